"""Rows to blocks: bytes where they are ggml's, errors, codes, threads, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from kernel_calls import ISAS, Fenced, library, run
from quantise_cases import errors, measured_rows, peer_errors

import runtime.gguf  # noqa: F401  (provides the code books)
from runtime.backends.cpu.quantising import Quantiser, quantisable, quantise
from runtime.backends.plan.kernel import Kernel
from runtime.errors import OpError, OptionError
from runtime.gguf import open_gguf
from runtime.ops.blocks import BLOCK_FORMATS, Join
from runtime.ops.dtypes import DTYPES, nbytes_for
from runtime.ops.quant_blocks import numbers, scales, struct_of
from runtime.ops.quants import dequantize

KINDS = quantisable()
SAME_BYTES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "f16", "bf16")
SEARCHED = [k for k in KINDS if k in BLOCK_FORMATS and k not in SAME_BYTES]
SEARCHED = [k for k in SEARCHED if not BLOCK_FORMATS[k].book]
ELSEWHERE = ("q4_0", "q5_1", "q8_0", "mxfp4")  # whose bytes are compared on another target, too
GOLDEN_FILES = [
    (model, kind)
    for model in ("qwen3", "qwen3next", "qwen35moe")
    for kind in ("Q4_0", "Q8_0", "MXFP4_MOE")
    if (model, kind) != ("qwen3", "MXFP4_MOE")
]


@pytest.fixture(scope="module")
def quantiser():
    with Quantiser(2, library(ISAS[0])) as made:
        made.prepare(list(KINDS))
        yield made


def values(rng: np.random.Generator, rows: int = 13, columns: int = 768) -> np.ndarray:
    """Normal rows, and rows of zeros, of one number, tiny, large, and of few numbers (ties)."""
    x = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.05)
    x[3], x[4], x[5] = 0, 1.5, -2
    x[6:9] *= np.array([1e-6, 1e-20, 1e4], np.float32)[:, None]
    x[9] = np.round(x[9] * 80) / 4
    x[10, ::2] = 0
    return x


@pytest.mark.parametrize(
    ("isa", "kind"),
    [(ISAS[0], kind) for kind in SAME_BYTES]
    + [(isa, kind) for isa in ISAS[1:] for kind in ELSEWHERE],
)
def test_bytes_are_those_of_the_gguf_package(rng, kind, isa):
    x = values(rng)
    x[12] = np.nextafter(np.float32(2) ** rng.integers(-30, 14, x[12].shape), np.float32(0))
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind.upper()]).view(np.uint8)
    with Quantiser(2, library(isa)) as quantiser:
        assert np.array_equal(quantiser(x, kind), expected)


@pytest.mark.parametrize(("model", "kind"), GOLDEN_FILES)
def test_bytes_are_those_of_golden_files(golden: Path, quantiser, model, kind):
    source, made = (open_gguf(golden / model / f"model-{which}.gguf") for which in ("f32", kind))
    compared = set()
    for name, tensor in made.tensors.items():
        if tensor.dtype.name in SAME_BYTES:
            rows = source.tensors[name].data.view(np.float32).reshape(-1, tensor.shape[-1])
            found = quantiser(rows, tensor.dtype)
            assert np.array_equal(found.reshape(-1), tensor.data.reshape(-1)), name
            compared.add(tensor.dtype.name)
    assert kind.lower().removesuffix("_moe") in compared


@pytest.mark.parametrize("kind", sorted(peer_errors()))
@pytest.mark.parametrize("name", ["plain", "importance"])
def test_errors_are_no_larger_than_those_of_llama_cpp(quantiser, kind, name):
    x, importance = measured_rows()
    raw = quantiser(x, kind, importance if name == "importance" else None)
    for found, peer in zip(
        errors(x, raw, kind, importance), peer_errors()[kind][name], strict=True
    ):
        assert found <= peer * (1 + 1e-6)


def _levels(name: str) -> np.ndarray:
    """All that a code of a format can stand for, before scales."""
    row = BLOCK_FORMATS[name]
    if row.levels:
        return np.array(row.levels, np.float32)
    parts = row.codes.parts if isinstance(row.codes, Join) else [row.codes]
    codes = 3 if name.startswith("tq") else 2 ** sum(part.width for part in parts)
    return np.arange(codes, dtype=np.float32) - row.offset


@pytest.mark.parametrize("kind", SEARCHED)
def test_each_code_is_the_nearest_for_its_scale(quantiser, rng, kind):
    """The definition, in numpy: with the scales found, no other code comes nearer."""
    x, row = values(rng), BLOCK_FORMATS[kind]
    blocks = quantiser(x, kind).view(struct_of(row)).reshape(-1)
    wide = x.reshape(len(blocks), -1).astype(np.float64)
    scale, minimum = (scales(row, s, blocks) if s else np.zeros((len(blocks), 1)) for s in
                      (row.scale, row.minimum))  # fmt: skip
    scale, minimum = (np.repeat(a, row.block // a.shape[1], 1) for a in (scale, minimum))
    reached = scale[..., None] * _levels(kind) + minimum[..., None]
    nearest = np.abs(reached - wide[..., None]).min(-1)
    found = np.abs(dequantize(blocks.view(np.uint8), DTYPES[kind], wide.shape) - wide)
    assert (found <= nearest + 2e-6 * np.abs(wide)).all()
    assert numbers(row, row.codes, blocks).max() < len(_levels(kind))


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_ternary_weights_stay_what_they_are(quantiser, rng, kind):
    x = rng.integers(-1, 2, (5, 512)).astype(np.float32) * np.float32(0.375)
    assert np.array_equal(dequantize(quantiser(x, kind), DTYPES[kind], x.shape), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_do_not_depend_on_threads_or_other_rows(rng, quantiser, kind, weighted):
    x = values(rng)
    importance = rng.random(x.shape[1], np.float32) if weighted else None
    one = quantise(x, kind, importance, threads=1)
    assert np.isfinite(dequantize(one, DTYPES[kind], x.shape)).all()
    assert np.array_equal(quantiser(x, kind, importance), one)
    assert np.array_equal(quantiser(x[5:8], kind, importance), one[5:8])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_written(rng, quantiser, kind):
    x = values(rng, 11, 256)
    x, importance = Fenced.of(x), Fenced.of(rng.random((1, 256), np.float32))
    out = Fenced(1, -(-nbytes_for(DTYPES[kind], (11, 256)) // 4), dtype=np.int32)
    run(
        Kernel.of(f"quantise_{kind}"), threads=2, x=x, importance=importance, out=out, n_rows=11,
        n_columns=256,
    )  # fmt: skip
    assert out.strays(1) == 0


def test_an_importance_of_zeros_is_none(rng, quantiser):
    x = values(rng)
    assert np.array_equal(quantiser(x, "q4_k", np.zeros(768, np.float32)), quantiser(x, "q4_k"))


@pytest.mark.parametrize(("kind", "most"), [("q4_0", 8), ("q5_0", 16), ("q4_1", 1), ("q4_k", 1)])
def test_the_largest_values_stay_finite(rng, quantiser, kind, most):
    x = (rng.uniform(-65504, 65504, (4, 256)) * most).astype(np.float32)
    for importance in (None, rng.random(256, np.float32)):
        raw = quantiser(x, kind, importance)
        assert np.isfinite(dequantize(raw, DTYPES[kind], x.shape)).all()


def test_odd_columns_of_plain_types(rng, quantiser):
    x = rng.standard_normal((3, 37)).astype(np.float32)
    assert np.array_equal(quantiser(x, "F16").view(np.float16), x.astype(np.float16))
    assert np.array_equal(quantiser(x, "f32").view(np.float32), x)
    assert quantiser(x[:0], "f16").shape == (0, 74)


def test_what_is_refused(rng, quantiser):
    x = values(rng)
    with pytest.raises(OptionError, match=r"quantised to 'q9_9'; the types are .*Q8_0"):
        quantiser(x, "q9_9")
    with pytest.raises(OpError, match="q8_0: rows must be contiguous float32 of 2 axes"):
        quantiser(x.astype(np.float64), "q8_0")
    with pytest.raises(OpError, match="multiple of 32"):
        quantiser(np.ascontiguousarray(x[:, :33]), "q8_0")
    with pytest.raises(OpError, match="q4_0: importance of 5 columns for rows of 768"):
        quantiser(x, "q4_0", np.ones(5, np.float32))
    for wrong in (-1, np.nan, np.inf):
        with pytest.raises(OpError, match="q4_k: an importance is negative, or no number"):
            quantiser(x, "q4_k", np.full(768, wrong, np.float32))
    for value, why in ((np.nan, "nan; no type"), (-np.inf, "-inf; no type"), (1e9, "holds up")):
        x[11, 700] = value
        with pytest.raises(OpError, match=f"row 11, column 700: the value is .*{why}"):
            quantiser(x, "q4_0")
