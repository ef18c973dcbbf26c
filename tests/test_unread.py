"""Nothing that a file says is ignored in silence: what is added to it is used, or refused by name.

Files are stood in for by dictionaries, so that every name of the GGUF format is tried on every
architecture: all of them with `-m sweep`, some by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from small_models import NOVEL, Sizes, metadata, write_model
from small_models import tensors as random_tensors

import runtime
from runtime import ops
from runtime.errors import Error, ModelError
from runtime.models import registry
from runtime.ops.dtypes import F32

tensors = lru_cache(random_tensors)
MODELS = {
    "llama": Sizes("llama"),
    "qwen2": Sizes("qwen2"),
    "qwen3": Sizes("qwen3"),
    "qwen3moe": Sizes("qwen3moe", experts=6, inner=32),
    **NOVEL,
}
# Said once more, so that a new exception is a decision: what changes nothing, whatever it says.
SPARE_TENSORS = r"(v|a|mm|mtp)\..*|.*attn_rot_embd(\.weight)?|.*\.input_scale"
SPARE_KEYS = {
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type",
    "attention.layer_norm_epsilon",
}  # fmt: skip
# Known, but of no effect where the model has no such part or another key goes first.
OF_NO_EFFECT = {
    "attention.head_dim", "feed_forward_length", "full_attention_interval", "rope.scale_linear",
    "expert_used_count", "expert_shared_count", "norm_top_k_prob",
}  # fmt: skip


@dataclass
class Stored:
    """A tensor as a model builder sees it."""

    values: np.ndarray
    dtype = F32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def to_float32(self) -> np.ndarray:
        return self.values


class StandIn:
    """An open file with the metadata and tensors of a small model, and whatever is added."""

    path = Path("m.gguf")

    def __init__(self, size: Sizes) -> None:
        self.architecture = size.architecture
        self.metadata = {f"{size.architecture}.{k}": v for k, v in metadata(size).items()}
        self.metadata["tokenizer.ggml.model"] = "none"
        self.tensors = {name: Stored(t) for name, t in tensors(size).items()}

    def with_tensor(self, name: str, *shape: int) -> StandIn:
        self.tensors[name] = Stored(np.full(shape, 0.5, np.float32))
        return self

    def with_key(self, key: str, value: Any) -> StandIn:
        self.metadata[f"{self.architecture}.{key}"] = value
        return self


def graph_of(model: registry.Architecture) -> ops.Graph:
    return model.graph(registry.one_token(model))


def outcome(file: StandIn, name: str) -> str:
    """What becomes of the tensor `name`: "used", "refused" (by name), or "silent"."""
    try:
        model = registry.build(file)
    except ModelError as error:
        named = name[:77] in str(error) or "is missing" in str(error)  # what belongs to it
        assert named and "\n" not in str(error), str(error)
        return "refused"
    numbers = [n.attrs["factor"] for n in graph_of(model).nodes if n.op == "scale"]
    used = {ops.tensor.stored_name(n) for n in graph_of(model).nodes if n.op == "weight"}
    return "used" if name in used or 0.5 in numbers or name == "rope_freqs.weight" else "silent"


def beside(size: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what a converter may put beside each tensor of a model."""
    for name, values in tensors(size).items():
        part = re.sub(r"\.(weight|bias)$", "", name)
        yield f"{part}.bias", values.shape[:-1] or values.shape
        yield f"{part}.scale", (len(values),) if values.ndim == 3 else (1,)
        yield f"{part}_norm.weight", (values.shape[-1],)
        yield f"{part}.weight_scale", values.shape[:-1]


@pytest.mark.parametrize("name", MODELS)
def test_biases_scales_and_norms_beside_every_tensor(name: str) -> None:
    size, found = MODELS[name], {"used": 0, "refused": 0}
    for tensor, shape in beside(size):
        if tensor not in tensors(size):
            found[outcome(StandIn(size).with_tensor(tensor, *shape), tensor)] += 1
    assert found["used"] > 10 and found["refused"] > 10


def format_names() -> list[str]:
    """Every tensor name that the gguf package knows, for layer 0."""
    names = sorted({n.format(bid=0, xid=0) for n in gguf.TENSOR_NAMES.values()})
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias", "scale")]


def check_tensors(size: Sizes, names: list[str]) -> None:
    have = tensors(size)
    for name in names:
        if name not in have and outcome(StandIn(size).with_tensor(name, 3), name) == "silent":
            assert re.fullmatch(SPARE_TENSORS, name), f"{name} is ignored by {size.architecture}"


@pytest.mark.parametrize("name", MODELS)
def test_tensors_of_other_architectures(name: str) -> None:
    check_tensors(MODELS[name], [*format_names()[::17], "x", "blk.0.x", "blk.7.attn_q.weight"])


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_other_architectures(name: str) -> None:
    check_tensors(MODELS[name], format_names())


def format_keys() -> list[str]:
    """Every key of a model that the gguf package knows, without its prefix."""
    groups = [v for v in vars(gguf.Keys).values() if isinstance(v, type)]
    texts = {v for group in groups for v in vars(group).values() if isinstance(v, str)}
    return sorted(t.removeprefix("{arch}.") for t in texts if t.startswith("{arch}."))


def said(model: registry.Architecture) -> tuple[Any, ...]:
    """All that metadata can change of a model: its numbers, its graph, and the constants in it."""
    nodes = graph_of(model).nodes
    constants = [n.attrs["value"].tobytes() for n in nodes if n.op == "constant"]
    attrs = [(n.op, n.shape, sorted((k, str(v)) for k, v in n.attrs.items())) for n in nodes]
    return model.p, constants, attrs


def check_keys(size: Sizes, keys: list[str]) -> None:
    plain = said(registry.build(StandIn(size)))
    for key in keys:
        for value in (7, 0.7, True, "other", [7, 7, 7]):
            file = StandIn(size).with_key(key, value)
            if StandIn(size).metadata.get(f"{size.architecture}.{key}") == value:
                continue
            try:
                silent = said(registry.build(file)) == plain
            except Error as error:
                assert "\n" not in str(error) and len(str(error)) < 400
                continue
            known = key in SPARE_KEYS | OF_NO_EFFECT or neutral(key, value)
            assert not silent or known, f"{key} = {value!r} is ignored by {size.architecture}"


def neutral(key: str, value: Any) -> bool:
    """Values that say what is done anyway."""
    if key in ("expert_weights_norm", "attention.causal", "rope.mrope_interleaved"):
        return value is True
    return key == "ssm.v_head_reordered" and isinstance(value, bool)


@pytest.mark.parametrize("name", MODELS)
def test_keys_of_other_architectures(name: str) -> None:
    check_keys(MODELS[name], [*format_keys()[::13], "x", "attention.x", "rope.scaling.x"])


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
def test_every_key_of_other_architectures(name: str) -> None:
    check_keys(MODELS[name], format_keys())


@pytest.mark.parametrize(
    "key, value",
    [
        ("tokenizer.ggml.normalizer.lowercase", True), ("tokenizer.ggml.unheard_of", "x"),
        ("tokenizer.other", [1]),
    ],
)  # fmt: skip
def test_keys_that_change_tokens(tmp_path: Path, key: str, value: Any) -> None:
    path = write_model(tmp_path / "m.gguf", extra={key: value})
    with pytest.raises(ModelError, match=f"metadata key '{re.escape(key)}'"):
        runtime.load(path, devices="null")


def test_several_are_counted_and_the_first_named() -> None:
    file = StandIn(MODELS["llama"])
    for i in range(5):
        file.with_tensor(f"blk.0.new_{i}.weight", 4).with_key(f"new_{i}", i + 2)
    with pytest.raises(ModelError, match=r"5 tensors \('blk\.0\.new_0\.weight', .*_2\.weight' and"):
        registry.build(file)
    file = StandIn(MODELS["llama"]).with_key("new_0", 2).with_key("new_1", 3)
    with pytest.raises(ModelError, match=r"2 metadata keys \('llama\.new_0', 'llama\.new_1'\) is"):
        registry.build(file)


@pytest.mark.parametrize("value", [0, 0.0, np.zeros(2), np.zeros(0)])
def test_what_is_off_is_no_matter(value: Any) -> None:
    registry.build(StandIn(MODELS["llama"]).with_key("attn_logit_softcapping", value))
    registry.build(StandIn(MODELS["llama"]).with_key("logit_scale", 1.0))


def test_blocks_that_nobody_announced_are_refused() -> None:
    """A file whose metadata counts fewer layers than it has."""
    file = StandIn(Sizes("llama", layers=3)).with_key("block_count", 2)
    with pytest.raises(ModelError, match=r"9 tensors \('blk\.2\.attn_norm\.weight'"):
        registry.build(file)
    file.with_tensor("blk.2.nextn.eh_proj.weight", 4)
    registry.build(file)


def test_golden_models_say_nothing_unread(golden: Path) -> None:
    from runtime.gguf import open_gguf

    files = [p for p in golden.rglob("*.gguf") if "vocab" not in p.name and "mmproj" not in p.name]
    assert len(files) > 20
    for path in files:
        registry.build(open_gguf(path))
