"""How a page of the cache lies in GPU memory: per KV head groups of 32 dims, one behind the other.

A group holds 32 tokens x 32 dims: the codes or values as fragments of the tensor cores' operands,
then of codes with more than 4 bits a word per token for each further bit (bit d: that of dim d),
then f16 scales and minima of the tokens. Heads are filled up to whole groups; what lies there is
finite. Pieces are 16 bytes, and a lane is 4 g + t with g < 8, t < 4.

A fragment: for each of 4 parts a lane has 8 values. Of K part j, lane (g, t) these are dims
8 t .. 8 t + 7 of token 8 (g / 2) + 2 j + g % 2; of V part s they are tokens 8 t .. 8 t + 7 of dim
8 s + g. So a lane multiplies what it loads, and each token's codes have bytes of their own:

    f16, bf16   [part, lane] pieces
    f32         [part, half, lane] pieces
    bytes       [part / 2, lane] pieces of [part % 2, 8]
    nibbles K   [lane] pieces of [part, 4 bytes]: dims (0, 2) (4, 6) (1, 3) (5, 7), low nibble first
    nibbles V   [lane] pieces of [part / 2, 8 tokens]: even part in the low nibble, odd in the high
"""

from __future__ import annotations

from runtime.ops.kv_formats import GROUP, KV_FORMATS, PAGE, KVFormat, kv_format

TYPES = {name: number for number, name in enumerate(KV_FORMATS)}  # as kernels know them
F32, F16, BF16, Q8_0, Q6_0, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL = range(len(TYPES))
assert list(TYPES) == [
    "f32", "f16", "bf16", "q8_0", "q6_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"
]  # fmt: skip
PIECE = 16  # bytes
BYTE_PIECES, NIBBLE_PIECES = 64, 32  # of a group's codes
BIT_PIECES, SHARED_PIECES = 8, 4  # of a word per token, of an f16 per token


def groups_of(dim: int) -> int:
    """Groups that a head of this many dims takes."""
    return -(-dim // GROUP)


def group_pieces(name: str) -> int:
    """Pieces of a group of a cache type."""
    return PAGE * kv_format(name).token_nbytes(GROUP) // PIECE


def extra_bits(row: KVFormat) -> list[int]:
    """Which bits of a code have words of their own."""
    if row.coding is None or row.codes[0].bits == 8:
        return []
    return [4 + n for n in range(sum(plane.bits for plane in row.codes[1:]))]
