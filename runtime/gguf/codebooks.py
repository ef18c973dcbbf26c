"""The code books of the IQ formats, taken from the gguf package when a file needs one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=8)
def codebook(name: str) -> np.ndarray:
    """Code book of the format `name`: float32 [entries, 4 or 8 elements].

    Importing gguf takes a few tenths of a second, which only users of these formats pay.
    """
    from gguf import quants

    book = getattr(quants, name.upper())
    book.init_grid()
    return np.ascontiguousarray(book.grid[0, 0], np.float32)
