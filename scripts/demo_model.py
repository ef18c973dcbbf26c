"""The demo model in torch: qwen3 (RMS norm, q/k norm, rotary, grouped heads, SwiGLU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; every matmul input is a multiple of 256 so that K-quants fit."""

    vocabulary: int = 1024
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    ff: int = 256
    context: int = 512
    rope_base: float = 10_000.0
    eps: float = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention with grouped heads; q and k are normalised per head before rotation."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q = nn.Linear(s.hidden, s.heads * s.head, bias=False)
        self.k = nn.Linear(s.hidden, s.kv_heads * s.head, bias=False)
        self.v = nn.Linear(s.hidden, s.kv_heads * s.head, bias=False)
        self.output = nn.Linear(s.heads * s.head, s.hidden, bias=False)
        self.q_norm = RMSNorm(s.head, s.eps)
        self.k_norm = RMSNorm(s.head, s.eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.s.heads, self.s.head)
        k = self.k(x).view(batch, tokens, self.s.kv_heads, self.s.head)
        v = self.v(x).view(batch, tokens, self.s.kv_heads, self.s.head).transpose(1, 2)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        group = self.s.heads // self.s.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(s.hidden, s.eps)
        self.attn = Attention(s)
        self.ffn_norm = RMSNorm(s.hidden, s.eps)
        self.gate = nn.Linear(s.hidden, s.ff, bias=False)
        self.up = nn.Linear(s.hidden, s.ff, bias=False)
        self.down = nn.Linear(s.ff, s.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class DemoModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, vocabulary]; the embedding is also the output matrix."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocabulary, s.hidden)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)
        angles = torch.outer(torch.arange(s.context).float(), _frequencies(s))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else weight.shape[1] ** -0.5)
            if name.endswith(("output.weight", "down.weight")):
                nn.init.zeros_(weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos[:tokens], self.sin[:tokens])
        return F.linear(self.norm(x), self.embed.weight)


def _frequencies(s: Shape) -> torch.Tensor:
    return s.rope_base ** (-torch.arange(0, s.head, 2).float() / s.head)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves of the last axis paired ("neox"); x [B, H, T, head]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@torch.no_grad()
def generate(model: DemoModel, ids: list[int], count: int, stop: set[int]) -> list[int]:
    """Greedy continuation of `ids`: at most `count`, ended by the context or by one of `stop`."""
    made: list[int] = []
    while len(made) < count and len(ids) + len(made) < model.s.context:
        logits = model(torch.tensor([ids + made]))[0, -1]
        made.append(int(logits.argmax()))
        if made[-1] in stop:
            break
    return made


class Muon(torch.optim.Optimizer):
    """Momentum with an update orthogonalised by Newton-Schulz steps (Jordan et al. 2024).

    For matrices only. Those of one shape are updated together, which keeps small products
    efficient.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault(tuple(weight.shape), []).append(weight)
            for weights in shapes.values():
                self._update(weights, group["lr"], group["momentum"])

    def _update(self, weights: list[nn.Parameter], lr: float, momentum: float) -> None:
        steps = []
        for weight in weights:
            mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
            mean.lerp_(weight.grad, 1 - momentum)
            steps.append(weight.grad.lerp(mean, momentum))
        rows, columns = weights[0].shape
        scale = lr * max(1.0, rows / columns) ** 0.5
        for weight, step in zip(weights, orthogonalise(torch.stack(steps)), strict=True):
            weight.mul_(1 - 0.1 * lr).sub_(step, alpha=scale)


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """x [N, R, C] with its singular values moved close to 1 by five Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
