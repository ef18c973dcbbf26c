"""`runtime.quantize`: a model's file with weights of other types."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.arguments import check_progress, flag, listed, whole, wrong
from runtime.errors import OptionError, TextError
from runtime.gguf.reader import open_gguf
from runtime.outputs import check_outputs
from runtime.progress import Progress

from .choose import Wishes
from .job import Job, plan

WINDOW, WINDOWS = 256, 4  # tokens, and how many windows of them a target is measured on


def quantize(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], type: str | None = None, *,
    target: str | float | None = None, text: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    tensor_types: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    output_tensor_type: str | None = None, token_embedding_type: str | None = None,
    pure: bool = False, leave_output_tensor: bool = False, allow_requantize: bool = False,
    threads: int | None = None, progress: bool | Progress | None = None,
) -> Job:  # fmt: skip
    """Write the model file `src` to `dst` with weights of a type or mix: "Q4_K_M", "Q8_0", "F16".

    Types per tensor are those that llama-quantize chooses. target: in place of a type, bits of a
    weight (4.5), the size of the file ("3.2GB") or a divergence ("kld=0.01"); each tensor gets the
    type that serves it best, as measured on `text` (stories that come with the package).

    imatrix: a file of column importance.
    tensor_types: patterns (regular expressions, searched for in names) with their types, before
    the mix; the first that is found counts. pure: the mix's base type everywhere.
    allow_requantize: also read weights that are quantised already. progress: True for a bar,
    False for none, None for one if it lasts, or a function (done, total, what).

    OptionError for a type or option that cannot be used, FileError where a file cannot be read or
    written, TextError for a text that is too short. `dst` appears only when it is whole.
    """
    for name, path in (("src", src), ("dst", dst), ("imatrix", imatrix)):
        needed = name != "imatrix" or path is not None
        if needed and (path == "" or not isinstance(path, str | os.PathLike)):
            raise wrong(name, path, "the path of a file, as text or Path")
    if (type is None) == (target is None):
        raise OptionError("give a type, such as 'Q8_0', or a target, such as 4.5")
    if text is not None and (target is None or not isinstance(text, str)):
        raise wrong("text", text, "what a target is measured on, as text")
    for name, value in (("type", type), ("output_tensor_type", output_tensor_type),
                        ("token_embedding_type", token_embedding_type)):  # fmt: skip
        if value is not None and not isinstance(value, str):
            raise wrong(name, value, "text, such as 'Q8_0'")
    check_progress(progress)
    wishes = Wishes(
        _pairs(tensor_types), output_tensor_type, token_embedding_type, flag("pure", pure),
        flag("leave_output_tensor", leave_output_tensor),
    )  # fmt: skip
    threads = None if threads is None else whole("threads", threads, 1)
    allowed = flag("allow_requantize", allow_requantize)
    check_outputs([dst], [src, imatrix])
    if type is not None:
        job = plan(src, type, wishes, imatrix, allowed)
    else:
        job = _aimed(src, dst, str(target), text, wishes, imatrix, allowed, threads, progress)
    job.write(dst, threads, progress)
    return job


def _aimed(src: Any, dst: Any, target: str, text: str | None, *more: Any) -> Job:
    from runtime.quality.windows import bundled_text
    from runtime.text.tokenizer import Tokenizer

    from .collect import windows
    from .target import Target, aim

    wishes, imatrix, allowed, threads, progress = more
    aimed, file = Target.of(target), open_gguf(src)
    check_outputs([dst], file.paths)
    text = bundled_text() if text is None else text
    found = windows(Tokenizer.from_gguf(file), text, WINDOW)[:WINDOWS]
    if not found:
        raise TextError(f"the text is shorter than {WINDOW} tokens: give a longer one")
    folder = Path(dst).parent
    return aim(src, aimed, found, wishes, imatrix, allowed, (), threads, progress, folder).job


def _pairs(given: Any) -> list[tuple[str, str]]:
    """Patterns with their types; OptionError for what is none."""
    legal = "a dict or pairs of a pattern and a type, as text"
    pairs = [*given.items()] if isinstance(given, Mapping) else listed("tensor_types", given, legal)
    if any(not isinstance(p, tuple | list) or [*map(type, p)] != [str, str] for p in pairs):
        raise wrong("tensor_types", given, legal)
    return [(pattern, dtype) for pattern, dtype in pairs]
