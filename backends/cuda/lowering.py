"""Intrinsics as numba-cuda and llvmlite know them. Imported by `compile.py` alone.

An operation with PTX becomes inline assembly with typed operands; the others have a rule below.
Accesses are written in LLVM where that keeps addresses foldable, and name their memory: generic
addresses would cost instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
_U32 = types.uint32


class Rule(NamedTuple):
    """How numba types an operation of `arity` arguments, `sign` (their types), and emits it."""

    arity: int
    sign: Callable[..., Any]
    generate: Callable[[Any, Any, Any, Any], Any]


@functools.cache
def lowered(operation: Intrinsic, capability: int) -> Any:
    """What stands for `operation` in a function that numba compiles for `capability` (90, ...)."""
    if operation.rule == "cast":
        return _CASTS[operation.parameters[0]]
    rule = _assembly(operation, capability) if operation.ptx else _RULES[operation.rule](operation)
    return intrinsic(_typer(operation.name, rule))


def _typer(name: str, rule: Rule) -> Callable[..., Any]:
    """numba looks at the parameters of a typing function: give it exactly those."""
    names = ", ".join(f"a{i}" for i in range(rule.arity))
    scope = rule._asdict()
    exec(f"def {name}(context, {names}): return sign({names}), generate", scope)
    return scope[name]


def _assembly(operation: Intrinsic, capability: int) -> Rule:
    """An operation written in PTX."""
    arguments = [TYPES[a] for a in operation.arguments]
    results = [TYPES[r] for r in operation.results]
    constraints = ["=" + _LETTERS[r] for r in operation.results]
    constraints += [_LETTERS[a] for a in operation.arguments]

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        if capability < operation.needs:
            return context.get_dummy_value()
        kinds = [context.get_value_type(t) for t in results]
        found = assemble(builder, operation.ptx, kinds, constraints, values, operation.effect)
        return _returned(context, builder, sig, found)

    whole = signature(_return_type(results), *arguments)
    return Rule(len(arguments), lambda *_: whole, generate)


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


def _register(operation: Intrinsic) -> Rule:
    name = f"llvm.nvvm.read.ptx.sreg.{operation.parameters[0]}"

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        return builder.call(_declared(builder, name, ir.FunctionType(_I32, [])), [])

    return Rule(0, lambda: signature(_U32), generate)


def _declared(builder: Any, name: str, kind: Any) -> Any:
    module = builder.module
    return module.globals.get(name) or ir.Function(module, kind, name)


def _barrier(operation: Intrinsic) -> Rule:
    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(_declared(builder, "llvm.nvvm.barrier0", kind), [])
        return context.get_dummy_value()

    return Rule(0, lambda: signature(types.none), generate)


def _load(operation: Intrinsic) -> Rule:
    count, mode, times = (*operation.parameters, 1)[:3]
    space = _SHARED if mode == "shared" else _GLOBAL

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        place, parts = _address(builder, values[0], values[1], count, space), list[Any]()
        for n in range(times):
            here = builder.gep(place, [_I64(n)]) if n else place
            read = builder.load(here, align=count * sig.args[0].dtype.bitwidth // 8)
            if mode == "constant":
                read.set_metadata("invariant.load", builder.module.add_metadata([]))
            parts += [read] if count == 1 else _lanes(builder, read, count)
        return _returned(context, builder, sig, parts)

    def sign(pointer: Any, index: Any) -> Any:
        return signature(_return_type([pointer.dtype] * count * times), pointer, _U32)

    return Rule(2, sign, generate)


def _lanes(builder: Any, vector: Any, count: int) -> list[Any]:
    return [builder.extract_element(vector, _I32(i)) for i in range(count)]


def _pick(operation: Intrinsic) -> Rule:
    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        which, *pointers = values
        found = pointers[0]
        for n, pointer in enumerate(pointers[1:], 1):
            here = builder.icmp_unsigned("==", which, which.type(n))
            found = builder.select(here, pointer, found)
        return found

    def sign(which: Any, a: Any, *others: Any) -> Any:
        return signature(a, _U32, a, *others)

    return Rule(5, sign, generate)


def _stream(operation: Intrinsic) -> Rule:
    (count,) = operation.parameters
    outputs = ", ".join(f"${i}" for i in range(count))
    text = f"ld.global.nc.L1::no_allocate.v{count}.u32 {{{outputs}}}, [${count}];"

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        place = _address(builder, values[0], values[1], count, _GLOBAL)
        letters = ["=r"] * count + ["l"]
        address = [builder.ptrtoint(place, _I64)]
        found = assemble(builder, text, [_I32] * count, letters, address, "")
        return _returned(context, builder, sig, found)

    return Rule(2, lambda p, i: signature(types.UniTuple(_U32, count), p, _U32), generate)


def _store(operation: Intrinsic) -> Rule:
    (count,) = operation.parameters
    space = _SHARED if operation.rule == "shared_store" else _GLOBAL

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        place = _address(builder, values[0], values[1], count, space)
        value = values[2]
        if count > 1:
            value = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
            for i, part in enumerate(values[2:]):
                value = builder.insert_element(value, part, _I32(i))
        builder.store(value, place, align=count * sig.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    def sign(pointer: Any, index: Any, *given: Any) -> Any:
        return signature(types.none, pointer, _U32, *[pointer.dtype] * count)

    return Rule(2 + count, sign, generate)


def _registers(operation: Intrinsic) -> Rule:
    name, count = operation.parameters

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        kind = context.get_value_type(TYPES[name])
        with builder.goto_entry_block():
            array = builder.alloca(ir.ArrayType(kind, count))
        return builder.bitcast(array, kind.as_pointer())

    return Rule(0, lambda: signature(types.CPointer(TYPES[name])), generate)


def _shared(operation: Intrinsic) -> Rule:
    name, count, alignment = (*operation.parameters, 0, 1024)[:3]

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

    return Rule(0, lambda: signature(types.CPointer(TYPES[name])), generate)


def _copy_async(operation: Intrinsic) -> Rule:
    text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        places = [
            _offset_bytes(builder, values[0], values[1], _SHARED),
            _offset_bytes(builder, values[2], values[3], _GLOBAL),
        ]
        letters = ["r", "l", "r"]
        assemble(builder, text, [], letters, [*places, values[4]], operation.effect)
        return context.get_dummy_value()

    def sign(target: Any, piece: Any, source: Any, source_piece: Any, nbytes: Any) -> Any:
        return signature(types.none, target, _U32, source, _U32, _U32)

    return Rule(5, sign, generate)


def _prefetch(operation: Intrinsic) -> Rule:
    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        place = builder.ptrtoint(_address(builder, values[0], values[1], 1, _GLOBAL), _I64)
        assemble(builder, "prefetch.global.L2 [$0];", [], ["l"], [place], operation.effect)
        return context.get_dummy_value()

    return Rule(2, lambda pointer, i: signature(types.none, pointer, _U32), generate)


def _atomic(operation: Intrinsic) -> Rule:
    text = "atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;"

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        place = builder.ptrtoint(_address(builder, values[0], values[1], 1, _GLOBAL), _I64)
        letters = ["=r", "l", "r"]
        found = assemble(builder, text, [_I32], letters, [place, values[2]], operation.effect)
        return _returned(context, builder, sig, found)

    return Rule(3, lambda pointer, i, v: signature(_U32, pointer, _U32, _U32), generate)


def _ldmatrix(operation: Intrinsic) -> Rule:
    count, mode = operation.parameters
    outputs = ", ".join(f"${i}" for i in range(count))
    text = f"ldmatrix.sync.aligned.m8n8.x{count}{mode}.shared.b16 {{{outputs}}}, [${count}];"

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        place = _offset_bytes(builder, values[0], values[1], _SHARED)
        letters = ["=r"] * count + ["r"]
        found = assemble(builder, text, [_I32] * count, letters, [place], operation.effect)
        return _returned(context, builder, sig, found)

    return Rule(2, lambda array, i: signature(types.UniTuple(_U32, count), array, _U32), generate)


_RULES: dict[str, Callable[[Intrinsic], Rule]] = {
    "register": _register,
    "barrier": _barrier,
    "load": _load,
    "stream": _stream,
    "pick": _pick,
    "store": _store,
    "shared_store": _store,
    "registers": _registers,
    "shared": _shared,
    "dynamic_shared": _shared,
    "copy_async": _copy_async,
    "atomic": _atomic,
    "prefetch": _prefetch,
    "ldmatrix": _ldmatrix,
}
