"""Checkpoints that are quantised already: which of them are read, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.conversion.checkpoint import Checkpoint, Stored
from runtime.conversion.config import Config
from runtime.conversion.pieces import Scaled
from runtime.ops.errors import ModelError, shown

_READ = ("fp8", "mxfp4")


def joined(checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    """The tensors by name, 8-bit ones together with their scales. ModelError: another method."""
    found: dict[str, Any] = dict(checkpoint.tensors)
    told = config.get("quantization_config", {})
    if not isinstance(told, Mapping):
        raise ModelError(f"{config.path}: quantization_config = {shown(told)} is not an object")
    method = str(told.get("quant_method") or "")
    if checkpoint.json("hf_quant_config.json"):
        method = method or "modelopt"
    if method and method not in _READ:
        raise ModelError(
            f"{config.path}: a checkpoint quantised with {method!r} is not converted (those in "
            "mxfp4, and in fp8 with scales of blocks, are); give the original in bf16, f16 or f32"
        )
    for name in [n for n in found if n.endswith(".weight_scale_inv")]:
        codes, scales = found.get(name.removesuffix("_scale_inv")), found.pop(name)
        found[name.removesuffix("_scale_inv")] = _scaled(codes, scales, told)
    return found


def _scaled(codes: Stored | None, scales: Stored, told: Mapping[str, Any]) -> Scaled:
    block = told.get("weight_block_size")
    if not (isinstance(block, list) and all(type(n) is int and n > 0 for n in block)):
        block = []
    if codes is not None and codes.kind == "F8_E4M3" and len(codes.shape) == len(block) == 2:
        rows, columns = block
        if scales.shape == (-(-codes.shape[0] // rows), -(-codes.shape[1] // columns)):
            return Scaled(codes, scales, (rows, columns))
    raise ModelError(f"{scales.label} is not that of an fp8 matrix in blocks (weight_block_size)")
