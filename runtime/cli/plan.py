"""`runtime plan`: where a model would lie, whether it fits, and how fast it would be."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import click

from runtime.cli.model_path import model_file, model_option
from runtime.cli.options import kv_type
from runtime.cli.output import note
from runtime.cli.parsing import Command, Refused, option

_WHAT, _HOW, _SHOWN = "What", "Where", "Output"


@click.command(
    "plan",
    cls=Command,
    epilog="""\b
Examples:
  runtime plan qwen3.5-27b --devices cuda:24GB
  runtime plan llama-3.1-70b -c 32768 -ctk q4_0 -ctv q4_0 --devices "tensor(cuda:16GB,cuda:16GB)"
  runtime plan gpt-oss-120b --weights MXFP4_MOE --devices "layers(cuda:24GB,cuda:24GB,cpu)"
  runtime plan model.gguf --devices "tensor(cpu:0,cpu:1)" --svg plan.svg
""",
)
@click.argument("model", required=False)
@model_option
@option("--hparams", "Metadata alone in place of a model: a .json or .toml file of GGUF's keys.",
        _WHAT, metavar="FILE")  # fmt: skip
@option("--weights", "With metadata alone, the type of the weights, such as Q4_K_M or Q8_0.", _WHAT,
        metavar="TYPE")  # fmt: skip
@option("-c --context | --ctx-size", "Tokens of context (default: as many as fit).", _WHAT,
        type=click.IntRange(1), metavar="N")  # fmt: skip
@option("-np --sequences | --parallel", "Sequences of that context at once.", _WHAT, default=1,
        type=click.IntRange(1, 1024), metavar="N")  # fmt: skip
@option("--kv-type", "Type of the KV cache, or two for K and V apart (f16).", _WHAT,
        metavar="TYPE")  # fmt: skip
@option("-ctk --cache-type-k", "Type of K alone.", _WHAT, metavar="TYPE")
@option("-ctv --cache-type-v", "Type of V alone.", _WHAT, metavar="TYPE")
@option("--devices", "Devices with their memory: cuda:24GB, tensor(cuda:24GB,cuda:16GB), ...; or "
        "of this machine: cpu, numa, or two processes of MPI, tensor(mpi:2).", _HOW,
        default="cpu", metavar="EXPR", show_default=True)  # fmt: skip
@option("-sm --split-mode", "How to split over a bare list of devices: none, layer or tensor.",
        _HOW, metavar="MODE")  # fmt: skip
@option("-ts --tensor-split", "Shares of the devices, such as 3,1 (default: by memory).", _HOW,
        metavar="N,N,...")  # fmt: skip
@option("-mg --main-device | --main-gpu", "With --split-mode none, which device of the list.", _HOW,
        type=click.IntRange(0), metavar="N")  # fmt: skip
@option(
    "-ngl --gpu-layers | --n-gpu-layers",
    "How many of the last layers GPUs have, the output "
    "being one, and the CPU the others: a number, all, or auto.",
    _HOW,
    metavar="N",
)
@option("-cmoe --cpu-moe", "The experts of all layers are the CPU's.", _HOW, is_flag=True)
@option("-ncmoe --n-cpu-moe", "The experts of the first N layers are.", _HOW,
        type=click.IntRange(0), metavar="N")  # fmt: skip
@option("--bandwidth", "GB/s that each device reads, one for all or one each; of the CPU it is "
        "measured.", _HOW, metavar="N,N,...")  # fmt: skip
@option("--gmacs", "1e9 weights that each device multiplies per second, for the speed of prompts.",
        _HOW, metavar="N,N,...")  # fmt: skip
@option("--link", "GB/s between devices.", _HOW, type=float, metavar="N")
@option("--fit", "Choose what was not given (shares, KV type, context) so that it fits.", _HOW,
        is_flag=True)  # fmt: skip
@option(
    "-v --verbose", "Every op of each layer, and why weights are mirrored.", _SHOWN, is_flag=True
)
@option("--svg", "Draw the plan.", _SHOWN, metavar="FILE")
@option("--dot", "Write the graph for Graphviz.", _SHOWN, metavar="FILE")
@option("--json as_json", "Everything as JSON.", _SHOWN, is_flag=True)
def command(model: str | None, model_option: str | None, **options: Any) -> None:
    """Say whether a model fits on some devices, how it is split, and how fast it would be.

    No device is needed and no weight is read. MODEL may be a name of metadata that comes along:
    qwen3.5-27b, qwen3.5-35b-a3b, qwen3-coder-next-80b, gpt-oss-120b, llama-3.1-70b, llama-3.1-8b,
    qwen3-0.6b; with a type behind it (llama-3.1-8b-q8_0) or --weights.
    """
    from runtime.outputs import check_outputs
    from runtime.planning import fitted, would_fit
    from runtime.report import text

    file = _file(model if model is not None else model_option, options)
    check_outputs([options["svg"], options["dot"]], [file.path])
    given = _placement(file, options)
    chosen = given
    if options["fit"]:
        chosen = fitted(given, _own_kv(options) is None, _no_shares(options))
    link = None if options["link"] is None else 1e9 * options["link"]
    if link is not None and not 0 < link < math.inf:
        raise Refused(f"--link {options['link']:g}: give a number above 0")
    speed = chosen.speed(_bandwidths(chosen, options["bandwidth"]), link)
    rates = _each(chosen, "--gmacs", options["gmacs"])
    prompt = chosen.prompt_speed(lambda plan, device: rates.get(device))
    answer = text.answer(chosen, speed, [] if chosen.fits else list(would_fit(chosen)))
    if options["svg"]:
        from runtime.report.svg import draw

        _write(options["svg"], draw(chosen, answer))
    if options["dot"]:
        from runtime.report.dot import dot

        _write(options["dot"], dot(chosen))
    if options["as_json"]:
        from runtime.report.data import as_data

        click.echo(json.dumps(as_data(chosen, speed, prompt, answer), indent=1))
        return
    first = "\n".join([answer, *text.without_part(chosen)])
    parts = [first, text.heading(chosen), text.devices_table(chosen)]
    parts.append(text.speed_line(chosen, speed, prompt))
    if options["fit"]:
        parts.insert(1, text.changes(given, chosen))
    click.echo("\n\n".join([*parts, text.layers_text(chosen, options["verbose"])]))


def _file(model: str | None, options: dict[str, Any]) -> Any:
    """An open file, or one of metadata alone."""
    from runtime.gguf.reader import open_gguf
    from runtime.models import outline

    if options["hparams"]:
        if model is not None:
            raise click.UsageError("give a model or --hparams, not both")
        path = Path(options["hparams"])
        if path.suffix == ".gguf":
            return outline.of_file(open_gguf(path), options["weights"])
        return outline.read(path, options["weights"])
    if model is not None and not Path(model).is_file() and (found := outline.find(model)):
        path, weights = found
        return outline.read(path, options["weights"] or weights)
    if model is not None and not Path(model).exists():
        near = difflib.get_close_matches(Path(model).name.lower(), outline.known(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise Refused(
            f"{model}: there is no such file, and no metadata of that name comes along: {hint}"
            f"There is {', '.join(outline.known())}"
        )
    from runtime.model import demo_path

    file = open_gguf(model_file(model) or demo_path())
    return outline.of_file(file, options["weights"]) if options["weights"] else file


def _own_kv(options: dict[str, Any]) -> str | None:
    """The KV type that was asked for; None: none was."""
    names = ("kv_type", "cache_type_k", "cache_type_v")
    if all(options[name] is None for name in names):
        return None
    given = options["kv_type"]
    return kv_type({**options, "kv_type": "f16" if given is None else given})


def _no_shares(options: dict[str, Any]) -> bool:
    return options["tensor_split"] is None and "*" not in options["devices"]


def _placement(file: Any, options: dict[str, Any]) -> Any:
    from runtime.arguments import kv_types
    from runtime.backends.devices import count, usable_gpu
    from runtime.backends.meta.choices import chosen
    from runtime.backends.offload import offloaded
    from runtime.errors import OptionError
    from runtime.memory.budget import available_memory
    from runtime.planning import Model, Placement, balanced, by_memory

    try:
        stages = chosen(
            options["devices"], options["split_mode"], options["tensor_split"],
            options["main_device"], count,
        )  # fmt: skip
        host, moe = None, options["cpu_moe"] or options["n_cpu_moe"]
        if options["gpu_layers"] is not None or moe:
            stages, host = offloaded(
                options["devices"], stages, file, options["gpu_layers"], moe, usable_gpu,
                lambda device: device.nbytes or 0,
            )  # fmt: skip
        kinds = kv_types(_own_kv(options) or "f16")
    except OptionError as error:
        raise Refused(str(error)) from None
    free = _no_shares(options)
    placement = Placement(
        Model(file), by_memory(stages) if free else stages, kinds, options["context"],
        options["sequences"], available_memory(), host,
    )  # fmt: skip
    return balanced(placement) if free else placement


def _bandwidths(placement: Any, given: str | None) -> Any:
    """What tells the bandwidth of a device: as given, or measured of this machine's memory."""
    from runtime.backends.cpu.run.cores import physical_cores
    from runtime.backends.meta.planner import ON_CPU
    from runtime.cli.bandwidth import measured, remembered

    known = _each(placement, "--bandwidth", given)
    here = [device for device in placement.needs if device.kind in ON_CPU]
    types = _large_types(placement.model.file)

    @cache
    def of_cpu(threads: int, dtype: str) -> float:
        found = remembered(threads, dtype)
        if found is None:
            what = f"{dtype} weights are" if dtype else "memory is"
            note(f"measuring how fast {what} read, once a day ...")
            found = measured(threads, dtype)
        return found

    def of(plan: Any, device: Any, x: Any) -> float | None:
        if device in known or device.kind not in ON_CPU:
            return known.get(device)
        sharing = sum(d.kind in ON_CPU for d in plan.devices)
        threads = max(1, physical_cores() // len(here)) * sharing
        of_type = x.op == "weight" and x.dtype.name in types
        return of_cpu(threads, x.dtype.name if of_type else "") / sharing

    return of


def _large_types(file: Any) -> set[str]:
    """Types of matrices that hold more than 2 % of the weights."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.dtype.name] += tensor.nbytes
    return {name for name, nbytes in sizes.items() if nbytes > 0.02 * sizes.total()}


def _each(placement: Any, name: str, given: str | None) -> dict[Any, float]:
    """What an option says of each device, or of each that is no CPU where there are any, times 1e9.

    UsageError: neither one number above 0 nor as many as there are devices, or such devices.
    """
    from runtime.backends.meta.planner import ON_CPU

    if given is None:
        return {}
    devices = [d for d in placement.needs if d.kind not in ON_CPU] or [*placement.needs]
    parts = given.split(",") * (1 if "," in given else len(devices))
    if len(parts) == len(placement.needs):
        devices = [*placement.needs]
    try:
        numbers = [float(part) * 1e9 for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != len(devices) or not all(0 < n < math.inf for n in numbers):
        raise Refused(f"{name} {given}: give one number above 0, or {len(devices)}")
    return dict(zip(devices, numbers, strict=True))


def _write(path: str, content: str) -> None:
    from runtime.outputs import write_text

    write_text(path, content)
    note(f"wrote {path}")
