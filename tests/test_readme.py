"""The README: its Python runs, its commands and variables exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_model import DEMO, needs_demo

import runtime
from runtime import environment
from runtime.cli import COMMANDS

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


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


def test_its_commands_and_variables_exist():
    named = set(re.findall(r"^\| `runtime (\w+)", README, re.MULTILINE))
    assert named == set(COMMANDS)
    variables = set(re.findall(r"^\| `([A-Z_]+)", README, re.MULTILINE))
    assert all(f"`{name}`" in str(environment.__doc__) for name in variables) and variables
