"""Compile one kernel to object code with Numba. The only place that needs Numba at all.

A process compiles for ONE instruction set: Numba reads its target from the environment when it is
imported. Object code then runs in processes that never import Numba.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.signatures import CONSTANTS, FILE_OF, SIGNATURES
from runtime.ops.errors import BackendError

from .target import choose


def compile_kernel(name: str, constants: dict[str, Any], isa: str) -> tuple[bytes, str]:
    """Object code of a kernel and the symbol of its entry `void(args, thread, n_threads)`.

    BackendError: unknown kernel or constant, or this process compiles for another `isa`.
    """
    _check(name, constants)
    choose(isa)
    module = importlib.import_module(f"{__package__}.{FILE_OF[name]}")
    if name not in module.KERNELS:
        raise BackendError(
            f"kernel {name!r} has arguments in backends/cpu/signatures.py and no builder: add one "
            f"to KERNELS in backends/cpu/kernels/{FILE_OF[name]}.py"
        )
    kernel = module.KERNELS[name](**constants)
    _check_arguments(name, kernel)
    return _compile(kernel)


def _check_arguments(name: str, kernel: Callable) -> None:
    """BackendError where a kernel does not take what signatures.py says, in that order."""
    takes = tuple(inspect.signature(kernel).parameters)
    if takes != (*SIGNATURES[name], "thread", "n_threads"):
        raise BackendError(
            f"kernel {name!r} takes {' '.join(takes)}, and signatures.py promises "
            f"{' '.join(SIGNATURES[name])} thread n_threads"
        )


def _check(name: str, constants: dict[str, Any]) -> None:
    if name not in SIGNATURES:
        raise BackendError(f"no CPU kernel is called {name!r}; there are {', '.join(SIGNATURES)}")
    allowed = CONSTANTS.get(name, {})
    if set(constants) != set(allowed):
        raise BackendError(f"kernel {name} takes the constants {list(allowed)}, not {constants}")
    for key, value in constants.items():
        if value not in allowed[key]:
            raise BackendError(f"kernel {name}: {key} is one of {allowed[key]}, not {value!r}")


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
