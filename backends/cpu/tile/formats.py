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

Source layouts: the GGUF specification (ggml-common.h names the fields d, m, qh, ql, scales).
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.dtypes import DType
from runtime.ops.errors import OpError

READABLE = ("f32", "f16", "bf16", *BLOCK_FORMATS)  # types whose rows a kernel decodes
ROWS = 16  # weight rows of one group
LINE = 64  # bytes of one word plane of a group


@dataclass(frozen=True)
class Format:
    """Layout of one block format: sizes in bytes, lengths in elements."""

    name: str
    block: int  # elements of one row in a block
    source_bytes: int  # of one row's block in the file
    header: int  # bytes before the first chunk of a packed block
    chunk: int  # elements of one row that are unpacked together
    chunk_bytes: int  # packed bytes of a chunk of 16 rows
    levels: int = 0  # codes are 0 .. levels - 1; 0 for float formats
    offset: int = 0  # what is subtracted from a code
    minimum: bool = False  # a float minimum is added for each block of 32
    scales: int = 1  # scales for each block of 32
    half_minima: bool = False  # the minimum has an integer factor for each half of 32

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers rather than codes."""
        return self.levels == 0

    @property
    def chunks(self) -> int:
        """Chunks of one block."""
        return self.block // self.chunk

    @property
    def packed_bytes(self) -> int:
        """Bytes of one packed block of 16 rows."""
        return self.header + self.chunks * self.chunk_bytes


_TABLE = {
    f.name: f
    for f in (
        Format("F32", 1, 4, 0, 1, 64),
        Format("F16", 1, 2, 0, 1, 32),
        Format("BF16", 1, 2, 0, 1, 32),
        # name, block, source, header, chunk, chunk bytes, levels, offset
        Format("Q8_0", 32, 34, 0, 32, 32 + 8 * LINE, 256, 128),
        Format("Q4_0", 32, 18, 0, 32, 32 + 4 * LINE, 16, 8),
        Format("Q4_1", 32, 20, 0, 32, 64 + 4 * LINE, 16, minimum=True),
        Format("Q5_0", 32, 22, 0, 32, 32 + 5 * LINE, 32, 16),
        Format("Q5_1", 32, 24, 0, 32, 64 + 5 * LINE, 32, minimum=True),
        Format("IQ4_NL", 32, 18, 0, 32, 32 + 4 * LINE, 256, 128),
        Format("MXFP4", 32, 17, 0, 32, ROWS + 4 * LINE, 29, 16),
        Format("Q1_0", 128, 18, 0, 128, 32 + 4 * LINE, 3, 1),
        Format("Q2_0", 64, 18, 0, 64, 32 + 4 * LINE, 4, 1),
        Format("NVFP4", 64, 36, 0, 64, 4 * ROWS + 8 * LINE, 29, 16, scales=2),
        Format("TQ1_0", 256, 54, 32, 256, 13 * LINE, 3, 1),
        Format("TQ2_0", 256, 66, 32 + 16 * LINE, 32, 0, 3, 1),
        Format("IQ4_XS", 256, 136, 32, 64, 32 + 8 * LINE, 256, 128),
        Format("Q2_K", 256, 84, 64 + 16 * LINE, 32, 2 * ROWS, 46, minimum=True, half_minima=True),
        Format("IQ1_S", 256, 50, 32, 32, LINE + 2 * ROWS, 26, 16),
        Format("IQ1_M", 256, 56, 32, 32, LINE + 3 * ROWS, 26, 16, scales=2),
        Format("IQ2_XXS", 256, 66, 32 + LINE, 32, 2 * LINE, 256, 128),
        Format("IQ2_XS", 256, 74, 32 + LINE, 32, 2 * LINE + ROWS, 256, 128, scales=2),
        Format("IQ2_S", 256, 82, 32, 32, 2 * LINE + 2 * ROWS, 256, 128, scales=2),
        Format("IQ3_XXS", 256, 98, 32 + LINE, 32, 3 * LINE, 256, 128),
        Format("IQ3_S", 256, 110, 32 + LINE, 32, 3 * LINE + ROWS, 256, 128),
        Format("Q3_K", 256, 110, 32 + 24 * LINE, 32, 2 * ROWS, 256, 128),
        Format("Q4_K", 256, 144, 64, 64, 64 + 8 * LINE, 16, minimum=True),
        Format("Q5_K", 256, 176, 64 + 8 * LINE, 64, 64 + 8 * LINE, 32, minimum=True),
        Format("Q6_K", 256, 210, 32, 128, 128 + 24 * LINE, 64, 32, scales=2),
    )
}
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


# The non-linear 4-bit values of IQ4_NL (kvalues_iq4nl of the GGUF reference).
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Four-bit floats (E2M1), doubled to be whole (OCP Microscaling Formats v1.0, table 5).
E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def tile_format(dtype: DType) -> str:
    """The packed format of a weight type; one without a tile is widened when it is loaded."""
    return dtype.name.upper() if dtype.name.upper() in NAMES else "F32"
