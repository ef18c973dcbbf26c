"""Kernels to PTX to cubin, with no GPU and no driver. With lowering.py and frontend.py, all
that knows numba.

numba only compiles: its dispatcher, its arrays and its launches are never used. nvJitLink turns
the PTX into code for one target and reports the registers and spills of each kernel.
"""

from __future__ import annotations

import functools
import re
import struct
import types as python_types
from dataclasses import replace
from typing import Any

import numpy as np
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda, types
from numba.cuda import dispatcher

from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

from . import frontend
from .catalogue import Compiled, declared
from .intrinsic import Declared, Intrinsic
from .lowering import TYPES, lowered
from .targets import capability

frontend.install()
_helpers: dict[int, dict[Any, Any]] = {}  # capability -> those of all kernels of this process


def compile_kernel(kernel: Kernel, target: str) -> Compiled:
    """A kernel of the catalogue for one target of TARGETS."""
    return compile_declared(declared(kernel), target)


def compile_declared(kernel: Declared, target: str) -> Compiled:
    """Any declared kernel. BackendError: double precision in it, or the linker's complaint.

    Fewer blocks than its `min_blocks` fit together where so many would spill registers.
    """
    text, entry = to_ptx(kernel, target), kernel.entry
    code, log = _link(text, target)
    registers, stack, spilled = _usage(kernel.name, log)
    while spilled and entry.min_blocks > 1:
        entry = replace(entry, min_blocks=entry.min_blocks - 1)
        text = re.sub(r"\.minnctapersm \d+", f".minnctapersm {entry.min_blocks}", text)
        code, log = _link(text, target)
        registers, stack, spilled = _usage(kernel.name, log)
    shared = _shared_nbytes(code, kernel.name)
    return Compiled(kernel.name, code, entry, registers, spilled, stack, shared)


def to_ptx(kernel: Declared, target: str) -> str:
    """The kernel's PTX, its entry named `kernel.name`."""
    major, minor = capability(target)
    variant = (major, minor, "a") if target.endswith("a") else (major, minor)
    dispatcher.get_current_device = lambda: python_types.SimpleNamespace(compute_capability=variant)
    bounds = kernel.entry.threads, kernel.entry.min_blocks or 1
    function = _rebound(kernel.function, 10 * major + minor)
    frontend.look_for_operations()
    compile_all: Any = cuda.compile_all  # type: ignore[attr-defined]
    codes, _ = compile_all(
        function, _signature(kernel), device=False,
        abi="numba", cc=variant, output="ptx", launch_bounds=bounds,
    )  # fmt: skip
    if len(codes) != 1 or not isinstance(codes[0], str):
        raise BackendError(f"kernel {kernel.name} uses operations that numba links from CUDA C++")
    text = codes[0]
    found = re.search(r"\.visible \.entry (\w+)\(", text)
    assert found, "numba's PTX has one entry"
    text = text.replace(found[1], kernel.name)
    if ".f64" in text:
        line = next(line.strip() for line in text.splitlines() if ".f64" in line)
        raise BackendError(f"kernel {kernel.name} computes in double precision: {line}")
    return text


def _signature(kernel: Declared) -> Any:
    kinds = [kind for _, kind in kernel.entry.arguments]
    pointer = [TYPES[k.removesuffix("*")] for k in kinds]
    pairs = zip(kinds, pointer, strict=True)
    return types.void(*[types.CPointer(t) if k.endswith("*") else t for k, t in pairs])


def _rebound(function: Any, capability: int) -> Any:
    """The same code with every intrinsic and helper replaced by what numba compiles."""

    def replaced(name: str, value: Any) -> Any:
        if isinstance(value, Intrinsic):
            return lowered(value, capability)
        if isinstance(value, python_types.FunctionType):
            return _helper(value, capability)
        if isinstance(value, float) and not isinstance(value, np.floating):
            raise BackendError(
                f"{function.__name__}: {name} = {value} is double: write f32({value})"
            )
        return value

    code, scope = function.__code__, function.__globals__
    names = {n: replaced(n, scope[n]) for n in code.co_names if n in scope}
    cells = [
        python_types.CellType(replaced(n, cell.cell_contents))
        for n, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
    ]
    return python_types.FunctionType(
        code, names, function.__name__, function.__defaults__, tuple(cells)
    )


def _helper(function: Any, capability: int) -> Any:
    """A function that others call; LLVM inlines it, which takes a fifth of the time it takes numba.

    But numba those with arrays in shared memory: LLVM would make one array for each function.
    What says the same is compiled once for all kernels, whoever made it.
    """
    made, key = _helpers.setdefault(capability, {}), _meaning(function)
    if key not in made:
        how = {"inline": "always"} if _shares(function) else {"forceinline": True}
        made[key] = cuda.jit(device=True, **how)(_rebound(function, capability))
    return made[key]


def _meaning(value: Any) -> Any:
    """Equal for functions of one code and equal constants."""
    if isinstance(value, python_types.FunctionType):
        cells = tuple(_meaning(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, value.__module__, cells
    return type(value), repr(value) if isinstance(value, float) else value


@functools.cache
def _shares(function: Any) -> bool:
    """Whether it, or what it calls, has arrays in shared memory."""
    code, scope = function.__code__, function.__globals__
    values = [scope[name] for name in code.co_names if name in scope]
    values += [cell.cell_contents for cell in function.__closure__ or ()]
    return any(
        value.rule in ("shared", "dynamic_shared")
        if isinstance(value, Intrinsic)
        else isinstance(value, python_types.FunctionType) and _shares(value)
        for value in values
    )


def _link(text: str, target: str) -> tuple[bytes, str]:
    options = LinkerOptions(arch=target, ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
    try:
        code = linker.link("cubin").code
        log = linker.get_info_log() + linker.get_error_log()
    finally:
        linker.close()
    return bytes(code), log.replace("\0", "")


def _usage(name: str, log: str) -> tuple[int, int, int]:
    """(registers, stack bytes, spilled bytes) from the linker's log."""
    registers = re.search(r"Used (\d+) registers", log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    if not registers or not frame:
        raise BackendError(f"the linker's report on kernel {name} is not understood: {log[:200]!r}")
    return int(registers[1]), int(frame[1]), int(frame[2])


def _shared_nbytes(code: bytes, name: str) -> int:
    """Size of the section of static shared memory in a cubin (an ELF file of 64 bits)."""
    start, entry_size, count, names_index = struct.unpack_from("<Q10xHHH", code, 40)
    headers = [struct.unpack_from("<IIQQQQ", code, start + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    for header in headers:
        begin = names + header[0]
        if code[begin : code.index(b"\0", begin)] == f".nv.shared.{name}".encode():
            return header[5]
    return 0
