"""Whole models of odd sizes: heads of 1 to 256 dims, every cache type, against the reference.

A prompt that leaves a page, then single tokens; with one thread and with two the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from row_errors import check_rows
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.errors import ModelError

# Of the worst row, 20 times what the sweep over all head sizes finds: a value near a border of the
# cache type may be stored as its neighbour, and few tokens stand beside it here.
LIMITS = {"f32": 1e-10, "f16": 1e-8, "bf16": 1e-6, "q8_0": 1e-5}
PLAIN = Sizes(
    "llama", layers=1, hidden=24, inner=40, heads=3, kv_heads=1, vocabulary=40, context=64
)
PROMPT = [*range(1, 36), 7, 7, 3, 0, 39]


def of_head(dim: int, size: Sizes = PLAIN) -> tuple[Sizes, dict[str, int]]:
    """A model with heads of `dim`; of an odd number the last dim is not rotated."""
    return replace(size, dim=dim), {"rope.dimension_count": dim // 2 * 2}


def answers(path: Path, kv: str, **options: object) -> np.ndarray:
    """Logits of the prompt in one step and of its last two tokens one by one."""
    load = runtime.load(path, kv_type=kv, context=64, sequences=1, **options)
    with load as model, model.session() as session:
        rows = [session.eval(PROMPT[:-2]), session.eval(PROMPT[-2:-1])]
        return np.concatenate([*rows, session.eval(PROMPT[-1:])])


def check(path: Path, kv: str) -> None:
    want = answers(path, kv, devices="reference")
    got = answers(path, kv, threads=1, activations="f32")
    check_rows(got, want, LIMITS[kv])
    again = answers(path, kv, threads=2, activations="f32")
    np.testing.assert_array_equal(again.view(np.uint32), got.view(np.uint32))


@pytest.mark.parametrize("dim", [2, 14, 20, 28, 33, 72, 80, 96, 100, 112, 120, 255])
def test_heads_of_any_size(tmp_path: Path, dim: int) -> None:
    size, extra = of_head(dim)
    path = write_model(tmp_path / "m.gguf", size, extra=extra)
    for kv in LIMITS:
        check(path, kv)


@pytest.mark.sweep
@pytest.mark.parametrize("first", range(1, 257, 32))
def test_every_head_size(tmp_path: Path, first: int) -> None:
    for dim in range(max(2, first), first + 32):
        size, extra = of_head(dim)
        path = write_model(tmp_path / "m.gguf", size, extra=extra)
        for kv in LIMITS:
            check(path, kv)


@pytest.mark.parametrize("style", ["llama", "qwen3"])
@pytest.mark.parametrize("dim, v_dim", [(20, 12), (100, 36), (33, 64)])
def test_values_of_another_size(tmp_path: Path, style: str, dim: int, v_dim: int) -> None:
    size, extra = of_head(dim, replace(PLAIN, architecture=style))
    v_rows = np.random.default_rng(1).standard_normal((v_dim, size.hidden)) / 5
    out = np.random.default_rng(2).standard_normal((size.hidden, size.heads * v_dim)) / 5
    changed = {"attn_v": v_rows, "attn_output": out}
    path = write_model(
        tmp_path / "m.gguf", size, extra={**extra, "attention.value_length": v_dim},
        replace={f"blk.0.{k}.weight": v.astype(np.float32) for k, v in changed.items()},
    )  # fmt: skip
    for kv in ("f16", "q8_0"):
        check(path, kv)


ODD = {
    "moe": Sizes("qwen3moe", 1, 30, 23, 3, 3, 18, 40, 64, experts=5, used=3),
    "wide": Sizes("qwen3", 1, 37, 51, 5, 5, 6, 41, 64),
    "gpt-oss": replace(NOVEL["gpt-oss"], hidden=36, inner=20, dim=20, experts=5, vocabulary=40),
    "qwen35": replace(NOVEL["qwen35"], dim=24, k_dim=20, v_dim=20, hidden=44, vocabulary=40),
    "qwen3next": replace(NOVEL["qwen3next"], dim=20, k_dim=9, v_dim=23, taps=3, vocabulary=40),
}


@pytest.mark.parametrize("name", ODD)
def test_other_odd_sizes(tmp_path: Path, name: str) -> None:
    """Rows, experts, recurrent heads and taps that are no multiple of anything."""
    extra = {"rope.dimension_sections": [2, 2, 2, 0]} if name == "qwen35" else {}
    path = write_model(tmp_path / "m.gguf", ODD[name], extra=extra)
    for kv in ("f32", "q8_0"):
        check(path, kv)


# Heads that are no multiple of 16 in rows that are whole blocks, and rows that are not.
BLOCKS = Sizes("qwen3moe", 1, 96, 160, 4, 2, 24, 41, 64, experts=3)


@pytest.mark.parametrize(
    "kind, size",
    [
        ("BF16", "wide"),
        ("Q4_0", "blocks"),
        pytest.param("F16", "wide", marks=pytest.mark.sweep),
        pytest.param("BF16", "blocks", marks=pytest.mark.sweep),
    ],
)
def test_odd_sizes_of_other_weights(tmp_path: Path, kind: str, size: str) -> None:
    path = write_model(tmp_path / "m.gguf", BLOCKS if size == "blocks" else ODD[size], kind)
    check(path, "f32")


def test_heads_larger_than_the_fused_kernel_takes(tmp_path: Path) -> None:
    size, extra = of_head(1026)
    check(write_model(tmp_path / "m.gguf", size, extra=extra), "f16")


@pytest.mark.parametrize("dim", [1, 33])
def test_an_odd_number_of_rotated_dims_is_refused(tmp_path: Path, dim: int) -> None:
    path = write_model(tmp_path / "m.gguf", replace(PLAIN, dim=dim))
    with pytest.raises(ModelError, match=f"rope.dimension_count {dim} of a head of {dim}"):
        runtime.load(path)
