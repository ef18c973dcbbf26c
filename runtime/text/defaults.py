"""Sampling that a model's file asks for: its `general.sampling.*` keys, under llama.cpp's names."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from runtime.ops.errors import OptionError, shown
from runtime.text.sampling import Sampling

_PREFIX = "general.sampling."
_OPTIONS = {
    **{"temp": "temperature", "penalty_repeat": "repeat_penalty", "sequence": "samplers"},
    **{name: name for name in ("top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold")},
    **{name: name for name in ("penalty_last_n", "mirostat", "mirostat_tau", "mirostat_eta")},
}


def file_defaults(metadata: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """Options of `Sampling` that the file sets, without those in `given`.

    Raises OptionError, which names the key, for a value that cannot be used. A key that nobody
    knows is told in a warning.
    """
    found = {}
    for key in metadata:
        if not key.startswith(_PREFIX):
            continue
        name = _OPTIONS.get(key.removeprefix(_PREFIX))
        if name is None:
            warnings.warn(f"the file's {key} = {shown(metadata[key])} is not used", stacklevel=2)
        elif name not in given:
            found[name] = _checked(key, name, metadata[key])
    return found


def _checked(key: str, name: str, value: Any) -> Any:
    """A number may be written as a text, and a whole one as a fraction, as llama.cpp takes it."""
    if isinstance(value, str) and name != "samplers":
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(getattr(Sampling, name), int) and isinstance(value, float) and value % 1 == 0:
        value = int(value)
    try:
        return getattr(Sampling(**{name: value}), name)
    except OptionError as error:
        raise OptionError(
            f"the file's {key} cannot be used: {error}; give {name} yourself"
        ) from None
