"""The cache of compiled CUDA kernels, without the toolchain that fills it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.backends.cuda.catalogue import Compiled, declared, head
from runtime.backends.cuda.library import Library
from runtime.backends.plan.kernel import Kernel

KERNEL, OTHER = (
    Kernel.of("swiglu", packed=False, clamp=False),
    Kernel.of("swiglu", packed=True, clamp=False),
)
TOOLCHAIN = "a" * 64


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """Stands in for the toolchain; the kernels it was asked for."""
    asked: list[Kernel] = []

    def compile_all(kernels, *_):
        for kernel in kernels:
            asked.append(kernel)
            code = f"code of {kernel}".encode()
            entry = declared(kernel).entry
            yield kernel, head(Compiled("swiglu", code, entry, 1, 0, 0, 0)), code

    monkeypatch.setattr("runtime.backends.cuda.compilers.compile_all", compile_all)
    monkeypatch.setattr("runtime.backends.cuda.library.toolchain_digest", lambda: TOOLCHAIN)
    return asked


def _entry(folder: Path, kernel: Kernel) -> Path:
    return folder / Library("sm_80", None).name(kernel, TOOLCHAIN)


def test_compiled_once_then_read(tmp_path: Path, made: list[Kernel], monkeypatch):
    first = Library("sm_80", tmp_path).get(KERNEL)
    assert Library("sm_80", tmp_path).get(KERNEL) == first and made == [KERNEL]
    monkeypatch.setattr("runtime.backends.cuda.library.toolchain_digest", lambda: "")
    assert Library("sm_80", tmp_path).missing([KERNEL, OTHER]) == [OTHER], "read without it"


def _head_changed(good: bytes) -> bytes:
    lines = good.split(b"\n", 3)
    return b"\n".join(
        [*lines[:2], lines[2].replace(b'"registers": 1', b'"registers": 2'), lines[3]]
    )


@pytest.mark.parametrize(
    "damage",
    [lambda good: good[:-1], _head_changed, lambda good: b""],
    ids=["short", "head", "empty"],
)
def test_a_damaged_entry_is_replaced(
    tmp_path: Path, made: list[Kernel], damage: Callable[[bytes], bytes]
):
    Library("sm_80", tmp_path).get(KERNEL)
    entry = _entry(tmp_path, KERNEL)
    good = entry.read_bytes()
    assert damage(good) != good
    entry.write_bytes(damage(good))
    assert Library("sm_80", tmp_path).get(KERNEL).registers == 1
    assert entry.read_bytes() == good and made == [KERNEL] * 2


def test_the_entry_of_another_kernel_is_not_loaded(tmp_path: Path, made: list[Kernel]):
    Library("sm_80", tmp_path).prepare([KERNEL, OTHER])
    _entry(tmp_path, KERNEL).write_bytes(_entry(tmp_path, OTHER).read_bytes())
    assert Library("sm_80", tmp_path).get(KERNEL).code == f"code of {KERNEL}".encode()


def test_what_an_entry_is_made_of():
    """Its own file and what this imports; not the list of kernels, nor other kernels."""
    sources = Library("sm_80", None)._sources
    modules = sources.modules("runtime.backends.cuda.kernels.norm", "runtime.backends.cuda.compile")
    names = {module.removeprefix("runtime.backends.cuda.") for module in modules}
    assert {"kernels.norm", "compile", "lowering", "intrinsics"} <= names
    assert not {"catalogue", "targets", "kernels.attention", "library"} & names
