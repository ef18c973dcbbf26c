"""What is derived from the description of a block format, and what a further format costs."""

from __future__ import annotations

import numpy as np
import pytest
from tile_calls import Guarded, call, loaded

from runtime.backends.cpu.compile.isa import available
from runtime.backends.cpu.tile.get_rows import emit_get_rows
from runtime.ops.blocks import (
    BLOCK_FORMATS,
    Bits,
    BlockFormat,
    Number,
    Scale,
    Trits,
    count_of,
    join,
    place_of,
)
from runtime.ops.quant_blocks import decode, numbers, struct_of

# Formats nobody has: 4 bits for each of 16, and 3 bits with scales of 6 in a word of 16.
PLAIN = BlockFormat("plain", 900, 16, "d:f2 qs:u1*8", Bits("qs", 4, 8), Scale("d"), offset=8)
ODD = BlockFormat(
    "odd", 901, 64, "scales:u2*2 qh:u1*8 d:f2 qs:u1*16", join(Bits("qs", 2, 16), Bits("qh", 1)),
    Scale("d", Bits("scales", 6, per=2), plus=-32),
    Scale("d", Bits("scales", 4, start=12), unit=-1),
    levels=(-9, -4, -2, 0, 1, 3, 5, 8),
)  # fmt: skip


def values_by_hand(row: BlockFormat, block: bytes) -> list[float]:
    """Of one block of PLAIN or ODD, in Python's floats, which are exact here."""
    if row is PLAIN:
        d = float(np.frombuffer(block, "<f2", 1)[0])
        return [d * ((block[2 + i % 8] >> i // 8 * 4 & 15) - 8) for i in range(16)]
    d, words = float(np.frombuffer(block, "<f2", 1, 12)[0]), np.frombuffer(block, "<u2", 2).tolist()
    found = []
    for i in range(64):
        code = block[14 + i % 16] >> i // 16 * 2 & 3 | (block[4 + i // 8] >> i % 8 & 1) << 2
        steps, low = words[i // 32] >> i // 16 % 2 * 6 & 63, words[i // 32] >> 12
        found.append(d * (steps - 32) * ODD.levels[code] - d * low)
    return found


@pytest.mark.parametrize("row", [PLAIN, ODD], ids=lambda row: row.name)
def test_a_further_format_is_one_row(monkeypatch: pytest.MonkeyPatch, row: BlockFormat) -> None:
    """Values in numpy and by the kernel for embedding rows, with nothing but the description."""
    monkeypatch.setitem(BLOCK_FORMATS, row.name, row)
    rng, blocks = np.random.default_rng(4), 3
    raw = rng.integers(0, 256, (5, blocks, row.nbytes)).astype(np.uint8)
    offset = row.fields["d"].offset
    raw[..., offset : offset + 2] = rng.uniform(-1, 1, (5, blocks, 1)).astype("<f2").view(np.uint8)
    wanted = [[values_by_hand(row, block.tobytes()) for block in each] for each in raw]
    wanted = np.array(wanted, np.float32).reshape(5, -1)
    found = decode(row, raw.reshape(-1).view(struct_of(row)))
    assert np.array_equal(found.reshape(5, -1), wanted)
    kernel = loaded(emit_get_rows(row.name, available()[0]), available()[0])
    table, ids = Guarded.of(raw), np.array([4, 0, 4], np.int32)
    out, live = Guarded(4 * 3 * wanted.shape[1]), np.array([3], np.int64)
    args = [table.address, ids.ctypes.data, out.address, live.ctypes.data, wanted.shape[1]]
    call(kernel, [*args, raw[0].nbytes, wanted.shape[1]], 2)
    out.check()
    assert np.array_equal(out.bytes.view(np.float32).reshape(3, -1), wanted[ids])


def parts_of(row: BlockFormat) -> list[Bits | Trits]:
    """Every number of a format that lies in one field."""
    scales = [scale for scale in (row.scale, row.minimum) if scale]
    found: list[Bits | Trits] = []

    def add(number: Number | str | None) -> None:
        if isinstance(number, (Bits, Trits)):
            found.append(number)
        elif number is not None and not isinstance(number, str):
            for part in number.parts:
                add(part)

    for number in (row.codes, row.signs, row.down, *(s.steps for s in scales), row.scale.base):
        add(number)
    return found


@pytest.mark.parametrize("row", [*BLOCK_FORMATS.values(), ODD], ids=lambda row: row.name)
def test_places_of_numbers_are_where_numpy_finds_them(row: BlockFormat) -> None:
    """One by one with Python's integers: what the emitters read by."""
    raw = np.random.default_rng(row.gguf_id).integers(0, 256, row.nbytes).astype(np.uint8)
    block = raw.view(struct_of(row))
    for number in parts_of(row):
        words = block[number.field][0].tolist()
        found = []
        for i in range(count_of(number, row)):
            word, place = place_of(number, row, i)
            if isinstance(number, Trits):
                found.append((words[word] * 3**place & 255) * 3 >> 8)
            elif number.width == 8 * row.fields[number.field].nbytes:
                found.append(words[word])
            else:
                found.append(words[word] >> place & (1 << number.width) - 1)
        assert numbers(row, number, block)[0].tolist() == found, number
