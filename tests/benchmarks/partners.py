"""What kernels are timed against: two loops that no change of the package touches.

Written as LLVM IR, so that they are the same instructions from release to release. One computes on
what a core's caches hold, as tiles do, and loses as much to a busy neighbour; one reads memory.
Each runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.backends.cpu.compile import objects
from runtime.backends.cpu.compile.isa import selected
from runtime.backends.cpu.run.weights import aligned

_SUMS = 8  # independent of each other, more than the units need
_TURN = 64 * _SUMS  # bytes that one turn of a loop reads
_NEAR = 1 << 18  # bytes that the computing loop goes over again and again: less than a core keeps

# (table of arguments, thread, threads); the arguments: turns, address of data
_FRAME = """
define void @entry(i64 %table, i64 %thread, i64 %threads) {{
start:
  %arguments = inttoptr i64 %table to i64*
  %turns = load i64, i64* %arguments
  %second = getelementptr i64, i64* %arguments, i64 1
  %data = load i64, i64* %second
  br label %loop
loop:
  %i = phi i64 [0, %start], [%next, %loop]
  {phis}
  {body}
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %turns
  br i1 %more, label %loop, label %end
end:
  %total0 = {add} {kind} %n0, zeroinitializer
  {totals}
  %out = inttoptr i64 %data to {kind}*
  store {kind} %total{last}, {kind}* %out, align 4
  ret void
}}
"""


def _loop(kind: str, add: str, body: Callable[[int], str]) -> str:
    """A loop over sums %s0.. of a vector type; `body` makes the next %n of one of them."""
    each = range(_SUMS)
    lines = {
        "phis": [f"%s{j} = phi {kind} [zeroinitializer, %start], [%n{j}, %loop]" for j in each],
        "body": [body(j) for j in each],
        "totals": [f"%total{j} = {add} {kind} %total{j - 1}, %n{j}" for j in each[1:]],
    }
    text = {name: "\n  ".join(found) for name, found in lines.items()}
    return _FRAME.format(kind=kind, add=add, last=_SUMS - 1, **text)


def _fill(value: float) -> str:
    return "<" + ", ".join([f"float {value}"] * 16) + ">"


def _compute(j: int) -> str:
    return f"""%w{j} = and i64 %i, {_NEAR // _TURN - 1}
  %a{j} = mul i64 %w{j}, {_TURN}
  %b{j} = add i64 %a{j}, {64 * j}
  %c{j} = add i64 %b{j}, %data
  %p{j} = inttoptr i64 %c{j} to <16 x float>*
  %v{j} = load <16 x float>, <16 x float>* %p{j}, align 4
  %m{j} = fmul <16 x float> %v{j}, {_fill(0.5)}
  %n{j} = fadd <16 x float> %s{j}, %m{j}"""


def _read(j: int) -> str:
    return f"""%a{j} = mul i64 %i, {_TURN}
  %b{j} = add i64 %a{j}, {64 * j}
  %c{j} = add i64 %b{j}, %data
  %p{j} = inttoptr i64 %c{j} to <16 x i32>*
  %v{j} = load <16 x i32>, <16 x i32>* %p{j}, align 4
  %n{j} = add <16 x i32> %s{j}, %v{j}"""


def computing(turns: int) -> Callable[[], None]:
    """`turns` times 128 float32 from a core's own caches, multiplied and added up."""
    return _program(_loop("<16 x float>", "fadd", _compute), turns, _NEAR)


def reading(nbytes: int) -> Callable[[], None]:
    """A pass over `nbytes` of memory of its own."""
    return _program(_loop("<16 x i32>", "add", _read), nbytes // _TURN, nbytes)


def _program(ir: str, turns: int, nbytes: int) -> Callable[[], None]:
    entry = objects.function(objects.load_object(objects.compile_ir(ir, selected())))
    data = aligned(nbytes)
    data[:] = 0
    arguments = np.array([turns, data.ctypes.data], np.int64)

    def work(kept: np.ndarray = data) -> None:  # the loop has its address
        entry(arguments.ctypes.data, 0, 1)

    return work
