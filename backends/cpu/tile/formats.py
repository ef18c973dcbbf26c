"""The packed weight layouts, one row of the table per format.

A GROUP is 16 weight rows. A packed group is a sequence of blocks (as long as the file's blocks),
each: a header, then chunks of 32 to 128 elements. Planes of a block, for 16 rows:

    words   64 bytes each: for every row one 32-bit lane with four consecutive elements
            (a nibble word holds four elements in the low nibbles, four others in the high ones)
    u8, f16 one value per row

Formats of 1 to 8 bits are stored as unsigned codes; a weight is (code - offset) * scale, plus a
minimum where the format has one. Codes of table formats are the table's values plus the offset. In
Q2_K and Q3_K a code is made of the stored bits and the scale of its 16 elements, so that a whole
block of 256 has one float scale. The code book formats (IQ1 to IQ3) keep their indices, with eight
sign bits for eight elements. Float formats have no blocks: [K][16] values, for BF16
[ceil(K/2)][16] pairs of neighbours.

Fields and numbers of the source blocks are those of `ops/blocks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.dtypes import DTYPES, DType
from runtime.ops.errors import OpError

READABLE = ("f32", "f16", "bf16", *BLOCK_FORMATS)  # types whose rows a kernel decodes
ROWS = 16  # weight rows of one group
LINE = 64  # bytes of one word plane of a group


class Plain(NamedTuple):
    """One plane of plain numbers of `unit` bytes.

    Like all that follow: `planes` planes of values of `unit` bytes, one for each row.
    """

    unit: int
    planes: int = 1


class Copy(NamedTuple):
    """The bytes of a field of the source, in order.

    change: "unsigned" adds 128 to signed bytes; "usable" leaves an E4M3 without its top bit and 0
    for 0x7f; "thirds" puts the bits of 32 elements out of 256 into four words of 128 elements.
    """

    unit: int
    planes: int
    field: str
    change: str = ""


class Half(NamedTuple):
    """The float16 that a block's scale, or its minimum, is a multiple of."""

    of: str = "scale"
    unit: int = 2
    planes: int = 1


class Numbers(NamedTuple):
    """Small integers side by side, `width` bits of each from bit `low` on, the first lowest.

    of: "scale" and "minimum" (the steps), "codes", "signs" (eight bits for eight elements),
    "turned" (of a negated step the size, and the top bit for its sign).
    """

    unit: int
    planes: int = 1
    of: str = "scale"
    width: int = 8
    low: int = 0


class Spread(NamedTuple):
    """Words of `width` bits for each element, bits that are neighbours in the field.

    Byte k of a word has, from bit width * w on, those of element 4 w + k.
    """

    field: str
    planes: int = 1
    width: int = 1
    unit: int = 4


Plane = Plain | Copy | Half | Numbers | Spread


@dataclass(frozen=True)
class Format:
    """Layout of one block format: planes, sizes in bytes, lengths in elements."""

    name: str
    chunk: int  # elements of one row that are unpacked together
    head: tuple[Plane, ...]  # before the first chunk of a packed block; its halves come first
    each: tuple[Plane, ...]  # of a chunk of 16 rows
    levels: int = 0  # codes are 0 .. levels - 1; 0 for float formats
    offset: int = 0  # what is subtracted from a code
    scales: int = 1  # scales for each block of 32
    half_minima: bool = False  # the minimum has an integer factor for each half of 32

    @property
    def block(self) -> int:
        """Elements of one row in a block."""
        return DTYPES[self.name.lower()].block

    @property
    def source_bytes(self) -> int:
        """Bytes of one row's block in the file."""
        return DTYPES[self.name.lower()].nbytes

    @property
    def minimum(self) -> bool:
        """Whether a float minimum is added for each block of 32."""
        return not self.is_float and BLOCK_FORMATS[self.name.lower()].minimum is not None

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers rather than codes."""
        return self.levels == 0

    @property
    def gives_rows(self) -> bool:
        """Whether tiles give rows bit for bit as the file's blocks do.

        The negated scales of Q3_K turn over the signs of zeros.
        """
        return self.name != "Q3_K"

    @property
    def chunks(self) -> int:
        """Chunks of one block."""
        return self.block // self.chunk

    @cached_property
    def header(self) -> int:
        """Bytes before the first chunk of a packed block."""
        return _nbytes(self.head)

    @cached_property
    def chunk_bytes(self) -> int:
        """Packed bytes of a chunk of 16 rows."""
        return _nbytes(self.each)

    @property
    def packed_bytes(self) -> int:
        """Bytes of one packed block of 16 rows."""
        return self.header + self.chunks * self.chunk_bytes


def _nbytes(planes: tuple[Plane, ...]) -> int:
    return ROWS * sum(plane.unit * plane.planes for plane in planes)


def _words(field: str, count: int, change: str = "") -> Copy:
    return Copy(4, count, field, change)


def _bytes(field: str, count: int = 1, change: str = "") -> Copy:
    return Copy(1, count, field, change)


_D, _M = Half(), Half("minimum")
_NIBBLES, _FIFTH = _words("qs", 4), Spread("qh")
_K_CHUNK = (Numbers(1, 2), Numbers(1, 2, "minimum"), _words("qs", 8))
_STEPS = Numbers(4, width=4)  # eight scales in a word
_INDEX, _SIGNS = Numbers(4, of="codes"), Numbers(4, of="signs")

_TABLE = {
    f.name: f
    for f in (
        Format("F32", 1, (), (Plain(4),)),
        Format("F16", 1, (), (Plain(2),)),
        Format("BF16", 1, (), (Plain(2),)),
        # name, chunk, head, planes of a chunk, levels, offset
        Format("Q8_0", 32, (), (_D, _words("qs", 8, "unsigned")), 256, 128),
        Format("Q4_0", 32, (), (_D, _NIBBLES), 16, 8),
        Format("Q4_1", 32, (), (_D, _M, _NIBBLES), 16),
        Format("Q5_0", 32, (), (_D, _FIFTH, _NIBBLES), 32, 16),
        Format("Q5_1", 32, (), (_D, _M, _FIFTH, _NIBBLES), 32),
        Format("IQ4_NL", 32, (), (_D, _NIBBLES), 256, 128),
        Format("MXFP4", 32, (), (_bytes("e"), _NIBBLES), 29, 16),
        Format("Q1_0", 128, (), (_D, Spread("qs", 4)), 3, 1),
        Format("Q2_0", 64, (), (_D, Spread("qs", 4, 2)), 4, 1),
        Format("NVFP4", 64, (), (_bytes("d", 4, "usable"), _words("qs", 8)), 29, 16, scales=2),
        Format("TQ1_0", 256, (_D,), (_words("qs", 12), _words("qh", 1)), 3, 1),
        Format("TQ2_0", 32, (_D, _words("qs", 16)), (), 3, 1),
        Format("IQ4_XS", 64, (_D,), (Numbers(1, 2), _words("qs", 8)), 256, 128),
        Format(
            "Q2_K", 32, (_D, _M, _words("qs", 16)), (_bytes("scales", 2),), 46, half_minima=True
        ),
        Format("IQ1_S", 32, (_D,), (_words("qs", 1), Copy(2, 1, "qh")), 26, 16),
        Format(
            "IQ1_M", 32, (_D,), (_words("qs", 1), Copy(2, 1, "qh"), Numbers(1, width=3)), 26, 16,
            scales=2,
        ),
        Format("IQ2_XXS", 32, (_D, _STEPS), (_INDEX, _SIGNS), 256, 128),
        Format(
            "IQ2_XS", 32, (_D, Numbers(4, 1, "codes", 1, low=8)),
            (_INDEX, _SIGNS, _bytes("scales")), 256, 128, scales=2,
        ),
        Format(
            "IQ2_S", 32, (_D,),
            (_words("qs", 1), _words("signs", 1), _bytes("qh"), _bytes("scales")), 256, 128,
            scales=2,
        ),
        Format("IQ3_XXS", 32, (_D, _STEPS), (_words("qs", 2), _SIGNS), 256, 128),
        Format(
            "IQ3_S", 32, (_D, _words("scales", 1)),
            (_words("qs", 2), _words("signs", 1), _bytes("qh")), 256, 128,
        ),
        Format(
            "Q3_K", 32, (_D, _words("qs", 16), _words("hmask", 8, "thirds")),
            (Numbers(1, 2, "turned"),), 256, 128,
        ),
        Format("Q4_K", 64, (_D, _M), _K_CHUNK, 16),
        Format("Q5_K", 64, (_D, _M, _words("qh", 8)), _K_CHUNK, 32),
        Format(
            "Q6_K", 128, (_D,), (_bytes("scales", 8), _words("ql", 16), _words("qh", 8)), 64, 32,
            scales=2,
        ),
    )
}  # fmt: skip
NAMES = tuple(_TABLE)


def format_of(name: str) -> Format:
    """The layout of the GGUF type `name`. Raises OpError listing the types that have a tile."""
    try:
        return _TABLE[name]
    except KeyError:
        raise OpError(f"no matmul tile for weights of type {name}: {', '.join(NAMES)}") from None


def packed_nbytes(name: str, n_rows: int, n_inner: int) -> int:
    """Bytes of a packed [n_rows, n_inner] matrix of type `name`; rows count in groups of 16.

    Raises OpError when n_inner is not a whole number of the format's blocks.
    """
    layout = format_of(name)
    if n_inner % layout.block:
        raise OpError(f"{name} weights: {n_inner} columns are not a multiple of {layout.block}")
    return -(-n_rows // ROWS) * group_nbytes(name, n_inner)


def group_nbytes(name: str, n_inner: int) -> int:
    """Bytes of one packed group of 16 rows."""
    layout = format_of(name)
    blocks = n_inner + n_inner % 2 if name == "BF16" else n_inner // layout.block
    return blocks * layout.packed_bytes


def tile_format(dtype: DType) -> str:
    """The packed format of a weight type; one without a tile is widened when it is loaded."""
    return dtype.name.upper() if dtype.name.upper() in NAMES else "F32"


def rows_from_tiles(dtype: DType) -> bool:
    """Whether a kernel reads rows of a weight type from its tiles, with the bits of the file's."""
    return format_of(tile_format(dtype)).gives_rows
