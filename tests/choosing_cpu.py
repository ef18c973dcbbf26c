"""A CPU backend that chooses tokens as a device would, for tests of what is begun ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from small_models import Sizes, write_model
from vocabularies import byte_pairs

import runtime
from runtime.backends.base import Choice, Program
from runtime.backends.cpu import CpuBackend
from runtime.model import Model
from runtime.text.samplers import filters
from runtime.text.samplers.candidates import Candidates, ordered, softmax

VOCABULARY = byte_pairs()


class ChoosingCpu(CpuBackend):
    """`log`: what was begun and waited for, in order; `broken`: the steps whose logits are NaN."""

    chooses = ahead = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.log: list[tuple[str, int]] = []
        self.broken: set[int] = set()
        self._last: dict[int, np.ndarray] = {}

    def begin(self, *_: Any) -> Sequence[Any]:
        """See `Choosing` in backends/base.py; nothing stands behind it here."""
        raise NotImplementedError

    def choose(
        self, program: Program, inputs: Mapping[str, np.ndarray], live: Mapping[str, int],
        choices: Sequence[Choice],
    ) -> Callable[[], np.ndarray]:  # fmt: skip
        """See `Choosing` in backends/base.py."""
        given = dict(inputs)
        if "tokens" not in given:
            given["tokens"] = np.maximum(self._last[id(program)], 0)
        logits = program.run(given, live)[0]
        found = np.array([chosen(*pair) for pair in zip(logits, choices, strict=True)], np.int32)
        number = sum(what == "begin" for what, _ in self.log)
        if number in self.broken:
            found[:] = -1
        self._last[id(program)] = found
        self.log.append(("begin", number))

        def tokens() -> np.ndarray:
            self.log.append(("wait", number))
            return found

        return tokens


def chosen(row: np.ndarray, choice: Choice) -> int:
    """The token of a row."""
    c = Candidates(row[: choice.columns])
    if choice.temperature == 0:
        return int(c.values.argmax())
    c = filters.top_k(c, choice.top_k)
    c = filters.top_p(c, choice.top_p) if choice.top_p < 1 else c
    c = filters.min_p(c, choice.min_p) if choice.min_p > 0 else c
    c = ordered(filters.temperature(c, choice.temperature))
    sums = softmax(c.values).cumsum()
    at = int(sums.searchsorted(choice.chance * sums[-1], side="right"))
    return int(c.ids[min(at, c.values.size - 1)])


def speaking(folder: Path, size: Sizes) -> Path:
    """A file of a small model with a vocabulary."""
    from dataclasses import replace

    size = replace(size, vocabulary=len(VOCABULARY["tokenizer.ggml.tokens"]))
    return write_model(folder / f"{size.architecture}.gguf", size, extra=VOCABULARY)


@contextmanager
def choosing(path: Path, choose: bool = True, **options: Any) -> Iterator[Model]:
    """A model on such a backend, or on a plain one."""

    def opened(_: str, file: Any, *__: Any, **___: Any) -> CpuBackend:
        return (ChoosingCpu if choose else CpuBackend)(file, 1)

    with patch("runtime.model.open_backend", opened), runtime.load(path, **options) as model:
        yield model
