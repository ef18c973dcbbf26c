"""Every kernel on rows of any length: what to call on fenced memory, and the result in float64.

A case is made for a length n and an instruction set; `call(threads)` gives all that was written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_calls import Fenced, run
from packed_rows import Packed

from runtime.backends.cpu.run.block import control_block
from runtime.backends.cpu.run.control import MEMBERS
from runtime.backends.cpu.sizes import conv_scratch_nbytes, delta_scratch_nbytes
from runtime.backends.plan.kernel import Kernel
from runtime.ops.registry import OPS, Kind

ROWS, LIVE, EPS, THREADS = 4, 3, 1e-6, 3
BOUNDS = {"alpha": 1.702, "limit": 7.0}


@dataclass(frozen=True)
class Odd:
    """`error` is the largest that is allowed, as a part of the largest value."""

    call: Callable[[int], np.ndarray]
    wanted: np.ndarray
    error: float = 4e-6

    def check(self, found: np.ndarray) -> None:
        assert np.isfinite(found).all(), "something unwritten or foreign was read"
        largest = np.abs(self.wanted).max(initial=1e-30)
        assert np.abs(found - self.wanted).max(initial=0) <= self.error * largest


class Numbers:
    """Random float32, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return self._rng.standard_normal(shape).astype(np.float32)

    def ids(self, count: int, *shape: int) -> np.ndarray:
        return self._rng.integers(0, count, shape).astype(np.int32)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def reference(op: str, *x: np.ndarray, **attrs: Any) -> np.ndarray:
    given = (wide(v) if v.dtype == np.float32 else v for v in x)
    return OPS[op].reference(*given, **attrs)


def normed(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    value = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + EPS)
    return value if w is None else value * w


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return reference("silu", gate) * up


def _binary(name: str, wanted: Callable[..., np.ndarray], **more: float) -> Callable[..., Odd]:
    def make(n: int, isa: str) -> Odd:
        x, y = Numbers(n)(2, LIVE, n)

        def call(threads: int) -> np.ndarray:
            out = Fenced(ROWS, n, n + 3)
            run(
                Kernel.of(name), isa, threads, x=Fenced.of(x, n + 5), y=Fenced.of(y, n + 2),
                out=out, live=LIVE, n=n, x_stride=n + 5, y_stride=n + 2, out_stride=n + 3, **more,
            )  # fmt: skip
            assert out.strays(LIVE) == 0
            return out.values[:LIVE].copy()

        return Odd(call, wanted(x, y))

    return make


def _unary(name: str, wanted: Callable[..., np.ndarray], **more: float) -> Callable[..., Odd]:
    def make(n: int, isa: str) -> Odd:
        x = Numbers(n)(LIVE, n)
        x = np.abs(x) + np.float32(0.1) if name in ("log", "normalize") else x

        def call(threads: int) -> np.ndarray:
            out = Fenced(ROWS, n, n + 3)
            run(
                Kernel.of(name), isa, threads, x=Fenced.of(x, n + 5), out=out, live=LIVE, n=n,
                x_stride=n + 5, out_stride=n + 3, **more,
            )  # fmt: skip
            assert out.strays(LIVE) == 0
            return out.values[:LIVE].copy()

        return Odd(call, wanted(x))

    return make


def _row_scale(n: int, isa: str) -> Odd:
    x, factors = Numbers(n)(LIVE, n), Numbers(n + 1)(LIVE, 1)

    def call(threads: int) -> np.ndarray:
        out = Fenced(ROWS, n, n + 3)
        run(
            Kernel.of("row_scale"), isa, threads, x=Fenced.of(x, n + 5), out=out, live=LIVE, n=n,
            y=Fenced.of(factors, 5), x_stride=n + 5, y_stride=5, out_stride=n + 3,
        )  # fmt: skip
        assert out.strays(LIVE) == 0
        return out.values[:LIVE].copy()

    return Odd(call, wide(x) * factors)


def _rms_norm(weighted: bool) -> Callable[..., Odd]:
    def make(n: int, isa: str) -> Odd:
        x, w = Numbers(n)(LIVE, n), Numbers(n + 1)(1, n) if weighted else None

        def call(threads: int) -> np.ndarray:
            out = Fenced(ROWS, n, n + 3)
            run(
                Kernel.of("rms_norm"), isa, threads, x=Fenced.of(x, n + 5), out=out, live=LIVE,
                n=n, w=0 if w is None else Fenced.of(w), x_stride=n + 5, out_stride=n + 3, eps=EPS,
            )  # fmt: skip
            assert out.strays(LIVE) == 0
            return out.values[:LIVE].copy()

        return Odd(call, normed(x, w))

    return make


def _gather_rows(n: int, isa: str) -> Odd:
    x, ids = Numbers(n)(7, n), np.array([[6], [0], [6]], np.int32)

    def call(threads: int) -> np.ndarray:
        out = Fenced(ROWS, n, n + 3)
        run(
            Kernel.of("gather_rows"), isa, threads, x=Fenced.of(x, n + 5), ids=Fenced.of(ids),
            out=out, live=LIVE, n=n, x_stride=n + 5, out_stride=n + 3,
        )  # fmt: skip
        assert out.strays(LIVE) == 0
        return out.values[:LIVE].copy()

    return Odd(call, wide(x[ids[:, 0]]), 0)


def _meeting() -> np.ndarray:
    """Of one thread at a time, which waits for nobody."""
    block = control_block(1)
    block[MEMBERS] = 1
    return block


def _all_sum(parts: int, more: bool, once: bool) -> Callable[..., Odd]:
    """Rows without gaps. once: threads know their numbers among those of all teams."""

    def make(n: int, isa: str) -> Odd:
        x = Numbers(n)(parts + 1, LIVE, n)
        wanted = functools.reduce(np.add, x if more else x[:-1])

        def call(threads: int) -> np.ndarray:
            out, held = Fenced(LIVE, n), [Fenced.of(part.reshape(1, -1)) for part in x]
            at = np.array([part.address for part in held[:-1]], np.int64)
            member = {"member": np.array([0, threads], np.int64)} if once else {}
            run(
                Kernel.of("all_sum_once" if once else "all_sum"), isa, threads, x=0, parts=at,
                n_parts=parts, more=held[-1] if more else 0, out=out, live=LIVE, n=n,
                meeting=_meeting(), **member,
            )  # fmt: skip
            assert out.strays(LIVE) == 0
            return out.values.copy()

        return Odd(call, wide(wanted), 0)

    return make


def _put_stretch(n: int, isa: str) -> Odd:
    """Two stretches of n of each row, to the second places of rows of two times n + 3."""
    x = Numbers(n)(LIVE, 2, n)

    def call(threads: int) -> np.ndarray:
        out = Fenced(2 * ROWS, n, n + 3)
        run(
            Kernel.of("put_stretch"), isa, threads, x=Fenced.of(x.reshape(LIVE, -1), 2 * n + 5),
            out=out, live=2 * LIVE - 1, each=2, repeat=2, n=n, x_row=2 * n + 5, x_step=n,
            out_row=2 * (n + 3), out_step=n + 3,
        )  # fmt: skip
        assert out.strays(2 * LIVE) == 0
        return out.values[: 2 * LIVE].copy()

    return Odd(call, wide(x.reshape(2 * LIVE, n)), 0)


def _copy(turned: bool) -> Callable[..., Odd]:
    """Rows of n of [LIVE, 2, n], or of [n, LIVE, 2] turned: each element apart."""

    def make(n: int, isa: str) -> Odd:
        x = Numbers(n)(*((n, LIVE, 2) if turned else (LIVE, 2, n)))
        wanted = x.transpose(1, 2, 0) if turned else x
        a, c, step = (stride // 4 for stride in wanted.strides)

        def call(threads: int) -> np.ndarray:
            out = Fenced(2 * ROWS, n, n)
            run(
                Kernel.of("copy", item=4), isa, threads, x=Fenced.of(x.reshape(1, -1)), out=out,
                live=LIVE, b=1, c=2, n=n, stride_a=a, stride_b=0, stride_c=c, stride_n=step,
            )  # fmt: skip
            assert out.strays(2 * LIVE) == 0
            return out.values[: 2 * LIVE].copy()

        return Odd(call, wide(wanted.reshape(2 * LIVE, n)), 0)

    return make


def _unary_ops() -> list[str]:
    """Ops of one input without attributes, whose kernels are called alike."""
    alike = (Kind.ELEMENTWISE, Kind.ROWWISE)
    return [
        name
        for name, op in OPS.items()
        if op.kind in alike and all(len(c.args) == 1 and not c.attrs for c in op.cases)
    ]


def _rope(style: str) -> Callable[..., Odd]:
    def make(n: int, isa: str) -> Odd:
        """n pairs; some dims behind them are left as they are."""
        dim, heads = 2 * n + n % 5, 3
        x, angles = Numbers(n)(LIVE, heads, dim), Numbers(n + 1)(LIVE, n, 2)

        def call(threads: int) -> np.ndarray:
            out = Fenced(ROWS, heads * dim, heads * dim + 3)
            run(
                Kernel.of("rope", style=style), isa, threads, x=Fenced.like(x), out=out, live=LIVE,
                angles=Fenced.of(angles.reshape(LIVE, -1)), n_heads=heads, head_dim=dim, half=n,
                x_stride=heads * dim, x_head_stride=dim, out_stride=heads * dim + 3,
            )  # fmt: skip
            assert out.strays(LIVE) == 0
            return out.values[:LIVE].reshape(LIVE, heads, dim).copy()

        return Odd(call, reference("rope", x, angles, style=style))

    return make


def _hadamard(n: int, isa: str) -> Odd:
    """Blocks of 64 and what is left: every size in turn."""
    x, heads = Numbers(n)(LIVE, 3, n), 3

    def call(threads: int) -> np.ndarray:
        out = Fenced(ROWS, heads * n)
        run(
            Kernel.of("hadamard"), isa, threads, x=Fenced.like(x), out=out, live=LIVE,
            n_heads=heads, head_dim=n, x_stride=heads * n, x_head_stride=n, block=64,
        )  # fmt: skip
        assert out.strays(LIVE) == 0
        return out.values[:LIVE].reshape(x.shape).copy()

    return Odd(call, reference("hadamard", x, block=64))


def _l2_norm(n: int, isa: str) -> Odd:
    x, heads = Numbers(n)(LIVE, 2, n), 2

    def call(threads: int) -> np.ndarray:
        out = Fenced(ROWS * heads, n)
        run(
            Kernel.of("l2_norm"), isa, threads, x=Fenced.like(x), out=out, live=LIVE, heads=heads,
            n=n, x_stride=heads * n, head_stride=n, eps=EPS,
        )  # fmt: skip
        assert out.strays(LIVE * heads) == 0
        return out.values[: LIVE * heads].reshape(LIVE, heads, n).copy()

    return Odd(call, reference("l2_norm", x, eps=EPS))


RUNS = np.array([[0, 2], [2, 5]], np.int32)  # first row and tokens of two sequences
SLOT_IN, SLOT_OUT = np.array([[-1], [2]], np.int32), np.array([[0], [1]], np.int32)
STEP = (RUNS, SLOT_IN[:, 0], SLOT_OUT[:, 0])


def _slots(state: Fenced, size: int) -> dict[str, Any]:
    return {
        "state": state, "slot_bytes": 4 * size, "spans": Fenced.of(RUNS), "live": 2,
        "slot_in": Fenced.of(SLOT_IN), "slot_out": Fenced.of(SLOT_OUT),
    }  # fmt: skip


def _conv(name: str, taps: int) -> Callable[..., Odd]:
    """short_conv: n channels. conv_post: three heads of n, of which two are normalised."""

    def make(n: int, isa: str) -> Odd:
        block, channels = (128, n) if name == "short_conv" else (n, 3 * n)
        draw, tokens = Numbers(n), int(RUNS.sum(1).max())
        x, w = draw(tokens, channels), draw(channels, taps)
        past, size = draw(3, taps - 1, channels), (taps - 1) * channels

        def call(threads: int) -> np.ndarray:
            nbytes = conv_scratch_nbytes(block, taps)
            state, out = Fenced.of(past.reshape(3, -1)), Fenced(tokens, channels)
            run(
                Kernel.of(name), isa, threads, x=Fenced.of(x, channels + 5), w=Fenced.of(w),
                **_slots(state, size), out=out, channels=channels, taps=taps, block=block,
                x_stride=channels + 5, norm_first=0,
                norm_end=2 * n if name == "conv_post" else 0, eps=EPS,
                scratch=Fenced(THREADS, nbytes // 4), scratch_bytes=nbytes,
            )  # fmt: skip
            assert out.strays(tokens) == 0 and state.strays(3) == 0
            return np.concatenate([out.values.ravel(), state.values[:2].ravel()])

        kept = wide(past)
        y = reference("short_conv", x, w, kept, *STEP)
        if name == "conv_post":
            heads = reference("silu", y).reshape(tokens, 3, n)
            heads[:, :2] = reference("l2_norm", heads[:, :2], eps=EPS)
            y = heads
        return Odd(call, np.concatenate([y.ravel(), kept[:2].ravel()]))

    return make


def _gated_delta(n: int, isa: str) -> Odd:
    """Keys of n, values of another odd number."""
    dk, dv, keys, heads = n, n * 7 % 64 + 1, 1, 2
    draw, tokens = Numbers(n), int(RUNS.sum(1).max())
    q, k = (reference("l2_norm", draw(tokens, keys, dk), eps=EPS).astype(np.float32) for _ in "qk")
    v, beta = draw(tokens, heads, dv), np.abs(draw(tokens, heads)) / 4
    decay, past = -np.abs(draw(tokens, heads)), draw(3, heads, dk, dv)
    attrs = {"scale": dk**-0.5, "order": "grouped"}

    def call(threads: int) -> np.ndarray:
        nbytes = delta_scratch_nbytes(dk)
        state, out = Fenced.of(past.reshape(3, -1)), Fenced(tokens, heads * dv)
        run(
            Kernel.of("gated_delta", gates="given"), isa, threads, q=Fenced.like(q),
            k=Fenced.like(k), v=Fenced.like(v), decay=Fenced.of(decay), beta=Fenced.of(beta),
            q_stride=keys * dk, k_stride=keys * dk, v_stride=heads * dv, decay_stride=heads,
            beta_stride=heads, dt=0, a=0, **_slots(state, heads * dk * dv), out=out, heads=heads,
            key_heads=keys, dk=dk, dv=dv, tiled=0, scale=attrs["scale"],
            scratch=Fenced(THREADS, nbytes // 4), scratch_bytes=nbytes,
        )  # fmt: skip
        assert out.strays(tokens) == 0 and state.strays(3) == 0
        return np.concatenate([out.values.ravel(), state.values[:2].ravel()])

    kept = wide(past)
    y = reference("gated_delta", q, k, v, decay, beta, kept, *STEP, **attrs)
    return Odd(call, np.concatenate([y.ravel(), kept[:2].ravel()]), 1e-5)


def _expert_sum(n: int, isa: str) -> Odd:
    k, draw = 3, Numbers(n)
    y, weights, shared, add = draw(LIVE, k, n), draw(LIVE, k), draw(LIVE, n), draw(LIVE, n)

    def call(threads: int) -> np.ndarray:
        out = Fenced(ROWS, n, n + 3)
        run(
            Kernel.of("expert_sum"), isa, threads, y=Fenced.like(y), weights=Fenced.of(weights),
            ids=0, shared=Fenced.of(shared, n + 1), gate=0, add=Fenced.of(add, n + 2), out=out,
            live=LIVE, n=n, k=k, shared_stride=n + 1, gate_stride=0, add_stride=n + 2,
            out_stride=n + 3,
        )  # fmt: skip
        assert out.strays(LIVE) == 0
        return out.values[:LIVE].copy()

    return Odd(call, reference("expert_sum", y, weights) + shared + add)


def _expert_bias(n: int, isa: str) -> Odd:
    k, draw = 2, Numbers(n)
    y, bias, ids = draw(LIVE, k, n), draw(5, n), draw.ids(5, LIVE, k)

    def call(threads: int) -> np.ndarray:
        out = Fenced(ROWS * k, n, n + 3)
        run(
            Kernel.of("expert_bias"), isa, threads, y=Fenced.like(y), bias=Fenced.of(bias),
            ids=Fenced.like(ids), out=out, live=LIVE * k, n=n, y_stride=n, out_stride=n + 3,
        )  # fmt: skip
        assert out.strays(LIVE * k) == 0
        return out.values[: LIVE * k].reshape(LIVE, k, n).copy()

    return Odd(call, reference("expert_bias", y, bias, ids))


def _top_k(n: int, isa: str) -> Odd:
    x, k = Numbers(n)(LIVE, n), min(n, 5)

    def call(threads: int) -> np.ndarray:
        out = Fenced(ROWS, k, dtype=np.int32)
        run(
            Kernel.of("top_k"), isa, threads, x=Fenced.of(x, n + 3), out=out, live=LIVE, n=n, k=k,
            x_stride=n + 3,
        )  # fmt: skip
        assert out.strays(LIVE) == 0
        return out.values[:LIVE].copy()

    return Odd(call, reference("top_k", x, k=k), 0)


def _router(scoring: str) -> Callable[..., Odd]:
    def make(n: int, isa: str) -> Odd:
        """n experts."""
        x, k = Numbers(n)(LIVE, n), min(n, 5)

        def call(threads: int) -> np.ndarray:
            ids, weights = Fenced(ROWS, k, dtype=np.int32), Fenced(ROWS, k)
            tiles, n_tiles = Fenced(LIVE * k, 2, dtype=np.int32), Fenced(1, 2, dtype=np.int32)
            run(
                Kernel.of("router", scoring=scoring, normalize=True), isa, threads,
                logits=Fenced.of(x, n + 3), ids=ids, weights=weights, tiles=tiles,
                n_tiles=n_tiles, numbers=0, own=0, live=LIVE, n_experts=n, k=k,
                logits_stride=n + 3, scale=1.0,
            )  # fmt: skip
            assert ids.strays(LIVE) == 0 and weights.strays(LIVE) == 0
            return np.stack([ids.values[:LIVE], weights.values[:LIVE]])

        chosen = reference("top_k", x, k=k)
        scores = x if scoring == "softmax_topk" else reference(scoring, x)
        shares = np.take_along_axis(scores, chosen, -1)
        op = "softmax" if scoring == "softmax_topk" else "normalize"
        return Odd(call, np.stack([chosen, reference(op, shares)]))

    return make


def _pack(name: str, C: int, **act: str) -> Callable[..., Odd]:
    """Float tiles of any length; those of int8 take whole blocks alone."""
    fused = {"pack": lambda x, y, w: wide(x), "rms_norm_pack": lambda x, y, w: normed(x, w)}
    fused["swiglu_pack"] = lambda x, y, w: (
        swiglu(x, y) if act["act"] == "silu" else reference("swiglu_oai", x, y, **BOUNDS)
    )
    plain = name.replace("_rows", "")
    indirect = name.endswith("_rows")

    def make(n: int, isa: str) -> Odd:
        draw, rows = Numbers(n), 2 * C + 1
        x, y, w = draw(rows, n), draw(rows, n), draw(1, n)
        tiles = np.full((2, 1 + C), -1, np.int32)
        tiles[:, 1 : 1 + C] = draw.ids(rows, 2, C)
        tiles[1, -1] = -1
        picked = tiles[:, 1:].ravel()

        def call(threads: int) -> np.ndarray:
            packed = Packed(2 * C if indirect else rows, n, C, "f32")
            places: dict[str, Any] = {"x": Fenced.of(x, n + 5), "x_stride": n + 5}
            if act:
                places = {"gate": Fenced.of(x, n + 5), "gate_stride": n + 5, **BOUNDS}
                places |= {"up": Fenced.of(y, n + 2), "up_stride": n + 2}
            if name == "rms_norm_pack":
                places |= {"w": Fenced.of(w), "eps": EPS}
            if indirect:
                places |= {"tiles": Fenced.of(tiles), "n_tiles": np.array([2], np.int64)}
            else:
                places |= {"live": rows}
            if name == "pack_rows":
                places |= {"divisor": 1}
            kernel = Kernel.of(name, C=C, coding="f32", **act)
            run(kernel, isa, threads, out=packed.memory, n=n, **places)
            packed.check()
            return packed.columns().copy()

        values = fused[plain](x, y, w)
        if indirect:
            values = np.where(picked[:, None] >= 0, values[picked], 0)
        filled = np.zeros((-(-len(values) // C) * C, n))
        filled[: len(values)] = values
        return Odd(call, filled)

    return make


CASES: dict[str, Callable[[int, str], Odd]] = {
    "add": _binary("add", lambda x, y: wide(x) + y),
    "mul": _binary("mul", lambda x, y: wide(x) * y),
    "swiglu": _binary("swiglu", swiglu),
    "swiglu_oai": _binary(
        "swiglu_oai", lambda x, y: reference("swiglu_oai", x, y, **BOUNDS), **BOUNDS
    ),
    **{name: _unary(name, lambda x, name=name: reference(name, x)) for name in _unary_ops()},
    "exp": _unary("exp", lambda x: np.exp(wide(x))),
    "log": _unary("log", lambda x: np.log(wide(x))),
    "scale": _unary("scale", lambda x: wide(x) * np.float32(0.3), factor=0.3),
    "row_scale": _row_scale,
    "rms_norm": _rms_norm(True),
    "rms_norm-plain": _rms_norm(False),
    "gather_rows": _gather_rows,
    "all_sum": _all_sum(1, False, False),
    "all_sum-more": _all_sum(3, True, False),
    "all_sum_once": _all_sum(2, True, True),
    "put_stretch": _put_stretch,
    "copy-apart": _copy(True),
    "copy-together": _copy(False),
    "rope-neox": _rope("neox"),
    "rope-normal": _rope("normal"),
    "hadamard": _hadamard,
    "l2_norm": _l2_norm,
    "short_conv-4": _conv("short_conv", 4),
    "short_conv-3": _conv("short_conv", 3),
    "conv_post-4": _conv("conv_post", 4),
    "conv_post-2": _conv("conv_post", 2),
    "gated_delta": _gated_delta,
    "expert_sum": _expert_sum,
    "expert_bias": _expert_bias,
    "top_k": _top_k,
    **{f"router-{s}": _router(s) for s in ("softmax", "sigmoid", "softmax_topk")},
    **{f"pack-{C}": _pack("pack", C) for C in (1, 4, 8)},
    **{f"rms_norm_pack-{C}": _pack("rms_norm_pack", C) for C in (1, 4, 8)},
    **{f"swiglu_pack-{C}": _pack("swiglu_pack", C, act="silu") for C in (1, 4, 8)},
    "swiglu_pack-oai": _pack("swiglu_pack", 8, act="oai"),
    **{f"pack_rows-{C}": _pack("pack_rows", C) for C in (4, 8)},
    "swiglu_pack_rows": _pack("swiglu_pack_rows", 4, act="silu"),
    "swiglu_pack_rows-oai": _pack("swiglu_pack_rows", 8, act="oai"),
}
