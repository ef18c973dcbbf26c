"""What `runtime bench` is to measure: lists of numbers, and the tests that follow from them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import click

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?:([+*])([0-9]{1,9}))?)?")
_MOST = 10_000  # values of one list

UBATCH = 512  # the most tokens that the engine takes in one step


class Numbers(click.ParamType):
    """Whole numbers and ranges with commas between them: "128,512", "1-8", "1-8+2", "16-128*2"."""

    name = "N[,N...]"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """The numbers in their order, of a text or of a default; fails below `least`."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(n for part in str(value).split(",") for n in _range(part))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if min(found) < self._least:
            self.fail(f"{min(found)} is less than {self._least}", param, ctx)
        return found


class Pair(click.ParamType):
    """A prompt's length and a number of tokens: "512,128"."""

    name = "P,N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """(prompt length, tokens) of a text or of a default."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
            self.fail(f"{value!r} is no prompt length and token count such as 512,128", param, ctx)
        return int(parts[0]), int(parts[1])


def _range(text: str) -> list[int]:
    """The numbers of "8", "1-8", "1-8+2" or "16-128*2"; ValueError says what is wrong."""
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no whole number or range such as 512, 1-8, 1-8+2, 16-128*2")
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    sign, step = match[3] or "+", int(match[4] or 1)
    if first > last or step < (2 if sign == "*" else 1) or (sign == "*" and not first):
        raise ValueError(f"the range {text!r} does not go up")
    found = []
    while first <= last:
        found.append(first)
        first = first * step if sign == "*" else first + step
        if len(found) > _MOST:
            raise ValueError(f"the range {text!r} has more than {_MOST} numbers")
    return found


@dataclass(frozen=True)
class Test:
    """What is timed: a prompt of `n_prompt` tokens, then `n_gen` single ones, after `n_depth`."""

    n_prompt: int
    n_gen: int
    n_depth: int

    __test__ = False  # no pytest class

    @property
    def name(self) -> str:
        """As llama-bench calls it: "pp512", "tg128 @ d1024", "pp512+tg128"."""
        parts = (f"pp{self.n_prompt}" * bool(self.n_prompt), f"tg{self.n_gen}" * bool(self.n_gen))
        kind = "+".join(part for part in parts if part)
        return f"{kind} @ d{self.n_depth}" if self.n_depth else kind

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen


@dataclass(frozen=True)
class Setting:
    """How a model is run: what is sent to it at once, and what it is loaded with."""

    path: str | None
    n_batch: int
    n_ubatch: int
    type_k: str
    type_v: str
    threads: int | None
    devices: str = "cpu"
    split_mode: str | None = None
    tensor_split: str | None = None
    main_device: int | None = None
    gpu_layers: str | None = None
    cpu_moe: bool | int = False

    @property
    def loading(self) -> tuple[Any, ...]:
        """What a model has to be loaded anew for."""
        return self.path, self.type_k, self.type_v, self.threads


def settings(
    paths: Sequence[str | None], batches: Sequence[int], ubatches: Sequence[int],
    types: tuple[Sequence[str], Sequence[str]], threads: Sequence[int | None],
    devices: Mapping[str, Any],
) -> Iterator[Setting]:  # fmt: skip
    """Every combination, in llama-bench's order: the threads change first, the model last.

    devices: the fields of Setting that say where a model is run, for all of them.
    """
    for path, batch, ubatch, k, v, n in product(paths, batches, ubatches, *types, threads):
        yield Setting(path, batch, min(ubatch, UBATCH), k, v, n, **devices)


def tests(
    n_prompt: Sequence[int], n_gen: Sequence[int], pairs: Sequence[tuple[int, int]],
    depths: Sequence[int],
) -> list[Test]:  # fmt: skip
    """Depth by depth: all prompts, all generations, all pairs of both."""
    found = []
    for depth in depths:
        found += [Test(p, 0, depth) for p in n_prompt if p]
        found += [Test(0, n, depth) for n in n_gen if n]
        found += [Test(p, n, depth) for p, n in pairs if p or n]
    return found
