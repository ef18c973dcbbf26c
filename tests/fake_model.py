"""A model that answers what it is told, for tests of the commands."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import runtime
from runtime.cli import main
from runtime.errors import MemoryLimitError
from runtime.gguf.reader import open_gguf
from runtime.quality.perplexity import Perplexity
from runtime.text.sampling import Token

DEMO = Path(runtime.__file__).parent / "data" / "demo.gguf"
needs_demo = pytest.mark.skipif(not DEMO.exists(), reason=f"no bundled model at {DEMO}")


class FakeTokenizer:
    def encode(self, text, add_special=True, parse_special=True):
        return [ord(c) % 50 for c in text]


class FakeSession:
    """Remembers what was evaluated; every evaluation takes a moment."""

    def __init__(self, model):
        self.model, self.tokens, self._log = model, [], model.evals

    def __len__(self):
        return len(self.tokens)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def eval(self, ids, logits="all"):
        self.tokens += ids
        self._log.append(len(ids))
        time.sleep(0.001)

    def close(self):
        self._log.append("closed")


class FakeAnswer:
    """What `generate` and `chat` give: pieces, then a reason."""

    reason = speculation = None
    cached_tokens = 0

    def __init__(self, model, prompt_tokens, on_token):
        self.prompt_tokens, self._pieces = prompt_tokens, self._run(model, on_token)

    def _run(self, model, on_token):
        for i, piece in enumerate(model.pieces):
            if on_token:
                on_token(Token(i))
            yield piece
        if model.raises:
            raise model.raises
        self.reason = model.reason

    def __iter__(self):
        return self._pieces


class FakeModel:
    """What the commands need of a model; answers are given."""

    name = "cpu"  # of the backend, which it is as well
    vocab_size, kv_types, context = 50, ("f16", "f16"), 512
    tokenizer = FakeTokenizer()

    def __init__(
        self, pieces=("one", " two"), raises=None, threads=3, reason="end", refuses=None,
        template=True,
    ):  # fmt: skip
        """`raises` comes after the pieces, `refuses` when an answer is asked for; `template`:
        whether the file has one for chats."""
        self.pieces, self.raises, self.threads = pieces, raises, threads
        self.reason, self.refuses = reason, refuses
        self.calls, self.evals, self.warmed, self.closed = [], [], False, False
        self.backend = self
        self.file = open_gguf(DEMO)
        if not template:
            held = dict(self.file.metadata)
            del held["tokenizer.chat_template"]
            self.file = SimpleNamespace(metadata=held, get=held.get, path=DEMO, tensors={})

    def generate(self, prompt, *, on_token=None, on_prompt=None, session=None, **options):
        self.calls.append((prompt, options))
        if self.refuses:
            raise self.refuses
        return FakeAnswer(self, len(prompt), on_token)

    def chat(self, messages, *, room=0, **options):
        if sum(len(m["content"]) for m in messages) + room > self.context:
            raise MemoryLimitError("the messages do not fit")
        return self.generate([dict(m) for m in messages], **options)

    def perplexity(self, text, **options):
        return Perplexity(8.0, 0.5, 4, 512, 1020)

    def warmup(self, progress):
        self.warmed = True

    def session(self):
        return FakeSession(self)

    def close(self):
        self.closed = True


class CommandLine:
    """Calls the command line with a fake model; the result also has `.loaded`."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch

    def __call__(self, *args, model=None, stdin="", loading=None):
        loaded = []

        def load(path=None, **options):
            loaded.append((path, options))
            if loading:
                raise loading
            return model or FakeModel()

        self._monkeypatch.setattr(runtime, "load", load, raising=False)
        for name in ("measured", "remembered"):
            self._monkeypatch.setattr(f"runtime.cli.bandwidth.{name}", lambda *_: 2e9)
        result = CliRunner().invoke(main, [str(a) for a in args], input=stdin)
        result.loaded = loaded
        return result
