"""numba's way from a Python function to LLVM, without what our kernels have no use for.

Kernels have numbers, pointers, tuples and functions; no arrays, objects, exceptions, generators or
functions made inside. So most passes find nothing, and what `u32 + u32` is, say, is asked thousands
of times over: here it is answered once in a process. The code is the same, in a third of the time.
Imported by `compile.py` alone: numba stays like this for the rest of the process.
"""
# mypy: disable-error-code="attr-defined,method-assign"

from __future__ import annotations

import copy
import functools
import inspect
import types as python_types
from typing import Any

from numba.core.types import functions
from numba.cuda import compiler, dispatcher, types, utils
from numba.cuda.core import (
    analysis,
    base,
    errors,
    inline_closurecall,
    postproc,
    transforms,
    typed_passes,
    untyped_passes,
)  # fmt: skip
from numba.cuda.core.rewrites import rewrite_registry
from numba.cuda.descriptor import cuda_target
from numba.cuda.typing import context as typing_context

_refreshing = False  # whether contexts may look for new operations


def install() -> None:
    """Make numba's compiler for GPUs this one."""
    compiler.CUDACompiler.define_pipelines = lambda self: [_Passes(*_UNTYPED, *_TYPED)]
    compiler.DefaultPassBuilder.define_untyped_pipeline = staticmethod(
        lambda state, name="untyped": _Passes(*_UNTYPED)
    )
    postproc.PostProcessor.run = _tidied
    functions.BaseFunction.get_call_type = _typed_once(functions.BaseFunction.get_call_type)
    base.BaseContext.get_function = _found_once(base.BaseContext.get_function)
    for context in (base.BaseContext, typing_context.BaseContext):
        context.refresh = _refreshed(context.refresh)
    base.BaseContext.get_abi_sizeof = _sized_once(base.BaseContext.get_abi_sizeof)
    utils.pysignature = functools.cache(inspect.signature)
    dispatcher.CUDADispatcher.get_call_template = _of_any_number(
        dispatcher.CUDADispatcher.get_call_template
    )
    # where numba inlines a function it copies, twice and deeply, what it has just made for it
    inline_closurecall.copy = python_types.SimpleNamespace(
        copy=copy.copy, deepcopy=lambda value, memo=None: value
    )


def look_for_operations() -> None:
    """Have numba know the intrinsics made since the last time, before a kernel is compiled."""
    global _refreshing
    _refreshing = True
    try:
        with utils.numba_target_override():
            cuda_target.typing_context.refresh()
            cuda_target.target_context.refresh()
    finally:
        _refreshing = False


class _Passes:
    """Functions of a compiler's state, in numba's place of a pass manager."""

    pipeline_name = "cuda"

    def __init__(self, *passes: Any) -> None:
        self._passes, self.exec_times = passes, dict[str, Any]()

    def finalize(self) -> None:
        """Nothing is left to do."""

    def run(self, state: Any) -> None:
        """Take a function through all of them."""
        for step in self._passes:
            step(state)


def _numbas(kind: Any) -> Any:
    return kind().run_pass


def _prune(state: Any) -> None:
    analysis.dead_branch_prune(state.func_ir, state.args)


def _rewrite(state: Any) -> None:
    rewrite_registry.apply("before-inference", state)


_UNTYPED = (
    _numbas(compiler.CUDATranslateBytecode), _numbas(untyped_passes.FixupArgs),
    _numbas(untyped_passes.IRProcessing), _numbas(untyped_passes.InlineInlinables), _prune,
    _rewrite,
)  # fmt: skip
_TYPED = (
    _numbas(untyped_passes.ReconstructSSA), _numbas(typed_passes.NopythonTypeInference),
    _numbas(typed_passes.PreLowerStripPhis), _numbas(compiler.CreateLibrary),
    _numbas(compiler.CUDANativeLowering), _numbas(compiler.CUDABackend),
)  # fmt: skip


def _tidied(self: Any, emit_dels: bool = False, extend_lifetimes: bool = False) -> None:
    """After a pass that changes blocks; nothing in a kernel has to be given back when it dies."""
    self.func_ir.blocks = transforms.canonicalize_cfg(self.func_ir.blocks)
    self.func_ir.generator_info = None


def _typed_once(get_call_type: Any) -> Any:
    found: dict[Any, Any] = {}

    def typed(self: Any, context: Any, args: Any, kws: Any) -> Any:
        key = self, tuple(args), tuple(dict(kws).items())
        if key not in found:
            try:
                found[key] = get_call_type(self, context, args, kws)
            except errors.TypingError as error:
                found[key] = error
        if isinstance(found[key], errors.TypingError):
            raise found[key]
        return found[key]

    return typed


def _found_once(get_function: Any) -> Any:
    """Of operators on constants numba asks first for code of its own, which there is not."""
    absent = set()

    def found(self: Any, fn: Any, sig: Any, _firstcall: bool = True) -> Any:
        global _refreshing
        if not _firstcall:
            return get_function(self, fn, sig, False)
        if (fn, sig) in absent:
            raise NotImplementedError(f"no code for {fn}{sig}")
        _refreshing = True
        try:
            return get_function(self, fn, sig)
        except NotImplementedError:
            absent.add((fn, sig))
            raise
        finally:
            _refreshing = False

    return found


def _refreshed(refresh: Any) -> Any:
    def refreshed(self: Any) -> None:
        if _refreshing:
            refresh(self)

    return refreshed


def _sized_once(get_abi_sizeof: Any) -> Any:
    sizes: dict[str, int] = {}

    def sized(self: Any, kind: Any) -> int:
        name = str(kind)
        if name not in sizes:
            sizes[name] = get_abi_sizeof(self, kind)
        return sizes[name]

    return sized


def _of_any_number(get_call_template: Any) -> Any:
    """A helper is compiled once, not for each constant it is called with: it is inlined later."""

    def template(self: Any, args: Any, kws: Any) -> Any:
        return get_call_template(self, tuple(types.unliteral(a) for a in args), kws)

    return template
