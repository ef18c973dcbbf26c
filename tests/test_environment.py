"""The environment is read in one place; malformed values name the variable and what is legal."""

from __future__ import annotations

from pathlib import Path

import pytest

import runtime
from runtime.backends import environment
from runtime.errors import OptionError

VARIABLES = (
    "RUNTIME_CPU_ISA", "RUNTIME_CACHE_DIR", "RUNTIME_NCCL", "DEBUG", "VALIDATE", "XDG_CACHE_HOME",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_defaults_when_unset_or_empty(monkeypatch):
    monkeypatch.setenv("DEBUG", "")
    monkeypatch.setenv("VALIDATE", " ")
    assert environment.cpu_isa() is None
    assert environment.debug() == 0
    assert environment.validate() is False
    assert environment.cache_dir().name == "graph-runtime"


def test_values(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNTIME_CPU_ISA", "AVX512VNNI")
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path / "not-yet"))
    monkeypatch.setenv("DEBUG", "4")
    monkeypatch.setenv("VALIDATE", "1")
    assert environment.cpu_isa() == "avx512vnni"
    assert environment.cache_dir() == tmp_path / "not-yet"
    assert not environment.cache_dir().exists()
    assert environment.debug() == 4
    assert environment.validate() is True


@pytest.mark.parametrize(
    ("name", "value", "read", "legal"),
    [
        ("RUNTIME_CPU_ISA", "sse2", environment.cpu_isa, "avx2"),
        ("DEBUG", "verbose", environment.debug, "0 to 4"),
        ("DEBUG", "5", environment.debug, "0 to 4"),
        ("DEBUG", "-1", environment.debug, "0 to 4"),
        ("DEBUG", "²", environment.debug, "0 to 4"),
        ("VALIDATE", "maybe", environment.validate, "0 or 1"),
        ("RUNTIME_CACHE_DIR", __file__, environment.cache_dir, "folder"),
    ],
)
def test_malformed_value_names_variable_and_legal_values(monkeypatch, name, value, read, legal):
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError) as caught:
        read()
    message = str(caught.value)
    assert name in message and legal in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("RUNTIME_NCCL", "bogus", "1 or more, or off"), ("RUNTIME_NCCL", "-5", "1 or more, or off"),
        ("RUNTIME_CPU_ISA", "sse2", "avx2"), ("DEBUG", "9", "0 to 4"), ("VALIDATE", "2", "0 or 1"),
    ],
)  # fmt: skip
def test_loading_refuses_what_it_may_never_read(monkeypatch, name, value, legal):
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=f"environment variable {name}='{value}' .*{legal}"):
        runtime.load(devices="reference")


@pytest.mark.parametrize(
    ("variables", "inspected"),
    [
        ({}, False), ({"DEBUG": "0"}, False), ({"DEBUG": ""}, False), ({"DEBUG": "1"}, False),
        ({"VALIDATE": "0"}, False), ({"VALIDATE": " "}, False), ({"VALIDATE": "off"}, False),
        ({"DEBUG": "2"}, True), ({"VALIDATE": "1"}, True), ({"DEBUG": "0", "VALIDATE": "1"}, True),
    ],
)  # fmt: skip
def test_steps_are_looked_into_where_that_is_asked_for(monkeypatch, variables, inspected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.inspected() is inspected


def test_relative_xdg_folder_is_ignored(monkeypatch):
    monkeypatch.setattr(environment.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert environment.cache_dir() == Path.home() / ".cache" / "graph-runtime"
