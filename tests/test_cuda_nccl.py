"""NCCL's interface, on a library that only notes its calls."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from runtime.backends.cuda.nccl import Nccl, check_version
from runtime.ops.errors import BackendError


class FakeNccl:
    """A library of some version; `fails`: a function that returns an error."""

    def __init__(self, version: int, fails: str = "") -> None:
        self.version, self.fails, self.calls = version, fails, list[tuple[Any, ...]]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            if name == "ncclGetVersion":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = self.version
            return 3 if name == self.fails else 0

        return call


@pytest.mark.parametrize(
    ("version", "want"), [(22705, (2, 27, 5)), (23204, (2, 32, 4)), (30000, (3, 0, 0))]
)
def test_versions_that_are_taken(version: int, want: tuple[int, ...]):
    assert check_version(FakeNccl(version)) == want


@pytest.mark.parametrize(
    ("version", "said"), [(22704, "2.27.4"), (22603, "2.26.3"), (2708, "2.7.8"), (21903, "2.19.3")]
)
def test_versions_that_write_out_of_bounds_are_refused(version: int, said: str):
    with pytest.raises(BackendError, match=rf"NCCL {said} writes out of bounds: install 2\.27\.5"):
        Nccl([0, 1], FakeNccl(version))


def test_a_gpu_is_taken_once():
    with pytest.raises(BackendError, match="NCCL takes a GPU once"):
        Nccl([0, 1, 0], FakeNccl(23204))


def test_sums_are_one_group_of_calls():
    library = FakeNccl(23204)
    nccl = Nccl([0, 2], library)
    nccl.sum([256, 512], [1024, 2048], 96, [7, 9])
    nccl.close()
    names = [name for name, *_ in library.calls]
    assert names == [
        "ncclGetVersion", "ncclCommInitAll", "ncclGroupStart", "ncclAllReduce", "ncclAllReduce",
        "ncclGroupEnd", "ncclCommDestroy", "ncclCommDestroy",
    ]  # fmt: skip
    _, source, target, count, kind, operation, _, stream = library.calls[4]
    assert (source.value, target.value, count.value, stream.value) == (512, 2048, 96, 9)
    assert (kind, operation) == (7, 0)


def test_what_fails_is_named():
    with pytest.raises(BackendError, match="ncclCommInitAll failed with code 3"):
        Nccl([0, 1], FakeNccl(23204, "ncclCommInitAll"))
