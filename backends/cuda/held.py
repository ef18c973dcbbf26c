"""What a step leaves on its device for a step of another one: nobody waits for it on the host."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.launcher import Device, Event, Stream


class Hands:
    """Of one program: its device, the stream of its steps, and how far that has come."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self.device, self.stream = device, stream
        self.ready = device.event()

    def done(self) -> None:
        """The stream was given all of a step."""
        self.device.activate()
        self.ready.record(self.stream)

    def close(self) -> None:
        """Give it back."""
        self.ready.close()


@dataclass(frozen=True)
class Held:
    """The first `nbytes` of a buffer, there when the stream of who has it gets so far.

    An input of a step that is begun before the next one of who has it.
    """

    source: Buffer
    nbytes: int
    by: Hands

    def copy(self, target: Buffer, device: Device, stream: Stream, taken: Event) -> None:
        """To memory of a device, which is active, in the order of its stream.

        taken: of that device; till then the other one leaves the source alone.
        """
        stream.wait(self.by.ready)
        there = target.view(0, self.nbytes).address
        if device.index == self.by.device.index:
            device.driver.copy(there, self.source.address, self.nbytes, stream.handle)
        else:
            device.driver.copy_between(
                there, device.context, self.source.address, self.by.device.context, self.nbytes,
                stream.handle,
            )  # fmt: skip
        taken.record(stream)
        self.by.stream.wait(taken)
