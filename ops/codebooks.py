"""Where the code books of the IQ formats come from: data of 0.5 to 4 KiB each, not held here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import ModelError

_sources: list[Callable[[str], np.ndarray]] = []


def set_codebooks(source: Callable[[str], np.ndarray]) -> None:
    """Take code books from `source(format name) -> float32 [entries, group]`."""
    _sources[:] = [source]


def code_book(name: str) -> np.ndarray:
    """The book of a format (float32 [entries, group]); ModelError when there is no source."""
    if not _sources:
        raise ModelError(f"{name} needs its code book; import runtime.gguf, which provides it")
    return _sources[0](name)
