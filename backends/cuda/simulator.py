"""Runs a kernel's own Python function as the GPU would, thread by thread, and finds its mistakes.

Threads run in an order that can be permuted, and switch only where they wait for each other. A
launch fails, naming the thread and the place, when

    threads wait for others that will never come (a barrier or shuffle in a branch),
    two threads touch the same shared memory without a barrier between them,
    shared memory or a register is read before it was written,
    an access is out of bounds or misaligned,
    a copy begun by `copy_async16` is used before it was waited for.

Not modelled: the order of global memory accesses of different threads, and numba's widening of
integers beyond 64 bits. Integers are exact until a cast such as u32() wraps them.
"""

from __future__ import annotations

import contextvars
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.ops.errors import BackendError

from . import lanes
from .intrinsic import Declared
from .lanes import WARP, Block, Lane
from .memory import Pointer, SharedMemory

ORDERS = ("forward", "reverse", "random")
_SHARED_NBYTES = 227 << 10  # what a block of compute capability 9.0 may have


def launch(
    kernel: Declared, grid: int | tuple[int, ...], *arguments: Any, order: str = "forward",
    seed: int = 0,
) -> None:  # fmt: skip
    """Run every block of the grid; arrays among `arguments` are read and written in place.

    `order`: in which order blocks and ready threads take their turns ("random" by `seed`).
    BackendError says what the kernel did wrong.
    """
    if order not in ORDERS:
        raise BackendError(f"order {order!r} is not one of {ORDERS}")
    x, y, z, *_ = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)
    sizes = x, y, z
    values = bind(kernel, arguments)
    turns = _turns(order, seed)
    blocks = [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])]
    with np.errstate(all="ignore"):
        for index in turns(blocks):
            block = Block(index, sizes, kernel.entry.threads)
            _run_block(kernel, block, values, turns)


def bind(kernel: Declared, arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments as the kernel's function takes them. BackendError for a wrong number or kind."""
    declared = kernel.entry.arguments
    if len(arguments) != len(declared):
        raise BackendError(f"{kernel.name} takes {len(declared)} arguments, not {len(arguments)}")
    return [_bound(kind, name, a) for (name, kind), a in zip(declared, arguments, strict=True)]


def _bound(kind: str, name: str, argument: Any) -> Any:
    if kind.endswith("*"):
        if not isinstance(argument, np.ndarray):
            raise BackendError(f"{name} is a pointer: give it an array")
        return Pointer(argument, kind.removesuffix("*"), name)
    if isinstance(argument, np.ndarray):
        raise BackendError(f"{name} is a {kind}, not an array")
    return np.float32(argument) if kind == "f32" else int(argument)


def _turns(order: str, seed: int) -> Callable[[list[Any]], list[Any]]:
    generator = random.Random(seed)
    if order == "random":
        return lambda items: generator.sample(items, len(items))
    return (lambda items: items[::-1]) if order == "reverse" else (lambda items: items)


def _run_block(kernel: Declared, block: Block, values: list[Any], turns: Callable) -> None:
    from greenlet import greenlet

    block.memory = SharedMemory(_SHARED_NBYTES)
    nbytes = kernel.entry.shared_nbytes
    block.dynamic = block.memory.reserve(nbytes, 1024), nbytes
    block.epochs = [0] * -(-block.threads // WARP)
    threads = [Lane(i, block) for i in range(block.threads)]
    warps = [threads[i : i + WARP] for i in range(0, block.threads, WARP)]
    for lane in threads:
        lane.greenlet = greenlet(lambda: kernel.function(*values))
        lane.greenlet.gr_context = contextvars.copy_context()  # numpy's errstate is part of it
    while not all(lane.done for lane in threads):
        ready = [lane for lane in threads if not lane.done and lane.waits is None]
        for lane in turns(ready):
            lanes.run(lane)
        released = sum(_release(warp, "warp") for warp in warps) + _release(threads, "block")
        if not ready and not released:
            raise BackendError(_deadlock(kernel, threads))


def _release(threads: list[Lane], kind: str) -> int:
    """How often all of a warp, or of the block, met; one that has ended never comes."""
    waits = [lane.waits[:2] for lane in threads if lane.waits]
    if len(waits) < len(threads) or len(set(waits)) != 1 or waits[0][0] != kind:
        return 0
    lanes.release(threads)
    return 1


def _deadlock(kernel: Declared, threads: list[Lane]) -> str:
    places: dict[str, Lane] = {}
    for lane in threads:
        if lane.waits:
            places.setdefault(lanes.place(lane).split(" waits ")[1], lane)
    waiting = "; ".join(lanes.place(lane) for lane in places.values())
    ended = sum(lane.done for lane in threads)
    return f"{kernel.name}: deadlock: {waiting}; {ended} threads have ended"
