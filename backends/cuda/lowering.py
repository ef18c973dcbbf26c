"""Intrinsics as numba-cuda and llvmlite know them. Imported by `compile.py` alone.

An operation with PTX becomes inline assembly with typed operands; the others have a rule below.
Accesses are written in LLVM where that keeps addresses foldable, and name their memory: generic
addresses would cost instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from .intrinsic import WIDTH, Intrinsic

_LETTERS = {"u16": "h", "i16": "h", "u32": "r", "i32": "r", "u64": "l", "i64": "l", "f32": "f"}
_NAMES = {"u": "uint", "i": "int", "f": "float"}
TYPES = {name: getattr(types, f"{_NAMES[name[0]]}{8 * WIDTH[name]}") for name in WIDTH}
_CASTS = {"u32": np.uint32, "i32": np.int32, "f32": np.float32}
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_GLOBAL, _SHARED = 1, 3
Rule = Callable[[Intrinsic, int], Callable[..., Any]]


@functools.cache
def lowered(operation: Intrinsic, capability: int) -> Any:
    """What stands for `operation` in a function that numba compiles for `capability` (90, ...)."""
    if operation.rule == "cast":
        return _CASTS[operation.parameters[0]]
    typer = _assembly(operation, capability) if operation.ptx else _RULES[operation.rule](operation)
    return intrinsic(_named(operation.name, typer))


def _named(name: str, typer: Callable[..., Any]) -> Callable[..., Any]:
    """numba looks at the parameters of a typing function: give it exactly those."""
    count = typer.__code__.co_argcount - 1
    names = "".join(f", a{i}" for i in range(getattr(typer, "count", count)))
    scope = {"typer": typer}
    exec(f"def {name}(context{names}): return typer(context{names})", scope)
    return scope[name]


def _assembly(operation: Intrinsic, capability: int) -> Callable[..., Any]:
    """The typing function of an operation written in PTX."""
    arguments = [TYPES[a] for a in operation.arguments]
    results = [TYPES[r] for r in operation.results]
    constraints = ["=" + _LETTERS[r] for r in operation.results]
    constraints += [_LETTERS[a] for a in operation.arguments]
    emitted = capability >= operation.needs

    def typer(context: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            if not emitted:
                return context.get_dummy_value()
            kinds = [context.get_value_type(t) for t in results]
            found = assemble(builder, operation.ptx, kinds, constraints, values, operation.effect)
            return _returned(context, builder, sig, found)

        return signature(_return_type(results), *arguments), generate

    typer.count = len(arguments)  # type: ignore[attr-defined]
    return typer


def assemble(
    builder: Any, text: str, results: list, constraints: list[str], values: Any, effect: str
) -> list[Any]:
    """One inline assembly; its results. With an effect it is also kept in its branch."""
    kind = ir.VoidType() if not results else results[0]
    if len(results) > 1:
        kind = ir.LiteralStructType(results)
    memory = ["~{memory}"] if effect == "memory" else []
    function = ir.FunctionType(kind, [v.type for v in values])
    code = ir.InlineAsm(function, text, ",".join(constraints + memory), side_effect=bool(effect))
    called = builder.call(code, values, attrs=("convergent",) if effect else ())
    if len(results) < 2:
        return [called] * len(results)
    return [builder.extract_value(called, i) for i in range(len(results))]


def _return_type(results: list) -> Any:
    if not results:
        return types.none
    return results[0] if len(results) == 1 else types.UniTuple(results[0], len(results))


def _returned(context: Any, builder: Any, sig: Any, values: list[Any]) -> Any:
    if not values:
        return context.get_dummy_value()
    if len(values) == 1:
        return values[0]
    return context.make_tuple(builder, sig.return_type, values)


def _address(builder: Any, pointer: Any, index: Any, count: int, space: int) -> Any:
    """Element `index` of vectors of `count` elements, as a pointer into `space`."""
    element = pointer.type.pointee
    kind = element if count == 1 else ir.VectorType(element, count)
    base = builder.bitcast(pointer, kind.as_pointer())
    base = builder.addrspacecast(base, ir.PointerType(kind, space))
    return builder.gep(base, [builder.zext(index, _I64)])


def _offset_bytes(builder: Any, pointer: Any, index: Any, space: int) -> Any:
    """The address of piece `index` of 16 bytes, as an integer."""
    base = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    base = builder.addrspacecast(base, ir.PointerType(ir.IntType(8), space))
    place = builder.gep(base, [builder.shl(builder.zext(index, _I64), _I64(4))])
    return builder.ptrtoint(place, _I32 if space == _SHARED else _I64)


def _register(operation: Intrinsic) -> Callable[..., Any]:
    name = f"llvm.nvvm.read.ptx.sreg.{operation.parameters[0]}"

    def typer(context: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            return builder.call(_declared(builder, name, ir.FunctionType(_I32, [])), [])

        return signature(types.uint32), generate

    return typer


def _declared(builder: Any, name: str, kind: Any) -> Any:
    module = builder.module
    return module.globals.get(name) or ir.Function(module, kind, name)


def _barrier(operation: Intrinsic) -> Callable[..., Any]:
    def typer(context: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(_declared(builder, "llvm.nvvm.barrier0", kind), [])
            return context.get_dummy_value()

        return signature(types.none), generate

    return typer


def _load(operation: Intrinsic) -> Callable[..., Any]:
    count, mode = operation.parameters
    space = _SHARED if mode == "shared" else _GLOBAL

    def typer(context: Any, pointer: Any, index: Any) -> Any:
        element = pointer.dtype

        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            place = _address(builder, values[0], values[1], count, space)
            read = builder.load(place, align=count * element.bitwidth // 8)
            if mode == "constant":
                read.set_metadata("invariant.load", builder.module.add_metadata([]))
            parts = [read] if count == 1 else _lanes(builder, read, count)
            return _returned(context, builder, sig, parts)

        return signature(_return_type([element] * count), pointer, types.uint32), generate

    return typer


def _lanes(builder: Any, vector: Any, count: int) -> list[Any]:
    return [builder.extract_element(vector, _I32(i)) for i in range(count)]


def _stream(operation: Intrinsic) -> Callable[..., Any]:
    (count,) = operation.parameters
    outputs = ", ".join(f"${i}" for i in range(count))
    text = f"ld.global.nc.L1::no_allocate.v{count}.u32 {{{outputs}}}, [${count}];"

    def typer(context: Any, pointer: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            place = _address(builder, values[0], values[1], count, _GLOBAL)
            letters = ["=r"] * count + ["l"]
            address = [builder.ptrtoint(place, _I64)]
            found = assemble(builder, text, [_I32] * count, letters, address, "")
            return _returned(context, builder, sig, found)

        result = types.UniTuple(types.uint32, count)
        return signature(result, pointer, types.uint32), generate

    return typer


def _store(operation: Intrinsic) -> Callable[..., Any]:
    (count,) = operation.parameters
    space = _SHARED if operation.rule == "shared_store" else _GLOBAL

    def typer(context: Any, pointer: Any, index: Any, *given: Any) -> Any:
        element = pointer.dtype

        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            place = _address(builder, values[0], values[1], count, space)
            value = values[2]
            if count > 1:
                value = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
                for i, part in enumerate(values[2:]):
                    value = builder.insert_element(value, part, _I32(i))
            builder.store(value, place, align=count * element.bitwidth // 8)
            return context.get_dummy_value()

        return signature(types.none, pointer, types.uint32, *[element] * count), generate

    typer.count = 2 + count  # type: ignore[attr-defined]
    return typer


def _registers(operation: Intrinsic) -> Callable[..., Any]:
    name, count = operation.parameters

    def typer(context: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            kind = context.get_value_type(TYPES[name])
            with builder.goto_entry_block():
                array = builder.alloca(ir.ArrayType(kind, count))
            return builder.bitcast(array, kind.as_pointer())

        return signature(types.CPointer(TYPES[name])), generate

    return typer


def _shared(operation: Intrinsic) -> Callable[..., Any]:
    name, count, alignment = (*operation.parameters, 0, 1024)[:3]

    def typer(context: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            kind = context.get_value_type(TYPES[name])
            label = f"shared_{id(operation):x}" if count else "dynamic_shared"
            array = builder.module.globals.get(label)
            if array is None:
                array = ir.GlobalVariable(
                    builder.module, ir.ArrayType(kind, count), label, addrspace=_SHARED
                )
                array.align = alignment
                array.linkage = "internal" if count else "external"
                if count:
                    array.initializer = ir.Constant(array.value_type, ir.Undefined)
            place = builder.bitcast(array, ir.PointerType(kind, _SHARED))
            return builder.addrspacecast(place, kind.as_pointer())

        return signature(types.CPointer(TYPES[name])), generate

    return typer


def _copy_async(operation: Intrinsic) -> Callable[..., Any]:
    text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"

    def typer(context: Any, target: Any, piece: Any, source: Any, source_piece: Any, n: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            places = [
                _offset_bytes(builder, values[0], values[1], _SHARED),
                _offset_bytes(builder, values[2], values[3], _GLOBAL),
            ]
            letters = ["r", "l", "r"]
            assemble(builder, text, [], letters, [*places, values[4]], operation.effect)
            return context.get_dummy_value()

        u = types.uint32
        return signature(types.none, target, u, source, u, u), generate

    return typer


def _ldmatrix(operation: Intrinsic) -> Callable[..., Any]:
    count, mode = operation.parameters
    outputs = ", ".join(f"${i}" for i in range(count))
    text = f"ldmatrix.sync.aligned.m8n8.x{count}{mode}.shared.b16 {{{outputs}}}, [${count}];"

    def typer(context: Any, array: Any, piece: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            place = _offset_bytes(builder, values[0], values[1], _SHARED)
            letters = ["=r"] * count + ["r"]
            found = assemble(builder, text, [_I32] * count, letters, [place], operation.effect)
            return _returned(context, builder, sig, found)

        result = types.UniTuple(types.uint32, count)
        return signature(result, array, types.uint32), generate

    return typer


_RULES: dict[str, Callable[[Intrinsic], Callable[..., Any]]] = {
    "register": _register,
    "barrier": _barrier,
    "load": _load,
    "stream": _stream,
    "store": _store,
    "shared_store": _store,
    "registers": _registers,
    "shared": _shared,
    "dynamic_shared": _shared,
    "copy_async": _copy_async,
    "ldmatrix": _ldmatrix,
}
