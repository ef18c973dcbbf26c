"""Reuse: what of a prompt did not have to be evaluated, and why not more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from runtime.units import counted_as

Texts = Callable[[Sequence[int]], str]


class Reuse(NamedTuple):
    """What a prompt of `prompt_tokens` did not have to evaluate.

    cached_tokens: how many of its first tokens. source: "cache", "disk" (where some were read
    from), "session" (its own), or "". blocks: pages of the cache that it shares. snapshot: where
    the recurrent state lay that it goes on from, 0 without one, None for models without recurrent
    layers. known: how many of its first tokens the cache has keys and values of. cached_next,
    prompt_next: the tokens that follow there, of the cached sequence that was nearest and of the
    prompt. evicted: whether more of the prompt had been cached and had to make room. off: there is
    no cache.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    source: str = ""
    blocks: int = 0
    snapshot: int | None = None
    known: int = 0
    cached_next: tuple[int, ...] = ()
    prompt_next: tuple[int, ...] = ()
    evicted: bool = False
    off: bool = False

    @property
    def differs(self) -> int | None:
        """The place of the first token in which the prompt and what is cached nearest to it
        differ; None where one of them ends before."""
        return self.known if self.cached_next and self.prompt_next else None

    @property
    def reason(self) -> str:
        """Why no more was reused: "" (nothing was left), "state", "evicted", "differs", "new" or
        "off".

        "state": the cache knows more of the prompt, and no recurrent state was kept behind it.
        "new": nobody has gone on from there yet.
        """
        if self.cached_tokens >= self.prompt_tokens - 1:
            return ""
        if self.off:
            return "off"
        if self.snapshot is not None and self.cached_tokens < min(
            self.known, self.prompt_tokens - 1
        ):
            return "state"
        if self.evicted:
            return "evicted"
        return "new" if self.differs is None else "differs"

    def explain(self, text: Texts) -> str:
        """Lines for a person; text: of tokens."""
        total = counted_as(self.prompt_tokens, "token")
        found = f"{self.cached_tokens} of {total} were not read again"
        if self.source in ("cache", "disk"):
            found += f": {counted_as(self.blocks, 'block')} of the cache"
            found += ", read from disk" if self.source == "disk" else ""
        elif self.source == "session":
            found += ": the session had them"
        lines = [found]
        if self.snapshot:
            lines.append(f"the recurrent state after token {self.snapshot} was kept")
        lines += self._why()
        if self.differs is not None:
            lines.append(f"first difference: token {self.differs + 1}")
            lines.append(f"  cached: {text(self.cached_next)!r}")
            lines.append(f"  prompt: {text(self.prompt_next)!r}")
        return "\n".join(lines)

    def _why(self) -> list[str]:
        match self.reason:
            case "off":
                return ["the model was loaded without a cache of prompts"]
            case "state":
                return [
                    f"{self.known} tokens are known; behind {self.cached_tokens} no recurrent "
                    "state was kept that reading could go on from"
                ]
            case "evicted":
                return [f"what followed token {self.known} had been cached and made room"]
            case "new":
                return [f"nothing was cached that goes on behind token {self.known}"]
        return []
