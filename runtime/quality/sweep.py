"""Sweeps: one model in several variants, each measured against the first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from runtime.errors import FileError, OptionError
from runtime.progress import Progress
from runtime.quality.divergence import Estimate
from runtime.quality.perplexity import Perplexity, Soon, measured
from runtime.quality.rows import log_sums, parts
from runtime.quality.windows import Windows

if TYPE_CHECKING:
    from runtime.model import Model


class Variant(NamedTuple):
    """`nbytes`, and `bits` of a value, of what differs: a token's cache, or the file's weights.

    file: the name of the weights' own, where they are not made.
    """

    name: str
    nbytes: float
    bits: float
    load: Callable[[], Model]
    file: str = ""


class Row(NamedTuple):
    """A variant measured. speeds: tokens/s by test; perplexity.kl: from the first variant."""

    name: str
    nbytes: float
    bits: float
    perplexity: Perplexity
    speeds: dict[str, Estimate]
    file: str = ""


def sweep(
    variants: Sequence[Variant], text: str, size: int, count: int | None,
    speeds: Callable[[Model], Iterator[tuple[str, Estimate]]] | None = None, tests: int = 0,
    progress: Progress | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Each variant's row, in order; one model is loaded at a time.

    size, count: of windows. speeds: measures as many tests of a model, one by one. progress: of a
    variant, by its name. OptionError for a variant of another vocabulary.
    """
    with _Kept() as base:
        for variant in variants:

            def report(soon: Soon, timed: int = 0, name: str = variant.name) -> None:
                if progress is not None:
                    progress(soon.done + timed, soon.total + tests, name)

            with variant.load() as model:
                windows = Windows.of_text(model, text, size, count)
                first = base.begin(windows, model.vocab_size, variant.name)
                known, keep = (None, base.add) if first else (base, None)
                quality = measured(model, windows, report, known, keep)
                found: dict[str, Estimate] = {}
                for name, speed in speeds(model) if speeds is not None else ():
                    found[name] = speed
                    report(Soon(len(windows), len(windows)), len(found))
                yield Row(*variant[:3], quality, found, variant.file)


class _Kept:
    """The log-probabilities of the first variant, float32, in a file that nobody else sees."""

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile()
        self._windows: Windows | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, windows: Windows, vocabulary: int, name: str) -> bool:
        """Whether this is the first variant; OptionError for another one of another text."""
        if self._windows is None:
            self._windows, self._vocabulary = windows, vocabulary
            return True
        if vocabulary != self._vocabulary or not np.array_equal(windows.ids, self._windows.ids):
            raise OptionError(f"{name} has another vocabulary than the base: they are other models")
        return False

    def add(self, logits: np.ndarray, mapped: Callable[..., Iterable[Any]]) -> None:
        """The next rows."""

        def log_probabilities(part: slice) -> np.ndarray:
            x = logits[part]
            return x - log_sums(x)[:, None].astype(np.float32)

        try:
            for found in mapped(log_probabilities, parts(*logits.shape)):
                self._file.write(found)
        except OSError as error:
            raise FileError(
                f"{tempfile.gettempdir()}: no room for the base's logits ({error.strerror}): use "
                "fewer windows (--chunks)"
            ) from None

    def rows(self, window: int, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, vocabulary]."""
        assert self._windows is not None, "the first variant has been measured"
        self._file.seek(4 * self._vocabulary * (window * self._windows.rows + start))
        data = self._file.read(4 * self._vocabulary * (stop - start))
        return np.frombuffer(data, np.float32).reshape(stop - start, -1)

    def decoded(self, stored: np.ndarray) -> np.ndarray:
        """They are kept as they are."""
        return stored
