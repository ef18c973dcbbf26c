"""What the CUDA backend does, shown without a GPU: what tests reach, models decoded, launches.

    python scripts/show_cuda.py coverage             # kernels and forms that tests run, and where
    python scripts/show_cuda.py decode MODEL ...     # on the fake driver, beside the CPU
    python scripts/show_cuda.py launches MODEL ...   # of a decode step: one layer of each kind

MODEL is a GGUF file, by default the bundled one. Needs the extra `test`; kernels run in numpy or,
thread by thread, in the simulator.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import numpy_grid
from cuda_models import on_fake_cuda
from fake_driver import FakeDriver
from row_errors import row_errors

import runtime
from runtime.backends.cuda import simulator
from runtime.backends.cuda.catalogue import KERNELS, declared
from runtime.backends.layer_names import layer_of
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import WEIGHTS, Call
from runtime.model import Model
from runtime.ops.errors import Error

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "runtime" / "data" / "demo.gguf"
PLACES = ("numpy", "simulator")
PROMPT = 6  # tokens in one step, before those that are chosen
# what a kind of layer is called, by what the names of its kernels contain
KINDS = {"delta": "delta-net", "attention": "attention", "expert": "experts"}
CONSOLE = Console(width=None if sys.stdout.isatty() else 140)
BEFORE, BEHIND = "before the layers", "behind them"
READ = (*WEIGHTS, "state")  # memories of buffers that a listed launch is told by


class Launches:
    """How often each kernel of the catalogue ended a launch without an error, and where."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        """Patches what launches, so it comes before the tests are imported."""
        self.ran: dict[str, Counter[Kernel]] = {place: Counter() for place in PLACES}
        self._built: dict[int, tuple[Any, Kernel]] = {}
        build = KERNELS.build

        def kept(kernel: Kernel) -> Any:
            found = build(kernel)
            self._built[id(found)] = found, kernel
            return found

        patch.setattr(KERNELS, "build", kept)
        for place, module in zip(PLACES, (numpy_grid, simulator), strict=True):
            patch.setattr(module, "launch", self._counted(place, module.launch))

    def _counted(self, place: str, launch: Callable[..., None]) -> Callable[..., None]:
        def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
            launch(kernel, *arguments, **options)
            if id(kernel) in self._built:
                self.ran[place][self._built[id(kernel)][1]] += 1

        return counted


def coverage_table(ran: dict[str, Counter[Kernel]]) -> tuple[Table, list[str]]:
    """A row for each kernel of the catalogue, and the forms that ran nowhere."""
    forms: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in KERNELS.every():
        forms[kernel.name].append(kernel)
    table = Table("kernel", title="forms of kernels that ended without an error")
    for head in ("forms", *PLACES, "either", *(f"launches,\n{place}" for place in PLACES)):
        table.add_column(head, justify="right")
    missing, rows = list[str](), list[tuple[int, ...]]()
    for name, every in forms.items():
        found = [set(every) & set(ran[place]) for place in PLACES]
        either = found[0] | found[1]
        launches = (sum(ran[place][k] for k in every) for place in PLACES)
        rows.append((len(every), *map(len, found), len(either), *launches))
        table.add_row(name, *map(str, rows[-1]), style=None if either else "red")
        if not either:
            missing.append(f"{name}: no form ran")
            continue
        missing += [f"{k}: ran nowhere" for k in every if k not in either]
        missing += [f"{name}: in {PLACES[not n]} alone" for n in (0, 1) if not found[n]]
    table.add_section()
    table.add_row("all", *(str(sum(column)) for column in zip(*rows, strict=True)))
    return table, missing


def layers_of(calls: list[Call]) -> dict[str, list[Call]]:
    """Launches by the number of the layer that nodes are named after, and those before and behind.

    One without such a name, between two that have one, is of the layer of the later.
    """
    layers = [layer_of([call.node.name]) for call in calls]
    named = {i: str(layer) for i, layer in enumerate(layers) if layer is not None}
    start = min(named, default=len(calls))
    found = {BEFORE: calls[:start]}
    for i, layer in named.items():
        found.setdefault(layer, []).extend(calls[start : i + 1])
        start = i + 1
    return found | {BEHIND: calls[start:]}


def kinds_of(layers: dict[str, list[Call]]) -> dict[str, list[Call]]:
    """The first of those that have the same kernels, whatever the constants, by what it is."""
    alike: dict[frozenset[str], list[str]] = defaultdict(list)
    for name, calls in layers.items():
        alike[frozenset(c.kernel.name for c in calls)].append(name)
    return {_kind(kernels, names): layers[names[0]] for kernels, names in alike.items()}


def _kind(kernels: Iterable[str], names: list[str]) -> str:
    found = [word for part, word in KINDS.items() if part in " ".join(kernels)]
    where = f"layer {', '.join(names)}" if names[0].isdigit() else names[0]
    return f"{' + '.join(found)}: {where}" if found else where


def launch_table(title: str, calls: list[Call]) -> Table:
    """Kernel, blocks and threads of each launch, the op, and the weights and states it reads."""
    table = Table("", "kernel", "grid", "threads", "op", "weights and states", "writes")
    table.title, table.title_justify = f"{title}; launches: {len(calls)}", "left"
    for n, call in enumerate(calls, 1):
        grid = " x ".join(str(size) for size in call.grid)
        read = dict.fromkeys(b.key for b in call.reads if b.memory in READ)
        writes = dict.fromkeys(b.key for b in call.writes if b.memory in ("arena", "state"))
        kernel, threads = str(call.kernel), str(declared(call.kernel).entry.threads)
        table.add_row(str(n), kernel, grid, threads, call.node.op, "\n".join(read),
                      "\n".join(writes))  # fmt: skip
    return table


def _step(model: Model) -> dict[str, list[Call]]:
    return layers_of(model.backend.plan(model.graph(1)).calls())  # type: ignore[attr-defined]


def decoded(path: Path, tokens: int) -> list[str]:
    """A row of `decode`: a prompt, then the likeliest token of each step, by replayed graphs.

    The prompt is a golden model's own or else random.
    """
    driver = FakeDriver(quick=True)
    with on_fake_cuda(path, backend={"driver": driver}) as model, model.session() as session:
        layers = _step(model)
        ids = np.random.default_rng(0).integers(model.vocab_size, size=PROMPT).tolist()
        if (golden := path.parent / "golden.npz").exists():
            ids = np.load(golden)["p48_ids"][:PROMPT].tolist()
        rows = [*session.eval(ids)]
        for _ in range(tokens):
            ids.append(int(rows[-1].argmax()))
            rows.append(session.eval(ids[-1:])[0])
    replays = sum(call[0] == "graph" for call in driver.calls)
    counts = {layer: len(calls) for layer, calls in layers.items()}
    total, outside = sum(counts.values()), f"{counts.pop(BEFORE)} + {counts.pop(BEHIND)}"
    each = ", ".join(f"{n} x {launches}" for launches, n in Counter(counts.values()).items())
    errors = (_errors(path, ids, np.array(rows), devices) for devices in ("cpu", "reference"))
    return [f"{path.parent.name}/{path.stem}", str(total), each, outside, str(replays),
            " ".join(map(str, ids[PROMPT:])), *errors]  # fmt: skip


def _errors(path: Path, ids: list[int], found: np.ndarray, devices: str) -> str:
    with runtime.load(path, devices=devices, context=64, threads=1, progress=False) as model:
        wanted = model.eval(ids)
    errors, same = row_errors(found, wanted), found.argmax(1) == wanted.argmax(1)
    return f"{np.median(errors):.1e} {errors.max():.1e} {same.sum()}/{len(same)}"


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("tests", nargs=-1, type=click.Path(exists=True))
def coverage(tests: tuple[str, ...]) -> None:
    """Run TESTS (default: all of CUDA but those that launch nothing) and count what they launch.

    Form: a kernel with its constants. `CUDA_OPS=all` runs all ops' cases in the simulator.
    """
    files = tests or [str(p) for p in sorted((ROOT / "tests").glob("test_cuda_*.py"))
                      if p.stem != "test_cuda_gates"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        launches = Launches(patch)
        status = pytest.main(["-p", "no:cacheprovider", "--rootdir", str(ROOT), *files])
    table, missing = coverage_table(launches.ran)
    CONSOLE.print(table)
    print("\n".join(missing or ["every form ran, every kernel in both"]))
    sys.exit(int(status))


models = click.argument("models", nargs=-1, type=click.Path(exists=True, path_type=Path))


@main.command()
@models
@click.option(
    "-n",
    "--tokens",
    default=4,
    type=click.IntRange(0, 50),
    help="that are chosen, after a prompt of some",
)
def decode(models: tuple[Path, ...], tokens: int) -> None:
    """Decode with MODELS on the fake driver, beside the CPU and float64 numpy.

    Errors are the NMSE of the median and of the worst row of logits (a token that takes another
    expert, of two that are equally good, moves its row), and in how many rows the best is the same.
    """
    table = Table("model", "launches\na token", "layers x\nlaunches", "before +\nbehind",
                  "graphs\nreplayed", "tokens", "CPU: median,\nworst, same",
                  "float64: median,\nworst, same")  # fmt: skip
    for path in models or (DEMO,):
        table.add_row(*decoded(path, tokens))
    CONSOLE.print(table)


@main.command()
@models
def launches(models: tuple[Path, ...]) -> None:
    """List the launches of a decode step of MODELS: one layer of each kind, and what is of none."""
    for path in models or (DEMO,):
        with on_fake_cuda(path, backend={"execute": False, "quick": False}) as model:
            step = _step(model)
        print(f"{path}: layers: {len(step) - 2}, launches: {sum(map(len, step.values()))}\n")
        for label, calls in kinds_of(step).items():
            CONSOLE.print(launch_table(label, calls))


if __name__ == "__main__":
    try:
        main()
    except Error as error:
        sys.exit(f"error: {error}")
