"""Fusions of gated delta-net layers: before the recurrence, in its gates, and behind it."""

from __future__ import annotations

from runtime.backends.passes.fuse_attention import gated_heads
from runtime.backends.passes.packing import Options, node_of, only_user, pack
from runtime.ops.delta import gated_delta, l2_norm, short_conv, softplus
from runtime.ops.elementwise import add, mul, sigmoid, silu
from runtime.ops.graph import Graph, rewrite
from runtime.ops.norm import rms_norm
from runtime.ops.registry import Kind, fused
from runtime.ops.tensor import Tensor
from runtime.ops.views import reshape, slice_

conv_post = fused("conv_post", kind=Kind.STATEFUL, picks={2: 3}, reads=(2,), writes=(2,))
delta_step = fused(
    "delta_step", kind=Kind.STATEFUL, picks={5: 6}, reads=(5,), writes=(5,), flops=gated_delta.flops
)
gated_norm_pack = fused("gated_norm_pack", kind=Kind.ROWWISE)
delta_layer = fused(
    "delta_layer",
    kind=Kind.STATEFUL,
    picks={2: 6, 5: 6},
    reads=(2, 5),
    writes=(2, 5),
    flops=gated_delta.flops,
)  # x, filters, state of the convolution, then alpha to dt of delta_step, the norm's w, the gate

_LAYER_DIMS, _LAYER_TAPS = (32, 64, 128), 4
_BEFORE = (l2_norm, reshape, slice_)  # between the convolution and the recurrence


def fuse_delta(graph: Graph, options: Options) -> Graph:
    """SiLU and L2 norms with the convolution, and the gates' arithmetic with the recurrence."""

    def recur(node: Tensor, *new: Tensor) -> Tensor:
        heads, gates, rest = new[:3], new[3:5], new[5:]
        if _read_here_alone(graph, node):
            heads = _after_conv(heads) or heads
        raw = _raw_gates(*gates)
        if raw is None:
            inputs = (*heads, *gates, *rest)
            return node.with_(inputs=inputs)
        alpha, beta, *weights = raw
        inputs = (*heads, alpha, beta, *rest, *weights)
        return node_of(delta_step, inputs, node, **node.attrs)

    return rewrite(graph, {gated_delta: recur})


def _read_here_alone(graph: Graph, node: Tensor) -> bool:
    """Whether queries, keys and values come of one convolution that nothing else reads."""
    active = node.inputs[2].base
    if not silu.made(active) or not short_conv.made(active.inputs[0]):
        return False
    found, seen = [active], {active}
    while found:
        x = found.pop()
        if x in graph.outputs:
            return False
        for user in graph.users[x]:
            if user is not node and not any(op.made(user) for op in _BEFORE):
                return False
            if user is not node and user not in seen:
                seen.add(user)
                found.append(user)
    return only_user(graph, active.inputs[0])


def _after_conv(heads: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """q, k and v as views of one `conv_post`; None where they do not lie as it leaves them."""
    q, k, v = heads
    if not l2_norm.made(q) or not l2_norm.made(k) or q.attrs != k.attrs:
        return None
    views = (q.inputs[0], k.inputs[0], v)
    active = v.base
    channels = int(active.shape[1])
    for x in views:
        dense = zip(x.shape, x.layout.strides, (channels, int(x.shape[2]), 1), strict=True)
        if x.base is not active or any(s != want for n, s, want in dense if n != 1):
            return None  # the stride of an axis of length 1 means nothing
    first, second = sorted(x.layout.offset for x in views[:2])
    dim, size = int(q.shape[2]), int(q.shape[1]) * int(q.shape[2])
    if second != first + size or first % dim:
        return None
    normed = {"normed": (first, second + size), "head_dim": dim, "eps": q.attrs["eps"]}
    post = node_of(conv_post, active.inputs[0].inputs, active, **normed)
    return tuple(_same_place(x, post) for x in views)


def _same_place(x: Tensor, whole: Tensor) -> Tensor:
    """The view of `whole` that x [T, heads, dim] is of its own base."""
    start, size = x.layout.offset, int(x.shape[1]) * int(x.shape[2])
    return reshape(slice_(whole, axis=1, start=start, stop=start + size), shape=x.shape)


def _raw_gates(decay: Tensor, beta: Tensor) -> tuple[Tensor, ...] | None:
    """alpha, b, a and perhaps dt of decay = a softplus(alpha + dt) and beta = sigmoid(b)."""
    if not (mul.made(decay) and sigmoid.made(beta) and softplus.made(decay.inputs[0])):
        return None
    pace, a = decay.inputs
    (alpha,), (b,) = pace.inputs, beta.inputs
    dt: tuple[Tensor, ...] = ()
    if add.made(alpha) and alpha.inputs[1].ndim == 1:
        alpha, dt = alpha.inputs[0], alpha.inputs[1:]
    dense = all(x.ndim == 2 and x.layout.strides[1] == 1 for x in (alpha, b))
    return (alpha, b, a, *dt) if dense and a.ndim == 1 else None


def fuse_gated_norm(graph: Graph, options: Options) -> Graph:
    """The gated norm of each head, rms_norm(y, w) * silu(gate), straight into tiles."""

    def normed(node: Tensor, x: Tensor) -> Tensor:
        gated = gated_heads(graph, node, x, silu)
        if gated is None or not rms_norm.made(gated[0]):
            return node.with_(inputs=(x,))
        norm, gate = gated
        (y, w), eps = norm.inputs, norm.attrs["eps"]
        if not y.layout.is_contiguous(y.shape):
            return node.with_(inputs=(x,))
        return node_of(gated_norm_pack, (y, w, gate), node, eps=eps, **node.attrs)

    return rewrite(graph, {pack: normed})


def fuse_delta_layer(graph: Graph, options: Options) -> Graph:
    """Convolution, recurrence and gated norm to int8 of a few tokens, where nothing else reads."""

    def join(node: Tensor, y: Tensor, w: Tensor, gate: Tensor) -> Tensor:
        plain = node.with_(inputs=(y, w, gate))
        if int(y.shape[0]) > options.delta_layer or node.attrs["coding"] != "int8":
            return plain
        if not delta_step.made(y) or not only_user(graph, node.inputs[0]):
            return plain
        (q, k, v, alpha, beta, state, *where), weights = y.inputs[:9], y.inputs[9:]
        conv = v.base
        if not conv_post.made(conv) or q.base is not conv or k.base is not conv:
            return plain
        old = node.inputs[0]
        if any(user is not old for user in _readers(graph, old.inputs[2].base)):
            return plain
        x, filters, kept, *conv_where = conv.inputs
        dims = {int(h.shape[2]) for h in (q, k, v)}
        fits = len(dims) == 1 and dims <= {*_LAYER_DIMS} and int(filters.shape[1]) == _LAYER_TAPS
        same = all(a is b for a, b in zip(conv_where, where, strict=True))
        if not fits or not same or conv.attrs["head_dim"] not in dims:
            return plain
        named = zip(("q_at", "k_at", "v_at"), (q, k, v), strict=True)
        places = {name: int(heads.layout.offset) for name, heads in named}
        inputs = (x, filters, kept, alpha, beta, state, *where, *weights, w, gate)
        return node_of(
            delta_layer, inputs, node, **node.attrs, **y.attrs, **places,
            l2_eps=conv.attrs["eps"], key_heads=int(q.shape[1]),
        )  # fmt: skip

    return rewrite(graph, {gated_norm_pack: join})


def _readers(graph: Graph, x: Tensor) -> list[Tensor]:
    """The nodes that read x, or a view of it."""
    found: list[Tensor] = []
    for user in graph.users[x]:
        views = any(op.made(user) for op in (reshape, slice_))
        found += _readers(graph, user) if views else [user]
    return found
