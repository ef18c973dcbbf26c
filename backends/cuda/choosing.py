"""The end of a step that chooses its tokens itself: launches behind those of its plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime.backends.base import MOST_CANDIDATES, Chosen
from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.held import Hands, Held
from runtime.backends.cuda.inputs import CHOICE, TOKENS, Inputs
from runtime.backends.cuda.kernels.sampling import MOST, PART
from runtime.backends.cuda.launcher import Device, Event, Launch, Stream
from runtime.backends.plan.kernel import Kernel
from runtime.ops.tensor import Tensor


@dataclass(frozen=True)
class Tokens:
    """See `Chosen` in backends/base.py."""

    found: np.ndarray
    done: Event
    held: Held

    def __call__(self) -> np.ndarray:
        self.done.synchronize()
        return self.found.copy()


class Choosing:
    """Launches from logits to tokens, which are written to the step input of that name, if any.

    The tokens of one step are kept while the next one runs.
    """

    def __init__(self, device: Device, inputs: Inputs, logits: Buffer, tensor: Tensor) -> None:
        """tensor: the logits, [rows, columns]."""
        assert MOST_CANDIDATES <= MOST, "the kernels hold fewer"
        rows, columns = (int(n) for n in tensor.shape)
        parts = -(-columns // PART)
        sizes = 4 * rows * parts * MOST, 4 * rows * parts * MOST, 4 * rows, 4 * rows
        self._room = device.arena(sum(sizes) + 1024, "choices")
        keys, ids, self._chosen, room = (self._room.take(nbytes) for nbytes in sizes)
        self._next = inputs.place(TOKENS) if TOKENS in inputs else room
        of = {name: inputs.place(f"choice.{name}") for name in CHOICE}
        self.launches: list[Launch] = [
            device.launch(
                Kernel.of("sample_parts"), (parts, rows), logits, of["columns"],
                of["temperature"], of["top_k"], keys, ids, columns,
            ),
            device.launch(
                Kernel.of("sample_merge"), rows, keys, ids, of["temperature"], of["top_k"],
                of["top_p"], of["min_p"], of["chance"], self._chosen, self._next, parts,
            ),
        ]  # fmt: skip
        self._driver = device.driver
        self._found = [device.pinned((rows,), np.int32) for _ in range(2)]
        self._done = [device.event() for _ in range(2)]
        self._turn = 0

    def fetch(self, stream: Stream, count: int, by: Hands) -> Chosen:
        """The tokens of the step that the stream was given; waits when it is called."""
        self._turn ^= 1
        found, done = self._found[self._turn].array[:count], self._done[self._turn]
        done.synchronize()  # of a step that was forgotten: nobody waited for it
        address = found.ctypes.data
        self._driver.copy_to_host(address, self._chosen.address, found.nbytes, stream.handle)
        done.record(stream)
        by.done()
        return Tokens(found, done, Held(self._next, 4 * count, by))

    def close(self) -> None:
        """Give back what it alone has."""
        for owned in (*self._found, *self._done, self._room):
            owned.close()
