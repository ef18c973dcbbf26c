"""Heads of k or v to their places in pages (`kv_layout.py`): a warp a group of 32 dims.

A token's codes have bytes of their own, so tokens may be written in any order and at once.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsics import (
    ballot,
    f32_to_bits,
    f32_to_f16,
    shuffle_xor_u32,
    store,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.cuda.kv_layout import (
    BYTE_PIECES,
    F16,
    F32,
    NIBBLE_PIECES,
    Q5_0,
    Q6_0,
    Q8_0,
)  # fmt: skip

from .kv_rounding import has_minimum, is_float

_BYTE_BYTES, _NIBBLE_BYTES = 16 * BYTE_PIECES, 16 * NIBBLE_PIECES


def fragment(which, token, d):
    """(part, lane, element) of a token's dim d, in K (which = 0) or V."""
    if which == 0:
        lane = u32(u32(8 * (token >> 3)) + u32(4 * (token & 1)) + (d >> 3))
        return u32((token >> 1) & 3), lane, u32(d & 7)
    return u32(d >> 3), u32(u32(4 * (d & 7)) + (token >> 3)), u32(token & 7)


def bf16_bits(x):
    """Bits of the nearest bfloat16, halves to even; NaN stays NaN."""
    bits = f32_to_bits(x)
    if x != x:
        return u32((bits >> 16) | 0x40)
    return u32(u32(bits + u32(0x7FFF + ((bits >> 16) & 1))) >> 16)


def _store_float(x, pages16, pages32, base, which, token, type):
    part, lane, i = fragment(which, token, u32(thread_x() & 31))
    if type == F32:
        at = u32(u32(64 * part + 32 * (i >> 2) + lane) * 4 + (i & 3))
        store(pages32, u32(base * 4 + at), f32_to_bits(x))
    else:
        bits = u32(f32_to_f16(x)) if type == F16 else bf16_bits(x)
        store(pages16, u32(base * 8 + u32(u32(32 * part + lane) * 8 + i)), bits)


def _store_nibbles(code, pages8, at, which, token):
    """The low 4 bits: two lanes to a byte."""
    lane = u32(thread_x() & 31)
    part, place, i = fragment(which, token, lane)
    apart = u32(2) if which == 0 else u32(8)
    other = shuffle_xor_u32(code, apart)
    inside = u32(4 * part + (i >> 2) + 2 * (i & 1)) if which == 0 else u32(8 * (part >> 1) + i)
    if lane & apart == 0:
        byte = u32((code & 15) | u32((other & 15) << 4))
        store(pages8, u32(at + u32(16 * place + inside)), byte)


def _store_bit(code, bit, pages32, at, token):
    word = ballot((code >> bit) & 1)
    if thread_x() & 31 == 0:
        store(pages32, u32((at >> 2) + token), word)


def _store_codes(code, pages8, pages32, at, which, token, type):
    """Codes of the 32 lanes, from byte `at` on; the byte behind them."""
    if type == Q8_0:
        part, lane, i = fragment(which, token, u32(thread_x() & 31))
        inside = u32(u32(32 * (part >> 1) + lane) * 16 + 8 * (part & 1) + i)
        store(pages8, u32(at + inside), code)
        return u32(at + _BYTE_BYTES)
    _store_nibbles(code, pages8, at, which, token)
    at = u32(at + _NIBBLE_BYTES)
    if Q6_0 <= type <= Q5_0:
        _store_bit(code, 4, pages32, at, token)
        at = u32(at + 128)
    if type == Q6_0:
        _store_bit(code, 5, pages32, at, token)
        at = u32(at + 128)
    return at


def put_group(x, made, pages8, pages16, pages32, base, which, token, type):
    """This lane's x, one of 32 dims of a token of a page, to the group at piece `base`.

    made: what `rounded` gave for it, of types with codes.
    """
    if is_float(type):
        _store_float(x, pages16, pages32, base, which, token, type)
    else:
        at = _store_codes(made[0], pages8, pages32, u32(16 * base), which, token, type)
        if thread_x() & 31 == 0:
            store(pages16, u32((at >> 1) + token), f32_to_f16(made[1]))
            if has_minimum(type):
                store(pages16, u32((at >> 1) + 32 + token), f32_to_f16(made[2]))
