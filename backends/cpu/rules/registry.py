"""Where the rules of the CPU are registered."""

from __future__ import annotations

from runtime.backends.passes import prepare  # noqa: F401  declares the ops of the passes
from runtime.backends.plan.lowering import Rules

RULES = Rules("cpu", "backends/cpu/rules")
lowers = RULES.lowers
