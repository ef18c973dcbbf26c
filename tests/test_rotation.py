"""Rotation of quantised caches: the transform, where graphs have it, and what it is good for."""

from __future__ import annotations

import numpy as np
import pytest

import runtime
from runtime import ops
from runtime.errors import OptionError
from runtime.ops.errors import OpError
from runtime.ops.registry import OPS

hadamard = OPS["hadamard"].reference
TEXT = list(range(5, 69))


def test_it_is_its_own_inverse_and_spreads_what_stands_out() -> None:
    x = np.random.default_rng(1).standard_normal((4, 3, 80))
    y = hadamard(x, block=64)
    np.testing.assert_allclose((y * y).sum(-1), (x * x).sum(-1))
    np.testing.assert_allclose(hadamard(y, block=64), x, atol=1e-12)
    assert set(np.abs(hadamard(np.eye(80), block=64)).round(6).flat) == {0, 1 / 8, 1 / 4}


@pytest.mark.parametrize("block", [0, 24, -4])
def test_what_is_no_block_is_refused(block: int) -> None:
    with pytest.raises(OpError, match=f"hadamard: block={block} is no power of two"):
        ops.hadamard(ops.step_input("x", (2, 3, 96), ops.DTYPES["f32"]), block=block)


def model(kv: str, **options) -> runtime.Model:
    given = {"context": 64, "sequences": 1, "activations": "f32", "progress": False, **options}
    return runtime.load(kv_type=kv, **given)


@pytest.mark.parametrize(
    "kv, q, v", [("f16", 0, 0), ("q8_0,f16", 1, 0), ("f16,q8_0", 0, 1), ("q8_0", 1, 1)]
)
def test_k_and_v_are_rotated_apart(kv: str, q: int, v: int) -> None:
    """Of each layer q and k for the one, v and the result for the other."""
    with model(kv, devices="null") as found:
        nodes = found.graph(tokens=4).nodes
        layers = sum(node.op == "attention" for node in nodes)
        assert sum(node.op == "hadamard" for node in nodes) == layers * (2 * q + 2 * v)
    with model(kv, devices="null", cache_rotation=False) as found:
        assert all(node.op != "hadamard" for node in found.graph(tokens=4).nodes)


def test_float_caches_know_nothing_of_it() -> None:
    with model("f16") as a, model("f16", cache_rotation=False) as b:
        assert a.eval(TEXT).tobytes() == b.eval(TEXT).tobytes()


def test_a_rotated_cache_loses_less() -> None:
    """Against a cache in float32, and the same bits token by token."""
    with (
        model("f32") as exact,
        model("q8_0") as rotated,
        model("q8_0", cache_rotation=False) as raw,
    ):
        want = exact.eval(TEXT)
        got = rotated.eval(TEXT)
        lost, lost_raw = (((x - want) ** 2).sum() for x in (got, raw.eval(TEXT)))
        assert 0 < lost < 0.7 * lost_raw
        with rotated.session() as session:
            each = np.concatenate([session.eval([token]) for token in TEXT])
        assert each.tobytes() == got.tobytes()


@pytest.mark.parametrize("devices", ["tensor(cpu:0,cpu:1)", "layers(cpu:0,cpu:1)"])
def test_on_several_devices(devices: str) -> None:
    with model("q8_0") as one, model("q8_0", devices=devices) as several:
        want = one.eval(TEXT)
        assert ((several.eval(TEXT) - want) ** 2).sum() <= 1e-6 * (want**2).sum()


def test_snapshots_name_it() -> None:
    with model("q8_0") as a, model("q8_0", cache_rotation=False) as b:
        snapshot, other = a.session().snapshot(), b.session()
        with pytest.raises(OptionError, match=r"cache_rotation True, this session of .* False"):
            other.restore(snapshot)
    with pytest.raises(OptionError, match="cache_rotation=1 must be True or False"):
        model("q8_0", cache_rotation=1)
