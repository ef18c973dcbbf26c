"""A thin layer over llvmlite's IR builder: addresses are int64, values are vectors of rows.

`Code` holds the function being written and knows the instruction set, so that the emitters read
as arithmetic: `code.fma(x, y, acc)`, `code.splat(address, F32)`, `code.loop(0, n, sums, body)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from runtime.backends.cpu import llvm
from runtime.backends.cpu.compile.isa import Isa
from runtime.backends.cpu.llvm import F32, I1, I8, I16, I32, I64, const, undefined, vec  # noqa: F401

ENTRY_TYPE = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
ARG_BYTES = 8


@dataclass(frozen=True)
class Variable:
    """An int64 in memory."""

    b: Any
    place: Any

    def get(self) -> Any:
        """The value now."""
        return self.b.load(self.place)

    def set(self, value: Any) -> None:
        """Change the value."""
        self.b.store(value, self.place)


class Broadcasts:
    """4-byte values that lie one after another in memory, each as a vector of it in every lane.

    For Arm's instructions by element four are loaded at once and an instruction names the lane it
    takes: no instruction is spent on spreading them. Elsewhere each is loaded where it is used,
    which is what memory operands want. All uses are in one stretch of code without jumps.
    """

    def __init__(self, code: Code, base: Any, offset: int, kind: ir.Type, count: int) -> None:
        """`count` values of `kind` from `offset` bytes after the int64 address `base` on."""
        self.code, self.base, self.offset, self.kind = code, base, offset, kind
        self.together = code.lanes if code.isa.has_sdot and count % code.lanes == 0 else 1
        self.loaded: dict[int, Any] = {}

    def __getitem__(self, i: int) -> Any:
        code = self.code
        if self.together == 1:
            return code.load_splat(code.at(self.base, self.offset + 4 * i), self.kind)
        value, lane = self.vector_with(i)
        return code.shuffle(value, value, [lane] * code.lanes)

    def vector_with(self, i: int) -> tuple[Any, int]:
        """The loaded vector that value i is in, and its lane there (where four are loaded)."""
        number, lane = divmod(i, self.together)
        if number not in self.loaded:
            place = self.code.at(self.base, self.offset + 4 * self.together * number)
            self.loaded[number] = self.code.load(place, vec(self.kind, self.together), 4)
        return self.loaded[number], lane


class Code:
    """One kernel function under construction, for one instruction set."""

    def __init__(self, isa: Isa, name: str = "entry") -> None:
        self.isa = isa
        self.lanes = isa.lanes
        self.module = ir.Module(name)
        self.function = ir.Function(self.module, ENTRY_TYPE, name)
        self.b = ir.IRBuilder(self.function.append_basic_block("start"))
        self.args, self.thread, self.n_threads = self.function.args

    def finish(self) -> str:
        """Close the function and give the module as text."""
        self.b.ret_void()
        return str(self.module)

    # ---- arguments, integers ------------------------------------------------------------

    def arguments(self, names: Sequence[str]) -> dict[str, Any]:
        """The kernel's int64 arguments, in table order, by name."""
        return {n: self.load(self.at(self.args, ARG_BYTES * i), I64) for i, n in enumerate(names)}

    def at(self, base: Any, *offsets: Any) -> Any:
        """base plus offsets, each an int64 value or a Python int."""
        for offset in offsets:
            if isinstance(offset, int):
                if offset == 0:
                    continue
                offset = const(offset)
            base = self.b.add(base, offset)
        return base

    def times(self, x: Any, factor: Any) -> Any:
        """x * factor for int64 values; factor may be a Python int."""
        return self.b.mul(x, const(factor) if isinstance(factor, int) else factor)

    def ceil_div(self, x: Any, by: int) -> Any:
        """ceil(x / by) for x >= 0."""
        return self.b.udiv(self.at(x, by - 1), const(by))

    def smaller(self, x: Any, y: Any) -> Any:
        """min(x, y), signed."""
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def larger(self, x: Any, y: Any) -> Any:
        """max(x, y), signed."""
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)

    def my_share(self, n: Any, unit: int = 1) -> tuple[Any, Any]:
        """The contiguous part [first, end) of n items, in whole units, that is this thread's."""
        units = self.ceil_div(n, unit)
        first = self.b.udiv(self.times(units, self.thread), self.n_threads)
        end = self.b.udiv(self.times(units, self.at(self.thread, 1)), self.n_threads)
        return self.smaller(self.times(first, unit), n), self.smaller(self.times(end, unit), n)

    # ---- memory -------------------------------------------------------------------------

    def pointer(self, address: Any, kind: ir.Type) -> Any:
        """The int64 address as a pointer to `kind`."""
        return llvm.pointer(self.b, address, kind)

    def load(self, address: Any, kind: ir.Type, align: int = 1) -> Any:
        """The value of type `kind` at an int64 address."""
        if isinstance(kind, ir.IntType):
            align = align if align > 1 else max(1, kind.width // 8)
        return llvm.load(self.b, address, kind, align)

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        """Store `value` at an int64 address."""
        llvm.store(self.b, value, address, align)

    def store_past_caches(self, value: Any, address: Any) -> None:
        """Store a vector that fills a cache line at an aligned address, without reading the line.

        Such stores are visible to other threads after `end_stores_past_caches` only.
        """
        store = self.b.store(value, self.pointer(address, value.type))
        store.align = 64
        one = self.module.add_metadata([ir.Constant(I32, 1)])
        store.set_metadata("nontemporal", one)

    def end_stores_past_caches(self) -> None:
        """Let all stores past the caches be seen before anything that follows."""
        self.intrinsic("llvm.x86.sse.sfence", ir.VoidType(), [])

    def stack(self, n_bytes: int) -> Any:
        """Address of n_bytes on the stack, 64-byte aligned, one place for the whole call."""
        with self.b.goto_entry_block():
            place = self.b.alloca(ir.ArrayType(I8, n_bytes))
            place.align = 64
            return self.b.ptrtoint(place, I64)

    def variable(self, value: Any) -> Variable:
        """An int64 that outer loops may change; `value` is its first value."""
        with self.b.goto_entry_block():
            place = self.b.alloca(I64)
        self.b.store(value, place)
        return Variable(self.b, place)

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at `address`, soon to be read; never faults."""
        llvm.prefetch(self.b, address)

    def keep_order(self) -> None:
        """Keep loads that follow from being scheduled before here; no instruction is made.

        Without it LLVM loads dozens of broadcast values early and has to spill them.
        """
        self.b.fence("acq_rel", "singlethread")

    # ---- vectors ------------------------------------------------------------------------

    def splat(self, value: Any, n: int | None = None) -> Any:
        """A vector with `value` in every lane."""
        return llvm.splat(self.b, value, n or self.lanes)

    def load_splat(self, address: Any, kind: ir.Type) -> Any:
        """The 4-byte value of `kind` at `address` in every lane."""
        return self.splat(self.load(address, kind, 4))

    def shuffle(self, x: Any, y: Any, picks: Sequence[int]) -> Any:
        """Lanes of x, then of y, by number."""
        return llvm.shuffle(self.b, x, y, picks)

    def fill(self, kind: ir.Type, value: float, n: int | None = None) -> ir.Constant:
        """A constant vector of `value`."""
        return llvm.fill(kind, value, n or self.lanes)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x * y + z, rounded once where the instruction set can, else after the product too."""
        return llvm.fma(self.b, x, y, z, self.isa.has_fma)

    def intrinsic(self, name: str, result: ir.Type, args: Sequence[Any]) -> Any:
        """Call the LLVM intrinsic `name`."""
        return llvm.intrinsic_call(self.b, name, result, args)

    def half_to_float(self, bits: Any) -> Any:
        """float32 of float16 bit patterns (a vector of int16); exact, infinities and NaN too."""
        return llvm.half_to_float(self.b, bits, self.isa.has_f16)

    # ---- control ------------------------------------------------------------------------

    def loop(
        self,
        start: Any,
        stop: Any,
        carried: Sequence[Any],
        body: Callable[[Any, list[Any]], Sequence[Any]],
        step: int = 1,
    ) -> list[Any]:
        """for i in range(start, stop, step): carried = body(i, carried); gives the last values."""
        start = const(start) if isinstance(start, int) else start
        stop = const(stop) if isinstance(stop, int) else stop
        before = self.b.block
        head, inside, after = (self.b.append_basic_block(n) for n in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        i, values = self._phi(start, before), [self._phi(v, before) for v in carried]
        self.b.cbranch(self.b.icmp_signed("<", i, stop), inside, after)
        self.b.position_at_end(inside)
        results = list(body(i, values))
        i.add_incoming(self.at(i, step), self.b.block)
        for phi, result in zip(values, results, strict=True):
            phi.add_incoming(result, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return values

    def each(self, start: Any, stop: Any, body: Callable[[Any], None], step: int = 1) -> None:
        """for i in range(start, stop, step): body(i)."""

        def turn(i: Any, _: list[Any]) -> list[Any]:
            body(i)
            return []

        self.loop(start, stop, [], turn, step)

    def repeat(self, more: Callable[[], Any], body: Callable[[], None]) -> None:
        """while more(): body()."""
        head, inside, after = (self.b.append_basic_block(n) for n in ("while", "do", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        self.b.cbranch(more(), inside, after)
        self.b.position_at_end(inside)
        body()
        self.b.branch(head)
        self.b.position_at_end(after)

    def choose(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        """yes() if condition else no(), only the taken side is run; both give one value."""
        with self.b.if_else(condition) as (then, otherwise):
            with then:
                first, first_block = yes(), self.b.block
            with otherwise:
                second, second_block = no(), self.b.block
        phi = self.b.phi(first.type)
        phi.add_incoming(first, first_block)
        phi.add_incoming(second, second_block)
        return phi

    def _phi(self, value: Any, block: Any) -> Any:
        phi = self.b.phi(value.type)
        phi.add_incoming(value, block)
        return phi
