"""Perplexity of a text, and divergence from a base: what `Model.perplexity` and the command do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from runtime.arguments import check_function, file_path
from runtime.engine.advance import Piece
from runtime.errors import OptionError
from runtime.ops import PAGE
from runtime.outputs import check_outputs
from runtime.quality import rows
from runtime.quality.base import BaseFile, writing
from runtime.quality.divergence import Divergence, Estimate, divergence, mean
from runtime.quality.divergence import perplexity as estimate
from runtime.quality.rows import Scores
from runtime.quality.windows import SIZE, Windows, counted
from runtime.units import counted_as

if TYPE_CHECKING:
    from runtime.model import Model

_SLOTS = 2  # of recurrent state that a sequence takes while it is read once


class Perplexity(NamedTuple):
    """`value` +- `error`, of `tokens` scored in `windows` of `window` tokens; `kl`: from a base."""

    value: float
    error: float
    windows: int
    window: int
    tokens: int
    kl: Divergence | None = None

    def __str__(self) -> str:
        windows = f"{counted_as(self.windows, 'window')} of {self.window} tokens"
        value = Estimate(self.value, self.error).shown(4)
        found = f"perplexity {value} ({windows}, {self.tokens} of them scored)"
        return found if self.kl is None else f"{found}, {self.kl}"


class Soon(NamedTuple):
    """What is known after some windows: perplexity, and mean divergence from a base."""

    done: int
    total: int
    perplexity: Estimate = Estimate(0.0, 0.0)
    kld: Estimate | None = None


OnWindow = Callable[[Soon], Any]


class Base(Protocol):
    """Log-probabilities to compare with: kept rows of a window, and what they stand for."""

    def rows(self, window: int, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 of those that are scored."""

    def decoded(self, stored: np.ndarray) -> np.ndarray:
        """float32 [rows, vocabulary]."""


def perplexity(
    model: Model, text: Any, window: int | None, windows: int | None, kl_base: Any, kl: Any,
    on_window: OnWindow | None,
) -> Perplexity:  # fmt: skip
    """See `Model.perplexity`."""
    check_function("on_window", on_window, "what is known so far")
    windows = counted(windows)
    for name, path in (("kl_base", kl_base), ("kl", kl)):
        if path is not None:
            file_path(name, path)
    if kl is not None and kl_base is not None:
        raise OptionError("kl= compares with a base file and kl_base= writes one; give one of them")
    if kl is None and text is None:
        raise OptionError("there is no text; give one, or with kl= a base file, which has its own")
    if kl is None:
        cut = Windows.of_text(model, text, SIZE if window is None else window, windows)
        if kl_base is None:
            return measured(model, cut, on_window)
        check_outputs([kl_base], model.file.paths)
        with writing(kl_base, model.vocab_size, cut) as add:
            return measured(model, cut, on_window, keep=add)
    with BaseFile(kl) as base:
        cut = base.windows(model, windows)
        if window not in (None, base.size):
            raise OptionError(f"{base.path} has windows of {base.size} tokens, not {window}")
        if text is not None:
            own = Windows.of_text(model, text, base.size, windows)
            base.check(own)
            cut = min(cut, own, key=len)
        return measured(model, cut, on_window, base)


def measured(
    model: Model, windows: Windows, on_window: OnWindow | None = None, base: Base | None = None,
    keep: Callable[..., Any] | None = None,
) -> Perplexity:  # fmt: skip
    """Perplexity of windows; keep: takes all logits that are scored, rows in order, and a `map`."""
    found: list[Scores] = []
    done = 0
    with ThreadPoolExecutor(model.threads) as pool:
        for window, start, logits in _scored_rows(model, windows):
            if keep is not None:
                keep(logits, pool.map)
            wanted = windows.wanted(window)[start : start + len(logits)]
            found.append(_scores(pool, logits, wanted, base, window, start))
            if start + len(logits) == windows.rows:
                done += 1
                if on_window is not None:
                    on_window(_soon(done, len(windows), _joined(found), base is not None))
    scores = _joined(found)
    value = estimate(scores.nll)
    compared = divergence(scores) if base is not None else None
    return Perplexity(*value, len(windows), windows.size, len(scores.nll), compared)


def _scored_rows(model: Model, windows: Windows) -> Iterator[tuple[int, int, np.ndarray]]:
    """(window, first of its rows, logits float32 [rows, vocabulary]), in order.

    Small windows are read several in one step, large ones in several, so that no more logits are
    held than those of a step.
    """
    most, size = model._engine.most_tokens, windows.size - 1
    together = min(most // size, _room(model, windows.size)) or 1
    for first in range(0, len(windows), together):
        some = range(first, min(first + together, len(windows)))
        with ExitStack() as stack:
            sequences = [stack.enter_context(model._alone())._sequence for _ in some]
            for at in range(0, size, most):
                places = range(max(at, windows.first) - at, min(size - at, most))
                pieces = [
                    Piece(sequence, windows.given(n)[at : at + most], places, False, False)
                    for n, sequence in zip(some, sequences, strict=True)
                ]
                results = model._engine.run_all(pieces)
                for n, logits in zip(some, results, strict=True):
                    if len(logits):
                        yield n, max(0, at - windows.first), logits


def _room(model: Model, size: int) -> int:
    """How many sequences of that size the model's memory has room for."""
    memory = model.memory()
    found = memory.pages // -(-size // PAGE)
    return min(found, memory.slots // _SLOTS) if memory.slots else found


def _scores(
    pool: ThreadPoolExecutor, logits: np.ndarray, wanted: np.ndarray, base: Base | None,
    window: int, start: int,
) -> Scores:  # fmt: skip
    stored = None if base is None else base.rows(window, start, start + len(logits))

    def scored(part: slice) -> Scores:
        known = None if base is None or stored is None else base.decoded(stored[part])
        return rows.scores(logits[part], wanted[part], known)

    return _joined([*pool.map(scored, rows.parts(*logits.shape))])


def _joined(scores: list[Scores]) -> Scores:
    return Scores(*map(np.concatenate, zip(*scores, strict=True)))


def _soon(done: int, total: int, scores: Scores, compared: bool) -> Soon:
    return Soon(done, total, estimate(scores.nll), mean(scores.kld) if compared else None)
