"""Where the rules of CUDA devices are registered."""

from __future__ import annotations

from runtime.backends.passes import prepare  # noqa: F401  declares the ops of the passes
from runtime.backends.plan.lowering import Rules

RULES = Rules("cuda", "backends/cuda/rules")
lowers = RULES.lowers
