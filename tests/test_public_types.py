"""What a type checker and an editor see of the public interface."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import runtime
from runtime.generation import Generation

ROOT = Path(__file__).resolve().parents[1]
# As README has it, and what users write: each line has to pass.
GOOD = """\
from collections.abc import Iterator

import runtime
from runtime import Generation, Sampling, Session, Snapshot, Token

model: runtime.Model = runtime.load("model.gguf", kv_type="q8_0", context=8192, threads=8)
for piece in model.generate("Once", max_tokens=64, temperature=0, stop=["\\\\n"], samplers="top_k"):
    text: str = piece
answer = model.chat([{"role": "user", "content": "Hi"}], temperature=0, tools=[len], seed=3)
reason: str | None = answer.reason
whole: str = answer.text
ids: list[int] = answer.tokens + model.tokenizer.encode("more")
best: list[Token] = answer.logprobs
pieces: Iterator[str] = model.chat("Hi", template_options={"enable_thinking": False})
with model.generate([1, 2], logit_bias={5: 1.0}, dry_multiplier=0.8) as made:
    kept: Generation = made
session: Session = model.session()
before: Snapshot = session.snapshot()
defaults: dict[str, object] = model.sampling_defaults
options: Sampling = Sampling(temperature=0.5)
errors: tuple[type[Exception], ...] = (runtime.Error, runtime.OptionError, runtime.FileError)
"""
BAD = {
    "model.generate('a', temprature=1)": "temprature",
    "model.generate('a', top_k='many')": "top_k",
    "model.chat(5)": "chat",
    "model.generate('a').reasons": "reasons",
    "model.tokenizer.encode(5)": "encode",
}


@pytest.mark.parametrize("method", ["generate", "chat"])
def test_each_field_of_sampling_is_a_typed_keyword(method: str):
    signature = inspect.signature(getattr(runtime.Model, method))
    assert signature.return_annotation in ("Generation", Generation)
    keywords = {n: p for n, p in signature.parameters.items() if p.kind == p.KEYWORD_ONLY}
    assert {field.name for field in fields(runtime.Sampling)} <= set(keywords)
    assert all(p.annotation is not p.empty for p in keywords.values())
    assert not any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())


def test_both_take_the_same_keywords():
    kinds = {
        method: {
            name: (parameter.annotation, parameter.default)
            for name, parameter in inspect.signature(
                getattr(runtime.Model, method)
            ).parameters.items()
            if parameter.kind == parameter.KEYWORD_ONLY
        }
        for method in ("generate", "chat")
    }
    alone = {"room", "tools", "tool_choice", "template", "template_options"}
    assert {n: k for n, k in kinds["chat"].items() if n not in alone} == kinds["generate"]


def test_every_name_is_there_and_explained():
    assert set(runtime.__all__) <= set(dir(runtime))
    for name in set(runtime.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(runtime, name)), name
    errors = [e for e in vars(runtime.errors).values() if inspect.isclass(e)]
    assert all(getattr(runtime, e.__name__) is e for e in errors)


@pytest.mark.sweep
def test_mypy_reads_it_as_it_is_meant(tmp_path: Path):
    pytest.importorskip("mypy")
    package = tmp_path / "runtime"
    package.mkdir()
    for part in (ROOT / "runtime").iterdir():
        (package / part.name).symlink_to(part)
    for folder in ("ops", "backends"):
        if not (package / folder).exists():
            (package / folder).symlink_to(ROOT / folder)
    (tmp_path / "good.py").write_text(GOOD)
    lines = ["import runtime", "model = runtime.load()", *BAD]
    (tmp_path / "bad.py").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "good.py", "bad.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    told = done.stdout.splitlines()
    assert not [line for line in told if line.startswith("good.py")], done.stdout
    for number, (line, says) in enumerate(BAD.items(), 3):
        assert any(t.startswith(f"bad.py:{number}:") and says in t for t in told), (line, told)
