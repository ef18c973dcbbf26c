"""What decoders of one block are written in: float16 scales, four-bit tables, where values go."""

from __future__ import annotations

from . import simd as s
from .rows import helper


def _words(values):
    """16 signed bytes as two int64, lowest first."""
    halves = (bytes(v & 255 for v in half) for half in (values[:8], values[8:]))
    return [int.from_bytes(half, "little", signed=True) for half in halves]


# kvalues_iq4nl of ggml-common.h
_IQ4_LOW, _IQ4_HIGH = _words(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
)
# E2M1 floats, doubled to be whole (OCP Microscaling Formats v1.0, table 5)
_E2M1_LOW, _E2M1_HIGH = _words([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])


@helper
def f16_at(address):
    return s.half_of(s.load_u16(address))


@helper
def put(out, i, value):
    s.store_f32(out + i * 4, value)


@helper
def entry(low, high, code):
    """Entry `code` (0..15) of a table of signed bytes."""
    word = low if code < 8 else high
    return s.f32(((word >> ((code & 7) * 8) & 255) ^ 128) - 128)


@helper
def iq4_value(code):
    return entry(_IQ4_LOW, _IQ4_HIGH, code)


@helper
def e2m1_value(code):
    return entry(_E2M1_LOW, _E2M1_HIGH, code)
