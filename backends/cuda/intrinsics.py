"""Everything a kernel may call: each operation's PTX beside its meaning in Python.

Integers are unsigned or signed 32-bit unless named otherwise; kernels cast with u32() and i32()
after each step, because the compiler widens sums and products to 64 bits. An index of an access of
`n` elements counts units of n elements. Operations of a warp need all 32 lanes.

Fragments of the matrix operations are those of the PTX manual (mma.m16n8k16, mma.m16n8k32,
ldmatrix); `meanings.py` spells them out.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from . import meanings as m
from .intrinsic import Intrinsic, entry

__all__ = ["Intrinsic", "dynamic_shared", "entry", "registers", "shared"]


def _op(name: str, meaning: Any, results: str = "", arguments: str = "", **rest: Any) -> Intrinsic:
    return Intrinsic(name, meaning, tuple(results.split()), tuple(arguments.split()), **rest)


def _rule(name: str, meaning: Any, rule: str, *parameters: Any, effect: str = "") -> Intrinsic:
    return Intrinsic(name, meaning, rule=rule, parameters=parameters, effect=effect)


# Where a thread is
thread_x = _rule("thread_x", m.thread_x, "register", "tid.x")
block_x = _rule("block_x", lambda: m.block_index(0), "register", "ctaid.x")
block_y = _rule("block_y", lambda: m.block_index(1), "register", "ctaid.y")
block_z = _rule("block_z", lambda: m.block_index(2), "register", "ctaid.z")
grid_x = _rule("grid_x", lambda: m.grid_size(0), "register", "nctaid.x")
grid_y = _rule("grid_y", lambda: m.grid_size(1), "register", "nctaid.y")

# Casts: integers wrap
u32 = _rule("u32", m.u32, "cast", "u32")
i32 = _rule("i32", m.i32, "cast", "i32")
f32 = _rule("f32", m.f32, "cast", "f32")

# Conversions
int_to_f32 = _op("int_to_f32", m.f32, "f32", "i32", ptx="cvt.rn.f32.s32 $0, $1;")
round_i32 = _op("round_i32", m.round_i32, "i32", "f32", ptx="cvt.rni.s32.f32 $0, $1;")
bits_to_f32 = _op("bits_to_f32", m.bits_to_f32, "f32", "u32", ptx="mov.b32 $0, $1;")
f32_to_bits = _op("f32_to_bits", m.f32_to_bits, "u32", "f32", ptx="mov.b32 $0, $1;")
f16_to_f32 = _op("f16_to_f32", m.f16_low, "f32", "u16", ptx="cvt.f32.f16 $0, $1;")
f32_to_f16 = _op("f32_to_f16", m.f32_to_f16, "u16", "f32", ptx="cvt.rn.f16.f32 $0, $1;")
_HALVES = "{.reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.f32.f16 $0, %s;}"
f16_low = _op("f16_low", m.f16_low, "f32", "u32", ptx=_HALVES % "lo")
f16_high = _op("f16_high", m.f16_high, "f32", "u32", ptx=_HALVES % "hi")
pack_f16 = _op("pack_f16", m.pack_f16, "u32", "f32 f32", ptx="cvt.rn.f16x2.f32 $0, $2, $1;")
pack_bf16 = _op("pack_bf16", m.pack_bf16, "u32", "f32 f32", ptx="cvt.rn.bf16x2.f32 $0, $2, $1;")

# Arithmetic; exp2, rcp and rsqrt are the hardware's approximations (2 ulp or less)
fma = _op("fma", m.fma, "f32", "f32 f32 f32", ptx="fma.rn.f32 $0, $1, $2, $3;")
# a product that no sum is fused with
multiply = _op("multiply", m.multiply, "f32", "f32 f32", ptx="mul.rn.f32 $0, $1, $2;")
fmax = _op("fmax", m.fmax, "f32", "f32 f32", ptx="max.f32 $0, $1, $2;")
fmin = _op("fmin", m.fmin, "f32", "f32 f32", ptx="min.f32 $0, $1, $2;")
fabs = _op("fabs", m.fabs, "f32", "f32", ptx="abs.f32 $0, $1;")
exp2 = _op("exp2", m.exp2, "f32", "f32", ptx="ex2.approx.ftz.f32 $0, $1;")
rcp = _op("rcp", m.rcp, "f32", "f32", ptx="rcp.approx.ftz.f32 $0, $1;")
rsqrt = _op("rsqrt", m.rsqrt, "f32", "f32", ptx="rsqrt.approx.f32 $0, $1;")
divide = _op("divide", m.divide, "f32", "f32 f32", ptx="div.rn.f32 $0, $1, $2;")
floor = _op("floor", m.floor, "f32", "f32", ptx="cvt.rmi.f32.f32 $0, $1;")
shift_right = _op("shift_right", m.shift_right, "i32", "i32 i32", ptx="shr.s32 $0, $1, $2;")
prmt = _op("prmt", m.prmt, "u32", "u32 u32 u32", ptx="prmt.b32 $0, $1, $2, $3;")

# Sums of products of bytes: c + a . b
dp4a = _op("dp4a", m.dp4a, "i32", "u32 u32 i32", ptx="dp4a.s32.s32 $0, $1, $2, $3;")
dp4a_us = _op("dp4a_us", m.dp4a_us, "i32", "u32 u32 i32", ptx="dp4a.u32.s32 $0, $1, $2, $3;")
# two int16 of a with the two low signed bytes of b
dp2a = _op("dp2a", m.dp2a, "i32", "u32 u32 i32", ptx="dp2a.lo.s32.s32 $0, $1, $2, $3;")

# two bf16 in a word: a * b + c, each rounded once
fma_bf16x2 = _op(
    "fma_bf16x2", m.fma_bf16x2, "u32", "u32 u32 u32", ptx="fma.rn.bf16x2 $0, $1, $2, $3;"
)

# Global memory. `stream` reads what this kernel reads once and nobody writes meanwhile
load = _rule("load", lambda p, i: p.read(i)[0], "load", 1, "plain")
load2 = _rule("load2", lambda p, i: p.read(i, 2), "load", 2, "plain")
load4 = _rule("load4", lambda p, i: p.read(i, 4), "load", 4, "plain")
constant = _rule("constant", lambda p, i: p.read(i)[0], "load", 1, "constant")
constant2 = _rule("constant2", lambda p, i: p.read(i, 2), "load", 2, "constant")
constant4 = _rule("constant4", lambda p, i: p.read(i, 4), "load", 4, "constant")
# units i and i + 1 of four, the second at a fixed distance from the first
load_pair = _rule("load_pair", m.read_pair, "load", 4, "plain", 2)
constant_pair = _rule("constant_pair", m.read_pair, "load", 4, "constant", 2)
stream2 = _rule("stream2", lambda p, i: p.read(i, 2), "stream", 2)
stream4 = _rule("stream4", lambda p, i: p.read(i, 4), "stream", 4)
# Element i on its way to the second-level cache: of what nobody writes, before `launch_wait` too
ahead = _rule("ahead", m.ahead, "prefetch", effect="memory")
store = _rule("store", lambda p, i, v: p.write(i, (v,)), "store", 1)
store2 = _rule("store2", lambda p, i, *v: p.write(i, v), "store", 2)
store4 = _rule("store4", lambda p, i, *v: p.write(i, v), "store", 4)

# The old value of an element, which grows by v; orders what its thread, and by barriers its block,
# did before it and does after it, for whoever comes to the same element
atomic_add = _rule("atomic_add", m.atomic_add, "atomic", effect="memory")
# one of four pointers to global memory: pick(which, a, b, c, d)
pick = _rule("pick", lambda which, *pointers: pointers[int(which)], "pick")

# Shared memory: arrays are made by `shared`; a[i] reads and writes single elements
shared_load2 = _rule("shared_load2", lambda a, i: a.read(i, 2), "load", 2, "shared")
shared_load4 = _rule("shared_load4", lambda a, i: a.read(i, 4), "load", 4, "shared")
shared_store4 = _rule("shared_store4", lambda a, i, *v: a.write(i, v), "shared_store", 4)

# Copies of 16 bytes to shared memory: copy_async16(array, its piece, pointer, its piece, nbytes);
# nbytes of the source are read and the rest is zero
copy_async16 = _rule("copy_async16", m.copy_async16, "copy_async", effect="memory")
copy_commit = _op("copy_commit", m.copy_commit, ptx="cp.async.commit_group;", effect="memory")
copy_wait0, copy_wait1, copy_wait2 = (
    _op(f"copy_wait{n}", partial(m.copy_wait, n), ptx=f"cp.async.wait_group {n};", effect="memory")
    for n in range(3)
)

# Matrices: ldmatrix(array, piece of 16 bytes that this lane names)
ldmatrix_x4 = _rule("ldmatrix_x4", m.ldmatrix_x4, "ldmatrix", 4, "", effect="memory")
ldmatrix_x2 = _rule("ldmatrix_x2", m.ldmatrix_x2, "ldmatrix", 2, "", effect="memory")
ldmatrix_x4_trans = _rule(
    "ldmatrix_x4_trans", m.ldmatrix_x4_trans, "ldmatrix", 4, ".trans", effect="memory"
)
_MMA = "mma.sync.aligned.%s {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"


def _mma(name: str, meaning: Any, shape: str, kind: str) -> Intrinsic:
    accumulators = " ".join([kind] * 4)
    arguments = "u32 u32 u32 u32 u32 u32 " + accumulators
    return _op(name, meaning, accumulators, arguments, ptx=_MMA % shape, effect="volatile")


mma_s8 = _mma("mma_s8", m.mma_s8, "m16n8k32.row.col.s32.s8.s8.s32", "i32")
mma_s8_half = _op(  # of 16 products: the first half of mma_s8's, or the second
    "mma_s8_half", m.mma_s8_half, "i32 i32 i32 i32", "u32 u32 u32 i32 i32 i32 i32",
    ptx="mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5}, {$6}, "
    "{$7,$8,$9,$10};", effect="volatile",
)  # fmt: skip
mma_f16 = _mma("mma_f16", m.mma_f16, "m16n8k16.row.col.f32.f16.f16.f32", "f32")
mma_bf16 = _mma("mma_bf16", m.mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", "f32")

# Between the lanes of a warp
_SHUFFLE = "shfl.sync.%s.b32 $0, $1, $2, %s, 0xffffffff;"


def _shuffle(name: str, meaning: Any, mode: str, kind: str, clamp: str = "0x1f") -> Intrinsic:
    text = _SHUFFLE % (mode, clamp)
    return _op(name, meaning, kind, f"{kind} u32", ptx=text, effect="volatile")


shuffle_xor = _shuffle("shuffle_xor", m.shuffle_xor, "bfly", "f32")
shuffle_xor_u32 = _shuffle("shuffle_xor_u32", m.shuffle_xor, "bfly", "u32")
shuffle_index = _shuffle("shuffle_index", m.shuffle_index, "idx", "f32")
shuffle_index_u32 = _shuffle("shuffle_index_u32", m.shuffle_index, "idx", "u32")
shuffle_down = _shuffle("shuffle_down", m.shuffle_down, "down", "f32")
shuffle_up = _shuffle("shuffle_up", m.shuffle_up, "up", "f32", "0")
_VOTE = (
    "{.reg .pred p, q; setp.ne.b32 p, $1, 0; vote.sync.%s q, p, 0xffffffff; selp.b32 $0, 1, 0, q;}"
)
_BALLOT = "{.reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff;}"
vote_any = _op("vote_any", m.vote_any, "u32", "u32", ptx=_VOTE % "any.pred", effect="volatile")
vote_all = _op("vote_all", m.vote_all, "u32", "u32", ptx=_VOTE % "all.pred", effect="volatile")
ballot = _op("ballot", m.ballot, "u32", "u32", ptx=_BALLOT, effect="volatile")
_REDUX = "redux.sync.add.s32 $0, $1, 0xffffffff;"
warp_sum_i32 = _op("warp_sum_i32", m.warp_sum, "i32", "i32", ptx=_REDUX, effect="volatile")
_REDUX_MAX = "redux.sync.max.s32 $0, $1, 0xffffffff;"
_REDUX_MIN = "redux.sync.min.u32 $0, $1, 0xffffffff;"
warp_max_i32 = _op("warp_max_i32", m.warp_max, "i32", "i32", ptx=_REDUX_MAX, effect="volatile")
warp_min_u32 = _op("warp_min_u32", m.warp_min, "u32", "u32", ptx=_REDUX_MIN, effect="volatile")

# Meeting points
syncwarp = _op("syncwarp", m.syncwarp, ptx="bar.warp.sync 0xffffffff;", effect="memory")
syncthreads = _rule("syncthreads", m.syncthreads, "barrier", effect="memory")

# Programmatic launch: wait for the kernels before this one; let the next one begin.
# Compute capability 9.0 and later; earlier ones wait at the launch, and nothing is emitted.
launch_wait = _op("launch_wait", m.nothing, ptx="griddepcontrol.wait;", effect="memory", needs=90)
launch_next = _op(
    "launch_next", m.nothing, ptx="griddepcontrol.launch_dependents;", effect="memory", needs=90
)


@cache
def registers(kind: str, count: int) -> Intrinsic:
    """Made beside a kernel, called in it: a lane's own array, kept in registers.

    Every index must be known when the kernel is compiled: constants and loops of fixed length.
    """
    return Intrinsic(
        "registers", lambda: m.registers(kind, count), rule="registers", parameters=(kind, count)
    )


def shared(kind: str, count: int, alignment: int = 16) -> Intrinsic:
    """Made beside a kernel, called once in it: an array that the block's threads share."""
    made: list[Intrinsic] = []
    made.append(
        Intrinsic(
            "shared", lambda: m.shared(made[0], kind, count, alignment), rule="shared",
            parameters=(kind, count, alignment),
        )
    )  # fmt: skip
    return made[0]


def dynamic_shared(kind: str) -> Intrinsic:
    """Made beside a kernel, called in it: all of the launch's dynamic shared memory."""
    return Intrinsic(
        "dynamic_shared", lambda: m.dynamic_shared(kind), rule="dynamic_shared", parameters=(kind,)
    )
