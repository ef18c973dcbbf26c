"""The gated delta rule (Yang et al. 2024), token by token, with the state of a head in the cache.

Parallel over (value head x 16 columns of its state), each thread with neighbouring ones: columns
of S [dk, dv] never meet, so their bits are the same whoever computes them and with how many
beside. A thread takes up to 64 columns at a time through all tokens of a sequence, in a copy of
32 KiB (dk = 128) that stays in the first level of the cache. Rows are added in order.

With g = exp(decay), S^T k after the decay is g (S^T k) before it. So one pass over S does the
update of a token, its read-out, and S^T k for the token behind it: two multiply-adds for the two
sums, one and a product for the update, while S is read and written once.
"""

from __future__ import annotations

from runtime.backends.cpu.abi import DELTA_VECTORS
from runtime.backends.plan.catalogue import constants

from . import simd as s
from .delta_passes import WIDEST, read_keys, update
from .rows import ask_for, clear, helper, share

_TOKENS = 16  # whose gates are computed together
_WIDEST = WIDEST

# Byte offsets in the scratch of a thread: gates of some tokens, vectors of one token, then S.
_GATES, _BETAS, _SUMS, _COPY = 0, 64, 128, DELTA_VECTORS


@helper
def column(x, stride, n, target):
    """n floats `stride` bytes apart and zeros behind them, as a vector at an address."""
    for i in range(16):
        s.store_f32(target + i * 4, s.load_f32(x + i * stride) if i < n else s.f32(0))


@helper
def given_decay(x, head, dt, a):
    """The logarithm of a decay as it is."""
    return x


@helper
def given_beta(x):
    """How much of a key's new value is written, as it is."""
    return x


@helper
def raw_decay(x, head, dt, a):
    """a softplus(x + dt) of a head; an address 0 stands for no dt."""
    if dt != 0:
        x = x + s.splat(s.load_f32(dt + head * 4))
    return s.softplus(x) * s.splat(s.load_f32(a + head * 4))


@helper
def raw_beta(x):
    """The same from its logit."""
    return s.sigmoid(x)


@helper
def width_of(columns, left):
    """How many columns to take together: of those of a thread, and left in the head."""
    width, most = _WIDEST, min(columns, left)
    while width > 16 and width > most:
        width //= 2
    return min(width, most)


def _build(log_decay, beta_of):
    @helper
    def gates(decay, decay_stride, beta, beta_stride, token, count, head, dt, a, mine):
        """g and beta of the next tokens."""
        some = min(_TOKENS, count)
        column(decay + (token * decay_stride + head) * 4, decay_stride * 4, some, mine + _GATES)
        column(beta + (token * beta_stride + head) * 4, beta_stride * 4, some, mine + _BETAS)
        s.store(mine + _GATES, s.exp(log_decay(s.load(mine + _GATES), head, dt, a)))
        s.store(mine + _BETAS, beta_of(s.load(mine + _BETAS)))

    def gated_delta(
        q, k, v, decay, beta, q_stride, k_stride, v_stride, decay_stride, beta_stride, dt, a,
        state, slot_bytes, spans, slot_in, slot_out, out, live, heads, key_heads, dk, dv, tiled,
        scale, scratch, scratch_bytes, thread, n_threads,
    ):  # fmt: skip
        mine, units = scratch + thread * scratch_bytes, (dv + 15) // 16
        for sequence in range(s.load_i64(live)):
            first, count = s.load_i32(spans + sequence * 8), s.load_i32(spans + sequence * 8 + 4)
            origin = s.load_i32(slot_in + sequence * 4)
            result = state + s.load_i32(slot_out + sequence * 4) * slot_bytes
            at, last = share(heads * units, thread, n_threads)
            while at < last:
                head, start = at // units, at % units * 16
                n = width_of((last - at) * 16, dv - start)
                at += (n + 15) // 16
                place, copy, copy_row = head * dk * dv + start, mine + _COPY, (n + 15) // 16 * 64
                behind = at // units * dk * dv + at % units * 16  # where the next columns are
                source, source_row = state + origin * slot_bytes + place * 4, dv * 4
                if origin < 0:
                    clear(copy, dk * copy_row)
                    source, source_row = copy, copy_row
                key = head % key_heads if tiled != 0 else head // (heads // key_heads)
                query = q + (first * q_stride + key * dk) * 4
                key = k + (first * k_stride + key * dk) * 4
                read_keys(source, source_row, key, dk, n, mine + _SUMS)
                for token in range(first, first + count):
                    left, i = first + count - token, (token - first) % _TOKENS
                    if i == 0:
                        gates(
                            decay, decay_stride, beta, beta_stride, token, left, head, dt, a, mine
                        )
                    g, by = s.load_f32(mine + _GATES + i * 4), s.load_f32(mine + _BETAS + i * 4)
                    target, target_row, following = copy, copy_row, key + k_stride * 4
                    ahead = 0
                    if left == 1:
                        target, target_row, following = result + place * 4, dv * 4, key
                        ahead = state + origin * slot_bytes + behind * 4 - source
                    value = v + (token * v_stride + head * dv + start) * 4
                    ask_for(following + k_stride * 4, dk * 4)
                    ask_for(query + q_stride * 4, dk * 4)
                    ask_for(value + v_stride * 4, n * 4)
                    update(
                        source, source_row, target, target_row, dk, n, g, by, key, value, query,
                        following, mine + _SUMS, out + ((token * heads + head) * dv + start) * 4,
                        s.float_of(scale), ahead,
                    )  # fmt: skip
                    source, source_row = target, target_row
                    key, query = following, query + q_stride * 4

    return gated_delta


@constants(gates=("given", "raw"))
def build_gated_delta(gates):
    """The rule over runs of tokens; gates "raw" are those before softplus and sigmoid."""
    given = gates == "given"
    return _build(*((given_decay, given_beta) if given else (raw_decay, raw_beta)))
