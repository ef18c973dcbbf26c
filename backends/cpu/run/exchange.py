"""Memory by which the programs that several devices make of one graph read of each other.

Time is counted in meetings, which all devices have in common: a buffer is in use from the last
meeting before it is first written to the first one after it is last touched, on any device. What
is never in use at the same time may share memory: who writes has passed a meeting to which the
others came when they no longer read.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from runtime.backends.plan.plan import KEPT, Buffer, Plan, Ref, fit


class Exchange:
    """What is in common to the plans of one graph, one of each device."""

    def __init__(
        self, plans: Sequence[Plan], room: Callable[[int, int], np.ndarray], meeting: np.ndarray,
        threads: Sequence[int],
    ) -> None:  # fmt: skip
        """room(n, bytes): memory written by device n, or if there is no such device, by all.

        meeting: the block where they meet. threads: how many each device has.
        """
        uses = [list(_uses(plan)) for plan in plans]
        wholes: dict[str, tuple[int, int, int]] = {}
        for buffer, first, last in (use for each in uses for use in each if _is_whole(use[0])):
            _, low, high = wholes.get(buffer.key, (0, first, last))
            wholes[buffer.key] = buffer.nbytes, min(first, low), max(last, high)
        self._offsets, nbytes = fit(wholes)
        self._whole = room(len(plans), nbytes)
        self._parts: dict[Buffer, np.ndarray] = {}
        for device, each in enumerate(uses):
            parts = {b: (b.nbytes, first, last) for b, first, last in each if not _is_whole(b)}
            offsets, nbytes = fit(parts)
            mine = room(device, nbytes)
            self._parts |= {b: mine[at : at + b.nbytes] for b, at in offsets.items()}
        self._tables = self._addresses(plans)
        self._meeting = meeting
        firsts = np.cumsum([0, *threads])
        self._members = [np.array([first, firsts[-1]], np.int64) for first in firsts[:-1]]

    def memory(self, device: int, buffer: Buffer) -> np.ndarray:
        """Where a buffer of a device's plan lies."""
        if buffer.memory == "part":
            return self._parts[buffer]
        if buffer.memory == "whole":
            return self._whole[self._offsets[buffer.key] :][: buffer.nbytes]
        if buffer.memory == "parts":
            return self._tables[buffer.key]
        return self._meeting if buffer.memory == "meeting" else self._members[device]

    def _addresses(self, plans: Sequence[Plan]) -> dict[str, np.ndarray]:
        """Of each sum where the parts of its holders lie."""
        return {
            f"parts {number}": np.array([self._address(ref) for ref in refs], np.int64)
            for number, refs in _refs(plans).items()
        }

    def _address(self, ref: Ref) -> int:
        return self._parts[ref.buffer].ctypes.data + ref.offset


def _is_whole(buffer: Buffer) -> bool:
    return buffer.memory == "whole"


def _uses(plan: Plan) -> Iterator[tuple[Buffer, int, int]]:
    """Parts and wholes of a plan with the first and the last meeting of their use."""
    rows = plan.instructions
    meetings = [at for at, one in enumerate(rows) for call in one.calls if call.meets]
    found: dict[Buffer, list[int]] = {}
    for at, one in enumerate(rows):
        passed, next_one = bisect_left(meetings, at), bisect_right(meetings, at)
        for call in one.calls:
            for buffer in (*call.reads, *call.writes):
                if buffer.memory in ("part", "whole"):
                    # a call that meets before it writes has passed one more
                    since = passed + (call.meets and buffer in call.writes)
                    found.setdefault(buffer, []).extend((since, next_one))
    for ref in plan.outputs:
        if ref.buffer in found:
            found[ref.buffer].append(KEPT)
    for buffer, times in found.items():
        yield buffer, min(times), max(times)


def _refs(plans: Sequence[Plan]) -> dict[int, list[Ref]]:
    """Of each sum the parts of its holders, in their order."""
    found: dict[int, dict[int, Ref]] = {}
    holders: dict[int, tuple[int, ...]] = {}
    for device, plan in enumerate(plans):
        for call in plan.calls():
            if "parts" in call.arguments:
                number = call.node.attrs["number"]
                holders[number] = call.node.attrs["holders"]
                part = call.arguments["x"]
                if isinstance(part, Ref):
                    found.setdefault(number, {})[device] = part
    return {number: [found[number][d] for d in holders[number]] for number in holders}
