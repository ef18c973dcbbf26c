"""Heads rotated on their way into quantised caches, and what attention makes of them rotated back.

Cache types with a scale for each group of dims lose least where no dim of a group stands out. An
orthonormal transform of q and k leaves all scores as they are, and one of v is undone behind
attention, which is linear in v. Models do not know of it.
"""

from __future__ import annotations

from runtime.ops.attention import attention, kv_write
from runtime.ops.graph import Graph, rewrite
from runtime.ops.rotation import hadamard
from runtime.ops.tensor import Tensor


def rotation_block(pages: Tensor) -> int:
    """Dims that are transformed together in heads of these pages; 0: they are stored as they are.

    The largest power of two that a head has room for, in pages of a type with groups.
    """
    dim = int(pages.shape[3])
    return 1 << (dim.bit_length() - 1) if pages.dtype.block > 1 and dim > 1 else 0


def rotate_cache(graph: Graph) -> Graph:
    """The plain graph of a model, of any device, with rotations where pages are quantised."""

    def write(node: Tensor, x: Tensor, pages: Tensor, kv_slots: Tensor) -> Tensor:
        return node.with_(inputs=(_rotated(x, pages), pages, kv_slots))

    def attend(node: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return _rotated(node.with_(inputs=(_rotated(q, k), k, v, *rest)), v)

    return rewrite(graph, {kv_write: write, attention: attend})


def _rotated(x: Tensor, pages: Tensor) -> Tensor:
    block = rotation_block(pages)
    return hadamard(x, name=x.name and f"{x.name}.rotated", block=block) if block else x
