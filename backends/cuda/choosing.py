"""The end of a step that chooses its tokens itself: launches behind those of its plan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.inputs import TOKENS, Inputs
from runtime.backends.cuda.launcher import Device, Launch, Stream
from runtime.backends.plan.kernel import Kernel
from runtime.ops.tensor import Tensor

_PART = 4096  # columns that a block of threads looks at


class Choosing:
    """Launches from logits to tokens, which are written to the step input of that name.

    The tokens of one step are kept while the next one runs.
    """

    def __init__(self, device: Device, inputs: Inputs, logits: Buffer, tensor: Tensor) -> None:
        """tensor: the logits, [rows, columns]."""
        rows, columns = (int(n) for n in tensor.shape)
        parts = -(-columns // _PART)
        sizes = 4 * rows * parts, 4 * rows * parts, 4 * rows
        self._room = device.arena(sum(sizes) + 1024, "choices")
        values, ids, self._chosen = (self._room.take(nbytes) for nbytes in sizes)
        self.launches: list[Launch] = [
            device.launch(
                Kernel.of("choose_parts"), (parts, rows), logits, inputs.place("choice.columns"),
                values, ids, columns,
            ),
            device.launch(
                Kernel.of("choose_merge"), rows, values, ids, self._chosen, inputs.place(TOKENS),
                parts,
            ),
        ]  # fmt: skip
        self._driver = device.driver
        self._found = [device.pinned((rows,), np.int32) for _ in range(2)]
        self._done = [device.event() for _ in range(2)]
        self._turn = 0

    def fetch(self, stream: Stream, count: int) -> Callable[[], np.ndarray]:
        """The tokens of the step that the stream was given; waits when it is called."""
        self._turn ^= 1
        found, done = self._found[self._turn].array[:count], self._done[self._turn]
        address = found.ctypes.data
        self._driver.copy_to_host(address, self._chosen.address, found.nbytes, stream.handle)
        done.record(stream)

        def tokens() -> np.ndarray:
            done.synchronize()
            return found

        return tokens

    def close(self) -> None:
        """Give back what it alone has."""
        for owned in (*self._found, *self._done, self._room):
            owned.close()
