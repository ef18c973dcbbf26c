"""The weights of a file, as a model builder asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np

from runtime import ops
from runtime.errors import ModelError
from runtime.ops.cuts import Runs
from runtime.ops.tensor import Shape, Tensor

# What other converters (Ollama's) call a tensor of a block, tried where its usual name is missing.
_OTHER_NAMES = {
    "attn_output.weight": "attn_out.weight",
    "attn_output.bias": "attn_out.bias",
    "attn_sinks.weight": "attn_sinks",
    "post_attention_norm.weight": "ffn_norm.weight",
    "ssm_dt.bias": "ssm_dt",
}


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by name, checked against the shape a model expects.

    `looked_up` collects the names of tensors whose numbers were read while building.
    """

    tensors: Mapping[str, Any]  # name -> object with .shape and .dtype (runtime.gguf's tensors)
    source: str
    looked_up: set[str] = field(default_factory=set)
    _stored: dict[str, str] = field(default_factory=dict)
    _made: dict[Any, Tensor] = field(default_factory=dict)
    _values: dict[str, np.ndarray] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        """Whether the file has a tensor, under this name or another converter's."""
        return self.stored(name) in self.tensors

    def stored(self, name: str) -> str:
        """The name a tensor has in the file; `name` itself where it has none."""
        if name not in self._stored:
            self._stored[name] = self._find(name)
        return self._stored[name]

    def _find(self, name: str) -> str:
        if name in self.tensors or not name.startswith("blk."):
            return name
        blk, number, rest = name.split(".", 2)
        other = f"{blk}.{number}.{_OTHER_NAMES.get(rest)}"
        return other if other in self.tensors else name

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The weight `name` of `shape` (outermost first); ModelError if missing or different."""
        name = self.stored(name)
        if name not in self.tensors:
            hint = get_close_matches(name, self.tensors, 1)
            raise ModelError(
                f"{self.source}: tensor {name!r} is missing"
                + (f" (the file has {hint[0]!r})" if hint else "")
                + "; the file is incomplete or of another architecture"
            )
        have: Shape = tuple(self.tensors[name].shape)
        if have != shape and (1, *have) != shape:  # a matrix of one row may be stored as a vector
            raise ModelError(
                f"{self.source}: tensor {name!r} has shape {list(have)}, "
                f"but the hyperparameters ask for {list(shape)}"
            )
        if name not in self._made:
            self._made[name] = ops.weight(name, shape, self.tensors[name].dtype)
        return self._made[name]

    def rows(self, name: str, part: str, runs: Runs, *shape: int, axis: int = -2) -> Tensor:
        """These runs of rows of the matrix `name` of `shape`, in their order, called `part`.

        axis: -1 for the elements of a bias. Without runs the whole.
        """
        whole = self(name, *shape)
        if not runs:
            return whole
        if axis == -1 and whole.dtype.block > 1:
            raise ModelError(f"{self.source}: tensor {name!r} is {whole.dtype}, not a plain type")
        made = ops.weight(whole.name, shape, whole.dtype, {axis: runs}, part)
        return self._made.setdefault(made.content, made)

    def columns(self, name: str, part: str, run: tuple[int, int], *shape: int) -> Tensor:
        """Columns first..end-1 of the matrix `name` of `shape`, called `part`.

        ModelError where that would cut a block of a quantised matrix.
        """
        whole = self(name, *shape)
        if any(end % whole.dtype.block for end in run):
            raise ModelError(
                f"{self.source}: tensor {name!r} is {whole.dtype.name}, whose blocks of "
                f"{whole.dtype.block} cannot be cut at {run[0] or run[1]}"
            )
        made = ops.weight(whole.name, shape, whole.dtype, {-1: (run,)}, part)
        return self._made.setdefault(made.content, made)

    def optional(self, name: str, *shape: int) -> Tensor | None:
        """The weight, or None where the file has none."""
        return self(name, *shape) if name in self else None

    def values(self, name: str, *shape: int) -> np.ndarray | None:
        """The float32 numbers of a small tensor needed while building, or None."""
        if name not in self:
            return None
        stored = self(name, *shape).name
        self.looked_up.add(stored)
        if stored not in self._values:  # a graph made later must not need the file
            self._values[stored] = self.tensors[stored].to_float32()
        return self._values[stored]

    def number(self, name: str) -> float | None:
        """The one number of a tensor [1] needed while building, or None."""
        values = self.values(name, 1)
        return None if values is None else float(values.reshape(-1)[0])
