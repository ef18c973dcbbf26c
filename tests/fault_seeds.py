"""Ways to put a fault into the running code, undone by the MonkeyPatch they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from runtime.backends.cpu.run.program import Program
from runtime.backends.plan.lowering import Lowering, Out
from runtime.backends.plan.plan import Call, Instruction, Ref

Patch = pytest.MonkeyPatch
Seed = Callable[[Patch], None]


def argument(kernel: str, **changes: Callable[[dict[str, Any]], Any]) -> Seed:
    """Calls of a kernel with other arguments, each made from all."""

    def seed(patch: Patch) -> None:
        emit = Lowering.emit

        def faulty(self: Lowering, name: str, *given: Any, **arguments: Any) -> None:
            if name == kernel:
                arguments |= {key: change(arguments) for key, change in changes.items()}
            emit(self, name, *given, **arguments)

        patch.setattr(Lowering, "emit", faulty)

    return seed


def constant(kernel: str, **changes: Any) -> Seed:
    """Another kernel of that name than the one asked for."""

    def seed(patch: Patch) -> None:
        emit = Lowering.emit

        def faulty(
            self: Lowering,
            name: str,
            node: Any,
            constants: Any = None,
            *more: Any,
            **arguments: Any,
        ) -> None:
            if name == kernel:
                constants = {**constants, **changes}
            emit(self, name, node, constants, *more, **arguments)

        patch.setattr(Lowering, "emit", faulty)

    return seed


def leaves(kernel: str, spoil: Callable[[np.ndarray, Call], None], state: bool = False) -> Seed:
    """A kernel that leaves something else in what it writes: `spoil` changes the bytes.

    Those of its first result, or with `state` of the first state [pages, bytes] it changes.
    """

    def seed(patch: Patch) -> None:
        run_each = Program.run_each

        def faulty(self: Program, inputs: Any, live: Any) -> Iterator[Callable[[], None]]:
            rows = zip(self.plan.instructions, run_each(self, inputs, live), strict=True)
            for row, run in rows:
                yield lambda row=row, run=run: spoiled(self, row, run)

        def spoiled(self: Program, row: Instruction, run: Callable[[], None]) -> None:
            run()
            for call in row.calls:
                if call.kernel.name == kernel:
                    kind = "state" if state else "arena"
                    b = next(b for b in call.writes if b.memory == kind)
                    memory = self._arena[b.offset : b.offset + b.nbytes]
                    spoil(self._memory.state(b.tensor) if state else memory, call)

        patch.setattr(Program, "run_each", faulty)

    return seed


def device_input(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Seed:
    """What the device has of a step input is not what it was given."""

    def seed(patch: Patch) -> None:
        make = Program.prepare

        def faulty(self: Program, inputs: Any, live: Any) -> None:
            make(self, inputs, live)
            room = self._inputs[name]
            room[:] = change(room.copy())

        patch.setattr(Program, "prepare", faulty)

    return seed


def put(owner: Any, name: str, made: Callable[[Any], Any]) -> Seed:
    """Another attribute, made from the one there is."""
    return lambda patch: patch.setattr(owner, name, made(getattr(owner, name)))


def shifted(key: str, nbytes: int) -> Callable[[dict[str, Any]], Any]:
    """An address some bytes further on."""

    def change(arguments: dict[str, Any]) -> Any:
        given = arguments[key]
        ref = given.ref if isinstance(given, Out) else given
        moved = Ref(ref.buffer, ref.offset + nbytes)
        return Out(moved, given.also_read) if isinstance(given, Out) else moved

    return change


def taken(key: str) -> Callable[[dict[str, Any]], Any]:
    """What another argument should be."""
    return lambda arguments: arguments[key]


def times(key: str, factor: float) -> Callable[[dict[str, Any]], Any]:
    """A float argument times a factor, in its bits."""

    def change(arguments: dict[str, Any]) -> int:
        value = np.array(arguments[key], np.uint32).view(np.float32) * np.float32(factor)
        return int(value.view(np.uint32))

    return change


def number(value: int) -> Callable[[dict[str, Any]], int]:
    return lambda arguments: value


def plus(key: str, n: int) -> Callable[[dict[str, Any]], int]:
    return lambda arguments: arguments[key] + n


def floats(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.float32)
