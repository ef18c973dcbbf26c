"""The graphs of a model's steps: how much room each has, and of what memory."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from runtime.backends.base import Backend
from runtime.backends.passes.rotate_cache import rotate_cache
from runtime.engine.batch import UBATCH
from runtime.memory.budget import CacheSize
from runtime.models.registry import Architecture, Predicting
from runtime.models.step import Step
from runtime.ops import PAGE, Graph, step_input

_OF_A_PLACE = attrgetter("places", "kv_slots", "positions")


class StepGraphs(NamedTuple):
    """Graphs of steps of a model with so much memory."""

    architecture: Architecture
    kv_types: tuple[str, str]
    size: CacheSize
    cache_rotation: bool = True

    def inputs(self, tokens: int, outputs: int, vectors: bool = False) -> Step:
        """The inputs of a step with room for so many tokens and rows of logits.

        vectors: whether tokens may come as vectors in place of ids.
        """
        return Step.capacity(
            tokens, outputs, -(-self.size.context // PAGE), self.size.pages, self.size.slots,
            self.architecture.layers, self.kv_types, self.architecture.positions_per_token,
            self.size.context, self.architecture.p.hidden if vectors else 0,
        )  # fmt: skip

    def graph(self, tokens: int, outputs: int, vectors: bool = False) -> Graph:
        """The plain graph of such a step, with what a quantised cache asks for."""
        graph = self.architecture.graph(self.inputs(tokens, outputs, vectors))
        return rotate_cache(graph) if self.cache_rotation else graph

    def drafts(self, tokens: int, count: int) -> Graph:
        """The graph of `count` drafts each for so many sequences; results as of `NextN.drafts`.

        Step inputs of the second and further ones have their number behind their names; `vectors`
        are the hidden rows before the first.
        """
        first = self.inputs(tokens, tokens, vectors=True)
        steps, rows = [first], first.vectors
        for n in range(1, count):
            own = [step_input(f"{x.name}.{n}", x.shape) for x in _OF_A_PLACE(first)]
            places, kv_slots, positions = own
            steps.append(first._replace(places=places, kv_slots=kv_slots, positions=positions))
        assert isinstance(self.architecture, Predicting)
        predictor = self.architecture.predictor
        assert predictor is not None and rows is not None
        steps = [step._replace(vectors=None, from_table=None) for step in steps]
        drafts, shares, last = predictor.drafts(steps, rows)
        graph = Graph((*drafts, *shares, last), "drafts")
        return rotate_cache(graph) if self.cache_rotation else graph

    def warm(self, backend: Backend) -> list[Graph]:
        """Graphs that between them use every kernel this model can need."""
        buckets = [1 << n for n in range(UBATCH.bit_length())]
        sizes = backend.distinct_sizes(self.graph(1, 1), buckets)
        found = [self.graph(t, r) for t in sizes for r in output_buckets(t)]
        return found + ([self.drafts(1, 1)] if self._predicts else [])

    @property
    def _predicts(self) -> bool:
        a = self.architecture
        return isinstance(a, Predicting) and a.predictor is not None


def state_nbytes(
    backend: Backend, architecture: Architecture, kv_types: tuple[str, str]
) -> tuple[int, int]:
    """Bytes of a page and of a slot on a device, all layers together."""
    step = Step.capacity(
        1, 1, 1, 1, 1, architecture.layers, kv_types, architecture.positions_per_token
    )
    backend.distinct_sizes(architecture.graph(step), ())  # how states are split is known from then
    page, slot = (
        sum(backend.page_nbytes(leaf) for group in groups for leaf in group.values())
        for groups in ((step.k, step.v), (step.conv, step.delta))
    )
    return page, slot


def bucket(n: int) -> int:
    """The smallest power of two that holds n."""
    return 1 << max(0, n - 1).bit_length()


def output_buckets(tokens: int) -> list[int]:
    """The numbers of output rows that a step of `tokens` tokens (a bucket) is made for."""
    return sorted({1, min(8, tokens), tokens})


def capacity(tokens: int, outputs: int, *kind: bool) -> tuple[int, ...]:
    """Tokens and output rows of the smallest program that holds a step of that size and kind."""
    t = bucket(tokens)
    return t, next(r for r in output_buckets(t) if r >= outputs), *kind
