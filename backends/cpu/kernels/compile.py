"""Compile one kernel to object code with Numba. The only place that needs Numba at all.

A process compiles for ONE instruction set: Numba reads its target from the environment when it is
imported. Object code then runs in processes that never import Numba.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.kernels import KERNELS
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

from .target import choose


def compile_kernel(kernel: Kernel, isa: str) -> tuple[dict[str, Any], bytes]:
    """A kernel's object code, and of its entry `void(args, thread, n_threads)` the symbol and the
    names of what lies at `args` ("symbol", "arguments").

    BackendError: unknown kernel or constant, or this process compiles for another `isa`.
    """
    choose(isa)
    function = KERNELS.build(kernel)
    *arguments, thread, n_threads = inspect.signature(function).parameters
    if (thread, n_threads) != ("thread", "n_threads"):
        raise BackendError(f"kernel {kernel.name} must take thread and n_threads at the end")
    code, symbol = _compile(function)
    return {"symbol": symbol, "arguments": arguments}, code


def _compile(kernel: Callable) -> tuple[bytes, str]:
    from numba import cfunc, types

    # Helpers are inlined into the entry: one function goes through Numba and LLVM, and LLVM sees
    # that no error path of it ever runs.
    signature = types.void(types.int64, types.int64, types.int64)
    options: Any = {"error_model": "numpy", "boundscheck": False}
    options |= {"nogil": True, "forceinline": True}
    compiled: Any = cfunc(signature, **options)(_entry(kernel))
    return compiled._library._get_compiled_object(), compiled.native_name


def _entry(kernel: Callable) -> Callable:
    """`kernel(a, b, ..., thread, n_threads)` as a function of (table, thread, n_threads).

    Its arguments become assignments from the table. This is done on the source, since having Numba
    inline the kernel into a second function doubles the time to compile it.
    """
    module = ast.parse(textwrap.dedent(inspect.getsource(kernel)))
    function = module.body[0]
    assert isinstance(function, ast.FunctionDef), "a kernel is a plain function"
    names = [argument.arg for argument in function.args.args]
    loads = [f"{name} = _load(_table + {8 * i})" for i, name in enumerate(names[:-2])]
    function.body[:0] = ast.parse("\n".join(loads)).body
    parameters: Any = ast.parse("lambda _table, thread, n_threads: 0", mode="eval").body
    function.args = parameters.args
    code = compile(ast.fix_missing_locations(module), inspect.getfile(kernel), "exec")
    scope = {**kernel.__globals__, **inspect.getclosurevars(kernel).nonlocals, "_load": _loader()}
    exec(code, scope)
    return scope[kernel.__name__]


def _loader() -> Any:
    from .simd import load_i64

    return load_i64
