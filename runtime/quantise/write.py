"""Write a file whose tensors have other types, a few rows at a time.

What is in memory at once does not depend on the size of the file: rows of some megabytes, as they
are stored, as float32 and as they will be stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np

from runtime.backends.cpu.quantising import Quantiser
from runtime.gguf.header import Stored
from runtime.gguf.reader import GGUFFile, GGUFTensor
from runtime.gguf.writer import NewTensor, file_nbytes, write_gguf
from runtime.ops.dtypes import F32, nbytes_for
from runtime.ops.errors import FileError, OpError
from runtime.ops.quants import dequantize
from runtime.outputs import check_outputs, check_room
from runtime.progress import Progress, reporter

from .choose import Choice

_ELEMENTS = 4 << 20  # of the rows that are in memory at once: 16 MiB as float32
_COPIED = 16 << 20  # bytes that are copied at once
_OF_PARTS = ("split.no", "split.count", "split.tensors.count")
_OF_PLACES = "general.alignment"  # the new file's is the default


def write_quantised(
    file: GGUFFile, path: str | os.PathLike[str], choices: Sequence[Choice],
    metadata: Mapping[str, Any], importance: Mapping[str, np.ndarray] | None = None,
    threads: int | None = None, progress: bool | Progress | None = None,
) -> None:  # fmt: skip
    """Write `file` to `path` with the tensors, types and order of `choices`.

    metadata: keys that are added, or take the place of the file's. importance: float32
    [matrices, columns] by tensor, what errors in a column weigh; without an entry all weigh the
    same. The new file appears only when it is whole.

    FileError: the file cannot be read or written, there is no room for the new one, or a value
    is one that its type cannot hold. OptionError: a type that nothing can be quantised to.
    """
    check_outputs([path], file.paths)
    check_room(path, quantised_nbytes(file, choices, metadata))
    with Quantiser(threads) as quantiser, reporter(progress) as report:
        changed = {c.dtype for c in choices if c.dtype is not file.tensors[c.name].dtype}
        quantiser.prepare(sorted(changed, key=repr), report)
        tensors = [
            NewTensor(c.name, c.shape, c.dtype, partial(_chunks, file, c, importance, quantiser))
            for c in choices
        ]
        done, total = 0, sum(tensor.nbytes for tensor in tensors)

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if report:
                report(done, total, "quantising")

        write_gguf(path, _merged(file, metadata), tensors, advance)


def quantised_nbytes(
    file: GGUFFile, choices: Sequence[Choice], metadata: Mapping[str, Any]
) -> int:  # fmt: skip
    """Of the file that `write_quantised` makes of these, all together."""
    tensors = [NewTensor(c.name, c.shape, c.dtype, tuple) for c in choices]
    return file_nbytes(_merged(file, metadata), tensors)


def _merged(file: GGUFFile, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The file's metadata as it is stored, without what is of its parts; what is new comes last."""
    gone = {*_OF_PARTS, _OF_PLACES, *metadata}
    kept: dict[str, Stored] = file.stored_metadata()
    return {key: value for key, value in kept.items() if key not in gone} | dict(metadata)


def _chunks(
    file: GGUFFile, choice: Choice, importance: Mapping[str, np.ndarray] | None,
    quantiser: Quantiser,
) -> Iterator[np.ndarray]:  # fmt: skip
    """The stored bytes of a tensor of the new file."""
    tensor = file.tensors[choice.name]
    if choice.dtype is tensor.dtype:
        yield from _copied(tensor)
        return
    columns, rows = tensor.shape[-1], prod(tensor.shape[:-1])
    means = importance.get(choice.name) if importance else None
    matrices = [None] if means is None else list(np.ascontiguousarray(means, np.float32))
    slow = choice.dtype.name.startswith("iq")  # to search for: an interrupt waits for a piece
    step = max(1, _ELEMENTS // (8 if slow else 1) // max(1, columns))
    try:
        for i, weights in enumerate(matrices):
            n = rows // len(matrices)
            for values in _values(tensor, i * n, (i + 1) * n, step):
                yield quantiser(values, choice.dtype, weights)
    except OpError as error:
        raise FileError(f"{tensor.path}: tensor {tensor.name}: {error}") from error


def _values(tensor: GGUFTensor, first: int, end: int, step: int) -> Iterator[np.ndarray]:
    """Rows of a tensor as float32 [up to step, columns]."""
    for row in range(first, end, step):
        shape = min(step, end - row), tensor.shape[-1]
        nbytes = nbytes_for(tensor.dtype, shape)
        raw = tensor.read(row * nbytes // shape[0], np.empty(nbytes, np.uint8))
        plain = tensor.dtype is F32
        yield raw.view("<f4").reshape(shape) if plain else dequantize(raw, tensor.dtype, shape)


def _copied(tensor: GGUFTensor) -> Iterator[np.ndarray]:
    whole = _COPIED // tensor.dtype.nbytes * tensor.dtype.nbytes
    for start in range(0, tensor.nbytes, whole):
        yield tensor.read(start, np.empty(min(whole, tensor.nbytes - start), np.uint8))
