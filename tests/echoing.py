"""The command line with a model that repeats each message, a word at a time.

A message "slow ..." is answered slowly, one that begins with "long" takes long to be read, and
"say ..." is answered with what follows.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fake_model import FakeAnswer, FakeModel

import runtime
from runtime.cli import main


class EchoModel(FakeModel):
    def chat(self, messages, *, room=0, on_token=None, on_prompt=None, **options):
        text = messages[-1]["content"]
        self.pieces = _pieces(text, len(messages))
        answer = FakeAnswer(self, len(messages), on_token)
        if text.startswith("long"):
            answer._pieces = _read(answer._pieces, on_prompt)
        if text.startswith("slow"):
            answer._pieces = _slowly(answer._pieces)
        return answer


def _pieces(text, n):
    words = text.removeprefix("say ") if text.startswith("say ") else f"{n}: {text!r} ok"
    return re.findall(r"\s*\S{1,5}", words)


def _read(pieces, on_prompt):
    for done in range(30):
        on_prompt(done, 30)
        time.sleep(0.05)
    yield from pieces


def _slowly(pieces):
    for piece in pieces:
        yield piece
        time.sleep(0.3)


if __name__ == "__main__":
    model = EchoModel()
    runtime.load = lambda *_, **__: model
    main(prog_name="runtime")
