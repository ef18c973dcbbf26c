"""How much of a prompt a step takes where others wait for their next token."""

from __future__ import annotations

from runtime.ops import PAGE

_STEP = 0.1  # seconds that a step should not exceed where answers are under way
_FIRST = 4 * PAGE  # tokens of a prompt, before anything is known
_NEWER = 0.3  # weight of what was measured last


class Pace:
    """What steps take: those of single tokens, and each token of a prompt beside them."""

    def __init__(self) -> None:
        self.single = self.token = 0.0  # seconds; 0: not known yet

    def share(self, most: int) -> int:
        """Tokens of prompts for a step with answers under way: whole pages, `most` at most."""
        if not self.token:
            return min(most, _FIRST)
        left = max(0.0, _STEP - self.single)
        return max(min(most, PAGE), min(most, int(left / self.token) // PAGE * PAGE))

    def learn(self, singles: int, prompt: int, seconds: float) -> None:
        """A step of so many single tokens and so many of prompts has taken so long."""
        if not prompt:
            self.single = _mixed(self.single, seconds)
        elif self.single or not singles:
            rest = max(seconds - self.single * bool(singles), 0.1 * seconds)
            self.token = _mixed(self.token, rest / prompt)


def _mixed(before: float, now: float) -> float:
    return now if not before else before + _NEWER * (now - before)
