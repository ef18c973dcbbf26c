"""What a step is given, in one block: filled on the host, copied to the device in one go.

The block exists twice on the host, so that the next step is prepared while the device may still
read the last one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.backends.base import Choice
from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.driver import ALIGNMENT
from runtime.backends.cuda.held import Held
from runtime.backends.cuda.launcher import Device, Stream
from runtime.backends.plan.plan import Plan, Ref
from runtime.ops.errors import BackendError

TOKENS = "tokens"  # the input that a choice of tokens is written to
_COPIES = 2


class Inputs:
    """Inputs by name, tiles of attention, live counts, and how tokens are chosen.

    tiles: most of attention. rows: of logits of which tokens are chosen.
    """

    def __init__(self, device: Device, plan: Plan, tiles: int, rows: int) -> None:
        self._starts: dict[str, int] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        shapes = _shapes(plan, tiles)
        shapes |= {f"choice.{name}": ((rows,), dtype) for name, dtype in CHOICE.items()}
        at = self._behind_tokens = 0
        for name in sorted(shapes, key=lambda name: name != TOKENS):
            self._starts[name], self._shapes[name] = at, shapes[name]
            at += -(-_nbytes(*shapes[name]) // ALIGNMENT) * ALIGNMENT
            if name == TOKENS:
                self._behind_tokens = at
        self._copies = [_Copy(device, at) for _ in range(_COPIES)]
        self._room = device.arena(at, "step inputs")
        self._device = self._room.take(at)
        self._of, self._taken = device, device.event()
        self._turn = 0

    def __contains__(self, name: str) -> bool:
        return name in self._starts

    def place(self, name: str, offset: int = 0) -> Buffer:
        """Where an input lies on the device."""
        nbytes = _nbytes(*self._shapes[name])
        return self._device.view(self._starts[name] + offset, nbytes - offset)

    def place_of(self, ref: Ref) -> Buffer:
        """The same, as plans name it."""
        return self.place(ref.buffer.key, ref.offset)

    def send(
        self, stream: Stream, plan: Plan, inputs: Mapping[str, Any],
        live: Mapping[str, int], tiles: Mapping[str, np.ndarray], choices: Sequence[Choice] = (),
    ) -> None:  # fmt: skip
        """Numbers of this step, to the device in the stream's order.

        What is behind the live ones is of an earlier step, but tiles are ended by 0. Without TOKENS
        those on the device stay as they are. What another device has comes straight from there.
        """
        self._turn = (self._turn + 1) % _COPIES
        copy = self._copies[self._turn]
        copy.sent.synchronize()
        kept = TOKENS not in inputs and TOKENS in self._starts
        held = {n: x for n, x in inputs.items() if isinstance(x, Held) and n in self._starts}
        for name in self._starts:
            given = not name.startswith("choice.") and name not in held
            if given and not (kept and name == TOKENS):
                self._fill(self._array(copy, name), name, plan, inputs, live, tiles)
        self._fill_choices(copy, choices)
        first = self._behind_tokens if kept else 0
        self._device.view(first).write(copy.host.array[first:], stream)
        copy.sent.record(stream)
        for name, rows in held.items():
            rows.copy(self.place(name), self._of, stream, self._taken)

    def close(self) -> None:
        """Give it back."""
        for copy in self._copies:
            copy.close()
        self._taken.close()
        self._room.close()

    def _fill(
        self, room: np.ndarray, name: str, plan: Plan, inputs: Mapping[str, Any],
        live: Mapping[str, int], tiles: Mapping[str, np.ndarray],
    ) -> None:  # fmt: skip
        if name == "counts":
            for (dim, factor), slot in plan.counts.items():
                room[slot] = (int(dim[1:]) if dim[0] == "=" else live[dim]) * factor
        elif name in tiles:
            room[: len(tiles[name])], room[len(tiles[name]) :] = tiles[name], 0
        else:
            value = inputs[name]
            if value.shape[:1] > room.shape[:1]:
                raise BackendError(f"step input {name}: {len(value)} rows, room for {len(room)}")
            room[tuple(slice(n) for n in value.shape)] = value

    def _fill_choices(self, copy: _Copy, choices: Sequence[Choice]) -> None:
        for name in CHOICE:
            column = self._array(copy, f"choice.{name}")
            column[: len(choices)] = [getattr(choice, name) for choice in choices]
            column[len(choices) :] = 0
            if name == "chance":  # float32 rounds what is nearly 1 up
                np.minimum(column, _BELOW_1, out=column)

    def _array(self, copy: _Copy, name: str) -> np.ndarray:
        if name not in copy.arrays:
            start, (shape, dtype) = self._starts[name], self._shapes[name]
            raw = copy.host.array[start : start + int(np.prod(shape)) * dtype.itemsize]
            copy.arrays[name] = raw.view(dtype).reshape(shape)
        return copy.arrays[name]


_BELOW_1 = np.nextafter(np.float32(1), np.float32(0))
CHOICE = {
    "columns": np.dtype(np.int32), "temperature": np.dtype(np.float32),
    "top_k": np.dtype(np.int32), "top_p": np.dtype(np.float32), "min_p": np.dtype(np.float32),
    "chance": np.dtype(np.float32),
}  # fmt: skip


class _Copy:
    """The block in pinned memory; `sent`: the device has read it."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.host = device.pinned((nbytes,), np.uint8)
        self.host.array[:] = 0
        self.sent = device.event()
        self.arrays: dict[str, np.ndarray] = {}

    def close(self) -> None:
        self.arrays.clear()
        self.host.close()
        self.sent.close()


def _shapes(plan: Plan, tiles: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Of what the launches read of a step: shape and numpy type."""
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    for buffer in plan.buffers():
        if buffer.memory == "count":
            found[buffer.key] = (max(1, len(plan.counts)),), np.dtype(np.int64)
        elif buffer.memory == "input" and buffer.tensor is None:
            found[buffer.key] = (tiles, 4), np.dtype(np.int32)
        elif buffer.memory == "input":
            assert buffer.tensor is not None and buffer.tensor.dtype.numpy is not None
            shape = tuple(int(n) for n in buffer.tensor.shape)
            found[buffer.key] = shape, buffer.tensor.dtype.numpy
    return found


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    return max(1, int(np.prod(shape)) * dtype.itemsize)
