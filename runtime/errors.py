"""The exceptions of the package, for `except runtime.Error`."""

from runtime.ops.errors import (
    BackendError,
    Error,
    FileError,
    MemoryLimitError,
    ModelError,
    OpError,
    OptionError,
    TextError,
)

__all__ = [
    "BackendError",
    "Error",
    "FileError",
    "MemoryLimitError",
    "ModelError",
    "OpError",
    "OptionError",
    "TextError",
]
