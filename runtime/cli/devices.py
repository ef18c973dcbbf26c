"""`runtime devices`: what this machine can run models on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import click

from runtime.cli.output import note, size, table
from runtime.cli.parsing import THREADS, Command, option


@click.command(
    "devices",
    cls=Command,
    epilog="""\b
Examples:
  runtime devices
  runtime devices --bandwidth      also measure how fast memory is read
""",
)
@option("-b --bandwidth", "Measure memory bandwidth (1 GiB, seconds).", "Options", is_flag=True)
@option("-t --threads", "Threads for the measurement (default: one per core).", "Options",
        type=THREADS, metavar="N")  # fmt: skip
@option("--json as_json", "As JSON.", "Options", is_flag=True)
def command(bandwidth: bool, threads: int | None, as_json: bool) -> None:
    """Show the processor, the instruction sets kernels are compiled for, memory, and GPUs."""
    found, cuda = _cpu(), _cuda()
    if bandwidth:
        from runtime.cli.bandwidth import measured

        note("measuring memory bandwidth ...")
        found["read_bandwidth"] = measured(threads or found["physical_cores"])
    if as_json:
        click.echo(json.dumps({"cpu": found, "cuda": cuda}, indent=1))
        return
    rows = [*_rows(found), *_gpu_rows(cuda), *_example_rows(bool(cuda["devices"]))]
    click.echo(table(rows, ("device", "what", "value")))


def _cpu() -> dict[str, Any]:
    from runtime.backends.cpu.compile import isa
    from runtime.backends.cpu.run.cores import cpu_name, numa_nodes, physical_cores
    from runtime.backends.environment import cache_dir
    from runtime.memory.budget import available_memory

    return {
        "name": cpu_name(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "numa_nodes": [sorted(node) for node in numa_nodes()],
        "isa_available": list(isa.available()),
        "isa_selected": isa.selected(),
        "memory_total": _total_memory(),
        "memory_available": available_memory(),
        "cache_dir": str(cache_dir()),
    }


def _cuda() -> dict[str, Any]:
    from runtime.backends.cuda.found import described

    return described()


def _gpu_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """GPUs, their driver, and why one cannot be used."""
    if not found["devices"]:
        return [("cuda", "none", found["problem"])]
    rows = []
    for gpu in found["devices"]:
        memory = f"{size(gpu['memory_total'])} in all"
        if gpu["memory_free"] is not None:
            memory += f", {size(gpu['memory_free'])} free"
        target = f", kernels for {gpu['target']}" if gpu["target"] else ""
        rows += [
            (gpu["device"], "GPU", f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors"),
            ("", "capability", f"{gpu['capability']}{target}"),
            ("", "memory", memory),
        ]
        if gpu["problem"]:
            rows.append(("", "not usable", gpu["problem"]))
    if found["nccl"]:
        version, problem = found["nccl"]["version"], found["nccl"]["problem"]
        rows.append(("", "large sums", f"NCCL {version}" if version else f"own: {problem}"))
    version = f"{found['driver']}, " if found["driver"] else ""
    return [*rows, ("", "driver", f"{version}supports CUDA {found['cuda']}")]


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    memory = [
        f"{size(n)} {word}"
        for word, n in (("in all", found["memory_total"]), ("free", found["memory_available"]))
        if n is not None
    ]
    others = [name for name in found["isa_available"] if name != found["isa_selected"]]
    rows = [
        ("cpu", "processor", found["name"]),
        ("", "cores", f"{found['physical_cores']} physical, {found['logical_cores']} logical"),
        *_nodes(found["numa_nodes"]),
        ("", "instruction set", f"{found['isa_selected']} (also: {', '.join(others) or 'none'})"),
        ("", "memory", ", ".join(memory) or "not known"),
        ("", "kernel cache", found["cache_dir"]),
    ]
    if "read_bandwidth" in found:
        rows.append(("", "bandwidth", f"{found['read_bandwidth'] / 1e9:.1f} GB/s read"))
    return rows


def _example_rows(gpu: bool) -> list[tuple[str, str, str]]:
    """What `--devices` takes."""
    examples = [*_GPU_EXAMPLES * gpu, *_EXAMPLES]
    return [("--devices" * (n == 0), *example) for n, example in enumerate(examples)]


_GPU_EXAMPLES = (("a GPU", "cuda:0"), ("a GPU, or else the CPU", "auto"))
_EXAMPLES = (
    ("all cores", "cpu"),
    ("parts of tensors", "tensor(cpu:0,cpu:1)"),
    ("some layers each", "layers(3*cpu:0,cpu:1)"),
    ("NUMA nodes", "tensor(numa)"),
    ("nested", "layers(tensor(cpu:0,cpu:1),cpu:2)"),
)


def _nodes(nodes: Sequence[Sequence[int]]) -> list[tuple[str, str, str]]:
    """One row for each NUMA node with its processors, where there are several."""
    if len(nodes) < 2:
        return [("", "NUMA nodes", str(len(nodes) or "not known"))]
    return [("", f"NUMA node {n}", f"processors {_runs(node)}") for n, node in enumerate(nodes)]


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers as the system lists them: "0-3,8-11"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
