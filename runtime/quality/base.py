"""Base files: a model's log-probabilities of a text, in the format of llama-perplexity.

Little-endian: "_logits_"; int32 tokens of a window, vocabulary, windows; the int32 tokens of all
windows; then for each row that is scored (`Windows`) float32 scale, float32 least log-probability
and a uint16 code for each token of the vocabulary, with one more where their number is odd. A
log-probability is code * scale + least; what is more than 16 below the best has code 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtime.errors import FileError, OptionError
from runtime.outputs import appearing
from runtime.quality.rows import FLOOR, log_sums, parts
from runtime.quality.windows import Windows, bos_of
from runtime.units import counted_as

if TYPE_CHECKING:
    from runtime.model import Model

_MAGIC = b"_logits_"
_HEAD = 20  # bytes before the tokens
_SCALE, _CODES = 4, 65535  # codes that the scale and the least take the place of; the largest code
_ROUNDED = 0.05  # how far a log-probability may be from one that can be
_MOST = (FLOOR + _ROUNDED) / _CODES  # of scales


def _width(vocabulary: int) -> int:
    """uint16 numbers of a row."""
    return _SCALE + vocabulary + vocabulary % 2


class BaseFile:
    """A base file to compare with. Attributes: size, vocabulary, ids int32 [windows, size]."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """FileError for what is no base file, or not whole."""
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        head = self._file.read(_HEAD)
        if len(head) < _HEAD or not head.startswith(_MAGIC):
            raise FileError(
                f"{path} is no base file, which begins with {_MAGIC.decode()}: make one with "
                "'runtime perplexity MODEL -f TEXT --kl-base FILE'"
            )
        self.size, self.vocabulary, windows = np.frombuffer(head[8:], "<i4").tolist()
        rows = self.size - 1 - self.size // 2
        if min(rows, self.vocabulary, windows) < 1:
            raise FileError(
                f"{path}: its head says {windows} windows of {self.size} tokens and a vocabulary "
                f"of {self.vocabulary}: it is damaged"
            )
        self._row = 2 * _width(self.vocabulary)
        whole = _HEAD + windows * (4 * self.size + rows * self._row)
        nbytes = os.fstat(self._file.fileno()).st_size
        if nbytes != whole:
            raise FileError(
                f"{path}: a base of {counted_as(windows, 'window')} of {self.size} tokens and a "
                f"vocabulary of {self.vocabulary} has {whole} bytes, and the file {nbytes}: "
                + ("it is not whole" if nbytes < whole else "something else is behind it")
            )
        ids = np.frombuffer(self._read(_HEAD, 4 * windows * self.size), "<i4")
        self.ids = ids.reshape(windows, self.size)
        self._rows, self._data = rows, _HEAD + ids.nbytes

    def windows(self, model: Model, count: int | None) -> Windows:
        """Its first `count` windows, for a model to read; OptionError for another vocabulary."""
        if model.vocab_size != self.vocabulary:
            raise OptionError(
                f"{self.path} is of another model: its vocabulary has {self.vocabulary} tokens, "
                f"that of {model.file.path} {model.vocab_size}"
            )
        if self.ids.min() < 0 or self.ids.max() >= self.vocabulary:
            raise FileError(f"{self.path}: a token is outside the vocabulary: it is damaged")
        if self.size > model.context:
            raise OptionError(
                f"{self.path} has windows of {self.size} tokens, and the model's context is "
                f"{model.context}: load it with a larger one"
            )
        return Windows(self.ids[:count], bos_of(model.tokenizer))

    def check(self, windows: Windows) -> None:
        """OptionError unless windows of that size begin as its own."""
        same = min(len(windows), len(self.ids))
        differs = np.argwhere(windows.ids[:same] != self.ids[:same])
        if len(differs):
            window, place = differs[0].tolist()
            there, here = (ids[window, place] for ids in (self.ids, windows.ids))
            raise OptionError(
                f"{self.path} is of another text or tokenizer: token {place} of window "
                f"{window + 1} is {there} there and {here} here"
            )

    def rows(self, window: int, start: int, stop: int) -> np.ndarray:
        """uint16 [stop - start, codes]: rows of a window as they are kept; see `decoded`."""
        at = self._data + (window * self._rows + start) * self._row
        stored = np.frombuffer(self._read(at, (stop - start) * self._row), "<u2")
        stored = stored.reshape(stop - start, -1)
        scale, least = np.ascontiguousarray(stored[:, :_SCALE]).view("<f4").astype(float).T
        with np.errstate(invalid="ignore"):
            most = least + _CODES * scale  # what the most probable token has
        low = -np.log(self.vocabulary) - _ROUNDED
        bad = np.argwhere(~((scale >= 0) & (scale < _MOST) & (most > low) & (most < _ROUNDED)))
        if len(bad):
            row = int(bad[0, 0])
            raise FileError(
                f"{self.path}: window {window + 1}, row {start + row + 1}: a scale of "
                f"{scale[row]:g} from {least[row]:g} gives no log-probabilities: it is damaged"
            )
        return stored

    def decoded(self, stored: np.ndarray) -> np.ndarray:
        """float32 [rows, vocabulary] log-probabilities of rows as they are kept."""
        codes = stored[:, _SCALE : _SCALE + self.vocabulary].astype(np.float32)
        scale, least = np.ascontiguousarray(stored[:, :_SCALE]).view("<f4").T
        codes *= scale[:, None]
        codes += least[:, None]
        return codes

    def _read(self, at: int, nbytes: int) -> bytes:
        self._file.seek(at)
        data = self._file.read(nbytes)
        if len(data) < nbytes:
            raise FileError(f"{self.path}: it was cut short while it was read")
        return data

    def close(self) -> None:
        """It cannot be read afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def writing(
    path: str | os.PathLike[str], vocabulary: int, windows: Windows
) -> Iterator[Callable[..., None]]:
    """Write a base file, which is there once the block ends well; FileError when it cannot be.

    Yields a function of the next rows, float32 [rows, vocabulary], and of what does `map`, perhaps
    in threads.
    """
    head = np.array([windows.size, vocabulary, len(windows)], "<i4")
    with appearing(path) as file:
        file.write(_MAGIC + head.tobytes() + windows.ids.astype("<i4").tobytes())

        def add(logits: np.ndarray, mapped: Callable[..., Iterable[Any]] = map) -> None:
            for stored in mapped(lambda part: encoded(logits[part]), parts(*logits.shape)):
                file.write(stored)

        yield add


def encoded(logits: np.ndarray) -> np.ndarray:
    """uint16 [rows, codes] of float32 [rows, vocabulary], as a base file keeps them."""
    found = np.zeros((len(logits), _width(logits.shape[1])), "<u2")
    top = logits.max(1)
    low = np.maximum(logits.min(1), top - np.float32(FLOOR))
    scale = (top - low) / np.float32(_CODES)
    sums = (log_sums(logits) - top).astype(np.float32)
    found[:, :_SCALE] = np.stack([scale, low - top - sums], 1).astype("<f4").view("<u2")
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.rint((logits - low[:, None]) * inverse[:, None])
    found[:, _SCALE : _SCALE + logits.shape[1]] = codes.clip(0, _CODES)
    return found
