"""What the passes over a model's graph share, and the first of them: activations packed.

Each pass is a table of rules for `ops.rewrite`; prepare.py lists them. The ops of new nodes
(`pack`, `linear`, `qkv_post`, ...), each declared with the pass that makes it, live only between
here and the lowering; model files and split rules never see them. Every fused op computes what
the plain ops do; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from runtime.ops.collective import all_gather
from runtime.ops.dtypes import I32, DType
from runtime.ops.graph import Graph, rewrite
from runtime.ops.matmul import matmul, matmul_id
from runtime.ops.moe import renumber
from runtime.ops.registry import Kind, Op, fused
from runtime.ops.tensor import Tensor

FLOAT_FORMATS = ("F32", "F16", "BF16")
PACKED = {  # by what weights are multiplied with; sizes are those of the CPU's tiles
    "int8": DType("int8 tiles", 32, 52, None),
    "f32": DType("f32 tiles", 1, 4, None),
    "split": DType("bf16 tiles", 1, 6, None),
}
PACKED_OPS = (matmul, matmul_id)  # what `pack_inputs` replaces: no rule sees them

pack = fused("pack", kind=Kind.ROWWISE)  # rows of x as tiles of a matmul
linear = fused("linear", kind=Kind.CONTRACTION, flops=matmul.flops)  # tiles, weight, bias, add
expert_tiles = fused("expert_tiles", kind=Kind.WHOLE)  # tokens by the expert they chose
pack_rows = fused("pack_rows", kind=Kind.GATHER, picks={0: 1})  # x in the order of expert tiles
linear_id = fused(
    "linear_id", kind=Kind.CONTRACTION, picks={1: 3, 4: 3}, flops=matmul_id.flops
)  # tiles, weights of all experts, expert tiles, ids, biases


# Rows from which the widest tile of a coding pays. Up to three tiles of eight columns of int8 are
# faster by vector instructions, which need no unpacked copy of the weights (two: 1.2 to 1.5 times).
_WIDE_FROM = {"int8": 32, "split": 16}


class Options(NamedTuple):
    """What the passes have to know of a device, and how its user wants it.

    packed: weight types the device has tiles for; those of others are widened to float32.
    max_head_dim: of a head that is normed, rotated and stored in one. activations: "int8" or
    "f32". wide: columns of the widest tile. split: BF16 weights take activations in bfloat16
    pieces. pack_parts: of a row that several devices have in parts, each packs its own.
    delta_layer: tokens of a step up to which convolution, recurrence and gated norm are one. few:
    kernels find the rows of experts themselves, so none are gathered, and up to so many tokens the
    products of experts are fused; 0: rows are gathered into tiles. attention_pack: attention
    gates and packs its result itself.
    """

    packed: frozenset[str]
    max_head_dim: int
    activations: str = "int8"
    wide: int = 8
    fuse: bool = True
    split: bool = False
    pack_parts: bool = True
    delta_layer: int = 0
    few: int = 0
    attention_pack: bool = False


def coding_of(weights: DType, n: int, options: Options) -> str:
    """What rows of n of a weight are multiplied with: int8 blocks, or for floats float32."""
    name = weights.name.upper()
    if options.split and name == "BF16" and n % 32 == 0:
        return "split"
    exact = name in FLOAT_FORMATS or name not in options.packed or options.activations == "f32"
    return "f32" if exact else "int8"


def columns(rows: int, coding: str, options: Options) -> int:
    """Columns of the tiles for a capacity of `rows`; a result's bits never depend on it."""
    if rows <= 4:
        return 1 if rows == 1 else 4
    return options.wide if rows >= _WIDE_FROM.get(coding, rows + 1) else 8


def expert_columns(choices: int, experts: int, coding: str, options: Options) -> int:
    """Columns of expert tiles: as many as an expert gets on average, so that few are empty."""
    return 1 if choices < 2 * experts else columns(choices // experts, coding, options)


def experts_of(w: Tensor, ids: Tensor) -> int:
    """How many experts ids are chosen from: of those in `w`, or of all where a device has some."""
    return int(ids.inputs[1].size if renumber.made(ids) else w.shape[0])


def distinct_sizes(graph: Graph, sizes: Sequence[int], options: Options) -> list[int]:
    """Of these numbers of tokens the first of each that makes tiles of other widths.

    graph: the model's step of one token. A plan's kernels are known by the widths of its tiles, so
    the plans of these sizes use all that the plans of all `sizes` use.
    """
    mixtures = {
        (experts_of(w, ids), int(ids.shape[1]))
        for _, w, ids, *_ in (node.inputs for node in graph.nodes if matmul_id.made(node))
    }

    def widths(tokens: int) -> tuple[int, ...]:
        every = ("int8", "f32")
        plain = [columns(tokens, coding, options) for coding in every]
        return *plain, *(
            expert_columns(tokens * used, experts, coding, options)
            for experts, used in sorted(mixtures)
            for coding in every
        )

    first: dict[tuple[int, ...], int] = {}
    for size in sizes:
        first.setdefault(widths(size), size)
    return list(first.values())


def node_of(op: Op, inputs: tuple[Tensor, ...], like: Tensor, **attrs: Any) -> Tensor:
    """A node with the name of `like`, and with its shape and dtype unless they are said."""
    shape, dtype = attrs.pop("shape", like.shape), attrs.pop("dtype", like.dtype)
    return like.with_(op=op.name, inputs=inputs, shape=shape, dtype=dtype, attrs=attrs)


def only_user(graph: Graph, node: Tensor) -> bool:
    """Whether exactly one node reads it, and nothing outside."""
    return len(graph.users[node]) == 1 and node not in graph.outputs


def pack_inputs(graph: Graph, options: Options) -> Graph:
    """matmul(x, w) -> linear(pack(x), w); equal packs of one x are one node."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def once(op: Op, inputs: tuple[Tensor, ...], dtype: DType, **attrs: Any) -> Tensor:
        key = (op, inputs, *sorted(attrs.items()))
        if key not in made:
            made[key] = node_of(op, inputs, inputs[0], dtype=dtype, **attrs)
        return made[key]

    def tile(x: Tensor, weights: DType) -> dict[str, Any]:
        coding = coding_of(weights, int(x.shape[-1]), options)
        return {"C": columns(x.size // x.shape[-1], coding, options), "coding": coding}

    def gathered(node: Tensor, *part: Tensor) -> Tensor:
        told = options.pack_parts and "weights" in node.attrs
        form = tile(node, node.attrs["weights"]) if told else {}
        unit = 1 if form.get("coding") == "f32" else 32
        if not form or any(n % unit for _, n in node.attrs["runs"]):
            return node.with_(inputs=part)
        to = PACKED[form["coding"]]
        tiles = tuple(once(pack, (x,), to, **form) for x in part)
        return node_of(all_gather, tiles, node, **{**node.attrs, **form, "dtype": to})

    def product(node: Tensor, x: Tensor, w: Tensor) -> Tensor:
        form = tile(x, w.dtype)
        packed = x if "coding" in x.attrs else once(pack, (x,), PACKED[form["coding"]], **form)
        return node_of(linear, (packed, w), node)

    def chosen(node: Tensor, x: Tensor, w: Tensor, ids: Tensor, *bias: Tensor) -> Tensor:
        coding = coding_of(w.dtype, int(w.shape[-1]), options)
        width = expert_columns(ids.size, experts_of(w, ids), coding, options)
        width = 1 if options.few else width
        tiles = once(expert_tiles, (ids,), I32, C=width, experts=int(w.shape[0]))
        each = int(ids.shape[1]) if x.ndim == 2 else 1  # choices that share a row of x
        if width == 1:  # tiles find their row: nothing has to be gathered
            form = tile(x, w.dtype) if options.few else {"C": 1, "coding": coding}
            packed, every = once(pack, (x,), PACKED[coding], **form), each
        else:
            shape, form = (*ids.shape, x.shape[-1]), {"C": width, "coding": coding}
            packed = once(pack_rows, (x, tiles), PACKED[coding], shape=shape, **form, divisor=each)
            every = 0
        return node_of(linear_id, (packed, w, tiles, ids, *bias), node, every=every)

    return rewrite(graph, {all_gather: gathered, matmul: product, matmul_id: chosen})
