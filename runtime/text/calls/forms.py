"""How a chat template has calls of tools written, found in its own text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from runtime.text.calls import harmony, tagged
from runtime.text.calls.reader import Reader

_ARGUMENTS = re.compile(r'"arguments\\?":')
_BARE = re.compile(r'\{\\?"name\\?": .{0,200}\\?"parameters\\?": ', re.DOTALL)


class Form(NamedTuple):
    """kind: "json" (<tool_call> around {"name": ..., "arguments": ...}), "xml" (<tool_call> around
    <function=NAME><parameter=KEY>), "bare" ({"name": ..., "parameters": ...} alone), "harmony"
    (channels), or "" where it is none of them. thinks: reasoning stands in <think>.
    """

    kind: str = ""
    thinks: bool = False

    def opened(self, prompt: str) -> bool:
        """Whether a prompt ends inside of reasoning."""
        return self.thinks and prompt.rstrip().endswith(tagged.THINK)

    def reader(
        self, prompt: str = "", tools: Mapping[str, Mapping[str, Any]] | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> Reader:  # fmt: skip
        """For the answer to `prompt`; tools: name -> JSON schema of the parameters."""
        if self.kind == "harmony":
            return harmony.HarmonyReader(tools, new_id)
        return tagged.TaggedReader(self.kind, self.thinks, self.opened(prompt), tools, new_id)

    @property
    def marks(self) -> tuple[str, ...]:
        """What has to be seen in an answer, even where it is a control token."""
        own = {"json": (tagged.CALL, tagged.CALLED), "bare": (tagged.PYTHON,)}
        own["xml"] = own["json"]
        thinking = (tagged.THINK, tagged.THOUGHT) if self.thinks else ()
        return (*own.get(self.kind, ()), *thinking)


def form_of(template: str) -> Form:
    """The form that the text of a chat template speaks."""
    thinks = tagged.THINK in template
    if harmony.CHANNEL in template and harmony.MESSAGE in template:
        return Form("harmony")
    if tagged.CALL in template and tagged.FUNCTION in template:
        return Form("xml", thinks)
    if tagged.CALL in template and _ARGUMENTS.search(template):
        return Form("json", thinks)
    if tagged.PYTHON in template or _BARE.search(template):
        return Form("bare", thinks)
    return Form("", thinks)
