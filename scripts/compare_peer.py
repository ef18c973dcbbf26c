"""Speed of this package against llama.cpp: same file, same run, in alternation.

Absolute figures move with the machine's load, so each repetition measures the peer and then us,
and the ratio is taken pair by pair. Both run in processes of their own; one works at a time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from runtime.gguf import GGUFFile, open_gguf
from runtime.ops.errors import Error

WORKER = Path(__file__).with_name("compare_worker.py")
SIDES = ("peer", "ours")
_BUSY = 0.7  # processes that want to run, on average over a minute


class Side:
    """A worker process and its protocol: one JSON line there, one back."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        try:
            self.process = subprocess.Popen(
                [python, str(WORKER), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise click.ClickException(
                f"{name}: cannot start {python} ({error.strerror})"
            ) from error

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; ClickException when the worker fails."""
        assert self.process.stdin and self.process.stdout, "both are pipes"
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            what = (
                f"ended with status {self.process.wait()} during {request.get('test', 'loading')}"
            )
            raise click.ClickException(f"{self.name}: the process {what}")
        reply = json.loads(line)
        if "error" in reply:
            raise click.ClickException(f"{self.name}: {' '.join(reply['error'].split())}")
        return reply

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin, "it is a pipe"
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def vocabulary_size(file: GGUFFile) -> int:
    """Number of tokens: rows of the embedding matrix."""
    if "token_embd.weight" not in file.tensors:
        raise click.ClickException(f"{file.path} has no token_embd.weight: not a language model")
    return file.tensors["token_embd.weight"].shape[0]


def introduce(side: Side, where: dict[str, Any], console: Console) -> dict[str, Any]:
    """Let a side load the model; what it says about itself, shown too."""
    about = side.ask(**where)
    head = f"{side.name}: {about['name']}, loaded in {about['seconds']:.1f} s"
    console.print(head, *about["details"], sep="\n  ", highlight=False)
    return about


def warn_if_busy(console: Console) -> None:
    """Say so when other programs are at work: threads that wait for one another suffer most."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY:
        console.print(
            f"the machine is busy (load {load:.1f}): figures and ratios mean little",
            style="yellow",
        )


def measure(
    sides: list[Side], tests: dict[str, list[int]], repetitions: int, console: Console
) -> dict[str, dict[str, list[float]]]:
    """tests maps a test to its token ids; tokens/s of every repetition as [test][side]."""
    speeds: dict[str, dict[str, list[float]]] = {t: {s.name: [] for s in sides} for t in tests}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(tests) * (repetitions + 1) * len(sides))
        for repetition in range(repetitions + 1):
            for test, ids in tests.items():
                for side in sides:
                    bar.update(task, description=f"{test} {side.name}")
                    seconds = side.ask(test=test, ids=ids)["seconds"]
                    if repetition:  # the first one warms caches and compiles
                        speeds[test][side.name].append(len(ids) / seconds)
                    bar.advance(task)
    return speeds


def summary(values: list[float]) -> dict[str, Any]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def evaluate(speeds: dict[str, dict[str, list[float]]], tests: dict[str, list[int]]) -> list[dict]:
    """One row a test: its tokens, speeds of each side, and the ratio of the pairs."""
    rows = []
    for test, by_side in speeds.items():
        row: dict[str, Any] = {"test": test, "tokens": len(tests[test])}
        row |= {name: summary(values) | {"all": values} for name, values in by_side.items()}
        if len(by_side) == 2:
            pairs = zip(by_side["ours"], by_side["peer"], strict=True)
            row["ratio"] = summary([ours / peer for ours, peer in pairs])
        rows.append(row)
    return rows


def draw(title: str, rows: list[dict[str, Any]], sides: list[Side]) -> Table:
    """The rows as a table."""
    table = Table(title=title, caption="tokens/s: median (min .. max)")
    table.add_column("test")
    for side in sides:
        table.add_column(side.name, justify="right")
    if len(sides) == 2:
        table.add_column("ours / peer", justify="right", style="bold")
    for row in rows:
        cells = [f"{row['test']} {row['tokens']}"]
        for key, digits in [(side.name, 1) for side in sides] + [("ratio", 2)]:
            if key in row:
                low, middle, high = (f"{row[key][k]:.{digits}f}" for k in ("min", "median", "max"))
                cells.append(f"{middle} ({low} .. {high})")
        table.add_row(*cells)
    return table


EPILOG = """
\b
Examples:
  python scripts/make_random_model.py qwen3-0.6b Q4_0 q4_0.gguf
  python scripts/compare_peer.py q4_0.gguf -t 2
  python scripts/compare_peer.py q4_0.gguf --peer-python /opt/llama/bin/python --json

\b
The peer is llama-cpp-python (pip install "graph-runtime[bench]"), driven as llama-bench drives
llama.cpp: prompts in one batch of up to 512, then single tokens, the cache emptied before each.
Ratios above 1 mean that this package is faster. Leave the machine alone while it runs.
"""


@click.command(
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-p", "--prompt", default=512, show_default=True, help="Prompt tokens; 0 skips it.")
@click.option("-n", "--decode", default=64, show_default=True, help="Decoded tokens; 0 skips it.")
@click.option(
    "-t", "--threads", default=os.cpu_count() or 1, show_default=True, help="Threads of each side."
)
@click.option("-r", "--repetitions", default=5, show_default=True, help="Measured pairs.")
@click.option("--only", type=click.Choice(SIDES), help="Measure one side alone.")
@click.option(
    "--peer-python", default=sys.executable, help="Interpreter that has llama-cpp-python."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with every single measurement.")
def main(
    file: Path,
    prompt: int,
    decode: int,
    threads: int,
    repetitions: int,
    only: str | None,
    peer_python: str,
    as_json: bool,
) -> None:
    """Measure prompt and decode speed of FILE (GGUF) here and in llama.cpp, and their ratio."""
    try:
        vocabulary = vocabulary_size(open_gguf(file))
    except Error as error:
        raise click.ClickException(str(error)) from error
    numbers = random.Random(0)
    tests = {
        test: [numbers.randrange(vocabulary) for _ in range(count)]
        for test, count in (("prompt", prompt), ("decode", decode))
        if count > 0
    }
    if not tests or repetitions < 1 or threads < 1:
        raise click.UsageError("nothing to measure: -p or -n, -r and -t must be at least 1")
    console = Console(stderr=True)
    warn_if_busy(console)
    pythons = {"peer": peer_python, "ours": sys.executable}
    sides: list[Side] = []
    try:
        sides += [Side(name, pythons[name]) for name in ([only] if only else SIDES)]
        where = {"path": str(file), "threads": threads, "context": max(prompt, decode) + 1}
        about = {side.name: introduce(side, where, console) for side in sides}
        rows = evaluate(measure(sides, tests, repetitions, console), tests)
    finally:
        for side in sides:
            side.close()
    if as_json:
        report = {"file": str(file), "threads": threads, "sides": about, "tests": rows}
        print(json.dumps(report, indent=2))
    else:
        out = Console()
        title = f"{file.name}, {threads} threads"
        (out if out.is_terminal else Console(width=110)).print(draw(title, rows, sides))


if __name__ == "__main__":
    main()
