"""Compile one kernel to object code with Numba. The only place that needs Numba at all.

A process compiles for ONE instruction set: Numba reads its target from the environment when it is
imported. Object code then runs in processes that never import Numba.
"""

from __future__ import annotations

import importlib
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
    kernel = module.KERNELS[name](**constants)
    return _compile(kernel, len(SIGNATURES[name]))


def _check(name: str, constants: dict[str, Any]) -> None:
    if name not in SIGNATURES:
        raise BackendError(f"no CPU kernel is called {name!r}; there are {', '.join(SIGNATURES)}")
    allowed = CONSTANTS.get(name, {})
    if set(constants) != set(allowed):
        raise BackendError(f"kernel {name} takes the constants {list(allowed)}, not {constants}")
    for key, value in constants.items():
        if value not in allowed[key]:
            raise BackendError(f"kernel {name}: {key} is one of {allowed[key]}, not {value!r}")


def _compile(kernel: Callable, n_args: int) -> tuple[bytes, str]:
    from numba import cfunc, types

    from .rows import helper

    # Everything is inlined into the entry: one function goes through Numba and LLVM, and LLVM
    # sees that no error path of it ever runs.
    entry = _entry(helper(kernel), n_args)
    signature = types.void(types.int64, types.int64, types.int64)
    options: Any = {
        "error_model": "numpy",
        "boundscheck": False,
        "nogil": True,
        "forceinline": True,
    }
    compiled: Any = cfunc(signature, **options)(entry)
    return compiled._library._get_compiled_object(), compiled.native_name


def _entry(body: Callable, n_args: int) -> Callable:
    """`body` with its arguments taken from the table at an address.

    Written as source because Numba cannot inline a call with a starred argument.
    """
    from .simd import load_i64

    words = "".join(f"load_i64(table + {8 * i}), " for i in range(n_args))
    source = f"def entry(table, thread, n_threads):\n    body({words}thread, n_threads)\n"
    names: dict[str, Any] = {"body": body, "load_i64": load_i64}
    exec(source, names)
    return names["entry"]
