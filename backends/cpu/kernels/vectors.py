"""Vectors of 16 lanes as Numba values: their types, operators, and how operations are made."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

from . import emit as e


class Vector(types.Type):
    """16 lanes of a scalar type, passed by value."""

    def __init__(self, element: types.Type) -> None:
        self.element = element
        super().__init__(name=f"{element}x16")


f32x16, i32x16, m16 = (Vector(t) for t in (types.float32, types.int32, types.boolean))


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector is one LLVM vector value everywhere: variable, argument and result."""

    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        lanes = e.i1 if fe_type is m16 else dmm.lookup(fe_type.element).get_value_type()
        super().__init__(dmm, fe_type, e.wide(lanes))


def operation(result: types.Type, *parameters: types.Type) -> Callable:
    """Make `emit(builder, *values)` callable from kernels with this one signature."""

    def wrap(emit: Callable) -> Any:
        def typer(typingctx, *args):
            if len(args) != len(parameters):
                return None

            def codegen(context, builder, signature, values):
                value = emit(builder, *values)
                return context.get_dummy_value() if value is None else value

            return result(*parameters), codegen

        names = list(inspect.signature(emit).parameters)[1:]
        typer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ["ctx", *names]]
        )
        typer.__name__ = emit.__name__
        typer.__doc__ = emit.__doc__
        return intrinsic(typer)

    return wrap


def _define(function: Callable, result: types.Type, arity: int, emit: Callable, on: Vector) -> None:
    """Give a Python operator a meaning for vectors of one type."""

    def typing(context):
        if arity == 1:
            return lambda x: result if x is on else None
        return lambda x, y: result if x is on and y is on else None

    type_callable(function)(typing)

    def lower(context, builder, signature, values):
        return emit(builder, *values)

    lower_builtin(function, *[on] * arity)(lower)


def _compare(symbol: str, is_float: bool) -> Callable:
    if is_float:
        return lambda b, x, y: b.fcmp_ordered(symbol, x, y)
    return lambda b, x, y: b.icmp_signed(symbol, x, y)


def _define_operators() -> None:
    for function, name in (
        (operator.add, "add"),
        (operator.sub, "sub"),
        (operator.mul, "mul"),
    ):
        _define(function, f32x16, 2, getattr(ir.IRBuilder, "f" + name), f32x16)
        _define(function, i32x16, 2, getattr(ir.IRBuilder, name), i32x16)
    _define(operator.truediv, f32x16, 2, ir.IRBuilder.fdiv, f32x16)
    _define(operator.neg, f32x16, 1, ir.IRBuilder.fneg, f32x16)
    _define(operator.neg, i32x16, 1, ir.IRBuilder.neg, i32x16)
    for function, name in (
        (operator.and_, "and_"),
        (operator.or_, "or_"),
        (operator.xor, "xor"),
    ):
        for on in (i32x16, m16):
            _define(function, on, 2, getattr(ir.IRBuilder, name), on)
    for function, symbol in (
        (operator.lt, "<"),
        (operator.le, "<="),
        (operator.gt, ">"),
        (operator.ge, ">="),
        (operator.eq, "=="),
    ):
        _define(function, m16, 2, _compare(symbol, True), f32x16)
        _define(function, m16, 2, _compare(symbol, False), i32x16)


_define_operators()
