"""What kernels there are, the order of their arguments, and their compile-time constants.

Free of Numba, because a warm process lowers graphs to these names without ever importing it.
Every argument is an int64: an address, a size, or the bit pattern of a float32 (`float_bits`).
Strides count elements; `live` is the address of an int64 with the number of live rows.
"""

from __future__ import annotations

import struct

# file of backends/cpu/kernels -> kernel -> its arguments, in the order of the table
_FILES: dict[str, dict[str, str]] = {
    "executor": {
        "executor": "control",
    },
    "norm": {
        "rms_norm": "x w out live n x_stride out_stride eps",
    },
    "pack": {
        "pack": "x out live n x_stride",
        "rms_norm_pack": "x w out live n x_stride eps",
        "swiglu_pack": "gate up out live n gate_stride up_stride",
        "pack_rows": "x tiles out n_tiles n x_stride divisor",
        "swiglu_pack_rows": "gate up tiles out n_tiles n gate_stride up_stride",
    },
}

SIGNATURES: dict[str, tuple[str, ...]] = {
    kernel: tuple(names.split()) for file in _FILES.values() for kernel, names in file.items()
}
FILE_OF: dict[str, str] = {kernel: name for name, file in _FILES.items() for kernel in file}

_PACKING = {"C": (1, 4, 8, 16), "kind": ("int8", "f32")}

# kernel -> constant -> the values it may have; a kernel that is not here has none
CONSTANTS: dict[str, dict[str, tuple]] = {
    **dict.fromkeys(_FILES["pack"], _PACKING),
}

# A plan is a table of rows of int64: kernel address, address of its arguments, flags, 0.
PLAN_ROW_WORDS = 4
PLAN_BARRIER = 1  # flag: all threads finish this row before any starts the next

# Words of the executor's control block: what different threads write lies in different lines.
CONTROL = {
    "self": 0,
    **{"generation": 8, "arrivals": 16, "sleepers": 32},
    **{"table": 24, "n_rows": 25, "base": 26, "profile": 27, "stop": 28},
    **{"yield": 40, "lock": 41, "unlock": 42, "wait": 43, "broadcast": 44, "clock": 45},
    **{"clock_id": 48, "clock_high": 49, "clock_low": 50, "spin_ns": 51, "spins": 52},
    **{"mutex": 64, "condition": 80, "threads": 96},  # then 8 words for each thread
}


def float_bits(value: float) -> int:
    """The bit pattern of a float32, as kernels take float arguments."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def packed_nbytes(rows: int, n: int, C: int, kind: str) -> int:
    """Bytes of packed activations of `rows` rows of `n` values in tiles of `C` columns."""
    return -(-rows // C) * packed_tile_nbytes(n, C, kind)


def packed_tile_nbytes(n: int, C: int, kind: str) -> int:
    """Bytes of one tile of packed activations: see kernels/pack.py for its layout."""
    used = n // 32 * C * 52 if kind == "int8" else n * C * 4
    return -(-used // 64) * 64
