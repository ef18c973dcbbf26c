"""A file to be quantised: what is read, what each tensor becomes, and what is said about it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from runtime.arguments import check_has_weights
from runtime.errors import FileError, OptionError
from runtime.gguf.reader import GGUFFile, open_gguf
from runtime.progress import Progress

from .choose import NONE, OUTER, Choice, Wishes, choose, needs_imatrix
from .imatrix_file import Imatrix, read
from .mixes import Facts, mix_of

_VERSION = 2  # of the block formats: general.quantization_version
_TYPE = "general.file_type"
_BETTER = "take the F16, BF16 or F32 file, or allow_requantize=True"
_MOST_TEXT = 127  # bytes of a path that llama-quantize keeps


@dataclass(frozen=True)
class Job:
    """Attributes: the open file, the tensors of the new one in their order, the metadata that is
    added, the importance of columns by tensor, and what a user should know (`notes`)."""

    file: GGUFFile
    choices: Sequence[Choice]
    metadata: Mapping[str, Any]
    importance: Mapping[str, np.ndarray]
    notes: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        """Of the tensors of the new file."""
        return sum(c.nbytes for c in self.choices)

    @property
    def weights(self) -> int:
        """How many numbers these tensors have."""
        return sum(prod(c.shape) for c in self.choices)

    def write(
        self, path: str | os.PathLike[str], threads: int | None = None,
        progress: bool | Progress | None = None,
    ) -> None:  # fmt: skip
        """Write the new file: see `write_quantised`."""
        from .write import write_quantised

        write_quantised(
            self.file, path, self.choices, self.metadata, self.importance, threads, progress
        )


def plan(
    src: str | os.PathLike[str], type: str, wishes: Wishes = NONE,
    imatrix: str | os.PathLike[str] | None = None, allow_requantize: bool = False,
    is_dry: bool = False,
) -> Job:  # fmt: skip
    """What quantising the file `src` to the mix `type` does; nothing is written.

    is_dry: what would stop the writing is a note. Else OptionError: a tensor is quantised already,
    or its type needs an importance matrix. FileError: the file, or the imatrix, cannot be used.
    """
    if wishes.keep_output and wishes.output:
        raise OptionError("leave_output_tensor and output_tensor_type exclude each other: give one")
    file = _model(src)
    found = read(imatrix) if imatrix is not None else None
    choices = choose(file.tensors, type, Facts.of(file.metadata), wishes, found is not None)
    notes = []
    metadata: dict[str, Any] = {"general.quantization_version": _VERSION}
    if type.upper() != "COPY":
        metadata[_TYPE] = mix_of(type).file_type
    elif _TYPE in file.metadata:
        metadata[_TYPE] = file.metadata[_TYPE]
    importance: dict[str, np.ndarray] = {}
    if imatrix is not None and found is not None:
        importance = importance_of(file, Path(imatrix), found)
        metadata |= _origin(imatrix, found)
        bare = [c.name for c in _changed(file, choices) if c.name not in {*importance, *OUTER}]
        if bare:
            notes.append(f"without data in the importance matrix: {_list(bare)}")
    missing, again = _missing(choices, type, importance), _requantised(file, choices)
    if missing and not is_dry:
        raise OptionError(f"{file.path}: {missing}")
    if again and not (is_dry or allow_requantize):
        raise OptionError(f"{file.path}: {again}; {_BETTER}")
    notes += filter(None, (missing, again))
    return Job(file, choices, metadata, importance, notes)


def _model(src: str | os.PathLike[str]) -> GGUFFile:
    """An open model; FileError for a file without weights, and for an importance matrix."""
    file = open_gguf(src)
    if file.get("general.type") == "imatrix":
        raise FileError(f"{file.path}: this is an importance matrix, not a model")
    check_has_weights(file)
    return file


def _changed(file: GGUFFile, choices: Sequence[Choice]) -> list[Choice]:
    return [c for c in choices if c.dtype is not file.tensors[c.name].dtype]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _missing(choices: Sequence[Choice], type: str, have: Mapping[str, Any]) -> str:
    needy = needs_imatrix([c for c in choices if c.name not in have], type)
    if needy is None:
        return ""
    return (
        f"{needy.dtype.name.upper()}, which {needy.name} gets, is of no use without an importance "
        "matrix: make one with `runtime imatrix` and give it with imatrix="
    )


def _requantised(file: GGUFFile, choices: Sequence[Choice]) -> str:
    names = [c.name for c in _changed(file, choices) if file.tensors[c.name].dtype.is_blocked]
    if not names:
        return ""
    return (
        f"tensor {names[0]} is {file.tensors[names[0]].dtype} already ({len(names)} in all): "
        "quantising again costs quality"
    )


def importance_of(file: GGUFFile, path: Path, imatrix: Imatrix) -> dict[str, np.ndarray]:
    """float32 [matrices, columns] by tensor; FileError: an imatrix of another model."""
    found = {}
    for name, entry in imatrix.entries.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            continue
        shape = int(np.prod(tensor.shape[:-2], dtype=int)), tensor.shape[-1]
        if entry.squares.size != shape[0] * shape[1]:
            raise FileError(
                f"{path}: this importance matrix is of another model: {name} has "
                f"{entry.squares.size} values there, and {shape[0]} x {shape[1]} columns in "
                f"{file.path}"
            )
        found[name] = entry.mean_squares.reshape(shape)
    if 2 * len(found) < len(imatrix.entries):
        absent = next(name for name in imatrix.entries if name not in found)
        raise FileError(
            f"{path}: this importance matrix is of another model: only {len(found)} of its "
            f"{len(imatrix.entries)} names are in {file.path}, {absent} is not"
        )
    return found


def _origin(path: str | os.PathLike[str], imatrix: Imatrix) -> dict[str, Any]:
    """Where the importance matrix comes from, in the keys that llama-quantize writes."""
    texts = {"file": os.fspath(path)} | dict(zip(("dataset",), imatrix.datasets, strict=False))
    cut = {key: os.fsencode(text)[:_MOST_TEXT] for key, text in texts.items()}
    counts = {"entries_count": len(imatrix.entries)}
    if imatrix.chunks > 0:
        counts["chunks_count"] = imatrix.chunks
    return {f"quantize.imatrix.{key}": value for key, value in (cut | counts).items()}
