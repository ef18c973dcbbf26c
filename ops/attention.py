"""Attention over a paged KV cache: write new rows into pages, then read the pages of a sequence.

Pages hold PAGE tokens each. A token's row goes to `kv_slots[t]` = physical page * PAGE + offset; a
sequence's pages are listed in its row of the block table. Causality goes by place in the cache,
never by position: the token at place p sees places 0..p of its own sequence.
"""

from __future__ import annotations

import numpy as np

from runtime.ops.cost import Seen
from runtime.ops.dtypes import I32, DType
from runtime.ops.kv_formats import KV_FORMATS, PAGE, kv_format
from runtime.ops.registry import Arg, Case, Kind, need, op
from runtime.ops.rotation import hadamard
from runtime.ops.tensor import Shape, Tensor


def _write_shape(
    x: Tensor, pages: Tensor, kv_slots: Tensor, *, which: str, kv: str
) -> tuple[Shape, DType]:
    need(which in ("k", "v"), f"which={which!r} is neither 'k' nor 'v'")
    need(pages.ndim == 4 and pages.shape[1] == PAGE, f"pages must be [pages, {PAGE}, heads, dim]")
    need(kv in KV_FORMATS and kv == pages.dtype.name, f"KV type {kv} in pages of {pages.dtype}")
    need(tuple(x.shape[1:]) == tuple(pages.shape[2:]), f"rows {list(x.shape[1:])} of other heads")
    need(kv_slots.shape == x.shape[:1], "needs one slot per row")
    return pages.shape, pages.dtype


def _slots(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.permutation(4 * PAGE)[: shape[0]].astype(np.int32)


def _write_case(kv: str, tolerance: float) -> Case:
    pages = Arg((4, PAGE, 2, 32), kv_format(kv).dtype, leaf="state")
    attrs = {"which": "k", "kv": kv}
    return Case(((5, 2, 32), pages, Arg((5,), I32, _slots)), attrs, tolerance)


@op(
    "kv_write",
    kind=Kind.STATEFUL,
    axes="T h D, Pages Place h D, T -> Pages Place h D",
    picks={1: 2},
    writes=(1,),
    layout=lambda node: node.inputs[1].layout,
    shape=_write_shape,
    flops=0,
    cases=[_write_case(kv, 1e-14) for kv in KV_FORMATS],
)
def kv_write(
    x: np.ndarray, pages: np.ndarray, kv_slots: np.ndarray, *, which: str, kv: str
) -> np.ndarray:
    """Rows x[t] rounded to the KV type and stored at kv_slots[t]; changes and returns the pages."""
    pages.reshape(-1, *pages.shape[2:])[kv_slots] = kv_format(kv).rounded(x)
    return pages


def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, sequences: Tensor, places: Tensor,
    *sinks: Tensor, scale: float, window: int = 0, softcap: float = 0.0, rotation: int = 0,
) -> Shape:  # fmt: skip
    need(q.ndim == 3 and k.ndim == 4 and v.ndim == 4, "needs q [T, heads, d] and pages of k, v")
    need(q.shape[1] % k.shape[2] == 0, f"{q.shape[1]} heads over {k.shape[2]} KV heads")
    need(q.shape[2] == k.shape[3], f"head sizes {q.shape[2]} and {k.shape[3]} differ")
    need(tuple(k.shape[:3]) == tuple(v.shape[:3]), "k and v pages differ")
    need(len(sinks) <= 1, "takes at most one vector of sinks")
    return (*q.shape[:2], v.shape[3])


def _table(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.permutation(6)[: shape[0] * shape[1]].reshape(shape).astype(np.int32)


def _sequences(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return np.sort(rng.integers(0, 2, shape)).astype(np.int32)


def _places(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.integers(0, 3 * PAGE, shape).astype(np.int32)


def _case(
    tokens: int, heads: int, kv_heads: int, dim: int, kv: str = "f32", sinks: bool = False,
    **attrs: float,
) -> Case:  # fmt: skip
    pages = Arg((6, PAGE, kv_heads, dim), kv_format(kv).dtype, leaf="state")
    step = (
        Arg((2, 3), I32, _table), Arg((tokens,), I32, _sequences), Arg((tokens,), I32, _places)
    )  # fmt: skip
    more = [Arg((heads,), leaf="weight")] if sinks else []
    args = ((tokens, heads, dim), pages, pages, *step, *more)
    tolerance = 1e-8 if kv_format(kv).coding else 1e-10  # q is 15 bits where K is codes
    return Case(args, {"scale": dim**-0.5, **attrs}, tolerance)


def _flops(node: Tensor, seen: Seen) -> float:
    """As if every token saw its sequence whole."""
    pages, block_table = node.inputs[2:4]
    mean = seen.places(block_table, pages, node.attrs.get("window", 0)) / seen.sequences(
        block_table
    )
    return 4 * seen.size(node) * mean


@op(
    "attention",
    kind=Kind.STATEFUL,
    axes="T (g r) D, Pages Place g D, Pages Place g D, S Table, T, T, (g r) -> T (g r) D",
    picks={1: 3, 2: 3},
    reads=(1, 2),
    shape=_attention_shape,
    flops=_flops,
    cases=[
        _case(1, 4, 4, 32),
        _case(7, 6, 2, 64),  # three query heads a KV head
        _case(3, 7, 1, 40),
        _case(9, 4, 2, 32, window=20),
        _case(2, 2, 1, 32, softcap=30.0),
        *(_case(5, 4, 2, 48, kv, sinks=True) for kv in KV_FORMATS),
    ],
)
def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, block_table: np.ndarray, sequences: np.ndarray,
    places: np.ndarray, *sinks: np.ndarray, scale: float, window: int = 0, softcap: float = 0.0,
    rotation: int = 0,
) -> np.ndarray:  # fmt: skip
    """softmax(scale * q k^T) v for each token over places 0..its own (Vaswani et al. 2017).

    `window` > 0 limits it to the last `window` places; `softcap` bounds scores by
    cap * tanh(score / cap); `sinks` [heads] adds one logit per head to the denominator.
    `rotation`: v is rotated by `hadamard` in blocks of so many dims; the result is rotated back.
    """
    group = q.shape[1] // k.shape[2]
    out = np.empty((*q.shape[:2], v.shape[3]), np.result_type(q, v))
    for t in range(len(q)):
        seen = np.arange(max(0, places[t] + 1 - window) if window else 0, places[t] + 1)
        rows = block_table[sequences[t], seen // PAGE], seen % PAGE
        keys, values = (np.repeat(a[rows], group, axis=1) for a in (k, v))
        scores = np.einsum("hd,nhd->hn", q[t], keys) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if sinks:
            scores = np.concatenate([scores, sinks[0][:, None]], 1)
        e = np.exp(scores - scores.max(1, keepdims=True))
        out[t] = np.einsum("hn,nhd->hd", (e / e.sum(1, keepdims=True))[:, : len(seen)], values)
    return hadamard.reference(out, block=rotation) if rotation else out
