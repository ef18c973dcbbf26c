"""What each op means, written a second time: float64, another formulation than `ops/` has.

Loops over indices where the reference is one numpy expression, closed forms where it is stepwise,
`math.fsum` where it sums. `ORACLES[name](*values, **attrs)` takes what the reference takes, changes
states as it does, and returns the result.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from runtime.ops.kv_formats import KV_FORMATS

Array = np.ndarray
ORACLES: dict[str, Callable[..., Array]] = {}


def oracle(function: Callable[..., Array]) -> Callable[..., Array]:
    """Register the oracle of the op that the function is called like."""
    ORACLES[function.__name__.rstrip("_")] = function
    return function


def _each(x: Array, value: Callable[[tuple[int, ...]], float], shape: Any = None) -> Array:
    """float64 of x's shape (or another), element by element."""
    out = np.empty(x.shape if shape is None else shape)
    for at in np.ndindex(out.shape):
        out[at] = value(at)
    return out


def _rows(x: Array) -> list[tuple[tuple[int, ...], Array]]:
    """Every row of the last axis with its place."""
    return [(at, x[at]) for at in np.ndindex(x.shape[:-1])]


def _second(y: Array, at: tuple[int, ...]) -> float:
    return float(y[at[-1]] if y.ndim == 1 else y[at])


def _gate(z: float) -> float:
    """1 / (1 + exp(-z)) by way of tanh."""
    return 0.5 * (1 + math.tanh(0.5 * z))


@oracle
def add(x: Array, y: Array) -> Array:
    return _each(x, lambda at: math.fsum((x[at], _second(y, at))))


@oracle
def mul(x: Array, y: Array) -> Array:
    return _each(x, lambda at: x[at] * _second(y, at))


@oracle
def scale(x: Array, *, factor: float) -> Array:
    return _each(x, lambda at: x[at] / (1 / factor))


@oracle
def row_scale(x: Array, s: Array) -> Array:
    return _each(x, lambda at: x[at] * s[at[:-1]][0])


@oracle
def silu(x: Array) -> Array:
    return _each(x, lambda at: x[at] * _gate(x[at]))


@oracle
def sigmoid(x: Array) -> Array:
    return _each(x, lambda at: _gate(x[at]))


@oracle
def softplus(x: Array) -> Array:
    return _each(x, lambda at: max(x[at], 0.0) + math.log1p(math.exp(-abs(x[at]))))


@oracle
def swiglu_oai(gate: Array, up: Array, *, alpha: float, limit: float) -> Array:
    def value(at: tuple[int, ...]) -> float:
        g = min(float(gate[at]), limit)
        return (max(-limit, min(limit, float(up[at]))) + 1) * g * _gate(alpha * g)

    return _each(gate, value)


@oracle
def softmax(x: Array) -> Array:
    out = np.empty(x.shape)
    for at, row in _rows(x):
        out[at] = [1 / math.fsum(math.exp(b - a) for b in row) for a in row]
    return out


@oracle
def normalize(x: Array) -> Array:
    return _each(x, lambda at: x[at] / math.fsum(x[at[:-1]]))


@oracle
def rms_norm(x: Array, w: Array, *, eps: float) -> Array:
    out = np.empty(x.shape)
    for at, row in _rows(x):
        length = math.sqrt(math.fsum(v * v for v in row) + eps * len(row))
        out[at] = [math.sqrt(len(row)) * v * u / length for v, u in zip(row, w, strict=True)]
    return out


@oracle
def l2_norm(x: Array, *, eps: float) -> Array:
    out = np.empty(x.shape)
    for at, row in _rows(x):
        out[at] = [v / math.hypot(*row, math.sqrt(eps)) for v in row]
    return out


@oracle
def matmul(x: Array, w: Array) -> Array:
    return _each(x, lambda at: math.fsum(x[at[:-1]] * w[at[-1]]), (*x.shape[:-1], len(w)))


@oracle
def matmul_id(x: Array, w: Array, ids: Array) -> Array:
    def value(at: tuple[int, ...]) -> float:
        row = x[at[0]] if x.ndim == 2 else x[at[:2]]
        return math.fsum(row * w[ids[at[:2]], at[2]])

    return _each(x, value, (*ids.shape, w.shape[1]))


@oracle
def get_rows(matrix: Array, ids: Array) -> Array:
    return _each(matrix, lambda at: matrix[ids[at[0]], at[1]], (len(ids), matrix.shape[1]))


@oracle
def select_rows(x: Array, ids: Array) -> Array:
    return _each(x, lambda at: x[ids[at[0]]][at[1:]], (len(ids), *x.shape[1:]))


@oracle
def top_k(x: Array, *, k: int) -> Array:
    out = np.empty((*x.shape[:-1], k), np.int32)
    for at, row in _rows(x):
        left = dict(enumerate(row))
        for n in range(k):
            best = max(left.values())
            out[(*at, n)] = next(i for i, v in left.items() if v == best)
            del left[out[(*at, n)]]
    return out


@oracle
def take(x: Array, ids: Array) -> Array:
    return _each(x, lambda at: x[at[0]][ids[at]], ids.shape)


@oracle
def renumber(ids: Array, numbers: Array) -> Array:
    return _each(ids, lambda at: numbers[ids[at]]).astype(np.int32)


@oracle
def expert_bias(y: Array, bias: Array, ids: Array) -> Array:
    return _each(y, lambda at: y[at] + bias[ids[at[:2]]][at[2]])


@oracle
def expert_sum(y: Array, weights: Array, ids: Array | None = None) -> Array:
    def value(at: tuple[int, ...]) -> float:
        here = [j for j in range(y.shape[1]) if ids is None or ids[at[0], j] >= 0]
        return math.fsum(weights[at[0], j] * y[at[0], j, at[1]] for j in here)

    return _each(y, value, (y.shape[0], y.shape[2]))


@oracle
def rope(x: Array, angles: Array, *, style: str) -> Array:
    """Pairs as complex numbers, turned by a product."""
    out, half = np.array(x), angles.shape[1]
    for t, h, i in product(range(x.shape[0]), range(x.shape[1]), range(half)):
        a, b = (i, i + half) if style == "neox" else (2 * i, 2 * i + 1)
        turned = complex(x[t, h, a], x[t, h, b]) * complex(*angles[t, i])
        out[t, h, a], out[t, h, b] = turned.real, turned.imag
    return out


@oracle
def rope_angles(positions: Array, inv_freq: Array, *components: Array, magnitude: float) -> Array:
    out = np.empty((len(positions), len(inv_freq), 2))
    for t, i in np.ndindex(out.shape[:2]):
        position = positions[t, components[0][i]] if components else positions[t]
        point = cmath.rect(magnitude, float(position) * float(inv_freq[i]))
        out[t, i] = point.real, point.imag
    return out


@oracle
def hadamard(x: Array, *, block: int) -> Array:
    """Signs by the parity of common bits; behind whole blocks one for each bit of the rest."""
    n, rest = divmod(x.shape[-1], block)
    sizes = [block] * n + [1 << bit for bit in reversed(range(16)) if rest >> bit & 1]
    parts = np.split(x, np.cumsum(sizes)[:-1], -1)
    for part, size in zip(parts, sizes, strict=True):
        old = part.copy()
        for j in range(size):
            signs = [(-1) ** (i & j).bit_count() for i in range(size)]
            part[..., j] = (old * signs).sum(-1) / math.sqrt(size)
    return np.concatenate(parts, -1)


@oracle
def reshape(x: Array, *, shape: tuple[int, ...]) -> Array:
    flat = [x[at] for at in np.ndindex(x.shape)]
    return _each(x, lambda at: flat[int(np.ravel_multi_index(at, shape))], shape)


@oracle
def slice_(x: Array, *, axis: int, start: int, stop: int) -> Array:
    return np.take(x, range(start, stop), axis)


@oracle
def copy(x: Array) -> Array:
    return _each(x, lambda at: x[at])


@oracle
def permute(x: Array, *, axes: tuple[int, ...]) -> Array:
    shape = [x.shape[a] for a in axes]
    return _each(x, lambda at: x[tuple(at[axes.index(d)] for d in range(x.ndim))], shape)


@oracle
def broadcast(x: Array, *, shape: tuple[int, ...]) -> Array:
    last = [n - 1 for n in x.shape]
    return _each(x, lambda at: x[tuple(map(min, at, last))], shape)


def stored(row: Array, kv: str) -> list[float]:
    """What a cache of type `kv` gives back for a head of values."""
    if kv == "f32":
        return [float(np.float32(v)) for v in row]
    if kv == "f16":
        return [float(np.float16(v)) for v in row]
    if kv == "bf16":  # 8 bits of mantissa, the even one of two neighbours
        return [math.ldexp(round(math.ldexp(m, 8)), e - 8) for m, e in map(math.frexp, row)]
    assert kv in LEVELS, f"write what a cache of type {kv} gives back here, in tests/oracles.py"
    blocks = np.split(row, range(32, len(row), 32))
    return [v for block in blocks for v in coded(list(block) + [0.0] * (32 - len(block)), kv)][
        : len(row)
    ]


LEVELS = {
    "q8_0": range(-128, 128), "q6_0": range(-32, 32), "q5_0": range(-16, 16),
    "q4_0": range(-8, 8), "q5_1": range(32), "q4_1": range(16),
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}  # fmt: skip


def coded(block: list[float], kv: str) -> list[float]:
    """A group in levels times a scale, plus a minimum: the best of the ways that the type tries."""
    levels, coding = LEVELS[kv], KV_FORMATS[kv].coding
    x = np.array(block, np.float32)  # steps are taken in single: what is halfway depends on it
    low, extent = x.min(), x.max() - x.min()
    peak = (x.max() if x.max() >= -low else low) or np.float32(1)
    ways = [(peak / np.float32(goal), np.float32(goal) / peak, x) for goal in coding.tries]
    for below, beyond in coding.cuts:
        n, width = np.float32(levels[-1] / (1 - below - beyond)), extent or np.float32(1)
        ways.append((width / n, n / width, x - low - np.float32(below) * width))
    found = []
    for step, per, left in ways:
        steps = [float(s) if kv == "iq4_nl" else round(float(s)) for s in left * per]
        q = np.array([min(levels, key=lambda level, s=s: (abs(level - s), level)) for s in steps])
        found.append((((left.astype(float) - q * float(step)) ** 2).sum(), q))
    q = min(found, key=lambda way: way[0])[1]
    rows = np.array([q, np.ones(32)] if coding.cuts else [q], float)
    fit = np.linalg.lstsq(rows.T, x.astype(float), rcond=None)[0]
    return list(np.float16(fit).astype(float) @ rows)


@oracle
def kv_write(x: Array, pages: Array, kv_slots: Array, *, which: str, kv: str) -> Array:
    for row, slot in zip(x, kv_slots, strict=True):
        page, place = divmod(int(slot), pages.shape[1])
        for h, head in enumerate(row):
            pages[page, place, h] = stored(head, kv)
    return pages


@oracle
def attention(
    q: Array, k: Array, v: Array, block_table: Array, sequences: Array, places: Array,
    *sinks: Array, scale: float, window: int = 0, softcap: float = 0.0,
) -> Array:  # fmt: skip
    """Per token and head, weights exp(score) as they are: float64 has room for them."""
    size, group = k.shape[1], q.shape[1] // k.shape[2]
    out = np.empty((*q.shape[:2], v.shape[3]))
    for t, h in np.ndindex(q.shape[:2]):
        at = [divmod(p, size) for p in range(int(places[t]) + 1) if not window
              or p > places[t] - window]  # fmt: skip
        rows = [(block_table[sequences[t], page], place, h // group) for page, place in at]
        scores = [scale * math.fsum(q[t, h] * k[row]) for row in rows]
        if softcap:
            scores = [softcap * math.tanh(s / softcap) for s in scores]
        weights = [math.exp(s) for s in scores]
        total = math.fsum([*weights, *(math.exp(s[h]) for s in sinks)])
        out[t, h] = sum(w * v[row] for w, row in zip(weights, rows, strict=True)) / total
    return out


@oracle
def short_conv(
    x: Array, w: Array, state: Array, spans: Array, slot_in: Array, slot_out: Array
) -> Array:
    out, taps = np.empty(x.shape), w.shape[1]
    for (first, count), source, target in zip(spans, slot_in, slot_out, strict=True):
        past = state[source] if source >= 0 else np.zeros(state.shape[1:])
        rows = np.concatenate([past, x[first : first + count]])
        for c in range(x.shape[1]):
            out[first : first + count, c] = np.convolve(rows[:, c], w[c, ::-1], "valid")
        state[target] = rows[len(rows) - taps + 1 :]
    return out


@oracle
def gated_delta(
    q: Array, k: Array, v: Array, decay: Array, beta: Array, state: Array, spans: Array,
    slot_in: Array, slot_out: Array, *, scale: float, order: str,
) -> Array:  # fmt: skip
    """S_t = exp(decay) (1 - beta k k^T) S_{t-1} + beta k v^T, as a product of matrices per head."""
    out, heads, keys = np.empty(v.shape), v.shape[1], q.shape[1]
    one = np.eye(q.shape[2])
    for (first, count), source, target in zip(spans, slot_in, slot_out, strict=True):
        left = np.empty(state.shape[1:])
        for h in range(heads):
            g = h * keys // heads if order == "grouped" else h % keys
            S = np.array(state[source][h] if source >= 0 else np.zeros(state.shape[2:]))
            for t in range(first, first + count):
                turn = one - beta[t, h] * np.outer(k[t, g], k[t, g])
                S = math.exp(decay[t, h]) * (turn @ S) + beta[t, h] * np.outer(k[t, g], v[t, h])
                out[t, h] = scale * (q[t, g] @ S)
            left[h] = S
        state[target] = left
    return out
