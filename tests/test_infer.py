"""Graphs split over devices by what `infer` says give what they give undivided, states included."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import Memory, run_together
from random_graphs import TOKENS, RandomGraph
from test_split_graphs import compare

from runtime.backends.meta.infer import Layout, infer
from runtime.backends.meta.shard import shards
from runtime.ops.cuts import cut_array
from runtime.ops.tensor import Tensor, stored_name

SHARES = st.lists(st.sampled_from([1.0, 1.0, 2.0, 3.0, 9.0, 0.05]), min_size=1, max_size=5)


def _check_random(made: RandomGraph, shares: list[float]) -> Layout:
    layout = infer(made.graph, shares)
    whole, after = made.whole()
    memory = Memory(len(shares), lambda leaf: made.values[leaf.name])

    def leaf(device: int, node: Tensor) -> np.ndarray:
        if node.op == "state":
            return memory.part(device, node)
        if node.op == "constant":
            return node.attrs["value"]
        return cut_array(made.values[stored_name(node)], node.attrs.get("cut", ()))

    outputs = run_together(shards(layout), leaf, {"tokens": TOKENS})
    wanted = [whole[o] for o in made.graph.outputs if o.base.op != "state"]
    for found in outputs:
        for got, want, same in zip(found, wanted, outputs[0], strict=True):
            compare(got, want, made.graph)
            np.testing.assert_array_equal(got, same)
    for state in made.graph.leaves("state"):
        compare(memory.joined(layout, state), after[state.name], state)
    return layout


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(10, 30), SHARES)
def test_random_graphs(seed: int, size: int, shares: list[float]):
    _check_random(RandomGraph(seed, size), shares)
