"""What kernels there are, the order of their arguments, and their compile-time constants.

Free of Numba, because a warm process lowers graphs to these names without ever importing it.
Every argument is an int64: an address, a size, or the bit pattern of a float32 (`float_bits`).
Strides count elements, `*_bytes` and `*_nbytes` bytes; `live` is the address of an int64 with the
number of live rows, `n_tiles` that of the number of live tiles.
"""

from __future__ import annotations

import struct

from runtime.backends.cpu.abi import (
    ATTENTION_BLOCKS,
    ATTENTION_ROWS,
    DELTA_COLUMNS,
    DELTA_VECTORS,
    HEAD_UNIT,
    KV_GROUP,
    PAGE,
)
from runtime.ops.errors import BackendError

# file of backends/cpu/kernels -> kernel -> its arguments, in the order of the table
_FILES: dict[str, dict[str, str]] = {
    "executor": {"executor": "control"},
    "norm": {"rms_norm": "x w out live n x_stride out_stride eps"},
    "pack": {
        "pack": "x out live n x_stride",
        "rms_norm_pack": "x w out live n x_stride eps",
        "swiglu_pack": "gate up out live n gate_stride up_stride alpha limit",
        "pack_rows": "x tiles out n_tiles n x_stride divisor",
        "swiglu_pack_rows": "gate up tiles out n_tiles n gate_stride up_stride alpha limit",
        "sigmoid_gate_pack": "x gate out live n head_dim x_stride gate_stride gate_head_stride",
        "gated_norm_pack": "x w gate out live n head_dim x_stride gate_stride gate_head_stride eps",
    },
    "gather": {
        "get_rows": "table ids out live n row_bytes out_stride",
        "gather_rows": "x ids out live n x_stride out_stride",
    },
    "rope": {
        "rope_angles": "positions width components inv_freq out live half mscale",
        "rope": "x angles out live n_heads head_dim half x_stride x_head_stride out_stride",
    },
    "kv_cache": {
        "kv_write": "x pages page_bytes slots live n_kv_heads head_dim x_stride",
        "qkv_post": "q k v q_stride q_head_stride k_stride v_stride q_norm k_norm eps angles half "
        "q_out q_out_stride k_pages v_pages k_page_bytes v_page_bytes slots live n_heads "
        "n_kv_heads head_dim",
    },
    "attention": {
        "attention": "q q_stride q_head_stride k_pages v_pages k_page_bytes v_page_bytes table "
        "table_stride tiles n_tiles places out out_stride n_heads n_kv_heads k_dim v_dim scale "
        "window softcap sinks scratch scratch_bytes",
    },
    "elementwise": {
        **dict.fromkeys(("add", "mul", "swiglu"), "x y out live n x_stride y_stride out_stride"),
        **dict.fromkeys(("silu", "sigmoid", "exp", "log"), "x out live n x_stride out_stride"),
        "softplus": "x out live n x_stride out_stride",
        **dict.fromkeys(("softmax", "normalize"), "x out live n x_stride out_stride"),
        "scale": "x out live n x_stride out_stride factor",
        "row_scale": "x factors out live n x_stride factors_stride out_stride",
        "swiglu_oai": "x y out live n x_stride y_stride out_stride alpha limit",
    },
    "short_conv": {
        "l2_norm": "x out live heads n x_stride head_stride eps",
        **dict.fromkeys(
            ("short_conv", "conv_post"),
            "x w state slot_bytes runs slot_in slot_out out live channels taps block x_stride "
            "norm_first norm_end eps scratch scratch_bytes",
        ),
    },
    "delta": {
        "gated_delta": "q k v decay beta q_stride k_stride v_stride decay_stride beta_stride dt a "
        "state slot_bytes runs slot_in slot_out out live heads key_heads dk dv tiled scale scratch "
        "scratch_bytes",
    },
    "moe": {
        "router": "logits ids weights tiles n_tiles live n_experts k logits_stride scale",
        "expert_group": "ids tiles n_tiles live n_experts k scratch",
        "expert_bias": "y bias ids out live n y_stride out_stride",
        "expert_sum": "y weights shared gate add out live n k shared_stride gate_stride "
        "add_stride out_stride",
        "top_k": "x out live n k x_stride",
        "take": "x ids out live k x_stride",
    },
}

SIGNATURES: dict[str, tuple[str, ...]] = {
    kernel: tuple(names.split()) for file in _FILES.values() for kernel, names in file.items()
}
FILE_OF: dict[str, str] = {kernel: name for name, file in _FILES.items() for kernel in file}

_KV_TYPES = ("f32", "f16", "bf16", "q8_0")
_PACKING = {"C": (1, 4, 8, 16), "kind": ("int8", "f32", "split")}

# kernel -> constant -> the values it may have; a kernel that is not here has none
CONSTANTS: dict[str, dict[str, tuple]] = {
    **dict.fromkeys(_FILES["pack"], _PACKING),
    **{name: _PACKING | {"act": ("silu", "oai")} for name in ("swiglu_pack", "swiglu_pack_rows")},
    "get_rows": {
        "format": (
            *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
            *("q4_k", "q5_k", "q6_k", "iq4_nl"),
            *("mxfp4", "nvfp4", "iq4_xs", "q2_k", "q3_k", "tq1_0", "tq2_0", "q1_0", "q2_0"),
            *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"),
        ),
    },
    "rope": {"style": ("neox", "normal")},
    "kv_write": {"which": ("k", "v"), "type": _KV_TYPES},
    "qkv_post": {"style": ("neox", "normal", "none"), "k_type": _KV_TYPES, "v_type": _KV_TYPES},
    "attention": {"k_type": _KV_TYPES, "v_type": _KV_TYPES},
    "router": {"scoring": ("softmax", "sigmoid", "softmax_topk"), "normalize": (False, True)},
    "expert_group": {"C": _PACKING["C"]},
    "gated_delta": {"gates": ("given", "raw")},
}


def float_bits(value: float) -> int:
    """The bit pattern of a float32, as kernels take float arguments."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def padded_head(head_dim: int) -> int:
    """Dims that a head of this size takes in a page: what kernels read has no odd end."""
    return -(-head_dim // HEAD_UNIT) * HEAD_UNIT


def kv_block_nbytes(kv_type: str, head_dim: int) -> int:
    """Bytes of one KV head's K or V in one page of 32 tokens."""
    dims = padded_head(head_dim)
    if kv_type == "q8_0":
        return PAGE * (dims + 2 * -(-dims // KV_GROUP))
    return PAGE * dims * (4 if kv_type == "f32" else 2)


def conv_scratch_nbytes(block: int, taps: int) -> int:
    """Bytes of scratch that each thread of a short convolution needs: filters and a zero row."""
    return -(-block // 16) * (taps + 1) * 64


def delta_scratch_nbytes(dk: int) -> int:
    """Bytes of scratch that each thread of `gated_delta` needs."""
    return DELTA_VECTORS + dk * DELTA_COLUMNS * 4


def attention_scratch_nbytes(n_heads: int, n_kv_heads: int, k_dim: int, v_dim: int) -> int:
    """Bytes of scratch that each thread of `attention` needs; see kernels/attention.py."""
    rows = ATTENTION_ROWS * (n_heads // n_kv_heads)
    blocks = min(ATTENTION_BLOCKS, -(-rows // ATTENTION_ROWS))
    state = 320 + ATTENTION_ROWS * 4 * (16 + PAGE + padded_head(k_dim) + padded_head(v_dim))
    return -(-blocks * state // 64) * 64


def arguments_of(name: str) -> tuple[str, ...]:
    """Names of a kernel's arguments in the order of its table."""
    from runtime.backends.cpu.tile.spec import KERNEL_ARGS

    found = KERNEL_ARGS.get(name) or SIGNATURES.get(name)
    if found is None:
        raise BackendError(
            f"no CPU kernel is called {name!r}: list its arguments in backends/cpu/signatures.py"
        )
    return found
