"""What a model builder is given: the inputs of a step and the memory of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime import ops
from runtime.ops.dtypes import F32
from runtime.ops.kv_formats import kv_format
from runtime.ops.tensor import Shape, Tensor


class CacheLayer(NamedTuple):
    """KV heads and head sizes of one attention layer; of a tensor split each device has all of it
    where it is `whole`."""

    kv_heads: int
    k_dim: int
    v_dim: int
    whole: bool = False


class StateLayer(NamedTuple):
    """One recurrent layer: taps and channels of its convolution, value heads (there may be none)
    and their sizes."""

    taps: int
    channels: int
    heads: int
    k_dim: int
    v_dim: int


@dataclass(frozen=True)
class Layers:
    """What the layers of a model remember, by number: KV cache, or recurrent state."""

    attention: Mapping[int, CacheLayer]
    recurrent: Mapping[int, StateLayer] = field(default_factory=dict)


class Step(NamedTuple):
    """Inputs of one step at capacity: T tokens, S sequences of up to P pages, R output rows.

    `places` are indices in a sequence (causality); `positions` [T] or [T, n] are what RoPE sees;
    `kv_slots` say where a token's K and V go; `block_table` lists each sequence's pages; `spans`
    are rows (first, count) of each; its recurrent state is read from `slot_in` (-1: zeros)
    and written to `slot_out`. Memory by layer: pages `k` and `v`, slots `conv` and `delta`.
    `context`: tokens that a sequence may grow to, a number and no input. Where some tokens come as
    `vectors` [T, hidden], such as those of an image: `from_table` [T, 1] is 1 for a token whose
    embedding is looked up and 0 for one whose vector is given; the other's row is zeros.
    """

    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    places: Tensor
    kv_slots: Tensor
    block_table: Tensor
    output_rows: Tensor
    spans: Tensor
    slot_in: Tensor
    slot_out: Tensor
    k: Mapping[int, Tensor]
    v: Mapping[int, Tensor]
    conv: Mapping[int, Tensor]
    delta: Mapping[int, Tensor]
    context: int = 0
    vectors: Tensor | None = None
    from_table: Tensor | None = None

    @staticmethod
    def capacity(
        tokens: int, outputs: int, table_pages: int, pages: int, slots: int, layers: Layers,
        kv_types: tuple[str, str], positions_per_token: int = 1, context: int = 0,
        vector_size: int = 0,
    ) -> Step:  # fmt: skip
        """Inputs with room for that many tokens (each its own sequence, at most) and output rows,
        over memory of that many pages and slots; with a `vector_size` for vectors too."""
        t, s = ops.Dim("tokens", tokens), ops.Dim("sequences", tokens)
        position = (t,) if positions_per_token == 1 else (t, positions_per_token)

        def pool(which: str, kind: str) -> dict[int, Tensor]:
            return {
                i: ops.state(
                    f"cache.{i}.{which}",
                    (pages, ops.PAGE, layer.kv_heads, getattr(layer, f"{which}_dim")),
                    kv_format(kind).dtype,
                    which,
                    whole=layer.whole,
                )
                for i, layer in layers.attention.items()
            }

        def room(which: str, shape: Callable[[StateLayer], Shape]) -> dict[int, Tensor]:
            shapes = {i: shape(layer) for i, layer in layers.recurrent.items()}
            return {
                i: ops.state(f"state.{i}.{which}", (slots, *shape), F32, "slots")
                for i, shape in shapes.items()
                if all(shape)
            }

        return Step(
            **{name: ops.step_input(name, (t,)) for name in _PER_TOKEN},
            positions=ops.step_input("positions", position),
            block_table=ops.step_input("block_table", (tokens, table_pages)),
            spans=ops.step_input("spans", (s, 2)),
            slot_in=ops.step_input("slot_in", (s,)),
            slot_out=ops.step_input("slot_out", (s,)),
            output_rows=ops.step_input("output_rows", (ops.Dim("outputs", outputs),)),
            k=pool("k", kv_types[0]),
            v=pool("v", kv_types[1]),
            conv=room("conv", lambda layer: (layer.taps - 1, layer.channels)),
            delta=room("delta", lambda layer: (layer.heads, layer.k_dim, layer.v_dim)),
            context=context,
            vectors=ops.step_input("vectors", (t, vector_size), F32) if vector_size else None,
            from_table=ops.step_input("from_table", (t, 1), F32) if vector_size else None,
        )

    @property
    def states(self) -> list[Tensor]:
        """All memory leaves, pages before slots."""
        return [x for group in (self.k, self.v, self.conv, self.delta) for x in group.values()]


_PER_TOKEN = ("tokens", "sequences", "places", "kv_slots")
