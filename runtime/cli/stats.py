"""How long an answer took: counted while it is generated."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.speculation.speculation import Drafts


class Stopwatch:
    """Counts tokens and seconds of one answer. Pass `on_token` to the model."""

    def __init__(self, prompt_tokens: int = 0) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.tokens = 0
        self.speculation: Drafts | None = None
        self._start = self._first = self._last = time.perf_counter()

    def on_token(self, token: Any) -> None:
        """Called when a token is chosen."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last
        self.tokens += 1

    def summary(self) -> str:
        """One line: tokens and speed of prompt and answer.

        The first token comes out of the prompt's last step, so the answer's speed counts from
        there.
        """
        prompt, answer = self._first - self._start, self._last - self._first
        parts, read = list[str](), self.prompt_tokens - self.cached_tokens
        if self.tokens:
            kept = f", {self.cached_tokens} of them not read again" if self.cached_tokens else ""
            parts.append(_part("prompt", self.prompt_tokens, read, prompt, kept))
        parts.append(_part("answer", self.tokens, self.tokens - 1, answer))
        drafts = self.speculation
        if drafts is not None and drafts.drafted:
            parts.append(f"{drafts.accepted} of {drafts.drafted} drafts accepted")
        return " · ".join(parts)


def _part(name: str, shown: int, timed: int, seconds: float, more: str = "") -> str:
    text = f"{name} {shown} token{'' if shown == 1 else 's'}{more}"
    return f"{text}, {timed / seconds:.1f} t/s" if timed > 0 and seconds > 0 else text
