"""Ops that look at one element at a time, each a function of numbers; a thread an element.

An op of this kind needs nothing but its function here: the first table has those of one operand,
the second those of two. Their last arguments are the op's attributes, in the order of ATTRIBUTES.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    divide,
    entry,
    exp2,
    f32,
    fabs,
    fma,
    fmax,
    fmin,
    launch_next,
    launch_wait,
    load,
    rcp,
    store,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

THREADS = 128
_LOG2_E = f32(1.4426950408889634)
# 2 artanh(s) / s in powers of s^2, the highest first
_ARTANH = tuple(f32(2 / n) for n in (15, 13, 11, 9, 7, 5, 3, 1))
_C7, _C6, _C5, _C4, _C3, _C2, _C1, _C0 = _ARTANH


def exp(x):
    """e^x."""
    return exp2(x * _LOG2_E)


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return rcp(f32(1) + exp(-x))


def silu(x):
    """x / (1 + e^-x); for large negative x the reciprocal of infinity gives -0."""
    return x * sigmoid(x)


def softplus(x):
    """log(1 + e^x), of small terms too: log(1 + t) = 2 artanh(t / (2 + t))."""
    t = exp(-fabs(x))
    s = divide(t, f32(2) + t)
    p = s * s
    high = fma(fma(fma(_C7, p, _C6), p, _C5), p, _C4)
    return fma(s, fma(fma(fma(fma(high, p, _C3), p, _C2), p, _C1), p, _C0), fmax(x, f32(0)))


def gated(gate, up):
    """silu(gate) * up (Shazeer 2020)."""
    return silu(gate) * up


def clamped(gate, up, alpha, limit):
    """(up + 1) * gate * sigmoid(alpha * gate); gate at most limit, up within -limit..limit."""
    gate = fmin(gate, limit)
    up = fmax(fmin(up, limit), -limit)
    return (up + f32(1)) * (gate * sigmoid(alpha * gate))


def _silu(x, a, b):
    return silu(x)


def _sigmoid(x, a, b):
    return sigmoid(x)


def _softplus(x, a, b):
    return softplus(x)


def _scale(x, a, b):
    return x * a


def _add(x, y, a, b):
    return x + y


def _mul(x, y, a, b):
    return x * y


def _swiglu(x, y, a, b):
    return gated(x, y)


UNARY = {"silu": _silu, "sigmoid": _sigmoid, "softplus": _softplus, "scale": _scale}
BINARY = {
    "add": _add, "mul": _mul, "row_scale": _mul, "swiglu": _swiglu, "swiglu_oai": clamped,
}  # fmt: skip
ATTRIBUTES = ("factor", "alpha", "limit")


@constants(op=tuple(UNARY))
def build_unary(op: str) -> Declared:
    """out[row, i] = op(x[row, i]): `count` elements f32 in rows of n. Grid (count / 128)."""
    value = UNARY[op]

    @entry("x:f32* out:f32* n:u32 count:u32 x_stride:u32 a:f32 b:f32", threads=THREADS)
    def unary(x, out, n, count, x_stride, a, b):
        launch_next()
        at = u32(block_x() * THREADS + thread_x())
        row = u32(at // n)
        launch_wait()
        if at < count:
            i = u32(at - u32(row * n))
            store(out, at, value(load(x, u32(row * x_stride + i)), a, b))

    return unary


@constants(op=tuple(BINARY))
def build_binary(op: str) -> Declared:
    """out[row, i] = op(x[row, i], y[row, i]), as `unary`; neighbours in y are `y_step` apart."""
    value = BINARY[op]

    @entry(
        "x:f32* y:f32* out:f32* n:u32 count:u32 x_stride:u32 y_stride:u32 y_step:u32 a:f32 b:f32",
        threads=THREADS,
    )
    def binary(x, y, out, n, count, x_stride, y_stride, y_step, a, b):
        launch_next()
        at = u32(block_x() * THREADS + thread_x())
        row = u32(at // n)
        launch_wait()
        if at < count:
            i = u32(at - u32(row * n))
            other = load(y, u32(row * y_stride + i * y_step))
            store(out, at, value(load(x, u32(row * x_stride + i)), other, a, b))

    return binary
