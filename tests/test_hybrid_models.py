"""Hybrid models and gpt-oss: layouts of their files, what is skipped, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_models import NOVEL, Sizes, fused_rows, tensors, write_model

import runtime
from runtime.models.hybrid import Hybrid
from runtime.models.registry import build
from runtime.ops.rope import rope_components

IDS = np.random.default_rng(7).integers(0, 80, 60).tolist()
DENSE, MOE, NEXT, OSS = (NOVEL[name] for name in ("qwen35", "qwen35moe", "qwen3next", "gpt-oss"))


def logits(path: Path, devices: str = "cpu", ids: list[int] = IDS) -> np.ndarray:
    with runtime.load(path, devices, kv_type="f32", activations="f32") as model:
        return model.eval(ids)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


@pytest.mark.parametrize("name", NOVEL)
@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_agrees_with_the_reference_backend(tmp_path: Path, name: str, kind: str):
    path = write_model(tmp_path / "m.gguf", NOVEL[name], kind)
    assert nmse(logits(path), logits(path, "reference")) <= 1e-11


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_fused_projections_of_older_files_give_the_same_bits(tmp_path: Path, kind: str):
    new = write_model(tmp_path / "new.gguf", NEXT, kind)
    parts = tensors(NEXT)
    older, gone = {}, []
    for layer in (0, 2):
        names = [f"blk.{layer}.attn_{part}.weight" for part in ("qkv", "gate")]
        older[f"blk.{layer}.ssm_in.weight"] = fused_rows(NEXT, *(parts[name] for name in names))
        gone += names
    old = write_model(tmp_path / "old.gguf", NEXT, kind, replace=older, without=tuple(gone))
    for devices in ("cpu", "reference"):
        np.testing.assert_array_equal(logits(old, devices), logits(new, devices))


def test_value_heads_are_in_the_order_of_the_architecture(tmp_path: Path):
    """Grouped heads of qwen3next, moved to where qwen35 has them, make the same model."""
    grouped = tensors(NEXT)
    order = np.arange(4).reshape(2, 2).T.reshape(-1)  # head of the grouped file, by tiled place
    each, keys = NEXT.v_dim, 2 * NEXT.key_heads * NEXT.k_dim
    rows = (order[:, None] * each + np.arange(each)).reshape(-1)
    tiled = dict(grouped)
    for layer in (0, 2):
        at = f"blk.{layer}."
        for name in ("attn_qkv", "ssm_conv1d"):
            whole = grouped[f"{at}{name}.weight"]
            tiled[f"{at}{name}.weight"] = np.concatenate([whole[:keys], whole[keys:][rows]])
        tiled[f"{at}attn_gate.weight"] = grouped[f"{at}attn_gate.weight"][rows]
        tiled[f"{at}ssm_out.weight"] = grouped[f"{at}ssm_out.weight"][:, rows]
        for name in ("ssm_a", "ssm_dt.bias"):
            tiled[f"{at}{name}"] = grouped[f"{at}{name}"][order]
        pairs = tiled.pop(f"{at}ssm_ba.weight").reshape(2, 2, 2, -1)  # group, beta or alpha, head
        for i, name in enumerate(("beta", "alpha")):
            tiled[f"{at}ssm_{name}.weight"] = pairs[:, i].reshape(4, -1)[order]
    gone = tuple(f"blk.{layer}.ssm_ba.weight" for layer in (0, 2))
    one = write_model(tmp_path / "next.gguf", NEXT)
    other = write_model(
        tmp_path / "35.gguf", MOE, replace=tiled, without=gone,
        extra={"rope.dimension_sections": [8, 0, 0, 0]},
    )  # fmt: skip
    assert nmse(logits(other), logits(one)) <= 1e-11


def test_layers_that_predict_further_tokens_are_kept_and_skipped(tmp_path: Path):
    plain = write_model(tmp_path / "plain.gguf", DENSE)
    ahead = {f"blk.3.nextn.{name}.weight": np.ones((64, 64), np.float32) for name in ("a", "b")}
    extra = {"nextn_predict_layers": 1, "block_count": 4}
    path = write_model(tmp_path / "nextn.gguf", DENSE, extra=extra, replace=ahead)
    model = build(runtime.gguf.open_gguf(path))
    assert isinstance(model, Hybrid) and model.p.layers == 3 and sorted(model.nextn) == [*ahead]
    np.testing.assert_array_equal(logits(path), logits(plain))
    stripped = write_model(tmp_path / "none.gguf", DENSE, extra=extra)
    np.testing.assert_array_equal(logits(stripped), logits(plain))


def test_layers_by_list_and_by_interval(tmp_path: Path):
    listed = {"attention.recurrent_layers": [True, False, True]}
    path = write_model(tmp_path / "m.gguf", DENSE, extra=listed)
    layers = build(runtime.gguf.open_gguf(path)).layers
    assert list(layers.attention) == [1] and list(layers.recurrent) == [0, 2]
    state = layers.recurrent[0]
    assert (state.taps, state.channels, state.heads) == (4, 2 * 2 * 16 + 4 * 32, 4)
    assert (state.k_dim, state.v_dim) == (16, 32)


def test_a_layer_without_experts_among_others(tmp_path: Path):
    dense = tensors(replace(MOE, experts=0, inner=32))
    ffn = {name: x for name, x in dense.items() if name.startswith("blk.1.ffn_")}
    gone = tuple(n for n in tensors(MOE) if n.startswith("blk.1.ffn_"))
    path = write_model(tmp_path / "m.gguf", MOE, replace=ffn, without=gone)
    assert nmse(logits(path), logits(path, "reference")) <= 1e-11


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_gate_and_up_of_experts_in_one_tensor(tmp_path: Path, kind: str):
    parts, both, gone = tensors(MOE), {}, []
    for layer in range(MOE.layers):
        names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        fused = f"blk.{layer}.ffn_gate_up_exps.weight"
        both[fused] = np.concatenate([parts[name] for name in names], 1)
        gone += names
    one = write_model(tmp_path / "one.gguf", MOE, kind, replace=both, without=tuple(gone))
    two = write_model(tmp_path / "two.gguf", MOE, kind)
    for devices in ("cpu", "reference"):
        np.testing.assert_array_equal(logits(one, devices), logits(two, devices))


def test_size_of_shared_experts_from_their_tensors(tmp_path: Path):
    key = "expert_shared_feed_forward_length"
    path = write_model(tmp_path / "m.gguf", MOE, without_key=key)
    assert build(runtime.gguf.open_gguf(path)).p.experts.shared == MOE.inner


@pytest.mark.parametrize(
    "extra",
    [
        {"expert_gating_func": 2}, {"expert_gating_func": 3}, {"expert_weights_scale": 2.5},
        {"expert_weights_norm": False}, {"expert_shared_count": 1},
    ],
    ids=str,
)  # fmt: skip
def test_router_variants(tmp_path: Path, extra: dict):
    path = write_model(tmp_path / "m.gguf", MOE, extra=extra)
    plain = write_model(tmp_path / "plain.gguf", MOE)
    want = logits(path, "reference")
    assert nmse(logits(path), want) <= 1e-11
    # Shares of the chosen that sum to 1 are the softmax of the chosen.
    same = extra.get("expert_gating_func") == 3 or "expert_shared_count" in extra
    changed = nmse(logits(plain, "reference"), want)
    assert changed <= 1e-11 if same else changed > 1e-4


def test_text_positions_make_m_rope_plain(tmp_path: Path):
    """All components of a text token's position are equal."""
    path = write_model(tmp_path / "m.gguf", DENSE)
    plain = write_model(
        tmp_path / "plain.gguf", DENSE, extra={"rope.dimension_sections": [8, 0, 0, 0]}
    )
    assert set(rope_components((3, 3, 2, 0), 8, True)) == {0, 1, 2}
    np.testing.assert_array_equal(logits(path), logits(plain))


def test_a_window_limits_what_even_layers_of_gpt_oss_see(tmp_path: Path):
    size = replace(OSS, layers=1)
    path = write_model(tmp_path / "m.gguf", size)
    changed = [(IDS[0] + 1) % 80, *IDS[1:]]
    one, other = logits(path), logits(path, ids=changed)
    np.testing.assert_array_equal(one[20:], other[20:])
    assert not np.array_equal(one[19], other[19])


@pytest.mark.parametrize("pattern, full", [(1, {0, 1}), (2, {1}), (3, set()), ([True, False], {1})])
def test_pattern_of_windows(tmp_path: Path, pattern: object, full: set[int]):
    extra = {"attention.sliding_window_pattern": pattern}
    model = build(runtime.gguf.open_gguf(write_model(tmp_path / "m.gguf", OSS, extra=extra)))
    assert {i for i, sliding in enumerate(model.p.sliding) if not sliding} == full


@pytest.mark.parametrize(
    "size, change, message",
    [
        (DENSE, {"without_key": "ssm.conv_kernel"}, r"key qwen35\.ssm\.conv_kernel is missing"),
        (DENSE, {"without_key": "ssm.state_size"}, r"key qwen35\.ssm\.state_size is missing"),
        (DENSE, {"extra": {"ssm.group_count": 3}}, "4 value heads over 3 key heads do not"),
        (DENSE, {"extra": {"ssm.inner_size": 66}}, "66 values over 4 value heads do not divide"),
        (DENSE, {"extra": {"ssm.state_size": 64}}, r"'blk\.0\.ssm_conv1d.*\[192, 4\].*\[384, 4\]"),
        (DENSE, {"extra": {"ssm.state_size": 1 << 23}}, r"'blk\.0\.ssm_conv1d.* has shape"),
        (DENSE, {"extra": {"ssm.conv_kernel": 5}}, r"'blk\.0\.ssm_conv1d.* has shape"),
        (NEXT, {"extra": {"ssm.group_count": 4}}, r"'blk\.0\.ssm_conv1d.* has shape"),
        (DENSE, {"extra": {"full_attention_interval": 3}}, "makes layer 1 recurrent, but the file"),
        (DENSE, {"extra": {"full_attention_interval": 1}}, "makes layer 0 an attention layer, but"),
        (DENSE, {"extra": {"full_attention_interval": 0}}, "must be a whole number from 1"),
        (DENSE, {"extra": {"attention.recurrent_layers": [True]}}, "has 1 entries, not 3"),
        (
            DENSE, {"extra": {"attention.recurrent_layers": [True, True, False]}},
            "recurrent_layers makes layer 1 recurrent, but",
        ),
        (DENSE, {"extra": {"block_count": 4}}, "says 4 layers, but the file has tensors of 3"),
        (DENSE, {"extra": {"nextn_predict_layers": 3}}, "leaves no layers"),
        (DENSE, {"extra": {"rope.dimension_sections": [3, 3, 3, 0]}}, "of 8 frequencies"),
        (DENSE, {"extra": {"rope.dimension_sections": "x"}}, "must be a list of whole numbers"),
        (DENSE, {"extra": {"expert_count": 4}}, "expert_count = 4 is not implemented"),
        (DENSE, {"without": ("blk.0.ssm_a",)}, r"tensor 'blk\.0\.ssm_a' is missing"),
        (DENSE, {"without": ("blk.2.ssm_conv1d.weight",)}, r"'blk\.2\.ssm_conv1d.* is missing"),
        (MOE, {"extra": {"expert_used_count": 7}}, "expert_used_count 7 of 6 experts"),
        (MOE, {"extra": {"expert_used_count": 0}}, "must be a whole number from 1"),
        (MOE, {"extra": {"expert_gating_func": 9}}, "expert_gating_func = 9 is not implemented"),
        (MOE, {"without_key": "expert_count"}, r"key qwen35moe\.expert_count is missing"),
        (MOE, {"extra": {"expert_weights_norm": 1}}, "must be true or false"),
        (
            NOVEL["qwen3next-fused"], {"extra": {"ssm.state_size": 64}},
            r"'blk\.0\.ssm_conv1d\.weight' has shape",
        ),
        (OSS, {"extra": {"attention.sliding_window_pattern": "odd"}}, "list"),
        (OSS, {"without_key": "attention.sliding_window"}, "sliding_window is missing"),
        (OSS, {"without": ("blk.1.attn_sinks.weight",)}, "attn_sinks.* is missing"),
    ],
)  # fmt: skip
def test_refused_with_one_line(tmp_path: Path, size: Sizes, change: dict, message: str):
    path = write_model(tmp_path / "bad.gguf", size, **change)
    with pytest.raises(runtime.Error, match=message) as caught:
        runtime.load(path, devices="null")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
