"""Matmul tiles: every format, width and instruction set against numpy, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tile_calls as tiles
from _pytest.mark import ParameterSet
from tile_calls import FLOATS, ISAS, QUANTISED, Guarded, matmul, packed, random_rows
from tile_reference import dequantised, matmul_f32, matmul_int8, matmul_split

from runtime.backends.cpu.compile import isa, objects
from runtime.backends.cpu.compile.symbols import undefined_symbols
from runtime.backends.cpu.tile.emit import emit_matmul
from runtime.backends.cpu.tile.formats import format_of
from runtime.backends.cpu.tile.pack import emit_pack
from runtime.backends.cpu.tile.spec import TileSpec
from runtime.backends.cpu.tile.sums_amx import STRETCH
from runtime.errors import Error

BEST = ISAS[0]
BEST_F32 = next(name for name in ISAS if name != "amx")  # which has no float tiles of its own
DOTS = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")  # plain and large blocks, with and without minima
SHAPES = ((1, 17, 32), (3, 1, 96), (9, 40, 256), (47, 33, 512))  # tokens, rows, inner


def shapes(name: str) -> tuple[tuple[int, int, int], ...]:
    """SHAPES with lengths that the format can have."""
    layout = format_of(name)
    if layout.is_float:
        return tuple((t, n, k - 1) for t, n, k in SHAPES)
    return tuple((t, n, -(-k // layout.block) * layout.block) for t, n, k in SHAPES)


def int8_cases() -> list[ParameterSet]:
    """Format, instruction set and columns; AMX is another tile at 16 columns and VNNI's below.

    The instruction sets differ in their dot products, not in their unpack steps: each dot product
    is tested in full with the formats of DOTS, the others once for each; the rest is a sweep.
    """
    once, cases = {"amx": 16, "avx512vnni": 8, "avx2": 4}, []
    for name in QUANTISED:
        for isa_name in ISAS:
            for columns in (16,) if isa_name == "amx" else (1, 4, 8):
                first = name in DOTS or columns == once.get(isa_name, 4 * (len(ISAS) == 1))
                cases.append(_case(first, name, isa_name, columns))
    return cases


def _case(first: bool, *values: object) -> ParameterSet:
    """Values of a test that is run always, or else in a sweep."""
    return pytest.param(*values, marks=() if first else pytest.mark.sweep)


def f32_cases() -> list[ParameterSet]:
    """Format, instruction set and columns: every format once, some in every way."""
    isas = [name for name in ISAS if name != "amx"]
    return [
        _case(name in FLOATS or (columns == 4 and (name in DOTS or isa_name == isas[0])),
              name, isa_name, columns)
        for name in FLOATS + QUANTISED
        for isa_name in isas
        for columns in (1, 4, 8)
    ]  # fmt: skip


def check(spec: TileSpec, isa_name: str, shape: tuple[int, int, int]) -> None:
    n_tokens, n_rows, n_inner = shape
    raw = random_rows(spec.format, n_rows, n_inner, seed=n_rows)
    x = np.random.default_rng(n_tokens).standard_normal((n_tokens, n_inner)).astype(np.float32)
    x[0, : n_inner // 2] = 0
    weights = packed(spec.format, raw, n_inner, BEST)
    buffer, held = tiles.activations(spec, x)
    references = {"int8": matmul_int8, "f32": matmul_f32, "split": matmul_split}
    reference = references[spec.coding]
    want = reference(spec.format, raw, *held, fma=isa.isa(isa_name).has_fma)
    for n_threads in (1, 3):
        got = matmul(spec, isa_name, weights, buffer, shape, n_threads=n_threads)
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize(("name", "isa_name", "columns"), int8_cases())
def test_int8_tile_is_the_reference(name: str, isa_name: str, columns: int) -> None:
    for shape in shapes(name):
        check(TileSpec(name, columns, "int8"), isa_name, shape)


@pytest.mark.parametrize(("name", "isa_name", "columns"), f32_cases())
def test_f32_tile_is_the_reference(name: str, isa_name: str, columns: int) -> None:
    for shape in shapes(name):
        check(TileSpec(name, columns, "f32"), isa_name, shape)


@pytest.mark.skipif("amx" not in ISAS, reason="AMX is needed")
@pytest.mark.parametrize(("name", "rest"), [("Q4_0", 96), ("Q4_0", 160), ("Q6_K", 256)])
def test_sums_of_amx_go_on_in_the_next_stretch(name: str, rest: int) -> None:
    check(TileSpec(name, 16, "int8"), "amx", (17, 20, STRETCH + rest))


@pytest.mark.skipif("amx" not in ISAS, reason="AMX is needed")
@pytest.mark.parametrize("columns", [1, 4, 8, 16])
def test_split_tile_is_the_reference(columns: int) -> None:
    for shape in shapes("Q8_0"):
        check(TileSpec("BF16", columns, "split"), "amx", shape)


@pytest.mark.skipif("amx" not in ISAS, reason="AMX is needed")
def test_split_activations_lose_nothing() -> None:
    raw = random_rows("BF16", 40, 1024)
    x = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
    spec = TileSpec("BF16", 4, "split")
    buffer, _ = tiles.activations(spec, x)
    got = matmul(spec, "amx", packed("BF16", raw, 1024, BEST), buffer, (4, 40, 1024))
    want = x.astype(np.float64) @ dequantised("BF16", raw).astype(np.float64).T
    assert ((got - want) ** 2).sum() / (want**2).sum() < 1e-12


@pytest.mark.parametrize("name", QUANTISED)
def test_f32_tile_agrees_with_dequantised_weights(name: str) -> None:
    raw = random_rows(name, 40, 1024)
    x = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
    spec = TileSpec(name, 4, "f32")
    buffer, _ = tiles.activations(spec, x)
    got = matmul(spec, BEST_F32, packed(name, raw, 1024, BEST), buffer, (4, 40, 1024))
    want = x.astype(np.float64) @ dequantised(name, raw).astype(np.float64).T
    assert ((got - want) ** 2).sum() / (want**2).sum() < 1e-11


@pytest.mark.parametrize("columns", [1, 4, 8, 16])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q2_K", "F16", "BF16"])
def test_long_rows_many_tokens(name: str, columns: int) -> None:
    """More tokens and longer rows than one block of the caches: the same bits as one at a time."""
    kind = "f32" if name in FLOATS else "int8"
    if name == "BF16" and "amx" in ISAS:
        kind = "split"
    if columns == 16 and (kind == "f32" or "amx" not in ISAS):
        pytest.skip("16 columns are for AMX")
    n_tokens, n_rows, n_inner = 530, 100, 4352
    raw = random_rows(name, n_rows, n_inner)
    x = np.random.default_rng(1).standard_normal((n_tokens, n_inner)).astype(np.float32)
    weights = packed(name, raw, n_inner, BEST)
    results = []
    for c in (1, columns):
        spec = TileSpec(name, c, kind)
        shape = (n_tokens, n_rows, n_inner)
        results.append(
            matmul(spec, BEST, weights, tiles.activations(spec, x)[0], shape, n_threads=2)
        )
    np.testing.assert_array_equal(results[0].view(np.int32), results[1].view(np.int32))


@pytest.mark.parametrize(("columns", "spare"), [(8, 24), (8, 3), (16, 24)])
def test_large_outputs_are_the_same(columns: int, spare: int) -> None:
    """More than a mebibyte is written past the caches where rows are whole lines (1000 + 24)."""
    if columns == 16 and "amx" not in ISAS:
        pytest.skip("16 columns are for AMX")
    shape = (270, 1000, 64)
    raw = random_rows("Q4_0", shape[1], shape[2])
    x = np.random.default_rng(5).standard_normal((shape[0], shape[2])).astype(np.float32)
    weights = packed("Q4_0", raw, shape[2], BEST)
    results = []
    for c in (1, columns):
        spec = TileSpec("Q4_0", c, "int8")
        buffer, _ = tiles.activations(spec, x)
        results.append(matmul(spec, BEST, weights, buffer, shape, n_threads=2, spare=spare))
    np.testing.assert_array_equal(results[0].view(np.int32), results[1].view(np.int32))


@pytest.mark.parametrize("columns", [1, 8])
def test_bias_and_residual(columns: int) -> None:
    rng = np.random.default_rng(2)
    n_tokens, n_rows, n_inner = 9, 21, 64
    raw, spec = random_rows("Q8_0", n_rows, n_inner), TileSpec("Q8_0", columns, "int8")
    weights = packed("Q8_0", raw, n_inner, BEST)
    x = rng.standard_normal((n_tokens, n_inner)).astype(np.float32)
    buffer, _ = tiles.activations(spec, x)
    bias = rng.standard_normal(n_rows).astype(np.float32)
    add = rng.standard_normal((n_tokens, n_rows + 5)).astype(np.float32)
    shape = (n_tokens, n_rows, n_inner)
    plain = matmul(spec, BEST, weights, buffer, shape)
    got = matmul(spec, BEST, weights, buffer, shape, bias=bias, add=add)
    np.testing.assert_array_equal(got, (plain + bias) + add[:, :n_rows])
    got = matmul(spec, BEST, weights, buffer, shape, add=add)
    np.testing.assert_array_equal(got, plain + add[:, :n_rows])


def test_no_tokens_no_output() -> None:
    spec = TileSpec("Q4_0", 8, "int8")
    weights = packed("Q4_0", random_rows("Q4_0", 16, 32), 32, BEST)
    buffer, _ = tiles.activations(spec, np.ones((8, 32), np.float32))
    assert matmul(spec, BEST, weights, buffer, (0, 16, 32), n_threads=2).size == 0


# ---- experts ----------------------------------------------------------------------------


def expert_tiles(columns: int, routes: list[tuple[int, int]]) -> tuple[np.ndarray, list[list[int]]]:
    """Records (expert, output rows) of routes [(expert, output row)], and the rows per tile."""
    records, rows = [], []
    for expert in sorted({e for e, _ in routes}):
        mine = [row for e, row in routes if e == expert]
        for start in range(0, len(mine), columns):
            part = mine[start : start + columns]
            rows.append(part)
            records.append([expert, *part, *[-1] * (columns - len(part))])
    return np.array(records, np.int32).reshape(-1, 1 + columns), rows


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "columns"),
    [("Q4_0", 1), ("Q4_K", 4), ("MXFP4", 8), ("F16", 8), ("Q8_0", 16), ("BF16", 16)],
)
def test_experts_are_the_same_bits_as_one_matrix(name: str, columns: int, n_threads: int) -> None:
    if columns == 16 and "amx" not in ISAS:
        pytest.skip("16 columns need AMX")
    rng = np.random.default_rng(3)
    n_experts, n_rows, n_inner, n_out = 5, 37, 256, 60
    kind = {"F16": "f32", "BF16": "split"}.get(name, "int8")
    raw = random_rows(name, n_experts * n_rows, n_inner).reshape(n_experts, n_rows, -1)
    experts = [packed(name, rows.copy(), n_inner, BEST) for rows in raw]
    joined = np.concatenate([e.bytes for e in experts])
    weights = Guarded(joined.size)
    weights.bytes[:] = joined
    x = rng.standard_normal((n_out, n_inner)).astype(np.float32)
    chosen = [(int(rng.integers(n_experts)) % 4, int(row)) for row in rng.permutation(n_out)]
    records, rows = expert_tiles(columns, chosen)
    padded = [part + [part[0]] * (columns - len(part)) for part in rows]
    if columns == 1:  # activations lie in the order of the output rows
        padded = [[row] for row in range(n_out)]
    direct, indirect = (TileSpec(name, columns, kind, indirect=i) for i in (False, True))
    buffer, _ = tiles.activations(direct, x[[row for part in padded for row in part]])
    out = Guarded(4 * n_out * n_rows)
    count = np.array([len(records)], np.int64)
    args = [weights.address, buffer.address, out.address, n_rows, 0, 0, 0, 0, n_rows, n_inner]
    args += [records.ctypes.data, count.ctypes.data, experts[0].n_bytes, 0, 1]
    tiles.call(tiles.matmul_kernel(indirect, BEST), args, n_threads)
    out.check()
    got = out.bytes.view(np.float32).reshape(n_out, n_rows)
    for expert, row in chosen:
        alone, _ = tiles.activations(direct, x[row : row + 1])
        want = matmul(direct, BEST, experts[expert], alone, (1, n_rows, n_inner))
        np.testing.assert_array_equal(got[row].view(np.int32), want[0].view(np.int32))


# ---- code -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isa_name", "instruction"), [("avx512vnni", "vpdpbusd"), ("avx2", "vpmaddubsw")]
)
def test_x86_code_uses_its_dot_product(isa_name: str, instruction: str) -> None:
    if isa.host_arch() != "x86_64":
        pytest.skip("an x86 processor is needed to emit its code")
    code = tiles.assembly(emit_matmul(TileSpec("Q4_0", 8, "int8"), isa_name), isa_name)
    assert code.count(instruction) >= 64
    assert ("%zmm" in code) == (isa_name == "avx512vnni")


@pytest.mark.parametrize("isa_name", dict.fromkeys(["generic", "arm_i8mm", "arm_dotprod"]))
def test_kernels_need_nothing_from_outside(isa_name: str) -> None:
    """Those of other instruction sets were looked at when the tests above loaded them."""
    for name in ("Q4_0", "IQ2_S", "F16"):
        kind = "f32" if name in FLOATS else "int8"
        for ir in (emit_matmul(TileSpec(name, 4, kind), isa_name), emit_pack(name, isa_name)):
            needed = undefined_symbols(objects.compile_ir(ir, isa_name))
            assert needed <= objects.ALLOWED, (name, isa_name)


def test_impossible_tiles_are_refused() -> None:
    with pytest.raises(Error, match="columns"):
        TileSpec("Q4_0", 3, "int8")
    with pytest.raises(Error, match="activations"):
        TileSpec("Q4_0", 4, "f16")
    with pytest.raises(Error, match="F16 weights"):
        TileSpec("F16", 4, "int8")
    with pytest.raises(Error, match=r"no matmul tile.*Q8_1"):
        TileSpec("Q8_1", 4, "int8")
    with pytest.raises(Error, match="amx"):
        emit_matmul(TileSpec("Q4_0", 16, "int8"), "avx512vnni")


def test_unknown_symbols_are_refused_before_loading() -> None:
    ir = (
        "declare double @no_such_function(double)\n"
        "define void @entry(i64 %a, i64 %b, i64 %c) {\n"
        "  %v = call double @no_such_function(double 1.0)\n  ret void\n}\n"
    )
    with pytest.raises(Error, match="no_such_function"):
        objects.load_object(objects.compile_ir(ir, "generic"))
    with pytest.raises(Error, match="not an object"):
        objects.load_object(b"nonsense")
    with pytest.raises(Error, match="LLVM refuses"):
        objects.compile_ir("define void @entry() { ret i32 1 }", "generic")


def test_instruction_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isa.available()[-1] == "generic"
    assert isa.detect() == isa.available()[0]
    monkeypatch.setenv("RUNTIME_CPU_ISA", "generic")
    assert isa.selected() == "generic"
    absent = "arm_dotprod" if isa.host_arch() == "x86_64" else "avx2"
    monkeypatch.setenv("RUNTIME_CPU_ISA", absent)
    with pytest.raises(Error, match=absent):
        isa.selected()
    with pytest.raises(Error, match="sse2"):
        isa.target("sse2")


def test_read_bandwidth_is_plausible() -> None:
    from runtime.backends.cpu.run.bandwidth import read_bandwidth

    assert 1e8 < read_bandwidth(threads=2, n_bytes=1 << 24) < 1e13
