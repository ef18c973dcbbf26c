"""Entries of the kernel caches on disk: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def write_entry(cache: Path, path: Path, lines: Sequence[bytes]) -> bool:
    """Write `lines` to `path` inside `cache`; False, with a line on stderr, where it cannot be.

    Other processes see the old file or the new one: it is written beside and then renamed.
    """
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"\n".join(lines))
        temporary.replace(path)
    except OSError as error:
        print(
            f"runtime: cannot write the kernel cache {cache} ({error.strerror}); "
            "kernels are compiled again in each process",
            file=sys.stderr,
        )
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True
