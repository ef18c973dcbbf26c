"""`runtime cache`: what is kept of prompts is listed, explained and removed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_model import DEMO, needs_demo

from runtime.cli import main

pytestmark = needs_demo
LONG = (
    "Where does Pip live? Tell me about his house, his friends, and what he does all day, please."
)
OTHER = LONG.replace("all day, please", "at night")
MORE = " And then tell me more, and more, of what his friends and the others in the town are doing."


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def kept(cache: Path) -> None:
    result = run("run", DEMO, "-q", "-p", LONG + MORE, "-n", "4", "-t", "1", "--cache-dir", cache)
    assert result.exit_code == 0, result.stderr


def test_prompts_are_listed_explained_and_removed(tmp_path: Path):
    where = ("--cache-dir", tmp_path)
    assert "no prompts are kept" in run("cache", "ls", *where).stderr
    kept(tmp_path)
    shown = run("cache", "ls", DEMO, *where).stdout
    assert "Where does Pip live?" in shown and DEMO.name in shown and "f16" in shown
    (found,) = json.loads(run("cache", *where, "--json").stdout)
    assert found["prompts"] == 1 and found["tokens"] >= 32 and found["bytes"] > 32000
    said = run("cache", "explain", DEMO, "-p", LONG + MORE, *where).stdout
    assert said.startswith(f"{found['tokens']} of ") or "whole ones of 32" in said
    said = run("cache", "explain", DEMO, "-p", OTHER + MORE, *where).stdout
    *_, kept_text, prompt = said.splitlines()
    assert "first difference" in said and "day" in kept_text and "night" in prompt, said
    said = run("cache", "explain", DEMO, "-p", LONG, "--raw", "--kv-type", "q8_0", *where).stdout
    assert said.startswith("0 of ") and "nothing goes on behind token 0" in said
    assert run("cache", "explain", DEMO, *where).exit_code == 2
    assert run("cache", "ls", DEMO, DEMO, *where).exit_code == 2
    assert run("cache", "clear", "other.gguf", *where).exit_code == 0
    assert json.loads(run("cache", *where, "--json").stdout)[0]["bytes"] == found["bytes"]
    assert "removed" in run("cache", "clear", DEMO, *where).stderr
    assert not list(tmp_path.glob("prompts/*/*"))


def test_explain_writes_nothing(tmp_path: Path):
    said = run("cache", "explain", DEMO, "-p", LONG, "--cache-dir", tmp_path).stdout
    assert said.startswith("0 of ") and not (tmp_path / "prompts").exists()


@pytest.mark.parametrize(
    "about", ['{"model": 5, "kv_type": null, "devices": []}', "[" * 99999, "pipe"],
    ids=["types", "depth", "pipe"],
)  # fmt: skip
def test_a_damaged_description_is_of_an_unknown_model(about: str, tmp_path: Path):
    folder = tmp_path / "prompts" / ("0a" * 16)
    folder.mkdir(parents=True)
    (folder / "0b.page").write_bytes(bytes(99))
    if about != "pipe":
        (folder / "about.json").write_text(about)
    elif hasattr(os, "mkfifo"):
        os.mkfifo(folder / "about.json")
    shown = run("cache", "ls", "--cache-dir", tmp_path)
    assert shown.exit_code == 0 and "unknown" in shown.stdout, shown
    assert run("cache", "clear", "--cache-dir", tmp_path).exit_code == 0
    assert not folder.exists()


def test_a_second_start_reads_it_from_disk(tmp_path: Path):
    kept(tmp_path)
    result = run("run", DEMO, "-p", LONG + MORE, "-n", "4", "-t", "1", "--cache-dir", tmp_path)
    assert result.exit_code == 0 and "Traceback" not in result.stderr
    assert run("run", DEMO, "-p", "a", "--cache-dir", DEMO).exit_code == 2
