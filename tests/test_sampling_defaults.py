"""What a file says about sampling (`general.sampling.*`) is used, or refused by the key's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import DEMO, needs_demo
from gguf_files import gguf_bytes

import runtime
from runtime.errors import OptionError
from runtime.generation import Generation
from runtime.gguf.reader import open_gguf
from runtime.model import Model
from runtime.text.defaults import file_defaults
from runtime.text.sampling import Sampling

KEYS: dict[str, Any] = {
    "temp": 0.5, "top_k": 20, "top_p": 0.25, "min_p": 0.125, "xtc_probability": 0.5,
    "xtc_threshold": 0.25, "penalty_last_n": 7, "penalty_repeat": 1.5, "mirostat": 2,
    "mirostat_tau": 3.0, "mirostat_eta": 0.5, "sequence": "top_k;temperature",
}  # fmt: skip
MEAN = {
    "temperature": 0.5, "top_k": 20, "top_p": 0.25, "min_p": 0.125, "xtc_probability": 0.5,
    "xtc_threshold": 0.25, "penalty_last_n": 7, "repeat_penalty": 1.5, "mirostat": 2,
    "mirostat_tau": 3.0, "mirostat_eta": 0.5, "samplers": ("top_k", "temperature"),
}  # fmt: skip


def in_file(keys: dict[str, Any]) -> dict[str, Any]:
    return {f"general.sampling.{name}": value for name, value in keys.items()}


def test_every_key_of_a_written_file(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "qwen3", **in_file(KEYS)}, {}))
    assert file_defaults(open_gguf(path).metadata) == MEAN


def test_no_key_no_default():
    assert file_defaults({"general.name": "x", "general.sampling_temp": 3}) == {}


@pytest.mark.parametrize(
    ("name", "value", "option", "meant"),
    [
        ("temp", 1, "temperature", 1.0),
        ("temp", "0.5", "temperature", 0.5),
        ("top_k", 20.0, "top_k", 20),
        ("top_k", "20", "top_k", 20),
        ("penalty_last_n", -1, "penalty_last_n", -1),
    ],
)
def test_numbers_as_files_write_them(name, value, option, meant):
    assert file_defaults(in_file({name: value})) == {option: meant}


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("temp", "hot", "temperature"),
        ("temp", float("nan"), "temperature"),
        ("temp", [1.0], "temperature"),
        ("top_k", 20.5, "top_k"),
        ("top_k", True, "top_k"),
        ("top_p", 3.0, "top_p"),
        ("mirostat", 1, "mirostat"),
        ("sequence", "top_k;infill", "samplers"),
        ("sequence", 5, "samplers"),
    ],
)
def test_a_value_that_cannot_be_used_names_its_key(name, value, option):
    metadata = in_file({name: value})
    with pytest.raises(OptionError) as caught:
        file_defaults(metadata)
    told = str(caught.value)
    assert f"the file's general.sampling.{name} cannot be used" in told and "\n" not in told
    assert told.endswith(f"give {option} yourself")
    assert file_defaults(metadata, {option}) == {}, "what is given replaces it"


def test_a_key_that_nobody_knows_is_told():
    with pytest.warns(UserWarning, match=r"general\.sampling\.magic = 5 is not used"):
        assert file_defaults(in_file({"magic": 5, "top_k": 3})) == {"top_k": 3}


@pytest.fixture
def model() -> Iterator[Callable[..., Model]]:
    opened = []

    def with_keys(**keys: Any) -> Model:
        loaded = runtime.load(DEMO, devices="null", context=64, sequences=1)
        loaded.file.metadata.update(in_file(keys))
        opened.append(loaded)
        return loaded

    yield with_keys
    for loaded in opened:
        loaded.close()


def sampling(answer: Generation) -> Sampling:
    answer.close()
    return answer._writing.options.sampling


@needs_demo
def test_answers_use_them_unless_told_otherwise(model):
    asked = model(temp=0.25, top_k=7)
    assert asked.sampling_defaults == {"temperature": 0.25, "top_k": 7}
    for answer in (asked.generate("Once", top_k=9), asked.chat("Hi", top_k=9)):
        used = sampling(answer)
        assert (used.temperature, used.top_k, used.top_p) == (0.25, 9, 0.95)
    assert sampling(asked.generate("Once", temperature=0.8)).top_k == 7


@needs_demo
def test_a_bad_one_is_refused_when_it_would_count(model):
    asked = model(temp="hot")
    assert asked.eval([1]).shape == (1, asked.vocab_size)
    with pytest.raises(OptionError, match=r"general\.sampling\.temp cannot be used"):
        asked.generate("Once")
    assert sampling(asked.generate("Once", temperature=1)).temperature == 1


@needs_demo
def test_what_the_file_leaves_idle_is_no_error_and_what_the_caller_gives_is(model):
    asked = model(mirostat=2, top_k=20)
    assert sampling(asked.generate("Once")).mirostat == 2
    with pytest.raises(OptionError, match=r"top_p=0\.5 has no effect with mirostat=2 of the file"):
        asked.generate("Once", top_p=0.5)
    assert sampling(asked.generate("Once", top_p=0.5, mirostat=0)).top_k == 20
