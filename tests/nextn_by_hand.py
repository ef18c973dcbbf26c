"""The NextN block in numpy, token by token and head by head, from a file's tensors alone."""

from __future__ import annotations

import numpy as np
from small_models import Sizes


def drafts(
    size: Sizes, tensors: dict[str, np.ndarray], ids: list[int], rows: np.ndarray, count: int
) -> list[int]:
    """`count` tokens behind `ids`, of which the last has no row yet; rows: of those before it."""
    t = {name: values.astype(np.float64) for name, values in tensors.items()}
    block, before = Block(size, t), np.zeros(size.hidden)
    for place, token in enumerate(ids[:-1]):
        block.keep(place, block.joined(token, before))
        before = rows[place]
    token, found = ids[-1], []
    for place in range(len(ids) - 1, len(ids) - 1 + count):
        before = block.row(place, block.joined(token, before))
        token = int(
            np.argmax(
                t.get(block.at + "nextn.shared_head_head.weight", t["token_embd.weight"]) @ before
            )
        )
        found.append(token)
    return found


class Block:
    """What it remembers is a list of keys and one of values, each [KV heads, dim]."""

    def __init__(self, size: Sizes, t: dict[str, np.ndarray]) -> None:
        self.size, self.t, self.at = size, t, f"blk.{size.layers}."
        self.keys, self.values = list[np.ndarray](), list[np.ndarray]()

    def joined(self, token: int, before: np.ndarray) -> np.ndarray:
        table = self.t.get(self.at + "nextn.embed_tokens.weight", self.t["token_embd.weight"])
        pair = [self.norm(table[token], "nextn.enorm"), self.norm(before, "nextn.hnorm")]
        return self.w("nextn.eh_proj") @ np.concatenate(pair)

    def keep(self, place: int, x: np.ndarray) -> None:
        x, s = self.norm(x, "attn_norm"), self.size
        k = (self.w("attn_k") @ x).reshape(s.kv_heads, s.dim)
        k = np.stack([self.norm(head, "attn_k_norm") for head in k])
        del self.keys[place:], self.values[place:]
        self.keys.append(self.rotated(k, place))
        self.values.append((self.w("attn_v") @ x).reshape(s.kv_heads, s.dim))

    def row(self, place: int, x: np.ndarray) -> np.ndarray:
        self.keep(place, x)
        x = x + self.attended(place, self.norm(x, "attn_norm"))
        x = x + self.network(self.norm(x, "post_attention_norm"))
        own = self.at + "nextn.shared_head_norm.weight"
        return _normed(x, self.t[own] if own in self.t else self.t["output_norm.weight"])

    def attended(self, place: int, x: np.ndarray) -> np.ndarray:
        s, found = self.size, []
        both = (self.w("attn_q") @ x).reshape(s.heads, 2 * s.dim)
        for head, (q, gate) in enumerate(zip(both[:, : s.dim], both[:, s.dim :], strict=True)):
            q = self.rotated(self.norm(q, "attn_q_norm")[None], place)[0]
            kv = head // (s.heads // s.kv_heads)
            scores = np.array([q @ k[kv] for k in self.keys]) / s.dim**0.5
            shares = np.exp(scores - scores.max())
            y = sum(
                share * v[kv] for share, v in zip(shares / shares.sum(), self.values, strict=True)
            )
            found.append(y / (1 + np.exp(-gate)))
        return self.w("attn_output") @ np.concatenate(found)

    def network(self, x: np.ndarray) -> np.ndarray:
        if not self.size.experts:
            return self.one(x, "ffn_{}", ...)
        scores = self.w("ffn_gate_inp") @ x
        chosen = np.argsort(-scores)[: self.size.used]
        shares = np.exp(scores[chosen] - scores.max())
        y = sum(
            share * self.one(x, "ffn_{}_exps", expert)
            for expert, share in zip(chosen, shares / shares.sum(), strict=True)
        )
        gate = 1 / (1 + np.exp(-(self.w("ffn_gate_inp_shexp") @ x)))
        return y + gate * self.one(x, "ffn_{}_shexp", ...)

    def one(self, x: np.ndarray, name: str, index) -> np.ndarray:
        gate, up, down = (self.w(name.format(part))[index] for part in ("gate", "up", "down"))
        inner = gate @ x
        return down @ (inner / (1 + np.exp(-inner)) * (up @ x))

    def rotated(self, x: np.ndarray, place: int) -> np.ndarray:
        n = self.size.dim // 2  # dims that are rotated, pairs half of them apart
        angles = place * 10000.0 ** (-np.arange(0, n, 2) / n)
        a, b, rest = x[:, : n // 2], x[:, n // 2 : n], x[:, n:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], 1)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return _normed(x, self.w(name))

    def w(self, name: str) -> np.ndarray:
        return self.t[f"{self.at}{name}.weight"]


def _normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + 1e-6) * weight
