"""Architectures by the name a GGUF file gives: the only place that knows these names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from runtime import ops
from runtime.errors import ModelError
from runtime.models.keys import LARGEST, Keys
from runtime.models.step import Layers, Step
from runtime.models.unread import refuse_unread
from runtime.models.weights import Weights


class Architecture(Protocol):
    """What the engine needs of a model."""

    @property
    def layers(self) -> Layers:
        """How many layers keep what: the shapes of the caches follow from it."""

    @property
    def p(self) -> Any:
        """The hyperparameters read from the file, a frozen dataclass."""

    @property
    def positions_per_token(self) -> int:
        """Columns of `step.positions`: 1, or 4 for M-RoPE (time, height, width, and one more)."""
        ...

    def graph(self, step: Step) -> ops.Graph:
        """Logits [output rows, vocabulary] of a step of the given capacities."""


@runtime_checkable
class Predicting(Architecture, Protocol):
    """A model whose files may have a block that predicts further tokens.

    `predictor` is there where it is used; then a step gives [output rows, hidden] beside logits.
    """

    predictor: NextN | None

    def predicting(self) -> Self:
        """The same with that block in use; ModelError where its form is not known."""


if TYPE_CHECKING:
    from runtime.models.nextn import NextN

Reader = Callable[[Keys, Weights, int], Architecture]  # of a file with so large a vocabulary


def _decoder(**variant: Any) -> Reader:
    def read(keys: Keys, w: Weights, vocabulary: int) -> Architecture:
        from runtime.models.decoder import Decoder, Variant

        return Decoder.read(keys, w, vocabulary, Variant(**variant))

    return read


def _hybrid(order: str, experts: bool = False) -> Reader:
    def read(keys: Keys, w: Weights, vocabulary: int) -> Architecture:
        from runtime.models.hybrid import Hybrid, Variant

        return Hybrid.read(keys, w, vocabulary, Variant(order, experts))

    return read


def _gpt_oss(keys: Keys, w: Weights, vocabulary: int) -> Architecture:
    from runtime.models.gpt_oss import GptOss

    return GptOss.read(keys, w, vocabulary)


# A family is imported with the first file of it.
MODELS: dict[str, Reader] = {
    "llama": _decoder(rope_style="normal"),
    "qwen2": _decoder(output_bias=True),
    "qwen3": _decoder(qk_norm=True),
    "qwen3moe": _decoder(qk_norm=True, experts=True),
    "qwen3next": _hybrid("grouped", experts=True),
    "qwen35": _hybrid("tiled"),
    "qwen35moe": _hybrid("tiled", experts=True),
    "gpt-oss": _gpt_oss,
    "gptoss": _gpt_oss,  # Ollama's name for it
}

# `general.type` of files that go with a model
_PARTS = {
    "adapter": "a LoRA adapter",
    "mmproj": "the part of a model that sees or hears (mmproj)",
    "imatrix": "an importance matrix",
}


def build(file: Any) -> Architecture:
    """The model of an open GGUF file; ModelError names an unknown architecture and the known.

    Whatever the file says is read, known to change nothing, or a ModelError.
    """
    source = str(file.path)
    if part := _PARTS.get(str(file.metadata.get("general.type"))):
        raise ModelError(f"{source}: this file is {part}; give the file of the model itself")
    name = file.architecture
    read = reader(name, source)
    keys, weights = Keys(file.metadata, name, source), Weights(file.tensors, source)
    check_blocks(keys, weights)
    model = read(keys, weights, vocabulary_size(file, keys))
    graph = model.graph(one_token(model))
    refuse_unread(keys, weights, graph, model.p.layers)
    return model


def further_blocks(model: Architecture) -> int:
    """How many blocks of its file predict further tokens, whatever their form."""
    return max(0, getattr(model.p, "stored", 0) - model.p.layers)


def predicting(model: Architecture) -> Architecture:
    """The model with the block that predicts further tokens in use.

    ModelError, which names what is missing, where there is none or its form is not known.
    """
    if not isinstance(model, Predicting) or not further_blocks(model):
        raise ModelError("there is no NextN (MTP) block in this file")
    made = model.predicting()
    made.graph(one_token(made))
    assert made.predictor is not None
    step = Step.capacity(
        1, 1, 1, 1, 1, made.layers, ("f16", "f16"), made.positions_per_token, 0, made.p.hidden
    )
    assert step.vectors is not None
    made.predictor.drafts([step._replace(vectors=None)], step.vectors)
    return made


def drafting(model: Architecture) -> Architecture:
    """The model as it is loaded by default: with such a block in use where its form is known."""
    try:
        return predicting(model)
    except ModelError:
        return model


def reader(name: str, source: str) -> Reader:
    """What reads models of an architecture; ModelError names the known ones."""
    if name not in MODELS:
        raise ModelError(
            f"{source}: architecture {name!r:.60} is not supported; "
            f"supported are {', '.join(sorted(MODELS))}"
        )
    return MODELS[name]


def one_token(model: Architecture, kv_types: tuple[str, str] = ("f16", "f16")) -> Step:
    """The inputs of a step of one token, one page and one slot."""
    return Step.capacity(1, 1, 1, 1, 1, model.layers, kv_types, model.positions_per_token)


def check_blocks(keys: Keys, w: Weights) -> None:
    """ModelError where the metadata counts layers that the file has no tensors of."""
    told = keys.layers()
    numbers = {name.split(".")[1] for name in w.tensors if name.startswith("blk.")}
    if told > len(numbers):
        raise ModelError(
            f"{keys.source}: {keys.architecture}.block_count says {told} layers, but the file has "
            f"tensors of {len(numbers)}; the file is incomplete"
        )


def vocabulary_size(file: Any, keys: Keys) -> int:
    """Rows of the embedding; the tensor is right where metadata and tensor differ."""
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{keys.source}: tensor 'token_embd.weight' is missing")
    rows = int(file.tensors["token_embd.weight"].shape[0])
    if not 1 <= rows <= LARGEST:
        raise ModelError(f"{keys.source}: tensor 'token_embd.weight' has {rows} rows")
    return rows
