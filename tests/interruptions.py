"""KeyboardInterrupt at a chosen line of chosen files, where a real one can come."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable
from functools import cache
from types import CodeType, FrameType
from typing import Any


def lines_of(action: Callable[[], Any], files: Iterable[str]) -> int:
    """How many lines of these files `action` runs, up to its end or its error."""
    return _run(action, files, -1)[0]


def interrupted(action: Callable[[], Any], files: Iterable[str], line: int) -> str:
    """Run `action` with an interrupt before its n-th line; where that was, "" when it ended."""
    return _run(action, files, line)[1]


def _run(action: Callable[[], Any], files: Iterable[str], line: int) -> tuple[int, str]:
    names, seen, place = frozenset(files), 0, ""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen, place
        if frame.f_code.co_filename not in names:
            return None
        if event == "line" and frame.f_lasti not in _uninterrupted(frame.f_code):
            if seen == line:
                place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                seen += 1
                raise KeyboardInterrupt
            seen += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        if not place:
            raise
    finally:
        sys.settrace(before)
    return seen, place


@cache
def _uninterrupted(code: CodeType) -> frozenset[int]:
    """Where the end of a `with` block begins, or its handler.

    Python looks for signals after calls and where it jumps back, not between the last call of a
    block and that of `__exit__`. A trace function can raise there, and a lock would stay held.
    """
    found, steps = set(), list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        names = [s.opname for s in steps[i : i + 6] if s.opname not in ("SWAP", "NOP", "PRECALL")]
        nones = sum(s.opname == "LOAD_CONST" and s.argval is None for s in steps[i : i + 5])
        ends = names[:4] == ["LOAD_CONST"] * 3 + ["CALL"] and nones >= 3
        if ends or names[:2] == ["PUSH_EXC_INFO", "WITH_EXCEPT_START"]:
            found.add(step.offset)
    return frozenset(found)
