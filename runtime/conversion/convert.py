"""`runtime.convert`: a Hugging Face checkpoint to a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from runtime.arguments import check_progress, flag, wrong
from runtime.conversion.architectures import Conversion, conversion_of
from runtime.conversion.checkpoint import Checkpoint
from runtime.conversion.config import Config
from runtime.conversion.metadata import general, sizes
from runtime.conversion.pieces import Planned
from runtime.conversion.plan import OUTTYPES, Planner, dtype_of, guessed
from runtime.conversion.tokenizer import tokenizer_keys
from runtime.conversion.words import translated
from runtime.gguf.writer import NewTensor, write_gguf
from runtime.models.registry import build
from runtime.ops.dtypes import MXFP4, DType
from runtime.ops.errors import ModelError, OptionError, shown
from runtime.outputs import check_outputs, check_room
from runtime.progress import Progress, reporter

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_FILE_TYPE_MXFP4 = 38
_QUANTIZATION_VERSION = 2


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    outtype: str = "auto",
    *,
    mtp: bool = True,
    progress: bool | Progress | None = None,
) -> Path:
    """Write the checkpoint in `folder` as the GGUF file `out`; its path.

    The file is what llama.cpp's converter makes of the checkpoint. It appears when it is whole, in
    place of one that was there; no tensor is in memory as a whole on the way.

    outtype: the type of most matrices, "f32", "f16", "bf16", "q8_0", or "auto" for the
    checkpoint's. mtp: keep blocks that predict further tokens. progress: show a bar (None: when it
    takes long), or a function (done, total, what).

    Raises OptionError for an argument of another type or value, FileError for files that are
    missing or damaged and for an `out` that cannot be written or is a file of the checkpoint,
    ModelError for an architecture or setting that is not implemented, TextError for a tokenizer
    that is not. Each names the file.
    """
    for name, value in (("folder", folder), ("out", out)):
        if not isinstance(value, str | os.PathLike):
            raise wrong(name, value, "a path, as text or Path")
    if not isinstance(outtype, str):
        raise wrong("outtype", outtype, "text, such as 'f16'")
    mtp = flag("mtp", mtp)
    check_progress(progress)
    outtype = outtype.lower()
    if outtype not in ("auto", *OUTTYPES):
        raise OptionError(
            f"outtype {shown(outtype)} is not known; there are auto, {', '.join(OUTTYPES)}"
        )
    path = Path(out)
    check_outputs([out], folder=folder)
    checkpoint = Checkpoint(Path(folder))
    config = Config(checkpoint.config, checkpoint.folder / "config.json")
    dtype = guessed(checkpoint) if outtype == "auto" else OUTTYPES[outtype]
    conversion = conversion_of(config)
    metadata, tensors = _planned(checkpoint, config, conversion, dtype, mtp)
    try:
        _check(config, metadata, tensors, dtype)
    except ModelError as error:
        raise ModelError(translated(str(error), conversion, checkpoint.tensors)) from None
    with reporter(progress) as report:
        _write(path, metadata, tensors, dtype, report)
    return path


def _planned(
    checkpoint: Checkpoint, config: Config, conversion: Conversion, dtype: DType, mtp: bool
) -> tuple[dict[str, Any], list[Planned]]:
    """Metadata and tensors of the new file, in order."""
    planner = Planner(checkpoint, conversion, config, mtp)
    tensors = planner.plan()
    sampling = checkpoint.json("generation_config.json") or {}
    name = conversion.architecture
    metadata = general(name, checkpoint.folder.resolve().name, sampling, tensors)
    common = sizes(config, planner.blocks, conversion.windows)
    packed = any(tensor.dtype is MXFP4 for tensor in tensors) and dtype.name != "q8_0"
    metadata |= {f"{name}.{key}": value for key, value in common.items()}
    metadata["general.file_type"] = _FILE_TYPE_MXFP4 if packed else _FILE_TYPES[dtype.name]
    own = conversion.keys(config, planner.blocks)
    metadata |= {f"{name}.{key}": value for key, value in own.items()}
    metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    return metadata | tokenizer_keys(checkpoint, config, name == "llama"), tensors


def _check(
    config: Config, metadata: Mapping[str, Any], tensors: Sequence[Planned], dtype: DType
) -> None:
    """ModelError: the new file would not run here: settings or tensors are missing, or contradict
    each other."""
    arrays = {k: np.asarray(v) if isinstance(v, list) else v for k, v in metadata.items()}
    shapes = {
        t.name: SimpleNamespace(
            name=t.name, shape=t.shape, dtype=dtype_of(t, dtype),
            to_float32=partial(np.ones, t.shape, np.float32),
        )
        for t in tensors
    }  # fmt: skip
    told, table = config.size("vocab_size"), shapes.get("token_embd.weight")
    if table is not None and table.shape[0] != told:
        raise ModelError(
            f"{config.path}: vocab_size = {told}, but tensor '{table.name}' has {table.shape[0]} "
            "rows"
        )
    architecture = metadata["general.architecture"]
    build(SimpleNamespace(
        path=config.path.parent, metadata=arrays, tensors=shapes, architecture=architecture,
    ))  # fmt: skip


def _write(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[Planned], dtype: DType,
    report: Progress | None,
) -> None:  # fmt: skip
    from runtime.backends.cpu.quantising import Quantiser

    new = []
    with Quantiser() as quantise:
        for tensor in tensors:
            kind = dtype_of(tensor, dtype)
            chunks = partial(tensor.chunks, kind, quantise)
            new.append(NewTensor(tensor.name, tensor.shape, kind, chunks))
        check_room(path, sum(t.nbytes for t in new))
        write_gguf(path, metadata, new, _counter(report, sum(t.nbytes for t in new)))


def _counter(report: Progress | None, total: int) -> Callable[[int], None]:
    """What is told of every n bytes that were written."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if report is not None:
            report(done, total, "converting")

    return count
