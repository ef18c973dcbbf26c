"""Whether a model fits on some devices, with how much context, and how fast it would be there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from runtime.backends.meta.expression import Device
from runtime.backends.meta.graph_stages import OnHost
from runtime.backends.meta.planner import (
    ON_CPU,
    StagePlan,
    gpu_page_nbytes,
    plan_stages,
    planned,
    planned_on_gpu,
)  # fmt: skip
from runtime.backends.meta.stages import Stage, text
from runtime.engine.batch import UBATCH
from runtime.memory.budget import LEAST_SLOTS, SHARE
from runtime.models.registry import build, drafting, one_token
from runtime.models.step import Step
from runtime.ops import PAGE
from runtime.ops.cost import Seen, page_nbytes
from runtime.ops.dtypes import DTYPES
from runtime.ops.graph import Graph
from runtime.ops.kv_formats import kv_format
from runtime.ops.tensor import Tensor

SMALLER_KV = ("q8_0", "q4_0")
SMALLER_WEIGHTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
OVERHEAD = 512 << 20  # bytes of a device that is no CPU, for its context, code and libraries
LATENCY, CPU_LATENCY = 10e-6, 3e-6  # seconds of an exchange over a link, or through memory
LINK = 16e9  # bytes per second between devices that are no CPUs, where nothing is said
CHECKS = {"reference": "computes slowly, to compare with", "null": "computes nothing"}
_TRIES = 3  # of shares by what is used
_STEP = 4  # percent that move from one device to another, at first
MEETING = 1.5e-6  # seconds of a row of a CPU's plan beside its work: all threads meet

# Of a device in a stage: bytes of a weight or state that it reads per second, and weights that it
# multiplies per second.
Bandwidth = Callable[[StagePlan, Device, Tensor], float | None]
Rate = Callable[[StagePlan, Device], float | None]


class Usage(NamedTuple):
    """Bytes on one device."""

    device: Device
    weights: float
    cache: float
    state: float
    activations: float
    overhead: float

    @property
    def parts(self) -> tuple[float, ...]:
        """Weights, cache, state, activations and what else there is."""
        return self[1:]

    @property
    def nbytes(self) -> float:
        """All of it."""
        return sum(self.parts)


class Need(NamedTuple):
    """What one device takes whatever the context, and for a page and a slot."""

    weights: float
    page: float
    slot: float
    activations: float
    overhead: float

    @property
    def fixed(self) -> float:
        """Bytes without cache and state."""
        return self.weights + self.activations + self.overhead


class Speed(NamedTuple):
    """Of decoding after `context` tokens: seconds that each stage reads, and exchanges."""

    context: int
    reading: tuple[float, ...]
    exchanging: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of one sequence per second."""
        return 1 / (sum(self.reading) + sum(self.exchanging))


class Model:
    """What does not change with the context: a file, its graphs, and who has what of them."""

    def __init__(self, file: Any) -> None:
        self.file, self.architecture = file, drafting(build(file))
        self._plans: dict[tuple[Any, ...], list[StagePlan]] = {}

    @cached_property
    def graph(self) -> Graph:
        """Of one token, one page and one slot."""
        return self.architecture.graph(one_token(self.architecture))

    @cached_property
    def planned(self) -> tuple[int, int]:
        """Bytes of activations of a long prompt's step on a CPU, and the rows of its plan."""
        return planned(self._largest)

    @cached_property
    def planned_on_gpu(self) -> int:
        """Bytes of activations of a long prompt's step on a GPU."""
        return planned_on_gpu(self._largest)

    @cached_property
    def _largest(self) -> Graph:
        a = self.architecture
        step = Step.capacity(UBATCH, 1, 1, 1, 1, a.layers, ("f16", "f16"), a.positions_per_token)
        return a.graph(step)

    def plans(self, stages: tuple[Stage, ...], host: OnHost | None = None) -> list[StagePlan]:
        """Who has what, stage by stage. host: what the CPU has beside GPUs."""
        if (stages, host) not in self._plans:
            self._plans[stages, host] = plan_stages(self.graph, stages, host)
        return self._plans[stages, host]


@dataclass(frozen=True)
class Placement:
    """A model on devices. asked: tokens of context, None: as many as fit.

    free: bytes of this machine's memory that programs can take. host: what the CPU has beside GPUs.
    """

    model: Model
    stages: tuple[Stage, ...]
    kv_types: tuple[str, str] = ("f16", "f16")
    asked: int | None = None
    sequences: int = 1
    free: int | None = None
    host: OnHost | None = None

    @property
    def plans(self) -> list[StagePlan]:
        """Who has what, stage by stage."""
        return self.model.plans(self.stages, self.host)

    @cached_property
    def needs(self) -> dict[Device, Need]:
        """What each device takes, all its stages together."""
        found: dict[Device, Need] = {}
        for plan in self.plans:
            for n, device in enumerate(plan.devices):
                on_cpu, model = device.kind in ON_CPU, self.model
                fixed = (model.planned[0], 0) if on_cpu else (model.planned_on_gpu, OVERHEAD)
                nbytes = self.page_nbytes if on_cpu else self._gpu_page_nbytes
                before = found.get(device, Need(0, 0, 0, *fixed))
                found[device] = before._replace(
                    weights=before.weights + plan.weights(n), slot=before.slot + plan.slots(n),
                    page=before.page + plan.pages(n, nbytes),
                )  # fmt: skip
        return found

    @property
    def trained(self) -> int:
        """Tokens of context that the model was trained for."""
        return int(self.model.architecture.p.context)

    @property
    def wanted(self) -> int:
        """Tokens of context that are enough: those trained or asked for."""
        return max(self.trained, self.asked or 0)

    @property
    def slots(self) -> int:
        """Slots of recurrent state that there must be."""
        any_state = any(need.slot for need in self.needs.values())
        return LEAST_SLOTS * self.sequences if any_state else 0

    @cached_property
    def most(self) -> int:
        """Tokens of context that fit, up to those trained or asked for; 0: not even the model."""
        pages = -(-self.wanted // PAGE) * self.sequences
        for devices, room in self.rooms():
            needs = [self.needs[device] for device in devices]
            left = room - sum(n.fixed + n.slot * self.slots for n in needs)
            if left < 0:
                return 0
            if each := sum(n.page for n in needs):
                pages = min(pages, int(left // each))
        return min(self.wanted, pages // self.sequences * PAGE)

    @property
    def context(self) -> int:
        """Tokens of context that are planned for."""
        return self.asked or min(self.most, self.trained)

    @property
    def fits(self) -> bool:
        """Whether there is room for the context asked for, or for any."""
        return 0 < self.context <= self.most

    @property
    def unknown(self) -> list[Device]:
        """Devices of unknown memory."""
        known = {device for devices, _ in self.rooms() for device in devices}
        return [device for device in self.needs if device not in known]

    def rooms(self) -> Iterator[tuple[tuple[Device, ...], float]]:
        """Devices that share a memory, and its bytes; what is not known is left out.

        Devices of this machine's memory share what is free; a part of it is left to the system,
        as when a model is loaded.
        """
        for device in self.needs:
            if device.nbytes is not None:
                yield (device,), device.nbytes
        here = tuple(d for d in self.needs if d.kind in ON_CPU and d.nbytes is None)
        if here and self.free is not None:
            weights = sum(self.needs[device].weights for device in here)
            yield here, weights + SHARE * (self.free - weights)

    def usage(self, device: Device, context: int | None = None) -> Usage:
        """Bytes of a device with that context, by default the one planned for."""
        tokens = self.context if context is None else context
        need, pages = self.needs[device], -(-tokens // PAGE) * self.sequences
        return Usage(
            device, need.weights, need.page * pages, need.slot * self.slots, need.activations,
            need.overhead,
        )  # fmt: skip

    def speed(self, bandwidth: Bandwidth, link: float | None = None) -> Speed | None:
        """Of decoding in the middle of the context; None where a bandwidth is not known, and of
        devices that are for tests.
        """
        if any(device.kind in CHECKS for device in self.needs):
            return None
        middle = max(1, min(self.context, 8192) // 2)
        seen = Seen(lengths=(middle,), page_nbytes=self.page_nbytes)
        reading, exchanging = [], []
        for plan in self.plans:

            def pace(device: Device, x: Tensor, plan: StagePlan = plan) -> float:
                return 1 / (bandwidth(plan, device, x) or math.nan)

            seconds = float(np.array(plan.reads(seen, pace)).max(1).sum())
            if math.isnan(seconds):
                return None
            if any(device.kind in ON_CPU for device in plan.devices):
                part = len(plan.graph.nodes) / len(self.model.graph.nodes)
                seconds += MEETING * self.model.planned[1] * min(1.0, part)
            reading.append(seconds)
            exchanging.append(sum(_seconds(plan, x.tensor.nbytes, link) for x in plan.exchanges))
        for n, nbytes in enumerate(self.hand_overs, 1):
            devices = self.plans[n - 1].devices + self.plans[n].devices
            here = all(device.kind in ON_CPU for device in devices)
            exchanging[n] += (CPU_LATENCY if here else LATENCY) + nbytes / (link or LINK)
        return Speed(middle, tuple(reading), tuple(exchanging))

    @property
    def hand_overs(self) -> list[int]:
        """Bytes that each stage but the first gets from those before, for a token."""
        own = {x.name for x in self.model.graph.leaves("input")}
        inputs = [plan.graph.leaves("input") for plan in self.plans[1:]]
        return [sum(x.nbytes for x in each if x.name not in own) for each in inputs]

    def prompt_speed(self, macs: Rate) -> float | None:
        """Tokens per second of a prompt by its products alone; None where a rate is not known."""
        seconds = 0.0
        for plan in self.plans:
            found = [macs(plan, device) for device in plan.devices]
            if not all(found):
                return None
            seconds += float((np.array(plan.multiplies()) / np.array(found)).max(1).sum())
        return 1 / seconds

    def _gpu_page_nbytes(self, leaf: Tensor) -> float:
        kind = kv_format(self.kv_types[leaf.attrs["storage"] == "v"]).dtype
        return gpu_page_nbytes(leaf.with_(dtype=kind))

    def page_nbytes(self, leaf: Tensor) -> float:
        """Bytes of a page of a plain leaf in its KV type, or of a slot."""
        kind = self.kv_types[leaf.base.attrs["storage"] == "v"]
        if leaf.base.attrs["storage"] == "slots":
            return page_nbytes(leaf)
        _, tokens, heads, dim = map(int, leaf.shape)
        return tokens * heads * kv_format(kind).token_nbytes(dim)


def _seconds(plan: StagePlan, nbytes: int, link: float | None) -> float:
    """Seconds of one exchange: each device sends and gets its part of all others'."""
    here = all(device.kind in ON_CPU for device in plan.devices)
    n = len(plan.devices)
    rate = link or LINK
    return (CPU_LATENCY if here else LATENCY) + 2 * nbytes * (n - 1) / n / rate


def by_memory(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The same stages with shares by the memory that devices have, where all of it is known."""
    rooms = [[_room(device) for device in stage.devices] for stage in stages]
    return _shared(stages, rooms) if all(map(all, rooms)) else stages


def _room(device: Device) -> float:
    """Bytes that a model may take there; 0 where that is not known."""
    overhead = 0 if device.kind in ON_CPU else OVERHEAD
    return max(1, device.nbytes - overhead) if device.nbytes else 0


def _shared(stages: tuple[Stage, ...], parts: Sequence[Sequence[float]]) -> tuple[Stage, ...]:
    """The same stages with shares like these parts, in whole percent."""
    return tuple(
        replace(stage, share=share, shares=tuple(_percent(row)))
        for stage, share, row in zip(stages, _percent(list(map(sum, parts))), parts, strict=True)
    )


def _percent(parts: Sequence[float]) -> list[Fraction]:
    """Parts of 1 in whole percent, none of them 0, that add up to it."""
    ends = np.rint(100 * np.cumsum(parts) / sum(parts)).astype(int).tolist()
    found = [max(1, stop - start) for start, stop in pairwise([0, *ends])]
    return [Fraction(n, sum(found)) for n in found]


def fitted(given: Placement, free_kv: bool, free_shares: bool) -> Placement:
    """The placement of most context by other shares, of fewer devices too; or smaller KV types,
    where it does not fit."""
    best = given
    if free_shares and _known(given) and given.most < given.wanted:
        best = balanced(max([given, *_fewer(given)], key=_room_for))
    if best.fits or not free_kv:
        return best
    tried = [replace(best, kv_types=(kind, kind)) for kind in SMALLER_KV]
    return next((t for t in tried if t.fits), best)


def balanced(given: Placement) -> Placement:
    """With shares of most context, found in a few tries: first those that fill all devices about
    alike, then some of what the fullest has goes to the emptiest."""
    if len(given.needs) == 1 or not _known(given) or given.most >= given.wanted:
        return given
    best = given
    for _ in range(_TRIES):
        given = _scaled(given, {d: (d.nbytes or 0) / u for d, u in _used(given).items()})
        best = max(best, given, key=_room_for)
    step = _STEP
    while step >= 1 and best.most < best.wanted:
        filled = {d: u / (d.nbytes or 1) for d, u in _used(best).items()}
        part = {d: 100 * float(sum(s.share * _share(s, d) for s in best.stages)) for d in filled}
        most, least = max(filled, key=filled.__getitem__), min(filled, key=filled.__getitem__)
        moved = {most: max(0.01, 1 - step / part[most]), least: 1 + step / part[least]}
        tried = _scaled(best, moved)
        if _room_for(tried) > _room_for(best):
            best = tried
        else:
            step //= 2
    return best


def _known(given: Placement) -> bool:
    return all(device.nbytes for device in given.needs)


def _used(given: Placement) -> dict[Device, float]:
    """Bytes on each device with as much context as fits."""
    return {device: given.usage(device, given.most).nbytes for device in given.needs}


def _room_for(given: Placement) -> tuple[int, float]:
    """Tokens that fit; of placements where none do, the one that lacks least is the largest."""
    return given.most, -max(u / (d.nbytes or 1) for d, u in _used(given).items())


def _share(stage: Stage, device: Device) -> Fraction:
    at = dict(zip(stage.devices, stage.shares, strict=True))
    return at.get(device, Fraction(0))


def _scaled(given: Placement, by: Mapping[Device, float]) -> Placement:
    """The shares of devices times these numbers."""
    parts = [
        [float(s.share * _share(s, d)) * by.get(d, 1) for d in s.devices] for s in given.stages
    ]
    return replace(given, stages=_shared(given.stages, parts))


def _fewer(given: Placement) -> Iterator[Placement]:
    """By memory on all devices, then without the smallest, without the smallest two, and so on."""
    devices = sorted(given.needs, key=lambda d: d.nbytes or 0)
    for n in range(len(devices)):
        left = {*devices[n:]}
        if sum(device.nbytes or 0 for device in left) < given.model.file.tensors_nbytes:
            return
        stages = tuple(
            replace(stage, devices=kept, shares=(Fraction(1, len(kept)),) * len(kept))
            for stage in given.stages
            if (kept := tuple(d for d in stage.devices if d in left))
        )
        yield replace(given, stages=by_memory(stages))


def would_fit(given: Placement) -> Iterator[str]:
    """What there would be room for, the smallest change first, in words."""
    if given.most:
        yield f"{given.most:,} tokens of context"
    for kind in SMALLER_KV:
        smaller = replace(given, kv_types=(kind, kind))
        if _saves(kind, given.kv_types) and smaller.most > given.most:
            tokens = given.asked if smaller.fits and given.asked else smaller.most
            yield f"{tokens:,} tokens with a {kind} cache"
            if smaller.fits:
                break
    yield from _smaller_weights(given)
    fewer = max([given, *_fewer(given)], key=_room_for) if _known(given) else given
    if fewer.most > given.most:
        yield f"{min(fewer.most, fewer.context):,} tokens on {text(fewer.stages)}"


def _smaller_weights(given: Placement) -> Iterator[str]:
    """The largest type of weights that fits, if need be with the smallest cache."""
    from runtime.models.outline import of_file

    room = min(sum(room for _, room in given.rooms()), given.model.file.tensors_nbytes)
    files = {weights: of_file(given.model.file, weights) for weights in SMALLER_WEIGHTS}
    models = {w: Model(file) for w, file in files.items() if file.tensors_nbytes < room}
    for kind in (None, SMALLER_KV[-1]):
        for weights, model in models.items():
            smaller = replace(given, model=model, kv_types=(kind, kind) if kind else given.kv_types)
            if smaller.fits:
                cache = f" and a {kind} cache" if kind else ""
                yield f"{smaller.context:,} tokens with weights of {weights}{cache}"
                return


def _saves(kind: str, than: Sequence[str]) -> bool:
    return all(_bits(kind) < _bits(k) for k in than)


def _bits(kind: str) -> float:
    return 8 * DTYPES[kind].nbytes / DTYPES[kind].block
