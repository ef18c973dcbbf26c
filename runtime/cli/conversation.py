"""A conversation through the model's chat template: its messages, its memory, its commands."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from runtime.cli.answer import Screen
from runtime.cli.output import note
from runtime.cli.session_file import SessionFile

_HELP = {
    "/clear": "forget the conversation",
    "/regen": "answer the last message again",
    "/system TEXT": "instructions for all that follows; without TEXT shows them",
    "/save FILE": "keep the conversation in FILE, as JSON",
    "/load FILE": "go on with a conversation that was kept",
    "/help, /?": "this list",
    "/bye, /exit": "leave (or Ctrl-D, or Ctrl-C twice); Ctrl-C stops an answer",
    '"""': "begins and ends a message of several lines; a \\ at a line's end goes on too",
}
# Commands of other programs, and what there is instead.
_ELSEWHERE = {
    "/set": "options are given at the start (runtime run -h); /system sets instructions",
    "/show": "'runtime inspect FILE' shows the model, /system the instructions",
    "/read": "paste the text, or begin with: runtime run FILE -cnv -f TEXTFILE",
}
_LEAVE = ("/bye", "/exit", "/quit")


class Conversation:
    """Messages so far and the session that remembers them."""

    def __init__(
        self, model: Any, system: str | None, arguments: dict[str, Any], screen: Screen,
        interactive: bool, file: SessionFile | None = None,
    ) -> None:  # fmt: skip
        """`interactive`: errors are told and the conversation goes on; else they are raised.

        file: what the conversation goes on from, and is kept in when its `with` block ends.
        """
        self._model, self._arguments, self._screen = model, arguments, screen
        self._interactive = interactive
        self._system = [{"role": "system", "content": system}] if system else []
        self._session: Any = None
        self.messages: list[dict[str, str]] = []
        self.clear()
        self._file, self._kept = file, self.messages
        if file is not None:
            self._go_on(file)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self.messages != self._kept:
            self._file.save(self._session, self.messages)

    def _go_on(self, file: SessionFile) -> None:
        """Its session and messages; instructions that are given now take the place of its own."""
        self._session.close()
        self._session, self._kept = file.session, file.messages
        said = file.messages
        if said[:1] and said[0]["role"] == "system":
            self._system, said = self._system or said[:1], said[1:]
        self.messages = [*self._system, *said]

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._system)
        if self._session is not None:
            self._session.close()
        self._session = self._model.session()

    def handle(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        text = line.strip()
        word, _, rest = text.partition(" ")
        if word in _LEAVE:
            return False
        if word.startswith("/") and (word[1:].isalpha() or word == "/?") and "\n" not in text:
            self._command(word, rest.strip())
        elif text:
            self.answer(text)
        return True

    def answer(self, text: str) -> None:
        """Print the answer to a message. A message without an answer is taken back."""
        self._try([*self.messages, {"role": "user", "content": text}])

    def _command(self, word: str, rest: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/clear": self._forget, "/regen": self._again, "/system": self._instruct,
            "/save": self._save, "/load": self._load, "/help": _help, "/?": _help,
        }  # fmt: skip
        if word in commands:
            commands[word](rest)
            return
        if word in _ELSEWHERE:
            note(f"no command {word}: {_ELSEWHERE[word]}")
            return
        near = difflib.get_close_matches(word, [*commands, *_LEAVE], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        note(f"no command {word}: {hint}/help lists them")

    def _forget(self, rest: str) -> None:
        self.clear()
        note("the conversation is forgotten", self._screen.quiet)

    def _again(self, rest: str) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            note("there is no answer yet")
            return
        self._try(self.messages[:-1])

    def _instruct(self, rest: str) -> None:
        if not rest:
            note(self._system[0]["content"] if self._system else "no instructions are given")
            return
        said = self.messages[len(self._system) :]
        self._system = [{"role": "system", "content": rest}]
        self.messages = [*self._system, *said]
        note("these instructions hold from now on", self._screen.quiet)

    def _save(self, rest: str) -> None:
        if not rest:
            note("give a file: /save FILE")
            return
        text = json.dumps(self.messages, ensure_ascii=False, indent=1)
        try:
            _path(rest).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            note(f"cannot write {rest}: {error.strerror or error}")
            return
        note(f"{_counted(len(self.messages))} kept in {rest}")

    def _load(self, rest: str) -> None:
        if not rest:
            note("give a file: /load FILE")
            return
        try:
            found = _messages(json.loads(_path(rest).read_text(encoding="utf-8")))
        except OSError as error:
            note(f"cannot read {rest}: {error.strerror or error}")
        except (ValueError, RecursionError):
            note(f"{rest} holds no messages: a JSON list of objects with role and content")
        else:
            self._system = found[:1] if found[:1] and found[0]["role"] == "system" else []
            self.messages = found
            note(f"{_counted(len(found))} read from {rest}")

    def _try(self, messages: list[dict[str, str]]) -> None:
        """Answer `messages` and keep both, also an answer that Ctrl-C cut short.

        After an error, or without a word of an answer, the messages are what they were.
        """
        from runtime.errors import Error

        pieces: list[str] = []
        kept, self.messages, whole = self.messages, messages, False
        try:
            whole = self._generate(pieces)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        except Error as error:
            pieces.clear()
            if not self._interactive:
                raise
            note(f"error: {error}")
        finally:
            if pieces or whole:
                self.messages = [
                    *self.messages, {"role": "assistant", "content": "".join(pieces)}
                ]  # fmt: skip
            else:
                self.messages = kept

    def _generate(self, pieces: list[str]) -> bool:
        """Print an answer and put it into `pieces`; whether it came to its end."""
        answer = self._begin()
        whole = self._screen.show(answer, pieces)
        self._screen.told(answer, self._model)
        if not whole and not self._interactive:
            raise click.exceptions.Exit(130)
        note("stopped: the message is taken back", whole or bool(pieces) or self._screen.quiet)
        return whole

    def _begin(self) -> Any:
        """The answer to the messages, the oldest turns forgotten until there is room for it."""
        from runtime.errors import MemoryLimitError

        most, context = self._arguments.get("max_tokens", -1), self._model.context
        room = context // 4 if most < 0 else min(most, context // 4)
        forgotten = 0
        while True:
            try:
                answer = self._model.chat(
                    self.messages, session=self._session, room=room, **self._arguments,
                    **self._screen.begin(),
                )  # fmt: skip
                break
            except MemoryLimitError:
                dropped = self._forget_oldest()
                forgotten += dropped
                if not dropped and not room:
                    raise
                room = room if dropped else 0
        if forgotten:
            plural = "s are" if forgotten > 1 else " is"
            note(f"the context is full: the oldest {forgotten} message{plural} forgotten")
        return answer

    def _forget_oldest(self) -> int:
        """Drop the oldest message and its answer; how many messages went. The last one stays."""
        start = len(self._system)
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user" and i > start]
        if not users:
            return 0
        self.messages = [*self.messages[:start], *self.messages[users[0] :]]
        return users[0] - start


def _help(rest: str) -> None:
    wide = max(map(len, _HELP))
    note("\n".join(f"{name.ljust(wide)}  {text}" for name, text in _HELP.items()))


def _path(text: str) -> Path:
    """A file, "~" standing for the home folder where there is one."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path.expanduser may raise)


def _counted(n: int) -> str:
    return f"{n} message{'s' * (n != 1)}"


def _messages(found: Any) -> list[dict[str, str]]:
    """The messages of a kept conversation; ValueError when it is none."""
    found = found.get("messages") if isinstance(found, dict) else found
    whole = isinstance(found, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in found
    )
    if not whole:
        raise ValueError("no messages")
    return found
