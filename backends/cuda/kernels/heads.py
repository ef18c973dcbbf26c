"""What happens to heads between their projections and attention, a warp a head: norm, rope and
rotation, q to memory, k and v rounded into their pages.

Types and styles are arguments: no launch is long enough for more kernels to pay.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    constant,
    divide,
    entry,
    f32,
    launch_next,
    launch_wait,
    load,
    load2,
    registers,
    rsqrt,
    shared,
    store,
    syncwarp,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .kv_rounding import rounded
from .kv_store import put_group
from .rotation import WARPS, rotating
from .sums import warp_sum

GROUPS = (4, 8)  # of 32 dims, that a head may have
STYLES = {"none": 0, "neox": 1, "normal": 2}


def _loading(groups: int) -> Callable:
    """values = a head of `dim`, zeros behind it."""

    def load_head(values, x, at, dim):
        lane = u32(thread_x() & 31)
        for k in range(groups):
            values[k] = f32(0)
            if u32(32 * k + lane) < dim:
                values[k] = load(x, u32(at + 32 * k + lane))

    return load_head


def _norming(groups: int) -> Callable:
    """RMS norm of a head with weights w."""

    def norm(values, w, eps, dim):
        lane, total = u32(thread_x() & 31), f32(0)
        for k in range(groups):
            total += values[k] * values[k]
        r = rsqrt(divide(warp_sum(total), f32(dim)) + eps)
        for k in range(groups):
            if u32(32 * k + lane) < dim:
                values[k] = (values[k] * r) * constant(w, u32(32 * k + lane))

    return norm


def _staging(groups: int) -> Callable:
    """values to the warp's room in shared memory; this lane's first place there."""
    rooms = shared("f32", WARPS * groups * 32)

    def stage(values):
        room = rooms()
        base = u32((thread_x() >> 5) * (groups * 32) + (thread_x() & 31))
        for k in range(groups):
            room[u32(base + 32 * k)] = values[k]
        syncwarp()
        return room, base

    return stage


def _turning(groups: int, stage: Callable) -> Callable:
    """Rope: pairs (i, i + half) of style 1, (2 i, 2 i + 1) of style 2, of the first 2 half dims."""

    def turn(values, angles, at, half, style):
        room, base = stage(values)
        for k in range(groups):
            d = u32(32 * k + (thread_x() & 31))
            if d < 2 * half:
                apart = half if style == 1 else u32(1)
                first = d < half if style == 1 else d & 1 == 0
                pair = u32(d >> 1)
                if style == 1:
                    pair = d if first else u32(d - half)
                c, s = load2(angles, u32(at + pair))
                place = u32(base + 32 * k)
                other = room[u32(place + apart) if first else u32(place - apart)]
                values[k] = values[k] * c - other * s if first else other * s + values[k] * c
        syncwarp()

    return turn


def head_groups(slot, heads, head, dim):
    """The groups of a head in its page: the first of them, and the one behind the last."""
    n = u32((dim + 31) >> 5)
    first = u32(u32(u32(slot >> 5) * heads + head) * n)
    return first, u32(first + n)


@constants(groups=GROUPS)
def build_kv_write(groups: int) -> Declared:
    """Rows of k (which = 0) or v, x f32 [tokens, KV heads, dim] of row stride `x_stride`, to their
    kv_slots i32 [tokens]: page x 32 + token of the page.

    The pages come three times, as bytes, halves and words; `pieces` of 16 bytes are a group of 32
    dims. Grid (KV heads / 4 rounded up, tokens).
    """
    held = registers("f32", groups)
    load_head, stage = _loading(groups), _staging(groups)

    @entry(
        "x:f32* pages8:u8* pages16:u16* pages32:u32* kv_slots:i32* live:u32* heads:u32 dim:u32 "
        "x_stride:u32 which:u32 type:u32 pieces:u32",
        threads=32 * WARPS,
    )
    def kv_write(
        x, pages8, pages16, pages32, kv_slots, live, heads, dim, x_stride, which, type, pieces
    ):
        launch_next()
        head, values = u32(block_x() * WARPS + (thread_x() >> 5)), held()
        launch_wait()
        if head < heads and block_y() < load(live, u32(0)):
            load_head(values, x, u32(block_y() * x_stride + u32(head * dim)), dim)
            slot = u32(load(kv_slots, block_y()))
            group, end = head_groups(slot, heads, head, dim)
            room, at = stage(values)
            while group < end:
                made, base = rounded(room[at], type), u32(group * pieces)
                put_group(
                    room[at], made, pages8, pages16, pages32, base, which, u32(slot & 31), type
                )
                group, at = u32(group + 1), u32(at + 32)

    return kv_write


@constants(groups=GROUPS)
def build_qkv_post(groups: int) -> Declared:
    """Norm, rope and rotation of q and k, q_out f32 [tokens, heads, dim], k and v to their pages.

    q f32 [tokens, heads, dim] of strides; k, v f32 [tokens, KV heads, dim] of row strides. Norms
    where `has_norm`, angles f32 [tokens, half, 2] where `style` is not 0, rotations where they are
    not 0. Grid (heads and twice KV heads / 4 rounded up, tokens).
    """
    held = registers("f32", groups)
    load_head, norm, stage = _loading(groups), _norming(groups), _staging(groups)
    turn, rotate = _turning(groups, stage), rotating(groups)

    @entry(
        "q:f32* k:f32* v:f32* q_norm:f32* k_norm:f32* angles:f32* q_out:f32* k_pages8:u8* "
        "k_pages16:u16* k_pages32:u32* v_pages8:u8* v_pages16:u16* v_pages32:u32* kv_slots:i32* "
        "live:u32* q_stride:u32 q_head_stride:u32 k_stride:u32 v_stride:u32 heads:u32 "
        "kv_heads:u32 dim:u32 half:u32 style:u32 has_norm:u32 eps:f32 k_rotation:u32 "
        "v_rotation:u32 k_type:u32 v_type:u32 k_pieces:u32 v_pieces:u32",
        threads=32 * WARPS,
    )
    def qkv_post(
        q, k, v, q_norm, k_norm, angles, q_out, k_pages8, k_pages16, k_pages32, v_pages8,
        v_pages16, v_pages32, kv_slots, live, q_stride, q_head_stride, k_stride, v_stride, heads,
        kv_heads, dim, half, style, has_norm, eps, k_rotation, v_rotation, k_type, v_type,
        k_pieces, v_pieces,
    ):  # fmt: skip
        launch_next()
        row, token = u32(block_x() * WARPS + (thread_x() >> 5)), block_y()
        values, lane = held(), u32(thread_x() & 31)
        launch_wait()
        if row < heads + 2 * kv_heads and token < load(live, u32(0)):
            head, rotation = u32(row - heads), k_rotation
            if row < heads:
                load_head(values, q, u32(u32(token * q_stride) + u32(row * q_head_stride)), dim)
                if has_norm:
                    norm(values, q_norm, eps, dim)
            elif head < kv_heads:
                load_head(values, k, u32(u32(token * k_stride) + u32(head * dim)), dim)
                if has_norm:
                    norm(values, k_norm, eps, dim)
            else:
                rotation = v_rotation
                at = u32(u32(token * v_stride) + u32(u32(head - kv_heads) * dim))
                load_head(values, v, at, dim)
            if style != 0 and row < heads + kv_heads:
                turn(values, angles, u32(token * half), half, style)
            if rotation != 0:
                rotate(values, dim, rotation)
            if row < heads:
                target = u32(u32(u32(token * heads) + row) * dim + lane)
                for n in range(groups):
                    if u32(32 * n + lane) < dim:
                        store(q_out, u32(target + 32 * n), values[n])
            else:
                is_k = head < kv_heads
                slot = u32(load(kv_slots, token))
                type, pieces = (k_type, k_pieces) if is_k else (v_type, v_pieces)
                head = head if is_k else u32(head - kv_heads)
                group, end = head_groups(slot, kv_heads, head, dim)
                room, at = stage(values)
                while group < end:
                    x, made, base = room[at], rounded(room[at], type), u32(group * pieces)
                    inside = u32(slot & 31)
                    if is_k:
                        put_group(
                            x, made, k_pages8, k_pages16, k_pages32, base, u32(0), inside, type
                        )
                    else:
                        put_group(
                            x, made, v_pages8, v_pages16, v_pages32, base, u32(1), inside, type
                        )
                    group, at = u32(group + 1), u32(at + 32)

    return qkv_post
