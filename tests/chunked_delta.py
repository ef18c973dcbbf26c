"""The gated delta rule in its other form, over chunks of tokens."""

from __future__ import annotations

import numpy as np


def chunked(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray,
    state: np.ndarray, spans: np.ndarray, slot_in: np.ndarray, slot_out: np.ndarray, *,
    scale: float, order: str, chunk: int = 64,
) -> np.ndarray:  # fmt: skip
    """`gated_delta` by matrix products over chunks of tokens, for devices where those are cheap.

    The WY form of Yang et al. 2024. The same numbers but for rounding, so a device uses one form
    alone: a prompt cut elsewhere would change bits. Changes `state`.
    """
    heads, apart = np.arange(v.shape[1]), v.shape[1] // q.shape[1]
    picked = heads // apart if order == "grouped" else heads % q.shape[1]
    out = np.empty(v.shape, np.result_type(q, v))
    for (first, count), source, target in zip(spans, slot_in, slot_out, strict=True):
        S = np.array(state[source] if source >= 0 else np.zeros_like(state[0]), out.dtype)
        for start in range(first, first + count, chunk):
            at = slice(start, min(start + chunk, first + count))
            Q, K, V = (x.swapaxes(0, 1) for x in (q[at][:, picked], k[at][:, picked], v[at]))
            read, S = _chunk(Q, K, V, decay[at].T, beta[at].T, S)
            out[at] = read.swapaxes(0, 1) * scale
        state[target] = S
    return out


def _chunk(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray, S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Read-outs [heads, tokens, dv] and the state behind a chunk [heads, tokens, ..].

    The update of token i is d_i = beta_i (v_i - S_i^T k_i), where S_i is the state before it,
    decayed: the first state and all k_j d_j^T with j < i. That is a triangular system for d.
    """
    total = np.cumsum(decay, 1)  # logarithm of all decay up to a token
    later = np.tril(np.exp(np.minimum(0, total[:, :, None] - total[:, None, :])))
    known = np.exp(total)[:, :, None]
    coupling = np.tril(beta[:, :, None] * later * (k @ k.swapaxes(1, 2)), -1)
    right = beta[:, :, None] * (v - known * (k @ S))
    d = np.linalg.solve(np.eye(k.shape[1]) + coupling, right)
    out = known * (q @ S) + (later * (q @ k.swapaxes(1, 2))) @ d
    left = k * later[:, -1, :, None]
    return out, known[:, -1:] * S + left.swapaxes(1, 2) @ d
