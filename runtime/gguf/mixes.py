"""Which type a quantised file gives each of its tensors.

A mix ("Q4_K_M") is a type for most matrices and others for some of them, as llama.cpp's quantiser
chooses without an importance matrix; a plain type ("Q8_0") is a mix too. Vectors, norms, routers
and filters stay float32 in every file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from runtime.ops.dtypes import DTYPES, F16, F32, MXFP4, Q8_0, DType
from runtime.ops.errors import OptionError, shown

Which = Callable[[int, int], bool]  # of the i-th of n: whether it is given this type
Choice = tuple[Which, str]

MXFP4_MOE = "MXFP4_MOE"  # experts MXFP4, all other matrices Q8_0


def more_bits(i: int, n: int) -> bool:
    """The first eighth, the last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first(share: int) -> Which:
    return lambda i, n: i < n // share


def _below(count: int) -> Which:
    return lambda i, n: i < count


def _all(i: int, n: int) -> bool:
    return True


@dataclass(frozen=True)
class Mix:
    """`base` for most matrices, `output` for the output matrix, and for some roles the first of
    their choices that holds."""

    base: str
    output: str = "q6_k"
    roles: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)


MIXES = {
    "Q2_K": Mix("q2_k", roles={
        "attn_v": ((_all, "q4_k"),), "ffn_down": ((_all, "q3_k"),),
        "attn_output": ((_all, "q3_k"),),
    }),
    "Q3_K_S": Mix("q3_k"),
    "Q3_K_M": Mix("q3_k", roles={
        "attn_v": ((_below(2), "q5_k"), (_all, "q4_k")), "attn_qkv": ((_all, "q4_k"),),
        "ffn_down": ((_first(16), "q5_k"), (_all, "q4_k")), "attn_output": ((_all, "q4_k"),),
    }),
    "Q4_K_S": Mix("q4_k", roles={
        "attn_v": ((_below(4), "q5_k"),), "ffn_down": ((_first(8), "q5_k"),),
    }),
    "Q4_K_M": Mix("q4_k", roles={
        "attn_v": ((more_bits, "q6_k"),), "attn_qkv": ((_all, "q5_k"),),
        "ffn_down": ((more_bits, "q6_k"),),
    }),
    "Q5_K_S": Mix("q5_k"),
    "Q5_K_M": Mix("q5_k", roles={
        "attn_v": ((more_bits, "q6_k"),), "attn_qkv": ((_all, "q6_k"),),
        "ffn_down": ((more_bits, "q6_k"),),
    }),
    "IQ4_XS": Mix("iq4_xs", roles={
        "attn_v": ((_all, "q5_k"),), "ffn_down": ((_first(8), "q5_k"),),
    }),
    "IQ4_NL": Mix("iq4_nl", roles={
        "attn_v": ((_all, "q5_k"),), "ffn_down": ((_first(8), "q5_k"),),
    }),
    MXFP4_MOE: Mix("q8_0", "q8_0"),
}  # fmt: skip
_PLAIN = ("f32", "f16", "bf16", "q8_0")  # that the output matrix has too
# What takes the place of a type whose blocks do not fit into a row, by its size.
_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}

_FLOAT32 = re.compile(r"norm|ffn_gate_inp\.|ssm_conv1d|rope_f|attn_sinks")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def mix_of(name: str) -> Mix:
    """The mix or plain type of this name; OptionError lists what there is."""
    upper = name.upper()
    if upper in MIXES:
        return MIXES[upper]
    lower, plain = name.lower(), [n for n, d in DTYPES.items() if d.is_blocked or d.is_float]
    if lower in plain:
        return Mix(lower, lower if lower in _PLAIN else "q6_k")
    known = sorted({*MIXES, *map(str.upper, plain)})
    raise OptionError(f"weight type {shown(name)} is not known; there are {', '.join(known)}")


def types(shapes: Mapping[str, tuple[int, ...]], name: str, layers: int) -> dict[str, DType]:
    """The type of each tensor of a file, by name, in a mix or plain type of that name.

    shapes: all tensors of the file, outermost axis first. layers: blocks of the model.
    """
    mix = mix_of(name)
    values = sum(tensor.endswith(".attn_v.weight") for tensor in shapes)
    found, seen = {}, 0
    for tensor, shape in shapes.items():
        if not tensor.endswith(".weight") or len(shape) < 2 or _FLOAT32.search(tensor):
            found[tensor] = F32
            continue
        if name.upper() == MXFP4_MOE:
            found[tensor] = MXFP4 if len(shape) > 2 else Q8_0
            continue
        role, at, count = _place(tensor, layers, "output.weight" not in shapes)
        if role == "attn_v":
            at, count, seen = seen, values, seen + 1
        chosen = mix.output if role == "output" else _chosen(mix, role, at, count)
        if role == "attn_v" and layers >= 80 and chosen in ("q3_k", "q4_k"):
            chosen = "q5_k"  # small where many heads share it
        found[tensor] = _fitting(chosen, shape[-1])
    return found


def _place(tensor: str, layers: int, tied: bool) -> tuple[str, int, int]:
    """Role of a matrix, its number and of how many."""
    block = _BLOCK.fullmatch(tensor)
    if block is None:
        output = tensor == "output.weight" or (tied and tensor == "token_embd.weight")
        return "output" if output else "", 0, 1
    role = "ffn_down" if block[2].startswith("ffn_down") else block[2]
    return role, int(block[1]), layers


def _chosen(mix: Mix, role: str, at: int, count: int) -> str:
    choices = mix.roles.get(role, ())
    return next((dtype for which, dtype in choices if which(at, count)), mix.base)


def _fitting(name: str, row: int) -> DType:
    """The type, or the one that takes its place for rows of that length."""
    for each in (name, _FALLBACK.get(name, "iq4_nl")):
        if row % DTYPES[each].block == 0:
            return DTYPES[each]
    return F16
