"""The arguments of `runtime.load`, looked at before anything is opened or allocated."""

from __future__ import annotations

import os
from numbers import Integral
from typing import Any

from runtime.errors import FileError, OptionError

_TEXTS = ("devices", "activations")
_NUMBERS = ("context", "threads", "sequences")


def check_load(path: Any, options: dict[str, Any]) -> None:
    """OptionError, one line that names the argument, for a value of a type it cannot have.

    path: a str or os.PathLike, or None. options: the other arguments of `load` by name; what a
    text or number may say is checked where it is used.
    """
    if path is not None and not isinstance(path, str | os.PathLike):
        raise OptionError(f"path={path!r:.60} must be the path of a .gguf file, as text or Path")
    for name in _TEXTS:
        if not isinstance(options[name], str):
            raise _wrong(name, options[name], "text")
    for name in _NUMBERS:
        value = options[name]
        optional = name != "sequences"
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise _wrong(name, value, "a whole number" + optional * ", or None for the default")
        if value < 1:
            raise _wrong(name, value, "at least 1")
    kv_type = options["kv_type"]
    pair = isinstance(kv_type, tuple | list) and all(isinstance(k, str) for k in kv_type)
    if not isinstance(kv_type, str) and not pair:
        raise _wrong("kv_type", kv_type, "text such as 'f16', or 'q8_0,f16' for K and V apart")
    progress = options["progress"]
    if not isinstance(progress, bool) and not callable(progress):
        raise _wrong("progress", progress, "True, False or a function of (done, total, what)")


def check_has_weights(file: Any) -> None:
    """FileError for a file without tensors: a vocabulary alone, or metadata alone."""
    if file.tensors:
        return
    words = file.metadata.get("tokenizer.ggml.tokens")
    what = "metadata alone" if words is None else f"a vocabulary alone ({len(words)} tokens)"
    use = "" if words is None else "; runtime.Tokenizer.from_gguf reads such a file"
    raise FileError(f"{file.path}: the file holds {what} and no weights to run{use}")


def _wrong(name: str, value: Any, legal: str) -> OptionError:
    return OptionError(f"{name}={value!r:.60} must be {legal}")
