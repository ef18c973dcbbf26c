"""The memories of several devices as one, by what a model takes of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from runtime.backends.base import Apart, Backend, Planner, Room, Rooms
from runtime.backends.plan.plan import weight_buffers
from runtime.ops.graph import Graph

_HOST = "host"


def is_apart(device: Backend) -> bool:
    """Whether a device, or one of those that it is made of, has a memory of its own."""
    return isinstance(device, Apart) or (isinstance(device, Rooms) and device.apart)


def rooms_of(parts: Iterable[tuple[Backend, Graph]], host: int | None) -> list[Room]:
    """Of devices with their parts of a model's largest step. host: see `Rooms`."""
    found: list[Room] = []
    for device, graph in parts:
        if isinstance(device, Rooms):
            found += device.rooms(graph, host)
        elif isinstance(device, Apart):
            found.append(Room(device.name, *device.memory(graph), _page(device, graph)))
        elif host is not None:
            weights = weight_buffers([device.plan(graph)])
            taken = sum(b.tensor.nbytes for b in weights if b.tensor is not None)
            found.append(Room(_HOST, host, taken, _page(device, graph)))
    return found


def as_one(rooms: Sequence[Room]) -> tuple[int, int]:
    """(free bytes, bytes taken beside the cache) of a memory that has room for as many pages.

    A page of it is as large as the pages of all rooms together.
    """
    names = dict.fromkeys(room.memory for room in rooms)
    each = [[room for room in rooms if room.memory == name] for name in names]
    taken, page = sum(room.taken for room in rooms), sum(room.page for room in rooms) or 1
    left = [min(r.free for r in same) - sum(r.taken for r in same) for same in each]
    own = [sum(room.page for room in same) for same in each]
    fit = [
        rest / (nbytes if rest >= 0 else page)
        for rest, nbytes in zip(left, own, strict=True)
        if nbytes or rest < 0
    ]
    return taken + int(page * min(fit, default=min(left) / page)), taken


def _page(device: Planner, graph: Graph) -> int:
    """Bytes of one page of all caches in a graph."""
    caches = [leaf for leaf in graph.leaves("state") if leaf.attrs["storage"] != "slots"]
    return sum(device.page_nbytes(leaf) for leaf in caches)
