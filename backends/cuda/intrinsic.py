"""What a kernel is made of: entries with declared arguments, and operations with two meanings.

An `Intrinsic` is what a kernel calls. Called from Python it does what it means, on the lane that
the simulator is running; `lowering.py` gives the same object its PTX when a kernel is compiled.
Kernels therefore import nothing but `intrinsics.py`, and run wherever Python runs.

Types are named by letter and width: u8 i8 u16 i16 u32 i32 u64 i64 f32, and `T*` for a pointer to
T in global memory. In an intrinsic's arguments `*` stands for any pointer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.ops.errors import BackendError

SCALARS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f32")
WIDTH = {name: int(name[1:]) // 8 for name in SCALARS}  # bytes


@dataclass(frozen=True, eq=False)
class Intrinsic:
    """One operation: its meaning in Python, and how it is written for the GPU.

    `ptx` is a template with $0.. for results, then arguments; without it `rule` names a rule of
    `lowering.py`, which `parameters` (compile-time constants) specialise. `effect` is "" for a
    pure operation, "volatile" for one that must neither move nor vanish, "memory" for one that
    also orders accesses to memory. Below compute capability `needs` nothing is emitted.
    """

    name: str
    meaning: Callable[..., Any]
    results: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    ptx: str = ""
    rule: str = ""
    parameters: tuple[Any, ...] = ()
    effect: str = ""
    needs: int = 0

    def __call__(self, *arguments: Any) -> Any:
        return self.meaning(*arguments)


@dataclass(frozen=True)
class Entry:
    """How a kernel is launched.

    `arguments`: (name, type) in order. `threads`: per block, fixed. `min_blocks`: blocks that
    must fit on a multiprocessor together, which bounds the registers (0: no bound).
    `shared_nbytes`: dynamic shared memory of a block, to be allowed before a launch where it is
    more than 48 KiB.
    """

    arguments: tuple[tuple[str, str], ...]
    threads: int
    min_blocks: int = 0
    shared_nbytes: int = 0


@dataclass
class Declared:
    """A kernel: a Python function of a block's threads, and how it is launched."""

    function: Callable[..., None]
    entry: Entry
    name: str = field(default="")


def entry(
    arguments: str, threads: int, min_blocks: int = 0, shared_nbytes: int = 0
) -> Callable[[Callable[..., None]], Declared]:
    """Declare a kernel; `arguments` is "name:type name:type ...", in the function's order.

    BackendError when names differ from the function's or a type is unknown.
    """
    pairs = tuple(tuple(item.split(":")) for item in arguments.split())

    def declare(function: Callable[..., None]) -> Declared:
        code = function.__code__
        if tuple(name for name, _ in pairs) != code.co_varnames[: code.co_argcount]:
            raise BackendError(f"kernel {code.co_name}: declared {arguments!r}, takes others")
        for name, kind in pairs:
            if kind.removesuffix("*") not in SCALARS:
                raise BackendError(f"kernel {code.co_name}: argument {name} of unknown type {kind}")
        how: Any = pairs, threads, min_blocks, shared_nbytes
        return Declared(function, Entry(*how), code.co_name)

    return declare
