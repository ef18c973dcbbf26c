"""The environment variables this package reads, all of them, typed and checked.

| variable            | legal values                         | unset means                    |
| ------------------- | ------------------------------------ | ------------------------------ |
| `RUNTIME_CPU_ISA`   | a name of `CPU_ISAS`                 | the best the processor has     |
| `RUNTIME_CACHE_DIR` | a folder (made on first use)         | `graph-runtime`, user's caches |
| `DEBUG`             | 0 quiet, 1 plan summary, 2 a step's  | 0                              |
|                     | time and bytes, 3 every instruction  |                                |
|                     | and the plan, 4 the graph            |                                |
| `VALIDATE`          | 0, or 1: compare calls of plans with | 0                              |
|                     | the reference                        |                                |
| `RUNTIME_NCCL`      | bytes of the smallest sum over GPUs  | 1048576                        |
|                     | that NCCL makes; or off              |                                |

Values are read at every call, so a test or a notebook can change them. A malformed value raises
`OptionError` naming the variable and what is legal, when a model is loaded at the latest; an empty
value counts as unset.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from runtime.ops.errors import OptionError

CPU_ISAS = ("amx", "avx512vnni", "avx2", "arm_i8mm", "arm_dotprod", "generic")
DEBUG_LEVELS = range(5)
_FOLDER = "graph-runtime"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def cpu_isa() -> str | None:
    """The instruction set forced by `RUNTIME_CPU_ISA`, or None when the choice is free.

    Whether the processor can run it is the CPU backend's question, not this module's.
    Raises OptionError for a name that is not in `CPU_ISAS`.
    """
    value = _read("RUNTIME_CPU_ISA")
    if value is None:
        return None
    name = value.lower().replace("-", "_")
    if name not in CPU_ISAS:
        raise _illegal("RUNTIME_CPU_ISA", value, "one of " + ", ".join(CPU_ISAS))
    return name


def cache_dir() -> Path:
    """The folder for compiled kernels and caches; it is not created here.

    `RUNTIME_CACHE_DIR` wins; otherwise the platform's cache folder: `$XDG_CACHE_HOME` or
    `~/.cache` on Linux, `~/Library/Caches` on macOS, `%LOCALAPPDATA%` on Windows.
    Raises OptionError when the variable names something that is not a folder, or when no
    home folder can be found.
    """
    value = _read("RUNTIME_CACHE_DIR")
    if value is None:
        return _user_cache() / _FOLDER
    try:
        path = Path(value).expanduser()
        is_folder = path.is_dir() or not path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise _illegal("RUNTIME_CACHE_DIR", value, f"a folder ({error})") from None
    if not is_folder:
        raise _illegal("RUNTIME_CACHE_DIR", value, "a folder, and this is a file")
    return path.absolute()


def debug() -> int:
    """The `DEBUG` level, 0 to 4 (see the table above). Raises OptionError for anything else."""
    value = _read("DEBUG")
    if value is None:
        return 0
    if not value.isascii() or not value.isdigit() or int(value) not in DEBUG_LEVELS:
        raise _illegal("DEBUG", value, "a whole number from 0 to 4")
    return int(value)


def validate() -> bool:
    """Whether `VALIDATE` asks for every op to be compared with the reference.

    Raises OptionError for a value that is neither yes nor no.
    """
    value = (_read("VALIDATE") or "0").lower()
    if value not in _TRUE + _FALSE:
        raise _illegal("VALIDATE", value, "0 or 1")
    return value in _TRUE


def nccl_from(usual: int) -> int | None:
    """Bytes of the smallest sum that is NCCL's by `RUNTIME_NCCL`, else `usual`; None: none is.

    Raises OptionError for anything but a number above 0 or `off`.
    """
    value = _read("RUNTIME_NCCL")
    if value is None:
        return usual
    if value.lower() == "off":
        return None
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise _illegal("RUNTIME_NCCL", value, "a whole number of bytes, 1 or more, or off")
    return int(value)


def inspected() -> bool:
    """Whether steps are looked into: by `VALIDATE`, or by `DEBUG` from 2 on."""
    return validate() or debug() >= 2


def check() -> None:
    """OptionError for a malformed value, of folders apart, whether anything will read it or not."""
    for read in (cpu_isa, debug, validate, lambda: nccl_from(1)):
        read()


def _read(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _illegal(name: str, value: str, legal: str) -> OptionError:
    return OptionError(f"environment variable {name}={value!r} cannot be used: give {legal}")


def _user_cache() -> Path:
    if sys.platform == "win32":
        found = _read("LOCALAPPDATA")
        return Path(found) if found else _home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches"
    found = _read("XDG_CACHE_HOME")
    # The XDG specification says that relative paths are to be ignored.
    return Path(found) if found and Path(found).is_absolute() else _home() / ".cache"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise OptionError(
            "no home folder found for the kernel cache: set RUNTIME_CACHE_DIR to a folder"
        ) from None
