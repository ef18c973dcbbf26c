"""The compute capabilities kernels are compiled for, and which of them a device runs."""

from __future__ import annotations

from runtime.ops.errors import BackendError

# target -> compute capability; "a" targets run on exactly that one and have its own instructions
TARGETS: dict[str, tuple[int, int]] = {
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_89": (8, 9),
    "sm_90a": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
}


def capability(target: str) -> tuple[int, int]:
    """(major, minor) of a target. BackendError for one that is not in TARGETS."""
    if target not in TARGETS:
        raise BackendError(f"no CUDA target {target!r}: there are {', '.join(TARGETS)}")
    return TARGETS[target]


def target_of(major: int, minor: int) -> str:
    """The best target whose code a device of this capability runs.

    Code runs on its own capability and later minor ones of the same major. BackendError: none.
    """
    fitting = [
        (of, name)
        for name, of in TARGETS.items()
        if of[0] == major and (of[1] == minor if name.endswith("a") else of[1] <= minor)
    ]
    if not fitting:
        known = ", ".join(f"{a}.{b}" for a, b in TARGETS.values())
        raise BackendError(
            f"the GPU has compute capability {major}.{minor}, and kernels exist for {known} "
            "and what runs their code: use devices='cpu'"
        )
    return max(fitting)[1]
