"""Which instruction set a machine gets: what systems of every kind answer, given by hand."""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator

import pytest

from runtime.backends.cpu.compile import features, isa
from runtime.errors import Error

DOT, BOTH = {"dotprod"}, {"dotprod", "i8mm"}
HWCAP, HWCAP2 = 16, 26
ASIMDDP, I8MM = 1 << 20, 1 << 13


def auxiliary(**entries: int) -> Callable[[int], int]:
    """getauxval of a kernel that has only these entries; others are 0, as the function has it."""
    numbers = {HWCAP: entries.get("hwcap", 0), HWCAP2: entries.get("hwcap2", 0)}
    return lambda entry: numbers.get(entry, 0)


@pytest.mark.parametrize(
    ("entries", "want"),
    [
        ({"hwcap": ASIMDDP, "hwcap2": I8MM}, BOTH),
        ({"hwcap": ASIMDDP}, DOT),  # Cortex-A76; also a kernel older than AT_HWCAP2
        ({"hwcap": 0x8FF}, set()),  # Cortex-A53: everything but what is asked for
        ({}, set()),
        ({"hwcap": ~(ASIMDDP | I8MM) & (2**64 - 1), "hwcap2": ~I8MM & (2**64 - 1)}, set()),
        ({"hwcap": I8MM, "hwcap2": ASIMDDP}, set()),  # the right bits of the wrong entries
    ],
)
def test_linux(entries: dict[str, int], want: set[str]):
    assert features.from_linux(auxiliary(**entries)) == want


def test_linux_without_the_function():
    assert features.from_linux(None) == set()


@pytest.mark.parametrize(
    ("dot", "matrix", "want"),
    [
        (1, 1, BOTH),  # M2 and later
        (1, 0, DOT),  # M1
        (1, None, DOT),
        (None, None, DOT),  # macOS 11 has no such keys, and every Mac with Arm has the product
        (0, 0, set()),
    ],
)
def test_macos(dot: int | None, matrix: int | None, want: set[str]):
    answers = {"hw.optional.arm.FEAT_DotProd": dot, "hw.optional.arm.FEAT_I8MM": matrix}
    assert features.from_macos(answers.__getitem__) == want


@pytest.mark.parametrize(("numbers", "want"), [({43, 66}, BOTH), ({43}, DOT), ({19, 44}, set())])
def test_windows(numbers: set[int], want: set[str]):
    assert features.from_windows(numbers.__contains__) == want


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make the product believe in an Arm machine: its platform, and functions of its C library."""

    def become(platform: str, **functions: object) -> None:
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(isa, "host_arch", lambda: "aarch64")
        monkeypatch.setattr(features, "_c_function", functions.get)
        isa.available.cache_clear()

    yield become
    monkeypatch.undo()
    isa.available.cache_clear()


class Getauxval:
    """A C function: ctypes objects take their types as attributes."""

    def __init__(self, **entries: int) -> None:
        self.answer = auxiliary(**entries)

    def __call__(self, entry: int) -> int:
        return self.answer(entry)


def sysctlbyname(**keys: int) -> Callable[..., int]:
    """The C function, of a system with these keys FEAT_...; their values have 4 bytes."""

    def call(name: bytes, value: object, size: object, new: object, new_size: int) -> int:
        found = keys.get(name.decode().removeprefix("hw.optional.arm."))
        if found is None:
            return -1
        ctypes.memmove(value, ctypes.byref(ctypes.c_int32(found)), 4)  # type: ignore[arg-type]
        return 0

    return call


MACHINES = [
    ("linux", {"getauxval": Getauxval(hwcap=ASIMDDP, hwcap2=I8MM)}, "arm_i8mm"),
    ("linux", {"getauxval": Getauxval(hwcap=ASIMDDP)}, "arm_dotprod"),
    ("linux", {"getauxval": Getauxval(hwcap2=I8MM)}, "generic"),  # smmla alone is no set of ours
    ("linux", {"getauxval": Getauxval()}, "generic"),
    ("linux", {}, "generic"),
    ("darwin", {"sysctlbyname": sysctlbyname(FEAT_DotProd=1, FEAT_I8MM=1)}, "arm_i8mm"),
    ("darwin", {"sysctlbyname": sysctlbyname(FEAT_DotProd=1, FEAT_I8MM=0)}, "arm_dotprod"),
    ("darwin", {"sysctlbyname": sysctlbyname()}, "arm_dotprod"),
    ("darwin", {}, "arm_dotprod"),
    ("win32", {}, "generic"),  # no kernel32 here
    ("freebsd14", {}, "generic"),
]


@pytest.mark.parametrize(("platform", "functions", "want"), MACHINES)
def test_the_best_is_chosen(machine, platform: str, functions: dict, want: str):
    machine(platform, **functions)
    assert isa.detect() == want
    order = ("arm_i8mm", "arm_dotprod", "generic")
    assert isa.available() == order[order.index(want) :]


@pytest.mark.parametrize(
    ("name", "bits", "lacks"),
    [
        ("arm_i8mm", 0, "it lacks dotprod, i8mm"),
        ("arm_i8mm", ASIMDDP, "it lacks i8mm"),
        ("arm_dotprod", 0, "it lacks dotprod"),
        ("avx2", ASIMDDP, "it needs x86_64, and this is aarch64"),
    ],
)
def test_what_is_missing_is_named(machine, monkeypatch, name: str, bits: int, lacks: str):
    machine("linux", getauxval=Getauxval(hwcap=bits))
    monkeypatch.setenv("RUNTIME_CPU_ISA", name)
    with pytest.raises(Error, match=rf"^RUNTIME_CPU_ISA={name} cannot run on this .*{lacks};.*"):
        isa.selected()


def test_what_is_there_is_accepted(machine, monkeypatch: pytest.MonkeyPatch):
    machine("linux", getauxval=Getauxval(hwcap=ASIMDDP, hwcap2=I8MM))
    for name in ("arm_i8mm", "arm-dotprod", "generic"):
        monkeypatch.setenv("RUNTIME_CPU_ISA", name)
        assert isa.selected() == name.replace("-", "_")


def test_windows_asks_its_kernel(machine, monkeypatch: pytest.MonkeyPatch):
    class Kernel32:
        IsProcessorFeaturePresent = staticmethod(lambda number: int(number == 43))

    class Windll:
        kernel32 = Kernel32

    machine("win32")
    monkeypatch.setattr(ctypes, "windll", Windll, raising=False)
    assert isa.detect() == "arm_dotprod"


@pytest.mark.parametrize("answer", [{}, {"avx2": False, "fma": True}])
def test_llvm_may_know_nothing(monkeypatch: pytest.MonkeyPatch, answer: dict[str, bool]):
    """On a processor it cannot read, llvmlite gives an empty map and raises nothing."""
    import llvmlite.binding as llvm

    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: answer)
    monkeypatch.setattr(isa, "host_arch", lambda: "x86_64")
    for cached in (features._from_llvm, isa.available):
        cached.cache_clear()
    try:
        assert isa.available() == ("generic",)
    finally:
        monkeypatch.undo()
        for cached in (features._from_llvm, isa.available):
            cached.cache_clear()


@pytest.mark.parametrize(("build", "arch"), [("win-amd64", "x86_64"), ("win-arm64", "aarch64")])
def test_windows_python_of_another_architecture(monkeypatch, build: str, arch: str):
    """An x86 Python that Windows emulates on Arm runs x86 kernels, whatever the machine is."""
    monkeypatch.delattr(os, "uname", raising=False)  # Windows has none
    monkeypatch.setattr(sysconfig, "get_platform", lambda: build)
    assert isa.host_arch() == arch
