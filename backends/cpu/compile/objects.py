"""LLVM IR to object code, and object code to a callable address, by llvmlite alone.

An object may refer to nothing outside itself but a few memory routines: LLVM's engine leaves an
unresolved symbol as address 0 and crashes at the call, so symbols are read from the object file
and checked before it is loaded.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from runtime.backends import forks
from runtime.backends.cpu.compile.isa import Isa, host_arch, isa, target
from runtime.backends.cpu.compile.symbols import undefined_symbols
from runtime.ops.errors import BackendError

ENTRY = "entry"
ALLOWED = frozenset({"memcpy", "memmove", "memset"})
# LLVM's own name for an address table; a reference to it needs no definition.
_HARMLESS = frozenset({"_GLOBAL_OFFSET_TABLE_", ""})

_linking = forks.awaited_lock()  # llvmlite has a lock of its own
_engines: list[Any] = []  # code lives as long as the process: threads may be inside it


def compile_ir(ir: str, isa_name: str) -> bytes:
    """Object code of the LLVM module `ir` (text) for the instruction set `isa_name`.

    Raises BackendError when LLVM refuses the module (a fault of the emitter).
    """
    module, machine = _prepare(ir, isa_name)
    return machine.emit_object(module)


def load_object(code: bytes, name: str = ENTRY, extra: Mapping[str, int] | None = None) -> int:
    """Load object code into the process for good; the address of its function `name`.

    extra: further symbols the object may use, name -> address.
    Raises BackendError naming the symbols, if it needs others, and if `name` is not in it.
    """
    extra = extra or {}
    unknown = sorted(undefined_symbols(code) - ALLOWED - _HARMLESS - extra.keys())
    if unknown:
        raise BackendError(
            f"compiled kernel {name!r} needs symbols that are not provided: {', '.join(unknown)}; "
            "delete the kernel cache, and report this if it comes again"
        )
    llvm = _llvm()
    _provide_memory_routines()
    for symbol, address in extra.items():
        llvm.add_symbol(symbol, address)
    address = _uninterrupted(_linked, code, name)
    if not address:
        raise BackendError(f"compiled kernel has no function {name!r}: delete the kernel cache")
    return address


def _linked(code: bytes, name: str) -> int:
    with _linking:
        return _link(code, name)


def _link(code: bytes, name: str) -> int:
    llvm = _llvm()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _host_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(name))


def _uninterrupted(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work`, done where no handler of a signal runs.

    Engines take over what they are made of. llvmlite notes that one call later, and where an
    interrupt came between, both free it: LLVM crashes at the next kernel.
    """
    if threading.current_thread() is not threading.main_thread():
        return work(*arguments)
    todo, results = [work], list[Any]()
    ended = _thread.allocate_lock()
    ended.acquire()

    def run() -> None:
        with contextlib.suppress(IndexError):  # an interrupt came, and another thread has it
            results.append(_outcome(todo.pop(), *arguments))
            ended.release()

    interrupt: BaseException | None = None
    while not results:  # an interrupt waits, some milliseconds
        try:
            if todo:
                # not threading.Thread: an interrupt inside its methods can leave its locks held
                _thread.start_new_thread(run, ())
            ended.acquire()
        except RuntimeError:  # no more threads
            run()
        except BaseException as error:
            interrupt = error
    for outcome in (interrupt, results[0]):
        if isinstance(outcome, BaseException):
            raise outcome
    return results[0]


def _outcome(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except BaseException as error:
        return error


def function(address: int) -> Any:
    """The kernel at `address` as a Python callable (args, thread, n_threads); releases the GIL."""
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)


def _prepare(ir: str, isa_name: str) -> tuple[Any, Any]:
    llvm = _llvm()
    machine = _machine(isa(isa_name))
    try:
        module = llvm.parse_assembly(ir)
        module.verify()
    except RuntimeError as error:
        first = str(error).strip().splitlines()
        raise BackendError(f"LLVM refuses a kernel: {' '.join(first[:3])}") from error
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    return module, machine


@functools.cache
def _llvm() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def _machine(isa: Isa) -> Any:
    llvm = _llvm()
    goal = target(isa.name)
    if isa.arch not in ("", host_arch()):
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(goal.triple).create_target_machine(
        cpu=goal.cpu,
        features=goal.features,
        opt=3,
        reloc=_reloc(),
        codemodel="jitdefault",
        jit=True,
    )


@functools.cache
def _host_machine() -> Any:
    llvm = _llvm()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        opt=3, reloc=_reloc(), codemodel="jitdefault", jit=True
    )


def _reloc() -> str:
    # MCJIT's loader on x86 wants absolute addresses, as every user of it there does.
    return "static" if host_arch() == "x86_64" and sys.platform != "darwin" else "default"


@functools.cache
def _provide_memory_routines() -> None:
    # memmove does all that memcpy promises, and ctypes knows where it is on every system.
    move = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value
    fill = ctypes.cast(ctypes.memset, ctypes.c_void_p).value
    prefix = "_" if sys.platform == "darwin" else ""
    for name, address in (("memcpy", move), ("memmove", move), ("memset", fill)):
        _llvm().add_symbol(prefix + name, address)
