"""`runtime bench`: prompt and decode speed, comparable with llama-bench.

A test is "pp N" (a prompt of N tokens), "tg N" (N single tokens) or both in a row, each after
`depth` tokens that are not timed. Every test is run once in short, untimed, and then
`repetitions` times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import click

from runtime.cli.bench_plan import UBATCH, Numbers, Pair, Setting, Test, settings, tests
from runtime.cli.bench_result import Result
from runtime.cli.model_path import load, model_file
from runtime.cli.options import (
    cache_types,
    device_arguments,
    precision_arguments,
    precision_options,
)
from runtime.cli.output import note
from runtime.cli.parsing import Command, F, option
from runtime.units import counted_as

_WATCHED = 32  # tokens between which idle time is looked for


def _numbers(names: str, least: int, text: str) -> Callable[[F], F]:
    """An option that takes lists of numbers and may be repeated."""
    return option(names, text, "Tests", type=Numbers(least), multiple=True)


@click.command(
    "bench",
    cls=Command,
    epilog="""\b
Examples:
  runtime bench model.gguf
  runtime bench model.gguf -p 128,512 -n 0 -t 1,2
  runtime bench model.gguf -p 64-1024*2 -n 64 -pg 512,128 -d 0,4096
  runtime bench model.gguf --kv-type q8_0 -o jsonl
  runtime bench model.gguf -p 128 -n 64 --parallel 1,4,16 --timeline requests.svg
  runtime bench model.gguf --devices cuda:0 --timeline step.svg
  runtime bench model.gguf -d 4096 --roofline roofline.svg
""",
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_numbers("-p --n-prompt", 0, "Lengths of prompts; 0 for none (512).")
@_numbers("-n --n-gen", 0, "Numbers of tokens to generate one by one; 0 for none (128).")
@option("-pg n_pg", "A prompt and a generation timed as one. May be repeated.", "Tests",
        type=Pair(), multiple=True)  # fmt: skip
@_numbers("-d --n-depth", 0, "Tokens that are in the cache before the test (0).")
@_numbers("-b --batch-size | --n-batch", 1, "Tokens of a prompt that are sent at once (2048).")
@_numbers("-ub --ubatch-size | --n-ubatch", 1, f"Tokens of one step, at most {UBATCH} ({UBATCH}).")
@_numbers("-t --threads", 1, "Threads (one per core).")
@option("-r --repetitions", "Times every test is timed.", "Tests", type=click.IntRange(1),
        default=5, show_default=True, metavar="N")  # fmt: skip
@option("--delay", "Wait before each test, for the processor to cool.", "Tests",
        type=click.FloatRange(0), default=0, metavar="SECONDS")  # fmt: skip
@option("--no-warmup", "Time without a run before.", "Tests", is_flag=True)
@option("-o --output", "Format of the table: md, json, jsonl, csv or sql.", "Tests", default="md",
        type=click.Choice(["md", "json", "jsonl", "csv", "sql"]), show_default=True,
        metavar="FORMAT")  # fmt: skip
@_numbers("--parallel", 1, "Answer so many requests at once, each with a prompt of -p and an "
          "answer of -n tokens, in llama-batched-bench's columns: 1,4,16.")  # fmt: skip
@option("--timeline", "Draw when each launch of one decode step runs on a GPU; with --parallel "
        "what each request does in each step (SVG).", "Tests",
        type=click.Path(dir_okay=False), metavar="FILE")  # fmt: skip
@option("--roofline", "Draw what bounds each phase on this machine's CPU (SVG): what memory and "
        "units give, and what decoding, also at depth (-d, or 2048), a prompt (-p, as long as one "
        f"step takes it: {UBATCH}) and 16 sequences reach of it.", "Tests",
        type=click.Path(dir_okay=False), metavar="FILE")  # fmt: skip
@option("-m --model more_models", "A model's file, as the argument MODEL.", "Model",
        multiple=True, metavar="FILE")  # fmt: skip
@precision_options
def command(
    models: tuple[str, ...], more_models: tuple[str, ...], output: str, **options: Any
) -> None:
    """Measure prompt and decode speed.

    The columns are llama-bench's. In addition decodes show bandwidth_share, the bytes that had
    to be read per second over what memory gives to as many threads, and prompts show GMAC/s; on a
    GPU shares are of a copy's bandwidth and of the tensor cores' int8 peak, measured once, and
    two columns of microseconds say how long it does nothing: gap_us between the launches of a
    token's step, on average, and idle_us between two steps, the median.
    Numbers may be lists and ranges: 128,512 or 1-8 or 1-8+2 or 16-128*2.
    """
    from runtime.cli.bench_output import FORMATS

    paths = [model_file(path) for path in (*models, *more_models)] or [None]
    chosen = tests(
        _flat(options["n_prompt"], 512), _flat(options["n_gen"], 128), options["n_pg"],
        _flat(options["n_depth"], 0),
    )  # fmt: skip
    if not chosen:
        raise click.UsageError("nothing to measure: give -p, -n or -pg more than 0")
    _check_pictures(paths, options)
    wanted = _settings(paths, options)
    if options["parallel"]:
        for line in _parallel(wanted, output, options):
            click.echo(line)
        return
    printer = FORMATS[output](wanted)
    for n, result in enumerate(_results(wanted, chosen, options)):
        for line in (*(printer.begin(result) if n == 0 else ()), *printer.row(result)):
            click.echo(line)
    for line in printer.end():
        click.echo(line)


def _check_pictures(paths: Sequence[str | None], options: dict[str, Any]) -> None:
    """FileError where a picture cannot be written; see `check_outputs`."""
    from runtime.outputs import check_outputs

    check_outputs((options["timeline"], options["roofline"]), [path for path in paths if path])


def _settings(paths: Sequence[str | None], options: dict[str, Any]) -> list[Setting]:
    """All that the options ask for, each test to be run with each of them."""
    types = cache_types(options)
    ubatches = _flat(options["ubatch_size"], UBATCH)
    if max(ubatches) > UBATCH:
        note(f"-ub: a step holds at most {UBATCH} tokens")
    batches, threads = _flat(options["batch_size"], 2048), _flat(options["threads"], None)
    devices = device_arguments(options)
    return list(settings(paths, batches, ubatches, types, threads, devices))


def _parallel(wanted: Sequence[Setting], output: str, options: dict[str, Any]) -> Iterator[str]:
    from runtime.cli import bench_parallel

    bench_parallel.check(options, output)
    counts = _flat(options["parallel"], 1)
    sizes = _flat(options["n_prompt"], 512), _flat(options["n_gen"], 128)
    if min(min(size) for size in sizes) < 1:
        raise click.UsageError("--parallel needs -p and -n of at least 1")
    load = precision_arguments(options)
    load |= {"context": max(sizes[0]) + max(sizes[1]), "sequences": max(counts)}
    with _Loader(load) as loader:
        yield from bench_parallel.lines(
            map(loader.model, wanted), counts, sizes, options["repetitions"], output,
            options["timeline"],
        )  # fmt: skip


def _results(
    wanted: Sequence[Setting], chosen: Sequence[Test], options: dict[str, Any]
) -> Iterator[Result]:
    from runtime.backends.base import Apart
    from runtime.cli import bench_roofline, bench_timeline

    load = precision_arguments(options)
    load["context"] = max(test.n_depth + test.tokens for test in chosen)
    deepest = max(test.n_depth for test in chosen)
    if options["roofline"]:
        prompt = min(max(test.n_prompt for test in chosen), UBATCH) or UBATCH
        load |= bench_roofline.sizes(load["context"], deepest)
    with _Loader(load) as loader:
        for setting in wanted:
            model = loader.model(setting)
            if options["timeline"]:
                bench_timeline.check(model)
            if options["roofline"]:
                bench_roofline.check(model)
            decodes = any(t.n_gen for t in chosen) and isinstance(model.backend, Apart)
            step = bench_timeline.step(model) if decodes or options["timeline"] else None
            bandwidth = _bandwidth(model) if any(t.n_gen for t in chosen) else None
            operations = _operations(model) if any(t.n_prompt for t in chosen) else None
            for test in chosen:
                note(f"{test.name}, {counted_as(model.threads, 'thread')} ...")
                time.sleep(options["delay"])
                result = Result(test, setting, model, bandwidth, operations, step and step.gap)
                result.seconds = _measure(result, options["repetitions"], not options["no_warmup"])
                result.idle = _idle(result)
                yield result
            if options["timeline"]:
                bench_timeline.draw(step, model, options["timeline"])
            if options["roofline"]:
                bench_roofline.draw(model, options["roofline"], deepest or None, prompt)


class _Loader:
    """One model at a time, loaded anew only where a setting needs it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._model: Any = None
        self._loaded: tuple[Any, ...] = ()

    def model(self, setting: Setting) -> Any:
        """The model of a setting."""
        if self._model is None or self._loaded != setting.loading:
            self.__exit__()
            types = setting.type_k, setting.type_v
            kv_type = types[0] if types[0] == types[1] else ",".join(types)
            self._model = load(
                setting.path, threads=setting.threads, kv_type=kv_type, progress=True,
                prompt_cache=False, **self._options,
            )  # fmt: skip
            self._loaded = setting.loading
        return self._model

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None


def _flat(lists: Sequence[tuple[int, ...]], default: Any) -> list[Any]:
    """The numbers of an option that may be repeated."""
    return [n for numbers in lists for n in numbers] or [default]


def _bandwidth(model: Any) -> float | None:
    from runtime.backends.base import Apart
    from runtime.cli.bandwidth import measured
    from runtime.errors import Error

    if isinstance(model.backend, Apart):
        return model.backend.bandwidth()
    if "cuda" in model.backend.name:  # several devices
        return None
    try:
        return measured(model.threads)
    except Error as error:
        note(f"bandwidth_share is left out: {error}")
        return None


def _operations(model: Any) -> float | None:
    """Of the int8 peak of the GPU that a model runs on."""
    from runtime.backends.base import Apart

    return model.backend.operations() if isinstance(model.backend, Apart) else None


def _measure(result: Result, repetitions: int, warmup: bool) -> list[float]:
    import numpy as np

    random = np.random.default_rng(1)
    if warmup:
        _time(result, Test(result.test.n_prompt, min(1, result.test.n_gen), 0), random)
    return [_time(result, result.test, random) for _ in range(repetitions)]


def _time(result: Result, test: Test, random: Any) -> float:
    """Seconds of one repetition in a fresh session."""
    with result.model.session() as session:
        if test.n_depth:
            session.eval(random_tokens(random, result.model, test.n_depth), logits="last")
        return timed(session, test, result.setting, random)


def _idle(result: Result) -> float | None:
    """Median seconds that a GPU waits between the steps of single tokens, of a short run more."""
    import numpy as np

    from runtime.backends.base import Apart

    test, model, random = result.test, result.model, np.random.default_rng(2)
    if test.n_gen < 2 or not isinstance(model.backend, Apart):
        return None
    with model.session() as session:
        if before := test.n_depth + test.n_prompt:
            session.eval(random_tokens(random, model, before), logits="last")
        with model.backend.idle() as seconds:
            timed(session, Test(0, min(test.n_gen, _WATCHED), 0), result.setting, random)
    return median(seconds)


def random_tokens(random: Any, model: Any, n: int) -> list[int]:
    """n token ids by a numpy generator."""
    return random.integers(0, model.vocab_size, n).tolist()


def timed(session: Any, test: Test, setting: Setting, random: Any) -> float:
    """Seconds that the tokens of a test take after those of a session."""
    pieces = list(_pieces(random_tokens(random, session.model, test.tokens), test, setting))
    start = time.perf_counter()
    for piece, logits in pieces:
        session.eval(piece, logits=logits)
    return time.perf_counter() - start


def _pieces(ids: list[int], test: Test, setting: Setting) -> Iterator[tuple[list[int], str]]:
    """What is evaluated at once, and which logits: those of the last token that is sent at once."""
    for start in range(0, test.n_prompt, setting.n_batch):
        end = min(start + setting.n_batch, test.n_prompt)
        for at in range(start, end, setting.n_ubatch):
            stop = min(at + setting.n_ubatch, end)
            yield ids[at:stop], "last" if stop == end else "none"
    for token in ids[test.n_prompt :]:
        yield [token], "last"
