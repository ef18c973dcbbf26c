"""Tables of numbers that are part of a kernel's code."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from . import emit as e
from . import simd as s


def constant(values: Any) -> Any:
    """() -> address of the values: float32 where they are floats, else int32."""
    given = np.asarray(values)
    data = np.ascontiguousarray(given, np.float32 if given.dtype.kind == "f" else np.int32)
    words = [int(v) for v in data.reshape(-1).view(np.int32)]

    @s.operation(s.i64)
    def address(b):
        initial = ir.Constant(ir.ArrayType(e.i32, len(words)), words)
        table = cgutils.global_constant(b, "table", initial)
        table.align = 64
        return b.ptrtoint(table, e.i64)

    return address
