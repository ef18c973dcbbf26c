"""The README: its Python runs, its commands and variables exist."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from fake_model import DEMO, needs_demo
from small_models import Sizes, write_model

import runtime
from runtime.backends import environment
from runtime.cli import COMMANDS, main
from runtime.models import registry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESEARCH = (ROOT / "ops" / "README.md").read_text()


@needs_demo
def test_its_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    load = runtime.load

    def small(path: str, **options: object):
        assert path.endswith(".gguf")
        return load(DEMO, **{**options, "devices": "null", "context": 128})

    monkeypatch.setattr(runtime, "load", small, raising=False)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    assert names["logits"].shape == (3, names["model"].vocab_size)
    assert names["answer"].reason and "get_rows" in capsys.readouterr().out
    names["model"].close()


def test_what_else_is_called_from_python_can_be():
    calls = re.findall(r"^- `((?:runtime|model)\.(\w+)\(.*?\))`", README, re.MULTILINE)
    assert {name for _, name in calls} == {"convert", "quantize", "perplexity"}
    for call, name in calls:
        bind = inspect.signature(getattr(runtime, name, None) or runtime.Model.perplexity).bind
        given = bind if hasattr(runtime, name) else partial(bind, None)
        eval(call, {"runtime": SimpleNamespace(**{name: given}), "text": "",
                    "model": SimpleNamespace(**{name: given})})  # fmt: skip


def test_its_commands_and_variables_exist():
    named = set(re.findall(r"^\| `runtime (\w+)", README, re.MULTILINE))
    assert named == set(COMMANDS)
    variables = set(re.findall(r"^\| `([A-Z_]+)[`=]", README, re.MULTILINE))
    assert all(f"`{name}`" in str(environment.__doc__) for name in variables) and variables


def test_options_in_its_commands_exist():
    lines = re.findall(r"^(?:\$ )?runtime (\w+) (.*)$", README, re.MULTILINE)
    used = [(name, rest.split("  #")[0]) for name, rest in lines if name in COMMANDS]
    assert {"quantize", "imatrix", "perplexity", "compare", "plan"} <= {name for name, _ in used}
    for name, rest in used:
        command = main.get_command(click.Context(main), name)
        known = {option for param in command.params for option in param.opts}
        assert set(re.findall(r"(?<!\S)--?[a-z][-\w]*", rest)) <= known, (name, rest)


def test_the_model_of_fifteen_lines_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    (code,) = re.findall(r"<!-- model -->\n```python\n(.*?)```", RESEARCH, re.DOTALL)
    exec(code, {})
    size = Sizes("parallel")
    second = tuple(f"blk.{i}.post_attention_norm.weight" for i in range(size.layers))
    path = write_model(tmp_path / "parallel.gguf", size, without=second)
    ids = [3, 1, 4, 1, 5, 9]
    logits, want = (
        runtime.load(path, device, kv_type="f32").eval(ids) for device in ("cpu", "reference")
    )
    assert ((logits - want) ** 2).sum() <= 1e-10 * (want**2).sum()


def test_the_places_of_an_op_exist():
    for place in re.findall(r"^\| `([\w/.]+)` \|", RESEARCH, re.MULTILINE):
        assert (ROOT / place).exists() or "FILE" in place, place
