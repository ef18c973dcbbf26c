"""A small hybrid model in torch with a head that predicts a further token (NextN), for training.

The shapes are Qwen3.5's: gated delta-net layers, a gated attention layer now and then. The head
takes the embedding of a token and the hidden row before it, and predicts what follows the token.
Letters: B rows, T tokens, H heads, N chunks of C tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from demo_model import RMSNorm, rotate
from torch import nn

CHUNK = 32  # tokens of a delta-net chunk


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; every `interval`-th layer has attention."""

    vocabulary: int = 1024
    hidden: int = 256
    layers: int = 12
    interval: int = 4
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    rotated: int = 32
    delta_heads: int = 4
    delta: int = 64
    taps: int = 4
    ff: int = 512
    context: int = 1024
    rope_base: float = 10_000.0
    eps: float = 1e-6


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class GatedAttention(nn.Module):
    """Causal attention; a gate lies behind each head's query, and a part of a head is rotated."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.attn_q = _linear(s.hidden, 2 * s.heads * s.head)
        self.attn_k = _linear(s.hidden, s.kv_heads * s.head)
        self.attn_v = _linear(s.hidden, s.kv_heads * s.head)
        self.attn_output = _linear(s.heads * s.head, s.hidden)
        self.attn_q_norm, self.attn_k_norm = RMSNorm(s.head, s.eps), RMSNorm(s.head, s.eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        s, (rows, tokens, _) = self.s, x.shape
        q, gate = self.attn_q(x).view(rows, tokens, s.heads, 2 * s.head).chunk(2, -1)
        k = self.attn_k(x).view(rows, tokens, s.kv_heads, s.head)
        v = self.attn_v(x).view(rows, tokens, s.kv_heads, s.head).transpose(1, 2)
        q, k = (
            self._rotated(self.attn_q_norm(q), cos, sin),
            self._rotated(self.attn_k_norm(k), cos, sin),
        )
        y = F.scaled_dot_product_attention(
            q, *(t.repeat_interleave(s.heads // s.kv_heads, 1) for t in (k, v)), is_causal=True
        )
        return self.attn_output((y.transpose(1, 2) * gate.sigmoid()).reshape(rows, tokens, -1))

    def _rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x, n = x.transpose(1, 2), self.s.rotated
        return torch.cat((rotate(x[..., :n], cos, sin).to(x.dtype), x[..., n:]), -1)


class DeltaNet(nn.Module):
    """The gated delta rule (Yang et al. 2024) behind a short convolution."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s, values = s, s.delta_heads * s.delta
        self.attn_qkv = _linear(s.hidden, 3 * values)
        self.attn_gate = _linear(s.hidden, values)
        self.ssm_conv1d = nn.Parameter(torch.randn(3 * values, s.taps) * s.taps**-0.5)
        self.ssm_alpha = _linear(s.hidden, s.delta_heads)
        self.ssm_beta = _linear(s.hidden, s.delta_heads)
        self.decay_log = nn.Parameter(torch.linspace(0, 2, s.delta_heads))
        self.ssm_dt = nn.Parameter(torch.linspace(-4, -2, s.delta_heads))
        self.ssm_norm = RMSNorm(s.delta, s.eps)
        self.ssm_out = _linear(values, s.hidden)

    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        s, (rows, tokens, _) = self.s, x.shape
        mixed = F.pad(self.attn_qkv(x).float().transpose(1, 2), (s.taps - 1, 0))
        mixed = F.silu(F.conv1d(mixed, self.ssm_conv1d[:, None], groups=mixed.shape[1]))
        q, k, v = mixed.transpose(1, 2).view(rows, tokens, 3, s.delta_heads, s.delta).unbind(2)
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        pace = F.softplus(self.ssm_alpha(x).float() + self.ssm_dt)
        decay, beta = -self.decay_log.exp() * pace, self.ssm_beta(x).float().sigmoid()
        with torch.autocast("cpu", enabled=False):
            y = delta_rule(q * s.delta**-0.5, k, v, decay, beta)
        gate = self.attn_gate(x).view(rows, tokens, s.delta_heads, s.delta)
        return self.ssm_out((self.ssm_norm(y) * F.silu(gate)).reshape(rows, tokens, -1))


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """S *= exp(decay); S += k (beta (v - S^T k))^T; S^T q of each token [B, T, H, D], by chunks.

    Within a chunk what each token adds to the state solves a triangular system, as it depends on
    what those before it have added.
    """
    rows, tokens, heads, size = q.shape
    q, k, v, decay, beta = (_chunks(t, CHUNK) for t in (q, k, v, decay[..., None], beta[..., None]))
    total = decay.cumsum(-2)  # [B, H, N, C, 1]
    fade = (total - total.mT).tril().exp().tril()
    own = torch.eye(CHUNK) + (beta * (k @ k.mT) * fade).tril(-1)
    solved = torch.linalg.solve_triangular(
        own, torch.cat((beta * v, beta * total.exp() * k), -1), upper=False, unitriangular=True
    )
    values, from_state = solved.split(size, -1)
    seen, faded = (q @ k.mT) * fade, q * total.exp()
    kept, last = k * (total[..., -1:, :] - total).exp(), total[..., -1:, :].exp()
    state, found = torch.zeros(rows, heads, size, size), []
    for n in range(q.shape[2]):
        added = values[:, :, n] - from_state[:, :, n] @ state
        found.append(faded[:, :, n] @ state + seen[:, :, n] @ added)
        state = state * last[:, :, n] + kept[:, :, n].mT @ added
    return torch.stack(found, 2).flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def _chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """[B, T, H, D] as [B, H, N, C, D]; zeros behind the last token."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    rows, tokens, heads, size = x.shape
    return x.transpose(1, 2).reshape(rows, heads, tokens // chunk, chunk, size)


class Block(nn.Module):
    """A layer: delta net or attention, then the feed-forward network."""

    def __init__(self, s: Shape, recurrent: bool) -> None:
        super().__init__()
        self.attn_norm, self.post_attention_norm = (
            RMSNorm(s.hidden, s.eps),
            RMSNorm(s.hidden, s.eps),
        )
        self.mixer = DeltaNet(s) if recurrent else GatedAttention(s)
        self.ffn_gate, self.ffn_up = _linear(s.hidden, s.ff), _linear(s.hidden, s.ff)
        self.ffn_down = _linear(s.ff, s.hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.attn_norm(x), cos, sin)
        h = self.post_attention_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Head(nn.Module):
    """Embeddings [B, T, hidden] and the hidden rows before them -> hidden rows of its own."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.enorm, self.hnorm = RMSNorm(s.hidden, s.eps), RMSNorm(s.hidden, s.eps)
        self.eh_proj = _linear(2 * s.hidden, s.hidden)
        self.block = Block(s, recurrent=False)
        self.shared_head_norm = RMSNorm(s.hidden, s.eps)

    def forward(self, x: torch.Tensor, before: torch.Tensor, *angles: torch.Tensor) -> torch.Tensor:
        x = self.eh_proj(torch.cat((self.enorm(x), self.hnorm(before)), -1))
        return self.shared_head_norm(self.block(x, *angles))


class HybridModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, vocabulary] of the model, and of the head."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocabulary, s.hidden)
        self.blocks = nn.ModuleList(Block(s, (i + 1) % s.interval != 0) for i in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)
        self.head = Head(s)
        frequencies = s.rope_base ** (-torch.arange(0, s.rotated, 2).float() / s.rotated)
        angles = torch.outer(torch.arange(s.context).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and "conv1d" not in name:
                nn.init.normal_(weight, std=0.02 if "embed" in name else weight.shape[1] ** -0.5)
            if name.endswith(("output.weight", "down.weight", "ssm_out.weight")):
                nn.init.zeros_(weight)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows that logits are made of."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.norm(x)

    def ahead(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The head's rows, of hidden rows that belong to the same tokens; the first has none."""
        before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return self.head(
            self.embed(ids), before, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The embedding is also the output matrix."""
        return F.linear(hidden, self.embed.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(ids))
