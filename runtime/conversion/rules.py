"""How tensors of a checkpoint become tensors of a GGUF file, where they are not just copied.

A rule is given a stored tensor, the new name's beginning ("blk.0."), its stem ("attn_q") and its
end (".weight"), and says what new tensors are made of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from runtime.conversion.checkpoint import Stored
from runtime.conversion.config import Config
from runtime.conversion.pieces import Change, Matrix, Mxfp4, Planned, Rows, floats, rows_of
from runtime.ops.dtypes import MXFP4
from runtime.ops.errors import ModelError


class Name(NamedTuple):
    """The new tensor's name in parts."""

    block: str
    stem: str
    tail: str

    def __str__(self) -> str:
        return f"{self.block}{self.stem}{self.tail}"


Rule = Callable[[Matrix, Name, Config], Sequence[Planned]]


def copied(w: Matrix, name: Name, config: Config, change: Change | None = None) -> list[Planned]:
    """The tensor as it is."""
    return [Planned(str(name), w.shape, [Rows(w, range(rows_of(w)), change)])]


def _ordered(
    w: Matrix, name: Name, order: np.ndarray, change: Change | None = None, rows: int | None = None
) -> Planned:
    """Rows of a tensor of up to two axes in another order; rows: of how many they are some."""
    if (len(order) if rows is None else rows) != rows_of(w):
        raise ModelError(f"{w.label}: shape {list(w.shape)} is not what config.json says")
    return Planned(str(name), (len(order), *w.shape[1:]), [Rows(w, order, change)])


def plus_one(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """Norm weights that are stored as their distance from 1."""
    return copied(w, name, config, lambda rows: floats(rows) + np.float32(1))


def rotated(heads: str) -> Rule:
    """Queries or keys, `heads` of them, whose rotated pairs come to stand side by side."""

    def rule(w: Matrix, name: Name, config: Config) -> list[Planned]:
        count = config.size(heads, config.size("num_attention_heads"))
        _divides(w, count)
        order = np.arange(rows_of(w)).reshape(count, 2, -1).swapaxes(1, 2)
        return [_ordered(w, name, order.reshape(-1))]

    return rule


def _divides(w: Matrix, count: int) -> None:
    if rows_of(w) % (2 * count):
        raise ModelError(f"{w.label}: {rows_of(w)} rows are not {count} heads as config.json says")


# Delta-net layers. Value heads that share a key head stand together in checkpoints, and take turns
# in files ("tiled") of all architectures but Qwen3-Next.


class _Delta(NamedTuple):
    keys: int
    shared: int  # value heads of a key head
    key_dim: int
    value_dim: int

    @staticmethod
    def of(config: Config) -> _Delta:
        keys, values = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
        if values % keys:
            raise ModelError(f"{config.path}: {values} value heads for {keys} key heads")
        return _Delta(
            keys, values // keys, config.size("linear_key_head_dim"),
            config.size("linear_value_head_dim"),
        )  # fmt: skip

    def tiled(self, dim: int) -> np.ndarray:
        """Numbers of the value rows, `dim` for each head, in the order of files."""
        order = np.arange(self.keys * self.shared * dim).reshape(self.keys, self.shared, dim)
        return order.swapaxes(0, 1).reshape(-1)

    def after_keys(self) -> np.ndarray:
        """Rows of queries, keys and values."""
        before = 2 * self.keys * self.key_dim
        return np.concatenate([np.arange(before), before + self.tiled(self.value_dim)])


def tiled_queries_keys_values(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """The values behind queries and keys."""
    return [_ordered(w, name, _Delta.of(config).after_keys())]


def tiled_filter(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """The convolution [channels, 1, taps] over queries, keys and values."""
    plan = _ordered(w, name, _Delta.of(config).after_keys())
    return [plan._replace(shape=(plan.shape[0], plan.shape[-1]))]


def flat_filter(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """The convolution [channels, 1, taps] as a matrix."""
    return [p._replace(shape=(p.shape[0], p.shape[-1])) for p in copied(w, name, config)]


def tiled_gate(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """Rows of all numbers of the value heads."""
    delta = _Delta.of(config)
    return [_ordered(w, name, delta.tiled(delta.value_dim))]


def tiled_heads(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """One row for each value head."""
    return [_ordered(w, name, _Delta.of(config).tiled(1))]


def decay(w: Matrix, name: Name, config: Config, tiled: bool = True) -> list[Planned]:
    """-exp of the logarithms, one for each value head."""
    order = _Delta.of(config).tiled(1) if tiled else np.arange(rows_of(w))
    return [_ordered(w, name, order, _minus_exp)]


def _minus_exp(rows: np.ndarray) -> np.ndarray:
    # in 64 bits: numpy's exponential of 32 bits is off by some units in the last place
    return -np.exp(floats(rows).astype(np.float64)).astype(np.float32)


def grouped_decay(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """As `decay`, the heads in the checkpoint's order."""
    return decay(w, name, config, tiled=False)


def tiled_columns(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """The output projection, whose columns are the value heads."""
    delta = _Delta.of(config)
    order = delta.tiled(delta.value_dim)
    if len(order) != w.shape[-1]:
        raise ModelError(f"{w.label}: shape {list(w.shape)} is not what config.json says")
    return copied(w, name, config, lambda rows: rows[:, order])


def mixed_queries_keys_values(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """Qwen3-Next: for each key head its query, key, values and gates, taken apart."""
    d = _Delta.of(config)
    values = d.shared * d.value_dim
    rows = np.arange(d.keys * 2 * (d.key_dim + values)).reshape(d.keys, -1)
    cuts = np.cumsum([d.key_dim, d.key_dim, values])
    *mixed, gates = (part.reshape(-1) for part in np.split(rows, cuts, axis=1))
    gate = name._replace(stem="attn_gate")
    return [
        _ordered(w, new, order, rows=rows.size)
        for new, order in ((name, np.concatenate(mixed)), (gate, gates))
    ]


# Experts


def stacked(parts: Sequence[Matrix], name: Name) -> Planned:
    """One tensor of the experts' matrices."""
    shape = parts[0].shape
    for part in parts:
        if part.shape != shape:
            raise ModelError(
                f"{part.label} has shape {list(part.shape)}, those of other experts {list(shape)}"
            )
    return Planned(str(name), (len(parts), *shape), [Rows(w, range(rows_of(w))) for w in parts])


def halves(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """Gates and ups of all experts, [experts, 2 units, hidden]."""
    experts, both, hidden = _three_axes(w)
    rows = np.arange(experts * both).reshape(experts, 2, both // 2)
    return [
        Planned(
            str(Name(name.block, f"ffn_{part}_exps", ".weight")), (experts, both // 2, hidden),
            [Rows(w, rows[:, i].reshape(-1))],
        )
        for i, part in enumerate(("gate", "up"))
    ]  # fmt: skip


def _three_axes(w: Matrix) -> tuple[int, ...]:
    shape = w.shape
    if len(shape) != 3:
        raise ModelError(f"{w.label}: shape {list(shape)} is not that of experts")
    return shape


def turned(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """gpt-oss without MXFP4: matrices [experts, in, out], each to be turned; of gates and ups,
    whose columns take turns, two are made."""
    experts, inner, outer = _three_axes(w)
    made = [("gate", 0, 2), ("up", 1, 2)] if name.stem == "ffn_gate_up_exps" else [("down", 0, 1)]
    return [
        Planned(
            str(Name(name.block, f"ffn_{part}_exps", ".weight")), (experts, outer // step, inner),
            [
                Rows(w, range(e * inner, (e + 1) * inner), _turn(first, step), at_once=True)
                for e in range(experts)
            ],
        )
        for part, first, step in made
    ]  # fmt: skip


def _turn(first: int, step: int) -> Change:
    return lambda rows: rows[:, first::step].T


def _in_turn(first: int, rows: np.ndarray) -> np.ndarray:
    return rows[:, first::2]


def biases_in_turns(w: Matrix, name: Name, config: Config) -> list[Planned]:
    """gpt-oss: biases [experts, 2 units] of gates and ups that take turns."""
    experts, both = w.shape
    return [
        Planned(
            str(Name(name.block, f"ffn_{part}_exps", ".bias")), (experts, both // 2),
            [Rows(w, range(experts), partial(_in_turn, i))],
        )
        for i, part in enumerate(("gate", "up"))
    ]  # fmt: skip


def mxfp4(codes: Stored, scales: Stored, name: Name) -> list[Planned]:
    """gpt-oss: codes [experts, rows, blocks, 16] and scales [experts, rows, blocks], rows of gates
    and ups in turns."""
    if codes.shape != (*scales.shape, MXFP4.block // 2) or {codes.kind, scales.kind} != {"U8"}:
        raise ModelError(f"{codes.label}: {codes.kind} {list(codes.shape)} are no MXFP4 blocks")
    experts, rows, blocks = _three_axes(scales)
    made = [("gate", 0, 2), ("up", 1, 2)] if name.stem == "ffn_gate_up_exps" else [("down", 0, 1)]
    order = np.arange(experts * rows).reshape(experts, rows)
    return [
        Planned(
            str(Name(name.block, f"ffn_{part}_exps", ".weight")),
            (experts, rows // step, blocks * MXFP4.block),
            [Rows(Mxfp4(codes, scales), order[:, first::step].reshape(-1))], MXFP4,
        )
        for part, first, step in made
    ]  # fmt: skip
