"""From ops to kernels of the CPU: one rule per op, in files that mirror `ops/`."""

from runtime.backends.cpu.rules import (  # noqa: F401  they register
    attention,
    collective,
    delta,
    elementwise,
    matmul,
    moe,
    norm,
    rope,
    rotation,
    rows,
)
from runtime.backends.cpu.rules.registry import RULES
from runtime.backends.passes.packing import PACKED_OPS
from runtime.ops.registry import OPS

__all__ = ["RULES"]

RULES.check(OPS, PACKED_OPS)
