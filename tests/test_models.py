"""Model files that cannot be run are refused in one line; rotary frequencies of every variant."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.errors import ModelError
from runtime.models.keys import Keys
from runtime.models.rotary import rotary
from runtime.models.scaling import Scaling


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": {"general.architecture": "qwen9"}}, "architecture 'qwen9' is not supported"),
        ({"without": ("blk.1.ffn_up.weight",)}, "tensor 'blk.1.ffn_up.weight' is missing"),
        ({"without": ("token_embd.weight",)}, "tensor 'token_embd.weight' is missing"),
        ({"extra": {"feed_forward_length": 128}}, r"has shape \[96, 64\].*ask for \[128, 64\]"),
        ({"extra": {"attention.head_count_kv": 3}}, "4 heads do not divide into 3 KV heads"),
        ({"extra": {"attention.head_count": 0}}, "must be a whole number from 1"),
        ({"extra": {"block_count": 1 << 30}}, "must be a whole number from 1"),
        ({"extra": {"rope.dimension_count": 64}}, "rope.dimension_count 64 of a head of 32"),
        ({"extra": {"rope.scaling.type": "dynamic"}}, "'dynamic' is not implemented"),
        ({"extra": {"rope.scaling.type": "longrope"}}, "'longrope' needs the tensor 'rope_factors"),
        ({"extra": {"attn_logit_softcapping": 30.0}}, "attn_logit_softcapping' = 30.0 is not"),
        ({"extra": {"expert_count": 4}}, "expert_count = 4 is not implemented"),
        ({"extra": {"attention.layer_norm_rms_epsilon": float("nan")}}, "must be a finite number"),
        ({"extra": {"attention.layer_norm_rms_epsilon": -1e-6}}, "a finite number from 0 on"),
    ],
)
def test_refused_with_one_line(tmp_path: Path, change: dict, message: str):
    path = write_model(tmp_path / "bad.gguf", **change)
    with pytest.raises(runtime.Error, match=message) as caught:
        runtime.load(path, devices="null")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_by_layer_says_what_is_wrong_with_it():
    keys = Keys({"llama.a": np.zeros(0, np.uint32), "llama.b": np.arange(2)}, "llama", "m.gguf")
    for key, message in (("a", "llama.a is empty"), ("b", "llama.b differs between layers")):
        with pytest.raises(ModelError, match=message):
            keys.count(key)


def test_a_head_may_be_larger_than_the_hidden_state(tmp_path: Path):
    size = Sizes("llama", layers=1, hidden=2, heads=4)
    with runtime.load(write_model(tmp_path / "m.gguf", size), devices="null") as model:
        assert model.graph()


def test_every_weight_type_loads_and_runs(tmp_path: Path):
    """Types without a fast tile are widened; the numbers are those of the stored values."""
    size = Sizes(layers=1, hidden=256, inner=256, dim=64)
    for kind in ("Q4_1", "Q5_0", "TQ2_0", "MXFP4"):
        path = write_model(tmp_path / f"{kind}.gguf", size, kind)
        with runtime.load(path, devices="reference", kv_type="f32") as exact:
            want = exact.eval([1, 2, 3])
        with runtime.load(path, kv_type="f32", activations="f32") as model:
            got = model.eval([1, 2, 3])
        assert ((got - want) ** 2).sum() <= 1e-10 * (want**2).sum(), kind


def test_plain_frequencies():
    found = rotary(8, 10_000.0, Scaling())
    want = [10_000.0 ** (-i / 8) for i in (0, 2, 4, 6)]
    np.testing.assert_allclose(found.inv_freq, want, rtol=1e-7)
    assert found.magnitude == 1.0


def test_linear_scaling_divides_every_frequency():
    plain, scaled = (rotary(64, 1e4, s) for s in (Scaling(), Scaling("linear", 4.0)))
    np.testing.assert_allclose(scaled.inv_freq, plain.inv_freq / 4, rtol=1e-7)


def test_factors_divide_frequencies():
    factors = np.array([1, 1, 2, 8], np.float32)
    plain, scaled = rotary(8, 1e4, Scaling()), rotary(8, 1e4, Scaling(), factors)
    np.testing.assert_allclose(scaled.inv_freq, plain.inv_freq / factors, rtol=1e-7)


def test_yarn_keeps_fast_and_stretches_slow_frequencies():
    """The paper's rule: by how often a dimension turns within the original context."""
    dims, base, original, factor = 128, 1e6, 32768, 4.0
    plain = rotary(dims, base, Scaling())
    found = rotary(dims, base, Scaling("yarn", factor, original))
    turns = original * plain.inv_freq.astype(np.float64) / (2 * math.pi)
    ratio = plain.inv_freq / found.inv_freq
    np.testing.assert_allclose(ratio[turns > 34], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[turns < 0.9], factor, rtol=1e-5)
    assert (np.diff(ratio) >= -1e-6).all()
    assert found.magnitude == pytest.approx(1 + 0.1 * math.log(factor))


@pytest.mark.parametrize("truncate, low, high", [(True, 8, 18), (False, 8.0927791, 17.3980245)])
def test_yarn_of_gpt_oss_ramps_between_dimensions(truncate: bool, low: float, high: float):
    """32 and 1 turns in 4096 tokens at base 150,000 are reached at those dimensions."""
    scaling = Scaling("yarn", 32.0, 4096, truncate=truncate)
    plain, found = (rotary(64, 150_000.0, s).inv_freq for s in (Scaling(), scaling))
    keep = 1 - np.clip((np.arange(32) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found / plain, keep + (1 - keep) / 32, rtol=1e-5)


SCALED = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
YARN = {**SCALED, "rope.scaling.type": "yarn"}
OWN = 1 + 0.1 * math.log(4)


@pytest.mark.parametrize(
    "extra, magnitude",
    [
        (YARN, OWN),
        (YARN | {"rope.scaling.yarn_attn_factor": 1.25}, 1.25),
        (YARN | {"rope.scaling.yarn_attn_factor": 1.25, "rope.scaling.attn_factor": 2.0}, 2.5),
        (YARN | {"rope.scaling.attn_factor": 0.5}, OWN / 2),
        (YARN | {"rope.scaling.yarn_log_multiplier": 1.0}, 1.0),
        (YARN | {"rope.scaling.yarn_log_multiplier": 0.5}, OWN / (1 + 0.05 * math.log(4))),
        (YARN | {"rope.scaling.yarn_ext_factor": -1.0}, OWN),  # llama.cpp's sign of unset
        (SCALED | {"rope.scaling.type": "linear"}, 1.0),
        (SCALED | {"rope.scaling.attn_factor": 1.5}, 1.5),
    ],
)
def test_what_cos_and_sin_are_multiplied_by(extra: dict, magnitude: float):
    keys = {f"llama.{key}": value for key, value in extra.items()}
    scaling = Scaling.read(Keys(keys, "llama", "m.gguf"), 256)
    assert rotary(32, 1e4, scaling).magnitude == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize(
    "extra, kind, factor",
    [
        ({}, "linear", 1.0), (SCALED, "linear", 4.0), ({"rope.scale_linear": 2.0}, "linear", 2.0),
        (SCALED | {"rope.scale_linear": 2.0}, "linear", 4.0),
        (SCALED | {"rope.scaling.type": "none"}, "none", 4.0),
        ({"rope.scaling.factor": 0.0}, "linear", 1.0),
    ],
)  # fmt: skip
def test_a_factor_alone_is_linear(extra: dict, kind: str, factor: float):
    keys = {f"llama.{key}": value for key, value in extra.items()}
    scaling = Scaling.read(Keys(keys, "llama", "m.gguf"), 256)
    assert (scaling.kind, scaling.factor) == (kind, factor)
    stretched = rotary(8, 1e4, scaling).inv_freq * (factor if kind == "linear" else 1)
    np.testing.assert_allclose(stretched, rotary(8, 1e4, Scaling()).inv_freq, rtol=1e-6)


def test_longrope_has_factors_for_short_and_for_long_contexts(tmp_path: Path):
    """Those of the context that the model is loaded with, as for phi-3; a magnitude for both."""
    short, long = (np.linspace(1, n, 16, dtype=np.float32) for n in (1.5, 8))
    extra = {
        "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 96,
        "rope.scaling.attn_factor": 1.25,
    }  # fmt: skip
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    path = write_model(
        tmp_path / "m.gguf",
        Sizes("llama"),
        extra=extra,
        replace=dict(zip(names, (short, long), strict=True)),
    )
    plain = write_model(tmp_path / "plain.gguf", Sizes("llama"))
    ids = list(range(1, 40))
    for context, factors in ((96, short), (97, long), (None, long)):
        with runtime.load(path, devices="null", context=context) as model:
            constants = [n for n in model.graph().nodes if n.op == "constant"]
            want = rotary(32, 1e4, Scaling(), factors).inv_freq
            np.testing.assert_array_equal(constants[0].attrs["value"], want)
    same = {"rope_freqs.weight": long}
    usual = write_model(
        tmp_path / "usual.gguf", Sizes("llama"), extra={"rope.scaling.attn_factor": 1.25},
        replace=same,
    )  # fmt: skip
    logits = []
    for file in (path, usual, plain):
        with runtime.load(file, kv_type="f32", activations="f32") as model:
            logits.append(model.eval(ids))
    np.testing.assert_array_equal(logits[0], logits[1])
    assert ((logits[0] - logits[2]) ** 2).sum() > 1e-3 * (logits[2] ** 2).sum()


def test_layers_with_a_window_may_have_a_base_of_their_own(tmp_path: Path):
    size = NOVEL["gpt-oss"]
    usual, own = (
        write_model(tmp_path / f"{len(extra)}.gguf", size, extra=extra)
        for extra in ({}, {"rope.freq_base_swa": 500.0})
    )
    with runtime.load(own, devices="null") as model:
        ropes = [n for n in model.graph().nodes if n.op == "rope"]
        angles = [n.inputs[1].inputs[1].attrs["value"] for n in ropes]
    for angle, base in zip(angles, (500.0, 500.0, 1e4, 1e4), strict=True):  # layer 0 has a window
        want = rotary(32, base, Scaling("yarn", 4.0, 64)).inv_freq
        np.testing.assert_array_equal(angle, want)
    with runtime.load(usual, devices="null") as model:
        assert len([n for n in model.graph().nodes if n.op == "rope_angles"]) == 1


def test_yarn_model_differs_from_plain_and_agrees_with_the_reference(tmp_path: Path):
    extra = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }  # fmt: skip
    plain = write_model(tmp_path / "plain.gguf")
    yarn = write_model(tmp_path / "yarn.gguf", extra=extra)
    ids = list(range(1, 60))
    with runtime.load(yarn, devices="reference", kv_type="f32") as model:
        want = model.eval(ids)
    with runtime.load(yarn, kv_type="f32") as model:
        got = model.eval(ids)
    with runtime.load(plain, kv_type="f32") as model:
        other = model.eval(ids)
    assert ((got - want) ** 2).sum() <= 1e-11 * (want**2).sum()
    assert ((other - want) ** 2).sum() > 1e-3 * (want**2).sum()


def test_unknown_architecture_lists_what_there_is(tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", Sizes("qwen4"))
    with pytest.raises(
        ModelError, match="supported are gpt-oss, gptoss, llama, qwen2, qwen3, qwen35"
    ):
        runtime.load(path)
