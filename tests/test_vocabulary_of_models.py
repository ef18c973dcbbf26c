"""Answers of models whose vocabulary is not the usual one: padded rows, marks, several ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_models import Sizes, write_model
from vocabularies import byte_pairs

import runtime
from runtime.errors import OptionError, TextError
from runtime.model import Model

TOKENS = len(byte_pairs()["tokenizer.ggml.tokens"])
ROWS = TOKENS + 40


def written(path: Path, rows: int = ROWS, **keys) -> Path:
    """A model with the vocabulary of `byte_pairs` and `rows` rows of embeddings."""
    return write_model(path, Sizes(vocabulary=rows), extra=byte_pairs(**keys))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[Model]:
    keys = {
        "tokenizer.ggml.suppress_tokens": [5, 6],
        "tokenizer.ggml.eos_token_ids": [TOKENS - 3, TOKENS - 1],
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "{{ tools | length }}",
    }
    path = written(tmp_path_factory.mktemp("model") / "m.gguf", **keys)
    with runtime.load(path, devices="null", context=64) as loaded:
        yield loaded


def chooses(*tokens: int) -> dict:
    """Options that make a model of equal logits choose the first of `tokens` that may be."""
    bias = {token: 90.0 - place for place, token in enumerate(tokens)}
    return {"temperature": 0, "logit_bias": bias}


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 2, "top_k": 0}])
def test_rows_without_a_token_are_never_chosen(model: Model, options: dict):
    assert model.vocab_size == ROWS and model.tokenizer.vocab_size == TOKENS
    ids: list[int] = []
    for seed in range(20):
        answer = model.generate(
            [1, 2], max_tokens=40, seed=seed, on_token=lambda t: ids.append(t.id), **options
        )
        "".join(answer)
    assert max(ids) < TOKENS


def test_a_bias_for_a_row_without_a_token_is_refused(model: Model):
    with pytest.raises(OptionError, match=f"token {TOKENS}, outside the vocabulary of {TOKENS}"):
        model.generate([1], logit_bias={TOKENS: 1.0})


def test_tokens_that_the_file_suppresses_are_never_chosen(model: Model):
    answer = model.generate([1], max_tokens=1, **chooses(5, 6, 7))
    assert "".join(answer) == model.tokenizer.decode([7])


@pytest.mark.parametrize("end", [TOKENS - 3, TOKENS - 1])
def test_every_listed_end_token_ends(model: Model, end: int):
    answer = model.generate([1], max_tokens=5, **chooses(end))
    assert "".join(answer) == "" and answer.reason == "end"


def test_a_control_token_may_be_a_stop_string(model: Model):
    start = model.tokenizer.encode("<|im_start|>", add_special=False)[0]
    stopped = model.generate([1], max_tokens=5, stop="<|im_start|>", **chooses(start))
    assert "".join(stopped) == "" and stopped.reason == "stop"
    on = model.generate([1], max_tokens=5, stop="<|im_end|>", **chooses(start))
    assert "".join(on) == "" and on.reason == "length"


def test_tools_choose_their_template(model: Model):
    tools = [{"type": "function", "function": {"name": "f"}}]
    ids = model.tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tools=tools)
    assert model.tokenizer.decode(ids) == "1"


def test_fewer_rows_than_tokens(tmp_path):
    with runtime.load(written(tmp_path / "m.gguf", TOKENS - 2), devices="null") as small:
        "".join(small.generate([1], max_tokens=20, temperature=2, top_k=0, seed=1))


def test_a_broken_vocabulary_names_file_and_key(tmp_path):
    path = written(tmp_path / "m.gguf", **{"tokenizer.ggml.unknown_token_id": "x"})
    with runtime.load(path, devices="null") as broken, pytest.raises(TextError) as caught:
        broken.tokenizer  # noqa: B018
    assert str(path) in str(caught.value) and "unknown_token_id" in str(caught.value)
