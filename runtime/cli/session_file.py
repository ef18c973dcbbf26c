"""The file of `--session`: what is said in a process goes on in the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.cli.output import note
from runtime.cli.parsing import Refused


class SessionFile:
    """A session that is loaded from a file, where that is there, and saved to it at the end.

    `session`: the loaded one, or a new one. `messages`: of the conversation that it is of, none of
    a new one.
    """

    def __init__(self, model: Any, path: str, conversation: bool, quiet: bool) -> None:
        """conversation: whether it is to be one, or a text. Refused: the file has the other."""
        self._path, self._conversation, self._quiet = path, conversation, quiet
        self.messages: list[dict[str, str]] = []
        if not Path(path).exists():
            self.session = model.session()
            return
        from runtime.session import load_session

        self.session, beside = load_session(model, path)
        kept = beside.get("messages")
        if conversation and kept is None:
            raise Refused(f"{path} holds a text, and no conversation: go on with --raw")
        if kept is not None and not conversation:
            raise Refused(f"{path} holds a conversation, and no text: leave --raw out")
        self.messages = kept or []
        what = f"{len(self.messages)} messages, " if conversation else ""
        note(f"going on from {path}: {what}{len(self.session)} tokens", quiet)

    def save(self, session: Any, messages: list[dict[str, str]] | None = None) -> None:
        """Keep a session, and the messages of a conversation."""
        from runtime.session import save_session

        save_session(session, self._path, {} if messages is None else {"messages": messages})
        note(f"kept in {self._path} for --session: {len(session)} tokens", self._quiet)


def settle(session: Any, tokens: list[int], answer: Any) -> None:
    """Have a session hold a text and its continuation, to the last token that is part of it."""
    whole = [*tokens, *(answer.tokens[:-1] if answer.reason == "end" else answer.tokens)]
    left = whole[len(session) : session.model.context]
    if left and session.tokens == whole[: len(session)]:
        session.eval(left, "none")
