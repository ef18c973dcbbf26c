"""Rows of k and v into the pages of the cache, alone or with the norm and rope before it.

Parallel over (token x head). A head is normed, turned by its rope and perhaps rotated for its
cache type (rotation.py) on the stack, then stored rounded, 32 dims at a time; kv_planes.py says
what and where.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from runtime.backends.cpu.abi import MAX_HEAD_DIM
from runtime.backends.plan.catalogue import constants
from runtime.ops.kv_formats import GROUP, KV_FORMATS, PAGE, kv_format

from . import emit as e
from . import simd as s
from .kv_planes import padded, store_group
from .rope import ROTATE
from .rotation import rotating
from .rows import helper, inverse_rms, share


@s.operation(s.i64)
def stage(b):
    """Address of room for one head on the stack."""
    room = cgutils.alloca_once(b, ir.ArrayType(e.f32, MAX_HEAD_DIM))
    return b.ptrtoint(room, e.i64)


@helper
def some(address, n):
    """Up to 16 floats, zeros after the n-th; n may be 0 or less."""
    return s.load(address) if n >= 16 else s.load_part(address, n, s.f32(0))


def _store(kind, which):
    """(row, block, place, d): one head into its block at the token's place in the page."""
    put_group = store_group(kv_format(kind), which)

    @helper
    def put(row, block, place, d):
        for i in range(0, d, GROUP):
            low, high = some(row + i * 4, d - i), some(row + i * 4 + 64, d - i - 16)
            put_group(low, high, block, place, i, padded(d))

    return put


@constants(which=("k", "v"), type=KV_FORMATS)
def build_kv_write(which, type):
    """Heads of k or v, float32, to their places in the pages: parallel over (token x head)."""
    put = _store(type, which)

    def kv_write(
        x, pages, page_bytes, kv_slots, live, n_kv_heads, head_dim, x_stride, thread, n_threads
    ):
        block_bytes = page_bytes // n_kv_heads
        first, last = share(s.load_i64(live) * n_kv_heads, thread, n_threads)
        for item in range(first, last):
            row, head = item // n_kv_heads, item % n_kv_heads
            slot = s.load_i32(kv_slots + row * 4)
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
def unturned(x, angles, out, half):
    """No rope: the head stays as it is."""


@constants(style=("neox", "normal", "none"), k_type=KV_FORMATS, v_type=KV_FORMATS)
def build_qkv_post(style, k_type, v_type):
    """Norm and rope of q and k, and k and v to the pages: parallel over (token x head of any)."""
    put_k, put_v = _store(k_type, "k"), _store(v_type, "v")
    turn, rotate_k, rotate_v = ROTATE.get(style, unturned), rotating(k_type), rotating(v_type)

    def qkv_post(
        q, k, v, q_stride, q_head_stride, k_stride, v_stride, q_norm, k_norm, eps, angles, half,
        q_out, q_out_stride, k_pages, v_pages, k_page_bytes, v_page_bytes, kv_slots, live, n_heads,
        n_kv_heads, head_dim, k_rotation, v_rotation, thread, n_threads,
    ):  # fmt: skip
        room, epsilon, heads = stage(), s.float_of(eps), n_heads + 2 * n_kv_heads
        first, last = share(s.load_i64(live) * heads, thread, n_threads)
        for item in range(first, last):
            row, head = item // heads, item % heads
            angle, slot = angles + row * half * 8, s.load_i32(kv_slots + row * 4)
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
                turn(target, angle, target, half)
                rotate_k(target, head_dim, k_rotation)
                if is_k:
                    block = k_pages + page * k_page_bytes + k_page_bytes // n_kv_heads * kv_head
                    put_k(room, block, place, head_dim)
            else:
                block = v_pages + page * v_page_bytes + v_page_bytes // n_kv_heads * kv_head
                source = v + (row * v_stride + kv_head * head_dim) * 4
                if v_rotation > 0:
                    normed(source, 0, epsilon, room, head_dim)
                    source = room
                    rotate_v(source, head_dim, v_rotation)
                put_v(source, block, place, head_dim)

    return qkv_post
