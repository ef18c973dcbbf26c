"""Checks of what callers give: each is one clear line that names the option, and a plain value."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Mapping, Set
from numbers import Integral, Real
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import environment
from runtime.errors import FileError, OptionError
from runtime.ops.errors import shown
from runtime.ops.kv_formats import KV_FORMATS

_TEXTS = ("devices", "activations")
SPECULATION = ("auto", "off", "ngram", "draft", "mtp")


def wrong(name: str, value: Any, legal: str) -> OptionError:
    """The error for `name=value`, which must be `legal`."""
    return OptionError(f"{name}={shown(value)} must be {legal}")


def whole(name: str, value: Any, low: int, note: str = "", high: float = 2**63 - 1) -> int:
    """`value` as an int from `low` to `high`; numpy's are taken, booleans are not.

    note: what else the option takes, for the error text.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong(name, value, f"a whole number{note}")
    plain = int(value)
    if plain < low:
        raise wrong(name, value, f"at least {low}{note}")
    if plain > high:
        raise wrong(name, value, f"at most {high}")
    return plain


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a finite float from `low` to `high`; numpy's are taken, booleans are not."""
    legal = "a finite number"
    if high < math.inf:
        legal = f"a number from {low:g} to {high:g}"
    elif low > -math.inf:
        legal = f"a finite number of at least {low:g}"
    try:
        plain = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        plain = math.inf
    if isinstance(value, bool) or not math.isfinite(plain) or not low <= plain <= high:
        raise wrong(name, value, legal)
    return plain


def token_ids(ids: Any) -> list[int]:
    """Token ids as ints; OptionError for what is no list of whole numbers."""
    try:
        found = list(ids)
        unfit = type(ids) is not list and isinstance(ids, bytes | bytearray | Mapping | Set)
        if not unfit and bool not in map(type, found):
            return list(map(index, found))
    except TypeError:
        pass
    raise OptionError(
        f"token ids must be a list of whole numbers, got {shown(ids)}; "
        "text becomes ids with model.tokenizer.encode(text)"
    )


def flag(name: str, value: Any) -> bool:
    """`value`, which is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise wrong(name, value, "True or False")
    return bool(value)


def listed(name: str, value: Any, legal: str) -> list[Any]:
    """What an iterable other than text or a mapping holds; `legal` says what it has to be."""
    try:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise TypeError
        return list(value)
    except TypeError:  # of an array without axes too
        raise wrong(name, value, legal) from None


def check_function(name: str, value: Any, of: str) -> None:
    """OptionError for what is neither None nor callable; `of` says with what it is called."""
    if value is not None and not callable(value):
        raise wrong(name, value, f"a function of {of}")


def check_path(name: str, value: Any) -> None:
    """OptionError for what is neither None nor a str or os.PathLike."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise wrong(name, value, "the path of a .gguf file, as text or Path")


def file_path(name: str, value: Any) -> str | os.PathLike[str]:
    """`value`, which is the path of a file to read or write."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise wrong(name, value, "the path of a file, as text or Path")
    return value


def kv_types(value: Any) -> tuple[str, str]:
    """K and V types of "f16", "q8_0,f16" or "q8_0/f16"; OptionError lists what there is."""
    text = value if isinstance(value, str) else ",".join(map(str, value))
    kinds = [kind.strip().lower() for kind in text.replace("/", ",").split(",")]
    if len(kinds) > 2 or not set(kinds) <= set(KV_FORMATS):
        raise OptionError(
            f"kv_type={text!r} must be one of {', '.join(KV_FORMATS)}, or two of them for K and V "
            "apart, such as 'q8_0,f16'"
        )
    return kinds[0], kinds[-1]


def check_progress(value: Any) -> None:
    """OptionError for a `progress` that is not None, True, False or a function."""
    if value is not None and not isinstance(value, bool) and not callable(value):
        raise wrong("progress", value, "True, False or a function of (done, total, what)")


def check_spec(value: Any) -> str:
    """`spec` as text; OptionError for what there is not."""
    if not isinstance(value, str) or value not in SPECULATION:
        raise wrong("spec", value, f"one of {', '.join(SPECULATION)}")
    return str(value)


def check_load(path: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load` as plain values; OptionError for a type one cannot have.

    And for a variable of the environment that says nothing legal.
    path: a str or os.PathLike, or None. options: the other arguments of `load` by name; what a
    text or number may say is checked where it is used.
    """
    environment.check()
    check_path("path", path)
    named = options["devices"]
    if isinstance(named, list | tuple) and named and all(isinstance(n, str) for n in named):
        options = {**options, "devices": ",".join(named)}
    for name in _TEXTS:
        if not isinstance(options[name], str):
            raise wrong(name, options[name], "text")
    plain: dict[str, Any] = {"sequences": whole("sequences", options["sequences"], 1)}
    for name in ("context", "threads", "cache_bytes"):
        if options[name] is not None:
            plain[name] = whole(name, options[name], 1, ", or None for the default")
    if options["split_mode"] is not None and not isinstance(options["split_mode"], str):
        raise wrong("split_mode", options["split_mode"], "none, layer or tensor, as text")
    if options["main_device"] is not None:
        plain["main_device"] = whole("main_device", options["main_device"], 0, ", or None")
    layers = options["gpu_layers"]
    if layers is not None and not isinstance(layers, str):
        plain["gpu_layers"] = whole("gpu_layers", layers, -2, ", 'auto', 'all' or None")
    if not isinstance(options["cpu_moe"], bool | np.bool_):
        plain["cpu_moe"] = whole("cpu_moe", options["cpu_moe"], 0, ", or True for all layers")
    shares = options["tensor_split"]
    if shares is not None and not isinstance(shares, str):
        plain["tensor_split"] = listed("tensor_split", shares, "shares, such as '3,1' or [3, 1]")
    kv_type = options["kv_type"]
    pair = isinstance(kv_type, tuple | list) and all(isinstance(k, str) for k in kv_type)
    if not isinstance(kv_type, str) and not pair:
        raise wrong("kv_type", kv_type, "text such as 'f16', or 'q8_0,f16' for K and V apart")
    for name in ("cache_rotation", "graphs", "prompt_cache"):
        plain[name] = flag(name, options[name])
    plain["pack_cache"] = _pack_cache(options["pack_cache"])
    plain["spec"] = check_spec(options["spec"])
    plain |= _prompts_on_disk(options["cache_dir"], options["cache_disk"], plain["prompt_cache"])
    check_progress(options["progress"])
    return {**options, **plain}


def _pack_cache(value: Any) -> str:
    """Where packed weights are kept, as `PackCache` has it; "": nowhere."""
    if isinstance(value, bool | np.bool_) or value is None:
        return "folder" if value else ""
    if not isinstance(value, str) or value not in ("folder", "beside"):
        raise wrong("pack_cache", value, "True, False, 'folder' or 'beside'")
    return str(value)


def _prompts_on_disk(folder: Any, most: Any, cached: bool) -> dict[str, Any]:
    """Where prompts are kept on disk, and how many bytes of them."""
    if folder is None:
        if most is not None:
            raise OptionError("cache_disk is of the folder that cache_dir names; give that too")
        return {"cache_dir": None, "cache_disk": None}
    try:
        path = Path(file_path("cache_dir", folder)).expanduser().absolute()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        is_folder = True  # it will be
    except (OSError, RuntimeError, ValueError) as error:
        raise wrong("cache_dir", folder, f"a folder ({error})") from None
    if not is_folder:
        raise wrong("cache_dir", folder, "a folder, and this is a file")
    if not cached:
        raise OptionError("cache_dir keeps the cache of prompts, and prompt_cache=False is none")
    return {"cache_dir": path, "cache_disk": None if most is None else whole("cache_disk", most, 1)}


def check_has_weights(file: Any) -> None:
    """FileError for a file without tensors: a vocabulary alone, or metadata alone."""
    if file.tensors:
        return
    words = file.metadata.get("tokenizer.ggml.tokens")
    what = "metadata alone" if words is None else f"a vocabulary alone ({len(words)} tokens)"
    use = "" if words is None else "; runtime.Tokenizer.from_gguf reads such a file"
    raise FileError(f"{file.path}: the file holds {what} and no weights to run{use}")
