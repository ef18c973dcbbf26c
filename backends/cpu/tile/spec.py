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
    "bias",  # float32 [N], or 0
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
)
AMX_COLUMNS = 16
COLUMNS = (1, 4, 8, AMX_COLUMNS)
Q_BYTES, SIDE_BYTES = 32, 20  # of one block of 32 of one column: int8 values; five 4-byte values
TILE_ALIGN = 64


@dataclass(frozen=True)
class TileSpec:
    """One matmul kernel: weight format, columns of a tile, kind of activations, MoE or not.

    activations: "int8" (blocks of 32 with a float scale) or "f32".
    indirect: tiles name their expert and output rows (mixture of experts).
    Raises OpError for a combination that does not exist.
    """

    format: str
    columns: int
    activations: str
    indirect: bool = False

    def __post_init__(self) -> None:
        layout = format_of(self.format)
        if self.columns not in COLUMNS:
            raise OpError(f"matmul tile of {self.columns} columns: legal are {COLUMNS}")
        if self.activations not in ("int8", "f32"):
            raise OpError(f"matmul activations {self.activations!r}: legal are 'int8' and 'f32'")
        if layout.is_float and self.activations != "f32":
            raise OpError(f"{self.format} weights take 'f32' activations only")
        if self.columns == AMX_COLUMNS and self.activations != "int8":
            raise OpError(f"matmul tiles of {AMX_COLUMNS} columns take 'int8' activations only")

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the kernel's int64 arguments, in table order."""
        return MATMUL_ARGS + (INDIRECT_ARGS if self.indirect else ())


def activation_tile_nbytes(columns: int, activations: str, n_inner: int) -> int:
    """Bytes of one tile of packed activations of `columns` tokens."""
    each = n_inner // 32 * (Q_BYTES + SIDE_BYTES) if activations == "int8" else 4 * n_inner
    return -(-each * columns // TILE_ALIGN) * TILE_ALIGN
