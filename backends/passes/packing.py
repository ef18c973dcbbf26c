"""What the passes over a model's graph share, and the first of them: activations packed.

Each pass is a table of rules for `ops.rewrite`; prepare.py lists them. The new nodes (`pack`,
`linear`, `qkv_post`, ...) live only between here and the lowering; model files and split rules
never see them. Every fused op computes what the plain ops do; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from runtime.ops.dtypes import F32, I32, DType
from runtime.ops.graph import Graph, rewrite
from runtime.ops.tensor import Tensor

FLOAT_FORMATS = ("F32", "F16", "BF16")
PACKED = DType("packed", 1, 1, None)
PACKED_OPS = frozenset({"matmul", "matmul_id"})  # what `pack_inputs` replaces: no rule sees them


# Ops that only exist behind the passes.
FUSED_OPS = frozenset({
    "pack", "rms_norm_pack", "swiglu_pack", "linear", "qkv_post", "router", "router_ids",
    "router_tiles", "expert_tiles", "pack_rows", "swiglu_pack_rows", "linear_id",
    "sigmoid_gate_pack", "gated_norm_pack", "conv_post", "delta_step",
})  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What the passes have to know of a device, and how its user wants it.

    packed: weight types the device has tiles for; those of others are widened to float32.
    max_head_dim: of a head that is normed, rotated and stored in one. activations: "int8" or
    "f32". wide: columns of the widest tile. split: BF16 weights take activations in bfloat16
    pieces.
    """

    packed: frozenset[str]
    max_head_dim: int
    activations: str = "int8"
    wide: int = 8
    fuse: bool = True
    split: bool = False


def activation_kind(w: Tensor, options: Options) -> str:
    """What a weight is multiplied with: int8 blocks, or float32 (whole or split) for floats."""
    kind = w.dtype.name.upper()
    if options.split and kind == "BF16" and w.shape[-1] % 32 == 0:
        return "split"
    exact = kind in FLOAT_FORMATS or kind not in options.packed or options.activations == "f32"
    return "f32" if exact else "int8"


def columns(rows: int, kind: str, options: Options) -> int:
    """Columns of the tiles for a capacity of `rows`; a result's bits never depend on it."""
    if rows <= 4:
        return 1 if rows == 1 else 4
    return options.wide if rows >= 16 and kind != "f32" else 8


def expert_columns(choices: int, experts: int, kind: str, options: Options) -> int:
    """Columns of expert tiles: as many as an expert gets on average, so that few are empty."""
    return 1 if choices < 2 * experts else columns(choices // experts, kind, options)


def distinct_sizes(graph: Graph, sizes: Sequence[int], options: Options) -> list[int]:
    """Of these numbers of tokens the first of each that makes tiles of other widths.

    graph: the model's step of one token. A plan's kernels are known by the widths of its tiles, so
    the plans of these sizes use all that the plans of all `sizes` use.
    """
    mixtures = {
        (int(w.shape[0]), int(ids.shape[1]))
        for _, w, ids, *_ in (node.inputs for node in graph.nodes if node.op == "matmul_id")
    }

    def widths(tokens: int) -> tuple[int, ...]:
        kinds = ("int8", "f32")
        plain = [columns(tokens, kind, options) for kind in kinds]
        return *plain, *(
            expert_columns(tokens * used, experts, kind, options)
            for experts, used in sorted(mixtures)
            for kind in kinds
        )

    first: dict[tuple[int, ...], int] = {}
    for size in sizes:
        first.setdefault(widths(size), size)
    return list(first.values())


def node_of(op: str, inputs: tuple[Tensor, ...], like: Tensor, **attrs: Any) -> Tensor:
    """A node of this device, with the shape and name of `like` and float32 unless said."""
    shape, dtype = attrs.pop("shape", like.shape), attrs.pop("dtype", F32)
    return Tensor(op, inputs, shape, dtype, MappingProxyType(attrs), like.name)


def only_user(graph: Graph, node: Tensor) -> bool:
    """Whether exactly one node reads it, and nothing outside."""
    return len(graph.users[node]) == 1 and node not in graph.outputs


def pack_inputs(graph: Graph, options: Options) -> Graph:
    """matmul(x, w) -> linear(pack(x), w); equal packs of one x are one node."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def pack(op: str, inputs: tuple[Tensor, ...], like: Tensor, **attrs: Any) -> Tensor:
        key = (op, inputs, *sorted(attrs.items()))
        if key not in made:
            made[key] = node_of(op, inputs, like, dtype=PACKED, shape=like.shape, **attrs)
        return made[key]

    def matmul(node: Tensor, x: Tensor, w: Tensor) -> Tensor:
        kind = activation_kind(w, options)
        width = columns(x.size // x.shape[-1], kind, options)
        packed = pack("pack", (x,), x, C=width, kind=kind)
        return node_of("linear", (packed, w), node)

    def matmul_id(node: Tensor, x: Tensor, w: Tensor, ids: Tensor, *bias: Tensor) -> Tensor:
        kind = activation_kind(w, options)
        width = expert_columns(ids.size, int(w.shape[0]), kind, options)
        key = ("tiles", ids, width)
        if key not in made:
            made[key] = node_of(
                "expert_tiles", (ids,), ids, dtype=I32, C=width, experts=int(w.shape[0])
            )
        each = int(ids.shape[1]) if x.ndim == 2 else 1  # choices that share a row of x
        if width == 1:  # tiles find their row: nothing has to be gathered
            packed, every = pack("pack", (x,), x, C=1, kind=kind), each
        else:
            packed = pack("pack_rows", (x, made[key]), x, C=width, kind=kind, divisor=each)
            every = 0
        return node_of("linear_id", (packed, w, made[key], *bias), node, every=every)

    return rewrite(graph, {"matmul": matmul, "matmul_id": matmul_id})
