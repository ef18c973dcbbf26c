"""Rows of k and v into the pages of the cache, alone or with the norm and rope before it.

A page holds 32 tokens; in it each KV head has one block. With d the head size rounded up to a
multiple of 16, a K block is transposed, [d][32 tokens], so that attention reads 16 keys at once; a
V block is [32 tokens][d]. Type q8_0 is int8 in the same places, then f16 scales of 32 dims each (or
of the last 16), of K [groups][32 tokens] and of V [32 tokens][groups], with
q = x * (1 / (max|x| / 127)) to the nearest even. Dims that a head does not have are zeros.

Parallel over (token x head). A head is normed and rotated on the stack, then stored rounded.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from runtime.backends.cpu.abi import KV_GROUP, MAX_HEAD_DIM, PAGE
from runtime.backends.plan.catalogue import constants
from runtime.ops.rounding import KV_TYPES

from . import emit as e
from . import simd as s
from .rope import ROTATE
from .rows import helper, inverse_rms, padded, share

_SMALLEST = 1e-30  # a block of smaller values is stored as zeros


@s.operation(s.i64)
def stage(b):
    """Address of room for one head on the stack."""
    room = cgutils.alloca_once(b, ir.ArrayType(e.f32, MAX_HEAD_DIM))
    return b.ptrtoint(room, e.i64)


# KV type -> how 16 lanes are stored apart, and the bytes of one value
_STORES = {"f32": (s.scatter, 4), "f16": (s.scatter_half, 2), "bf16": (s.scatter_brain, 2)}


@helper
def some(address, n):
    """Up to 16 floats, zeros after the n-th; n may be 0 or less."""
    return s.load(address) if n >= 16 else s.load_part(address, n, s.f32(0))


def _plain_store(kind, which):
    """(row, block, place, d): one head into its block at the token's place in the page."""
    lanes, size = _STORES[kind]
    is_k = which == "k"

    @helper
    def put(row, block, place, d):
        step = PAGE * size if is_k else size
        at = block + (place * size if is_k else place * padded(d) * size)
        for i in range(0, d, 16):
            lanes(at + i * step, some(row + i * 4, d - i), step, 16)

    return put


def _quantised_store(which):
    is_k = which == "k"

    @helper
    def put(row, block, place, d):
        step, dims = PAGE if is_k else 1, padded(d)
        groups = (dims + KV_GROUP - 1) // KV_GROUP
        at = block + (place if is_k else place * dims)
        scales = block + PAGE * dims + (place * 2 if is_k else place * groups * 2)
        for g in range(groups):
            low, high = some(row + g * 128, d - g * 32), some(row + g * 128 + 64, d - g * 32 - 16)
            peak = s.largest(s.larger(s.absolute(low), s.absolute(high)))
            empty = not peak >= s.f32(_SMALLEST)
            scale = s.f32(0) if empty else peak / s.f32(127)
            inverse = s.splat(s.f32(0) if empty else s.f32(1) / scale)
            s.scatter_bytes(at + g * 32 * step, s.nearest_int(low * inverse), step, 16)
            if g * 32 + 16 < dims:
                s.scatter_bytes(at + (g * 32 + 16) * step, s.nearest_int(high * inverse), step, 16)
            s.store_i16(scales + g * (2 * PAGE if is_k else 2), s.half_bits(scale))

    return put


def _store(kind, which):
    return _quantised_store(which) if kind == "q8_0" else _plain_store(kind, which)


@constants(which=("k", "v"), type=KV_TYPES)
def build_kv_write(which, type):
    put = _store(type, which)

    def kv_write(
        x, pages, page_bytes, slots, live, n_kv_heads, head_dim, x_stride, thread, n_threads
    ):
        block_bytes = page_bytes // n_kv_heads
        first, last = share(s.load_i64(live) * n_kv_heads, thread, n_threads)
        for item in range(first, last):
            row, head = item // n_kv_heads, item % n_kv_heads
            slot = s.load_i32(slots + row * 4)
            block = pages + slot // PAGE * page_bytes + head * block_bytes
            put(x + (row * x_stride + head * head_dim) * 4, block, slot % PAGE, head_dim)

    return kv_write


@helper
def normed(x, w, eps, out, d):
    """Per-head RMS norm, or a copy where there are no weights."""
    factor = s.splat(s.f32(1))
    if w != 0:
        factor = s.splat(inverse_rms(x, d, eps))
    for i in range(0, d, 16):
        value = some(x + i * 4, d - i) * factor
        if w != 0:
            value = value * some(w + i * 4, d - i)
        s.scatter(out + i * 4, value, 4, d - i)


@helper
def unrotated(x, angles, out, half):
    pass


@constants(style=("neox", "normal", "none"), k_type=KV_TYPES, v_type=KV_TYPES)
def build_qkv_post(style, k_type, v_type):
    put_k, put_v = _store(k_type, "k"), _store(v_type, "v")
    rotate = ROTATE.get(style, unrotated)

    def qkv_post(
        q, k, v, q_stride, q_head_stride, k_stride, v_stride, q_norm, k_norm, eps, angles, half,
        q_out, q_out_stride, k_pages, v_pages, k_page_bytes, v_page_bytes, slots, live, n_heads,
        n_kv_heads, head_dim, thread, n_threads,
    ):  # fmt: skip
        room, epsilon, heads = stage(), s.float_of(eps), n_heads + 2 * n_kv_heads
        first, last = share(s.load_i64(live) * heads, thread, n_threads)
        for item in range(first, last):
            row, head = item // heads, item % heads
            turn, slot = angles + row * half * 8, s.load_i32(slots + row * 4)
            page, place = slot // PAGE, slot % PAGE
            kv_head, is_k = (head - n_heads) % n_kv_heads, head >= n_heads
            if head < n_heads + n_kv_heads:
                source = q + (row * q_stride + head * q_head_stride) * 4
                target = q_out + (row * q_out_stride + head * head_dim) * 4
                weights = q_norm
                if is_k:
                    source = k + (row * k_stride + kv_head * head_dim) * 4
                    target, weights = room, k_norm
                normed(source, weights, epsilon, target, head_dim)
                rotate(target, turn, target, half)
                if is_k:
                    block = k_pages + page * k_page_bytes + k_page_bytes // n_kv_heads * kv_head
                    put_k(room, block, place, head_dim)
            else:
                block = v_pages + page * v_page_bytes + v_page_bytes // n_kv_heads * kv_head
                put_v(v + (row * v_stride + kv_head * head_dim) * 4, block, place, head_dim)

    return qkv_post
