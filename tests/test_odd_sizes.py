"""Every kernel that works on rows, at every length from 1 to 64, with guards on both sides."""

from __future__ import annotations

import pytest
from kernel_calls import ISAS, fenced_twice
from odd_rows import CASES

from runtime.backends.cpu.compile.isa import available
from runtime.backends.cpu.kernels import KERNELS

LENGTHS = range(1, 65)
# What models run most, and one of each way to end a row; the sweep takes all on all processors.
DEFAULT = (
    "add", "swiglu", "softmax", "rms_norm", "gather_rows", "copy-apart", "rope-neox", "rope-normal",
    "hadamard", "conv_post-4", "short_conv-3", "gated_delta", "expert_sum", "router-softmax",
    "pack-1", "pack-8", "rms_norm_pack-4", "swiglu_pack-4", "pack_rows-4",
    "all_sum-more", "all_sum_once", "put_stretch",
)  # fmt: skip
WITHOUT_FMA = ("softmax", "rope-neox", "hadamard", "gated_delta", "pack-8")
# Whole blocks alone (quantised rows, heads of whole units), pages, no rows at all, several teams.
ELSEWHERE = {
    "executor", "lead_teams", "meet",
    "rope_angles", "kv_write", "qkv_post", "attention", "expert_group",
    "take", "renumber", "sigmoid_gate_pack", "gated_norm_pack", "magnitude",
}  # fmt: skip


def check(name: str, isa: str) -> None:
    for n in LENGTHS:
        case = CASES[name](n, isa)
        case.check(fenced_twice(case.call))


def test_every_kernel_has_a_case() -> None:
    covered = {kernel for kernel in KERNELS.names() if any(c.startswith(kernel) for c in CASES)}
    quantisers = {kernel for kernel in KERNELS.names() if kernel.startswith("quantise_")}
    assert covered | ELSEWHERE | quantisers == set(KERNELS.names())


@pytest.mark.parametrize("name", DEFAULT)
def test_rows_of_any_length(name: str) -> None:
    check(name, ISAS[0])


@pytest.mark.parametrize("name", WITHOUT_FMA)
def test_rows_of_any_length_without_wide_registers(name: str) -> None:
    check(name, "generic")


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isa", available())
def test_every_row_kernel_on_every_processor(isa: str, name: str) -> None:
    check(name, isa)
