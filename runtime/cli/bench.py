"""`runtime bench`: prompt and decode speed, comparable with llama-bench.

A test is "pp N" (a prompt of N tokens in one go) or "tg N" (N single tokens), each after `depth`
tokens that are not timed. Every test runs once untimed and then `repetitions` times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import click
import numpy as np

from runtime.cli.options import precision_options
from runtime.cli.output import note


class NumberList(click.ParamType):
    """Whole numbers with commas between them: "128,512"."""

    name = "N[,N...]"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers such as 128,512", param, ctx)
        if min(numbers) < self._least:
            self.fail(f"{min(numbers)} is less than {self._least}", param, ctx)
        return numbers


@dataclass(frozen=True)
class Test:
    """What is timed: a prompt of `n_prompt` tokens, or `n_gen` single ones, after `n_depth`."""

    n_prompt: int
    n_gen: int
    n_depth: int

    __test__ = False  # no pytest class

    @property
    def name(self) -> str:
        """As llama-bench calls it: "pp512", "tg128 @ d1024"."""
        kind = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{kind} @ d{self.n_depth}" if self.n_depth else kind


@dataclass
class Result:
    """Seconds of every repetition, and what the model had to do for one token."""

    test: Test
    model: Any
    threads: int
    kv_types: tuple[str, str]
    bandwidth: float | None
    seconds: list[float] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of every repetition."""
        return [(self.test.n_prompt + self.test.n_gen) / s for s in self.seconds]

    @property
    def bandwidth_share(self) -> float | None:
        """Of a decode: bytes that its tokens had to read per second, over what memory gives."""
        if not self.test.n_gen or not self.bandwidth:
            return None
        return self._traffic().nbytes * mean(self.speeds) / self.bandwidth

    @property
    def gmac_per_s(self) -> float | None:
        """Of a prompt: 1e9 multiplications of weights per second."""
        if not self.test.n_prompt:
            return None
        return self._traffic().macs * mean(self.speeds) / 1e9

    def _traffic(self) -> Any:
        """What a token moves in the middle of the test."""
        from runtime import traffic

        context = self.test.n_depth + self.test.n_gen // 2
        return traffic.of_file(self.model.file, self.kv_types, context)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (divided by n - 1); 0 for one value."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1))


@click.command(
    "bench",
    epilog="""\b
Examples:
  runtime bench model.gguf
  runtime bench model.gguf -p 128,512 -n 0 -t 1,2
  runtime bench model.gguf -n 64 -d 0,4096 --kv-type q8_0 -o json
""",
)
@click.argument("models", nargs=-1, type=click.Path(), metavar="[MODEL]...")
@click.option(
    "-p",
    "--n-prompt",
    type=NumberList(0),
    default="512",
    show_default=True,
    help="Lengths of prompts; 0 for none.",
)
@click.option(
    "-n",
    "--n-gen",
    type=NumberList(0),
    default="128",
    show_default=True,
    help="Numbers of tokens to generate one by one; 0 for none.",
)
@click.option(
    "-d",
    "--n-depth",
    type=NumberList(0),
    default="0",
    show_default=True,
    help="Tokens that are in the cache before the test.",
)
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Times every test is timed.",
)
@click.option("-t", "--threads", type=NumberList(1), help="Threads (default: one per core).")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "json", "csv"]),
    default="md",
    show_default=True,
    help="Format of the table.",
)
@precision_options
@click.option("--no-warmup", is_flag=True, help="Time the first run too.")  # fmt: skip
def command(models: tuple[str, ...], output: str, **options: Any) -> None:
    """Measure prompt and decode speed.

    The columns are llama-bench's. In addition decodes show bandwidth_share, the bytes that had
    to be read per second over what memory gives to as many threads, and prompts show GMAC/s.
    """
    from runtime.cli.bench_output import FORMATS

    printer = FORMATS[output]()
    for result in _results(models or (None,), **options):
        for text in printer.row(result):
            click.echo(text)
    for text in printer.end():
        click.echo(text)


def _results(
    models: Sequence[str | None], n_prompt: tuple[int, ...], n_gen: tuple[int, ...],
    n_depth: tuple[int, ...], threads: tuple[int, ...] | None, repetitions: int,
    no_warmup: bool, **load: Any,
) -> Iterator[Result]:  # fmt: skip
    import runtime

    tests = [Test(p, 0, d) for d in n_depth for p in n_prompt if p]
    tests += [Test(0, n, d) for d in n_depth for n in n_gen if n]
    if not tests:
        raise click.UsageError("nothing to measure: give -p or -n more than 0")
    context = max(t.n_depth + t.n_prompt + t.n_gen for t in tests)
    for path in models:
        for n_threads in threads or (None,):
            model = runtime.load(path, threads=n_threads, context=context, progress=True, **load)
            try:
                bandwidth = _bandwidth(model.threads) if any(t.n_gen for t in tests) else None
                for test in tests:
                    note(f"{test.name}, {model.threads} threads ...")
                    result = Result(test, model, model.threads, model.kv_types, bandwidth)
                    result.seconds = _measure(model, test, repetitions, not no_warmup)
                    yield result
            finally:
                model.close()


def _bandwidth(threads: int) -> float | None:
    from runtime.backends.cpu.bandwidth import read_bandwidth
    from runtime.errors import Error

    try:
        return read_bandwidth(threads)
    except Error as error:
        note(f"bandwidth_share is left out: {error}")
        return None


def _measure(model: Any, test: Test, repetitions: int, warmup: bool) -> list[float]:
    random = np.random.default_rng(1)

    def tokens(n: int) -> list[int]:
        return random.integers(0, model.vocab_size, n).tolist()

    if warmup:
        _time(model, test, tokens)
    return [_time(model, test, tokens) for _ in range(repetitions)]


def _time(model: Any, test: Test, tokens: Callable[[int], list[int]]) -> float:
    """Seconds of one repetition in a fresh session."""
    with model.session() as session:
        if test.n_depth:
            session.eval(tokens(test.n_depth), logits="last")
        ids = tokens(test.n_prompt + test.n_gen)
        pieces = [ids] if test.n_prompt else [[i] for i in ids]
        start = time.perf_counter()
        for piece in pieces:
            session.eval(piece, logits="last")
        return time.perf_counter() - start
