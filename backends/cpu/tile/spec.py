"""What a matmul kernel is asked to be, and the names of its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.backends.cpu.tile.formats import format_of
from runtime.ops.errors import OpError

MATMUL_ARGS = (
    "w",  # packed weights
    "x",  # packed activations
    "out",  # float32 [tokens, N]
    "out_stride",  # elements between rows of out
    "bias",  # float32 [N], with experts [experts, N], or 0
    "add",  # float32 [tokens, N] added to the result, or 0
    "add_stride",
    "live",  # address of the int64 number of live tokens
    "n_rows",  # N
    "n_inner",  # K
)
INDIRECT_ARGS = (
    "tiles",  # int32 [n_tiles][1 + columns]: expert, then the output row of each column or -1
    "n_tiles",  # address of the int64 number of live tiles
    "expert_stride",  # bytes between the packed weights of two experts
    "bias_stride",  # elements between the biases of two experts
    "every",  # with one column: output rows that share a tile of activations, one after another
)
GET_ROWS_ARGS: tuple[str, ...] = (
    "matrix",  # rows of blocks as in the file
    "ids",  # int32 [rows]
    "out",  # float32 [rows, n]
    "live",  # address of the int64 number of live rows
    "n",  # elements of a row
    "row_bytes",  # between rows of the matrix
    "out_stride",  # elements between rows of out
)
PACKED_ROWS_ARGS: tuple[str, ...] = (
    "matrix",  # packed groups
    "ids",  # int32 [rows]
    "out",  # float32 [rows, n]
    "live",  # address of the int64 number of live rows
    "n",  # elements of a row
    "group_bytes",  # between groups of the matrix
    "out_stride",  # elements between rows of out
)
PACK_ARGS: tuple[str, ...] = (
    "src",  # rows of GGUF blocks
    "dst",  # packed groups
    "n_rows",  # of one matrix
    "n_inner",  # elements of a row
    "src_row_bytes",  # between rows
    "n_matrices",  # 1, or the number of experts
    "src_matrix_bytes",  # between matrices
    "dst_matrix_bytes",  # between packed matrices
)
# kernels of this folder, and the file that each is emitted in
TILE_KERNELS = {
    "matmul": "emit",
    "matmul_id": "emit",
    "pack_weights": "pack",
    "get_rows": "get_rows",
    "get_packed_rows": "packed_rows",
}
AMX_COLUMNS = 16
COLUMNS = (1, 4, 8, AMX_COLUMNS)
Q_BYTES, SIDE_BYTES = 32, 20  # of one block of 32 of one column: int8 values; five 4-byte values
STRETCHES = (1.0, 1.005, 1.01, 1.015)  # of the scale max|x| / 127 of a block: all are tried
PIECES = 3  # bfloat16 values that add up to one float32 activation
TILE_ALIGN = 64


@dataclass(frozen=True)
class TileSpec:
    """One matmul kernel: weight format, columns of a tile, MoE or not.

    coding: how its activations lie: "int8" (blocks of 32 with a float scale), "f32" or, for BF16
    with AMX, "split" (each float32 in three bfloat16 pieces; K must be a multiple of 32).
    indirect: tiles name their expert and output rows (mixture of experts).
    Raises OpError for a combination that does not exist.
    """

    format: str
    columns: int
    coding: str
    indirect: bool = False

    def __post_init__(self) -> None:
        layout = format_of(self.format)
        kinds: tuple[str, ...] = ("f32",) if layout.is_float else ("int8", "f32")
        if layout.name == "BF16":
            kinds += ("split",)
        if self.coding not in kinds:
            raise OpError(
                f"{self.format} weights with {self.coding!r} activations: legal are {kinds}"
            )
        if self.columns not in COLUMNS or (self.columns == AMX_COLUMNS and not self.needs_amx):
            raise OpError(
                f"matmul tile of {self.columns} columns with {self.coding!r} activations: "
                f"legal are {COLUMNS}, the last for AMX only"
            )

    @property
    def needs_amx(self) -> bool:
        """Whether the kernel uses the matrix registers."""
        wide = self.columns == AMX_COLUMNS and self.coding == "int8"
        return wide or self.coding == "split"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the kernel's int64 arguments, in table order."""
        return MATMUL_ARGS + INDIRECT_ARGS if self.indirect else MATMUL_ARGS


def activations_nbytes(rows: int, n_inner: int, columns: int, coding: str) -> int:
    """Bytes of `rows` tokens in tiles of packed activations."""
    return -(-rows // columns) * activation_tile_nbytes(columns, coding, n_inner)


def activation_tile_nbytes(columns: int, coding: str, n_inner: int) -> int:
    """Bytes of one tile of packed activations of `columns` tokens; layouts: kernels/pack.py."""
    if coding == "int8":
        each = n_inner // 32 * (Q_BYTES + SIDE_BYTES)
    else:
        each = (2 * PIECES if coding == "split" else 4) * n_inner
    return -(-each * columns // TILE_ALIGN) * TILE_ALIGN
