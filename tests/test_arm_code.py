"""Arm's matmul kernels, on machines that are not Arm: their instructions and their arithmetic.

What the processor would do is a function in LLVM's portable language here, put in the place of the
instruction, so that a kernel made for Arm runs and gives the reference's bits. The instructions
themselves run under emulation: scripts/check_arm.sh.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tile_calls as tiles
from tile_calls import ISAS, QUANTISED, packed, random_rows
from tile_reference import matmul_int8

from runtime.backends.cpu.compile import objects
from runtime.backends.cpu.tile.emit import emit_matmul
from runtime.backends.cpu.tile.formats import format_of
from runtime.backends.cpu.tile.spec import TileSpec

ARM = ("arm_dotprod", "arm_i8mm")
# A scale for 32 and for 16, one and two kinds of minimum, an offset, signed bytes, a table.
FEW = ("Q4_1", "Q6_K", "Q2_K", "IQ4_NL")


def hot_blocks(name: str, columns: int, isa_name: str) -> list[Counter[str]]:
    """Instructions of each stretch without jumps that multiplies bytes, by name.

    Instructions by element count as `NAME[]`; the operands of others are not told apart.
    """
    spec = TileSpec(name, columns, "int8")
    text = tiles.assembly(emit_matmul(spec, isa_name), isa_name)
    found = []
    for block in re.split(r"(?m)^(?=\S*BB\S*:)", text):
        lines = re.findall(r"(?m)^\t([a-z]\w*)(.*)$", block)
        counts = Counter(n + "[]" * bool(re.search(r"\.(4b|s)\[\d]$", rest)) for n, rest in lines)
        if counts["sdot"] + counts["sdot[]"] + counts["smmla"] > 2:
            found.append(counts)
    return found


def total(blocks: list[Counter[str]]) -> Counter[str]:
    return sum(blocks, Counter())


def check_instructions(name: str) -> None:
    """No word of activations is spread by an instruction of its own; wide tiles take smmla."""
    for columns in (1, 4, 8):
        for isa_name in ARM:
            found = total(hot_blocks(name, columns, isa_name))
            matrix = isa_name == "arm_i8mm" and columns == 8
            products, others = ("smmla", "sdot[]") if matrix else ("sdot[]", "smmla")
            # Words of 32 elements of a group: of 16 rows, or of 4 by all columns.
            each = 8 * (4 if columns == 1 else columns // 2 if matrix else columns)
            assert found[products] >= each, (columns, isa_name, found)
            assert found["sdot"] == found[others] == 0, (columns, isa_name, found)
            if columns > 1:
                assert found["ld1r"] == 0, (columns, isa_name, found)
                assert found["fmul[]"] + found["fmla[]"] > 0, (columns, isa_name, found)


@pytest.mark.parametrize("name", FEW)
def test_instructions(name: str) -> None:
    check_instructions(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(set(QUANTISED) - set(FEW)))
def test_instructions_of_every_format(name: str) -> None:
    check_instructions(name)


@pytest.mark.parametrize(
    ("isa_name", "product", "most"), [("arm_dotprod", "sdot[]", 140), ("arm_i8mm", "smmla", 235)]
)
def test_the_innermost_loop_is_mostly_products(isa_name: str, product: str, most: int) -> None:
    """Where a prompt's time goes: 32 elements, eight columns, codes unpacked before.

    64 products are 4 rows by sdot and 8 by smmla; the bound is what LLVM 22 makes, and a little.
    """
    blocks = [b for b in hot_blocks("Q4_0", 8, isa_name) if b[product] == 64]
    assert min(b.total() for b in blocks) <= most, blocks


# ---- arithmetic -------------------------------------------------------------------------

_PORTABLE = {
    "sdot.v4i32.v16i8": "sdot",
    "smmla.v4i32.v16i8": "smmla",
    "tbl1.v16i8": "lookup",
}


def _sum_of_products(pairs: tuple[list[int], list[int]], lane: int) -> str:
    """LLVM text: add the products of these bytes of %a and of %b to lane `lane` of %sum."""
    lines, n = [], len(pairs[0])
    for vector, picks in zip("ab", pairs, strict=True):
        mask = ", ".join(f"i32 {p}" for p in picks)
        source = f"<16 x i8> %{vector}, <16 x i8> %{vector}"
        lines += [
            f"%{vector}{lane} = shufflevector {source}, <{n} x i32> <{mask}>",
            f"%w{vector}{lane} = sext <{n} x i8> %{vector}{lane} to <{n} x i32>",
        ]
    return "\n".join([
        *lines,
        f"%p{lane} = mul <{n} x i32> %wa{lane}, %wb{lane}",
        f"%r{lane} = call i32 @llvm.vector.reduce.add.v{n}i32(<{n} x i32> %p{lane})",
        f"%o{lane} = extractelement <4 x i32> %sum{lane}, i32 {lane}",
        f"%t{lane} = add i32 %o{lane}, %r{lane}",
        f"%sum{lane + 1} = insertelement <4 x i32> %sum{lane}, i32 %t{lane}, i32 {lane}",
    ])  # fmt: skip


def _product(name: str, bytes_of: Any) -> str:
    """A product whose lane i sums over bytes_of(i), pairs (bytes of a, bytes of b)."""
    body = "\n".join(_sum_of_products(bytes_of(lane), lane) for lane in range(4))
    head = f"define internal <4 x i32> @{name}(<4 x i32> %sum0, <16 x i8> %a, <16 x i8> %b)"
    return f"{head} alwaysinline {{\n{body}\nret <4 x i32> %sum4\n}}\n"


def _lookup() -> str:
    """Entry i of the table for byte i; the indices are below 16."""
    lines = []
    for i in range(16):
        lines += [
            f"%i{i} = extractelement <16 x i8> %at, i32 {i}",
            f"%e{i} = extractelement <16 x i8> %table, i8 %i{i}",
            f"%v{i + 1} = insertelement <16 x i8> %v{i}, i8 %e{i}, i32 {i}",
        ]
    lines[2] = lines[2].replace("%v0,", "undef,")
    head = "define internal <16 x i8> @lookup(<16 x i8> %table, <16 x i8> %at) alwaysinline"
    return f"{head} {{\n" + "\n".join(lines) + "\nret <16 x i8> %v16\n}\n"


def _definitions() -> str:
    """Arm's instructions as its architecture manual defines them, for any processor."""

    def sdot(i: int) -> tuple[list[int], list[int]]:
        four = list(range(4 * i, 4 * i + 4))
        return four, four

    def smmla(i: int) -> tuple[list[int], list[int]]:
        row, column = divmod(i, 2)
        return list(range(8 * row, 8 * row + 8)), list(range(8 * column, 8 * column + 8))

    declared = [f"declare i32 @llvm.vector.reduce.add.v{n}i32(<{n} x i32>)\n" for n in (4, 8)]
    return "".join([*declared, _product("sdot", sdot), _product("smmla", smmla), _lookup()])


@functools.cache
def portable_kernel(spec: TileSpec, isa_name: str) -> Any:
    """A kernel emitted for `isa_name` of Arm, its instructions replaced, compiled for here."""
    text = emit_matmul(spec, isa_name)
    for intrinsic, own in _PORTABLE.items():
        quoted = f'@"llvm.aarch64.neon.{intrinsic}"'
        text = re.sub(rf"(?m)^declare .*{re.escape(quoted)}.*$", "", text)
        text = text.replace(quoted, f"@{own}")
    assert "aarch64" not in text
    code = objects.compile_ir(text + _definitions(), "avx2")
    return objects.function(objects.load_object(code))


def check(monkeypatch: pytest.MonkeyPatch, name: str, columns: int, isa_name: str) -> None:
    """As tests/test_tile.py checks kernels of this processor."""
    monkeypatch.setattr(tiles, "matmul_kernel", portable_kernel)
    spec, block = TileSpec(name, columns, "int8"), format_of(name).block
    for n_tokens, n_rows, n_inner in ((1, 17, 32), (9, 40, 256), (60, 67, 512)):
        n_inner = -(-n_inner // block) * block
        raw = random_rows(name, n_rows, n_inner, seed=n_rows)
        x = np.random.default_rng(n_tokens).standard_normal((n_tokens, n_inner)).astype(np.float32)
        x[0, : n_inner // 2] = 0
        x[:, -1] *= 1000  # a block whose other values become small integers
        buffer, held = tiles.activations(spec, x)
        want = matmul_int8(name, raw, *held, fma=True)
        weights = packed(name, raw, n_inner, "avx2")
        got = tiles.matmul(spec, isa_name, weights, buffer, (n_tokens, n_rows, n_inner))
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


needs_avx2 = pytest.mark.skipif("avx2" not in ISAS, reason="float16 and fma of avx2 are needed")


@needs_avx2
@pytest.mark.parametrize("isa_name", ARM)
@pytest.mark.parametrize("columns", [1, 4, 8])
@pytest.mark.parametrize("name", FEW)
def test_bits_are_the_reference(monkeypatch, name: str, columns: int, isa_name: str) -> None:
    check(monkeypatch, name, columns, isa_name)


@needs_avx2
@pytest.mark.sweep
@pytest.mark.parametrize("isa_name", ARM)
@pytest.mark.parametrize("columns", [1, 4, 8])
@pytest.mark.parametrize("name", sorted(set(QUANTISED) - set(FEW)))
def test_bits_of_every_format(monkeypatch, name: str, columns: int, isa_name: str) -> None:
    check(monkeypatch, name, columns, isa_name)
