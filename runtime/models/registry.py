"""Architectures by the name a GGUF file gives: the only place that knows these names."""

from __future__ import annotations

from typing import Any, Protocol

from runtime import ops
from runtime.errors import ModelError
from runtime.models.decoder import Decoder, Hyperparameters, Variant
from runtime.models.keys import LARGEST, Keys
from runtime.models.step import Layers, Step, Weights


class Architecture(Protocol):
    """What the engine needs of a model."""

    @property
    def layers(self) -> Layers: ...

    @property
    def p(self) -> Any: ...

    @property
    def positions_per_token(self) -> int:
        """Columns of `step.positions`: 1, or 4 for M-RoPE (time, height, width, and one more)."""
        ...

    def graph(self, step: Step) -> ops.Graph: ...


VARIANTS: dict[str, Variant] = {
    "llama": Variant(rope_style="normal"),
    "qwen2": Variant(),
    "qwen3": Variant(qk_norm=True),
    "qwen3moe": Variant(qk_norm=True, experts=True),
}


def build(file: Any) -> Architecture:
    """The model of an open GGUF file; ModelError names an unknown architecture and the known."""
    name, source = file.architecture, str(file.path)
    if name not in VARIANTS:
        raise ModelError(
            f"{source}: architecture {name!r} is not supported; "
            f"supported are {', '.join(sorted(VARIANTS))}"
        )
    variant, keys = VARIANTS[name], Keys(file.metadata, name, source)
    weights = Weights(file.tensors, source)
    parameters = Hyperparameters.read(keys, vocabulary_size(file, keys), variant)
    return Decoder(parameters, weights, variant)


def vocabulary_size(file: Any, keys: Keys) -> int:
    """Rows of the embedding; the tensor is right where metadata and tensor differ."""
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{keys.source}: tensor 'token_embd.weight' is missing")
    rows = int(file.tensors["token_embd.weight"].shape[0])
    if not 1 <= rows <= LARGEST:
        raise ModelError(f"{keys.source}: tensor 'token_embd.weight' has {rows} rows")
    return rows
