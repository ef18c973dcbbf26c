"""How a step's tokens are cut into the tiles that attention works on."""

from __future__ import annotations

import numpy as np

from runtime.backends.cuda.kernels.attention_scores import ROWS
from runtime.backends.passes.fuse_attention import attention_pack
from runtime.ops.attention import attention
from runtime.ops.tensor import Tensor


def attends(node: Tensor) -> bool:
    """Whether it is attention, of which the first inputs are the same in all forms."""
    return attention.made(node) or attention_pack.made(node)


def tile_rows(node: Tensor) -> int:
    """Tokens of a tile: their query heads of one KV head are its rows."""
    q, k = node.inputs[:2]
    return max(1, ROWS * int(k.shape[2]) // int(q.shape[1]))


def tiles_name(node: Tensor) -> str:
    """The step input with its tiles: one for all layers whose tiles have as many tokens."""
    return f"attention_tiles {tile_rows(node)}"


def most_tiles(node: Tensor) -> int:
    """Tiles of a step at most: those of a sequence's tokens are full, but for the last."""
    tokens, sequences = int(node.shape[0]), int(node.inputs[3].shape[0])
    return min(tokens, -(-tokens // tile_rows(node)) + sequences)


def attention_tiles(sequences: np.ndarray, tokens: int, most: int) -> np.ndarray:
    """Runs of live tokens of one sequence, `most` at most: int32 [tiles, 4], sequence, first, count

    The tiles of a sequence begin at its first token of the step.
    """
    if tokens == 1:  # a decode step, where every microsecond counts
        return np.array([[sequences[0], 0, 1, 0]], np.int32)
    row = np.asarray(sequences[:tokens])
    starts = np.flatnonzero(np.diff(row, prepend=-1)) if len(row) else row
    found = []
    for start, end in zip(starts, [*starts[1:], tokens][: len(starts)], strict=True):
        for first in range(start, end, most):
            found.append((row[first], first, min(most, end - first), 0))
    return np.array(found, np.int32).reshape(-1, 4)
