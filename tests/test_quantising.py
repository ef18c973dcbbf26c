"""Rows to blocks: bytes where they are ggml's, errors, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from kernel_calls import ISAS, Fenced, library, run

from runtime.backends.cpu.quantising import Quantiser, quantisable, quantise
from runtime.backends.plan.kernel import Kernel
from runtime.errors import OpError, OptionError
from runtime.gguf import open_gguf
from runtime.ops.dtypes import DTYPES, nbytes_for

KINDS = quantisable()
SAME_BYTES = ("q8_0", "q4_0")  # as the gguf package's
GOLDEN_FILES = [
    (model, kind)
    for model in ("qwen3", "qwen3next", "qwen35moe")
    for kind in ("Q4_0", "Q8_0")
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled():
    for isa in ISAS:
        with Quantiser(1, library(isa)) as quantiser:
            quantiser.prepare(list(KINDS))


def values(rng: np.random.Generator, rows: int = 13, columns: int = 768) -> np.ndarray:
    """Normal rows, and rows of zeros, of one number, tiny, large, and of few numbers (ties)."""
    x = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.05)
    x[3], x[4], x[5] = 0, 1.5, -2
    x[6:9] *= np.array([1e-6, 1e-20, 1e4], np.float32)[:, None]
    x[9] = np.round(x[9] * 80) / 4
    x[10, ::2] = 0
    return x


@pytest.mark.parametrize("kind", SAME_BYTES)
@pytest.mark.parametrize("isa", ISAS)
def test_bytes_are_those_of_the_gguf_package(rng, kind, isa):
    x = values(rng)
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind.upper()]).view(np.uint8)
    with Quantiser(2, library(isa)) as quantiser:
        assert np.array_equal(quantiser(x, kind), expected)


@pytest.mark.parametrize(("model", "kind"), GOLDEN_FILES)
def test_bytes_are_those_of_golden_files(golden: Path, model, kind):
    folder, compared = golden / model, 0
    source, made = (open_gguf(folder / f"model-{which}.gguf") for which in ("f32", kind))
    with Quantiser(2) as quantiser:
        for name, tensor in made.tensors.items():
            if tensor.dtype.name in SAME_BYTES:
                rows = source.tensors[name].data.view(np.float32)
                found = quantiser(rows.reshape(-1, tensor.shape[-1]), tensor.dtype)
                assert np.array_equal(found.reshape(-1), tensor.data.reshape(-1)), name
                compared += 1
    assert compared > 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_do_not_depend_on_threads_or_other_rows(rng, kind, weighted):
    x = values(rng)
    importance = rng.random(x.shape[1], np.float32) if weighted else None
    one = quantise(x, kind, importance, threads=1)
    with Quantiser(3) as quantiser:
        assert np.array_equal(quantiser(x, kind, importance), one)
        assert np.array_equal(quantiser(x[5:8], kind, importance), one[5:8])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_written(rng, kind):
    x = values(rng, 11, 256)
    x, importance = Fenced.of(x), Fenced.of(rng.random((1, 256), np.float32))
    words = nbytes_for(DTYPES[kind], (11, 256)) // 2
    out = Fenced(1, -(-words // 2), dtype=np.int32)
    run(
        Kernel.of(f"quantise_{kind}"), threads=2, x=x, importance=importance, out=out, n_rows=11,
        n_columns=256,
    )  # fmt: skip
    assert out.strays(1) == 0


def test_what_is_refused(rng):
    x = values(rng)
    with Quantiser(1) as quantiser:
        with pytest.raises(OptionError, match=r"quantised to 'q9_9'; the types are .*Q8_0"):
            quantiser(x, "q9_9")
        with pytest.raises(OpError, match="q8_0: rows must be contiguous float32 of 2 axes"):
            quantiser(x.astype(np.float64), "q8_0")
        with pytest.raises(OpError, match="multiple of 32"):
            quantiser(np.ascontiguousarray(x[:, :33]), "q8_0")
        with pytest.raises(OpError, match="q4_0: importance of 5 columns for rows of 768"):
            quantiser(x, "q4_0", np.ones(5, np.float32))
        for value, why in ((np.nan, "nan; no type"), (-np.inf, "-inf; no type"), (1e9, "holds up")):
            x[11, 700] = value
            with pytest.raises(OpError, match=f"row 11, column 700: the value is .*{why}"):
                quantiser(x, "q4_0")
