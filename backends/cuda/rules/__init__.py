"""From ops to launches of CUDA kernels: one rule per op, in files that mirror `ops/`."""

from runtime.backends.cuda.rules import (  # noqa: F401  they register
    attention,
    collective,
    delta,
    elementwise,
    experts,
    matmul,
    moe,
    norm,
    rope,
    rotation,
    rows,
)
from runtime.backends.cuda.rules.registry import RULES

__all__ = ["RULES"]
