"""Importance matrices: made by running a model over text, and added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from runtime.engine.batch import UBATCH
from runtime.errors import TextError
from runtime.model import Model
from runtime.ops.errors import FileError
from runtime.quality.windows import bos_of
from runtime.quantise.imatrix_file import Entry, Imatrix
from runtime.quantise.observe import Observer
from runtime.quantise.statistics import SCHEMA, statistics
from runtime.text.tokenizer import Tokenizer


def sequences(window: int) -> int:
    """How many windows of that many tokens `collect` evaluates together."""
    return max(1, UBATCH // window)


def windows(
    tokenizer: Tokenizer, text: str, size: int, parse_special: bool = False
) -> list[list[int]]:
    """A text in whole windows of tokens, each with the BOS that the vocabulary wants in place of
    its first; what is left over is dropped. One newline at the end of the text does not count.

    parse_special: control tokens written in the text are such. TextError: there is no vocabulary.
    """
    if not tokenizer.has_text:
        raise TextError("the model's file has no vocabulary")
    ids = tokenizer.encode(text.removesuffix("\n"), parse_special=parse_special)
    bos = bos_of(tokenizer)
    found = [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
    return found if bos is None else [[bos, *window[1:]] for window in found]


def collect(
    model: Model, windows: Sequence[Sequence[int]], output: bool = False
) -> Iterator[tuple[int, Callable[[], Imatrix]]]:
    """How many windows of tokens, of one length, are evaluated, and a function that gives what
    weights were multiplied with in them; whenever there are more.

    output: with the weight that makes the logits. The model has room for `sequences(length)`
    sequences of that length.
    """
    size = len(windows[0]) if windows else 1
    with Observer(model._engine, output) as observer:
        done = 0
        while done < len(windows):
            part = windows[done : done + sequences(size)]
            observer.add(part)
            done += len(part)
            yield done, partial(lambda n: Imatrix(entries_of(observer), (), n, size), done)


def entries_of(observer: Observer) -> dict[str, Entry]:
    """What was observed, as a file has it."""
    return {
        name: Entry(*(x.astype(np.float32) for x in (s.squares, s.counts, s.sums)))
        for name, s in observer.sums().items()
    }


def merged(parts: Iterable[tuple[str, Imatrix]], window: int) -> Imatrix:
    """The sums of several, each with what errors call it.

    window: tokens of each of the windows that .dat files count. FileError: they are not of models
    of one shape.
    """
    entries: dict[str, Entry] = {}
    datasets: list[str] = []
    chunks, size = 0, 0
    for source, part in parts:
        scale = 1 if part.chunk_tokens else window
        for name, entry in part.entries.items():
            entry = Entry(entry.squares * scale, entry.counts * scale, entry.sums)
            before = entries.get(name)
            entries[name] = entry if before is None else _sum(source, name, before, entry)
        datasets += part.datasets
        chunks, size = chunks + part.chunks, size or part.chunk_tokens
    return with_statistics(Imatrix(entries, datasets, chunks, size or window))


def with_statistics(imatrix: Imatrix) -> Imatrix:
    """With the statistics of every entry."""
    found = statistics(imatrix.entries)
    entries = {
        name: Entry(e.squares, e.counts, e.sums, found[name])
        for name, e in imatrix.entries.items()
    }  # fmt: skip
    return replace(imatrix, entries=entries, schema=SCHEMA)


def _sum(source: str, name: str, a: Entry, b: Entry) -> Entry:
    """A file that does not tell matrices apart counts the same rows for each."""
    few, many = sorted((a, b), key=lambda e: len(e.counts))
    shape = many.squares.shape
    if few.squares.size != many.squares.size or len(few.counts) not in (1, len(many.counts)):
        raise FileError(
            f"{source}: the entry of {name} is for another matrix: {few.squares.size} numbers, and "
            f"{many.squares.size} in what it is added to; importance matrices add up for one model"
        )
    sums = a.sums + b.sums if a.sums is not None and b.sums is not None else None
    squares = many.squares + few.squares.reshape(shape)
    return Entry(squares, many.counts + few.counts, sums)
