"""Vocabularies that a file has wrong, and wrong calls of a tokenizer: one line that names it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from vocabularies import WORDS, byte_pairs, scored

from runtime.errors import Error, OptionError, TextError
from runtime.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["nothalves"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": 7}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": "ab"}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", 2]}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": "a b"}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": 3}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [1.0] * 274}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [True] * 274}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [[1]] * 274}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [1, [2]]}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [2**70] * 274}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": ["x"]}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.pre": "qwen-2"}, "did you mean 'qwen2'"),
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv' is not supported: supported are gpt2"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [1.0]},
            "tokenizer.ggml.scores has 1 entries",
        ),
        *(
            ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}, "ggml.scores")
            for scores in (["x"] * 274, 5, "abc", [[1.0]] * 274, [float("nan")] * 274, [None] * 274)
        ),
        *(
            (
                {
                    "tokenizer.ggml.model": "t5",
                    "tokenizer.ggml.scores": [0.0] * 274,
                    "tokenizer.ggml.precompiled_charsmap": charsmap,
                },
                "tokenizer.ggml.precompiled_charsmap",
            )
            for charsmap in ([], 5, "abc", ["a"], [1, 2, 3], [9, 0, 0, 0], [255] * 40)
        ),
        (
            {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
            "tokenizer.ggml.bos_token_id is not set",
        ),
    ],
)
def test_broken_metadata_is_named_in_one_line(change, says):
    metadata = {k: v for k, v in (byte_pairs() | change).items() if v is not None}
    with pytest.raises(TextError) as caught:
        Tokenizer(metadata).encode("x")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_pre_tokenizer_warns_and_uses_the_default():
    metadata = byte_pairs()
    del metadata["tokenizer.ggml.pre"]
    with pytest.warns(UserWarning, match=r"no tokenizer\.ggml\.pre"):
        tokenizer = Tokenizer(metadata)
    assert tokenizer.encode("hello", add_special=False)


def test_text_is_normalised_only_where_the_file_asks():
    plain = Tokenizer(byte_pairs())
    assert plain.decode(plain.encode("e\u0301", add_special=False)) == "e\u0301"
    for normaliser in ({"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}):
        source = json.dumps({"normalizer": normaliser})
        asking = Tokenizer(byte_pairs(**{"tokenizer.huggingface.json": source}))
        assert asking.decode(asking.encode("e\u0301", add_special=False)) == "\xe9"
    nothing = json.dumps({"normalizer": None})
    quiet = Tokenizer(byte_pairs(**{"tokenizer.huggingface.json": nothing}))
    assert quiet.decode(quiet.encode("e\u0301", add_special=False)) == "e\u0301"
    with pytest.raises(TextError, match=r"huggingface\.json"):
        Tokenizer(byte_pairs(**{"tokenizer.huggingface.json": "{"}))


@pytest.mark.parametrize("token", [-1, 10**6])
def test_wrong_ids_are_refused(token):
    with pytest.raises(TextError, match="outside the vocabulary"):
        Tokenizer(byte_pairs()).decode([token])


@pytest.mark.parametrize("ids", [5, [True], None, ["1"], "12", [1.0], [None], [np.bool_(1)]])
def test_ids_have_to_be_whole_numbers(ids):
    with pytest.raises(OptionError, match="list of whole numbers"):
        Tokenizer(byte_pairs()).decode(ids)


def test_any_iterable_of_whole_numbers_decodes():
    tokenizer = Tokenizer(byte_pairs())
    ids = tokenizer("hello")
    for same in (tuple(ids), iter(ids), np.array(ids), np.array(ids, np.uint16), map(int, ids)):
        assert tokenizer.decode(same) == tokenizer.decode(ids)


@pytest.mark.parametrize("source", [None, 5, [], object(), b"x.gguf"])
def test_a_tokenizer_comes_from_a_path_or_a_file(source):
    with pytest.raises(OptionError, match=r"path of a \.gguf file"):
        Tokenizer.from_gguf(source)


def test_a_tokenizer_can_be_called_and_has_a_length():
    tokenizer = Tokenizer(byte_pairs("llama-bpe"))
    assert tokenizer("he") == tokenizer.encode("he")
    assert tokenizer("he", add_special=False) == tokenizer.encode("he", add_special=False)
    assert len(tokenizer) == tokenizer.vocab_size and tokenizer
    assert repr(tokenizer) == f"<Tokenizer {tokenizer.kind}, {tokenizer.vocab_size} tokens>"


def test_text_has_to_be_text():
    with pytest.raises(TextError, match="bytes"):
        Tokenizer(byte_pairs()).encode(b"x")


def test_a_model_without_text_only_knows_its_size():
    tokenizer = Tokenizer(
        {
            "tokenizer.ggml.model": "none",
            "general.architecture": "llama",
            "llama.vocab_size": 321,
        }
    )
    assert tokenizer.vocab_size == 321 and not tokenizer.has_text and not tokenizer.end_ids
    for use in (lambda: tokenizer.encode("x"), lambda: tokenizer.decode([1]), tokenizer.stream):
        with pytest.raises(TextError, match="no vocabulary"):
            use()


@pytest.mark.parametrize("key", ["model", "pre", "merges", "tokens"])
@pytest.mark.parametrize("value", [np.zeros(3), np.zeros(0), 5, np.ones(1, bool), [1, 2]])
def test_words_of_another_type_are_refused(key: str, value: Any):
    """Files damaged in the type of a value: a TextError that names the key, nothing else."""
    metadata = byte_pairs(**{f"tokenizer.ggml.{key}": value})
    if key == "merges" and not np.size(value):
        return  # no merges at all
    with pytest.raises(TextError, match=rf"tokenizer\.ggml\.{key}"):
        Tokenizer(metadata).encode("hello")


WRONG: tuple[Any, ...] = (
    *(None, True, 0, -1, 3.5, float("nan"), "", "text", [], ["a"], [1], [-1], [1.5], [True], [[1]]),
    *({}, b"ab", 2**70, np.zeros(0), np.ones(3), np.array(["a"]), np.int64(3), ["\udc80"], [None]),
)
KEYS = (
    *("model", "pre", "tokens", "token_type", "scores", "merges", "precompiled_charsmap"),
    *("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "eot_token_id"),
    *("eos_token_ids", "suppress_tokens", "fim_pad_token_id", "add_bos_token", "add_eos_token"),
    *("add_space_prefix", "remove_extra_whitespaces", "token_type_count"),
)
OTHER_KEYS = ("tokenizer.huggingface.json", "tokenizer.chat_template", "general.name")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "gemma4"])
@pytest.mark.parametrize("key", [*(f"tokenizer.ggml.{key}" for key in KEYS), *OTHER_KEYS])
def test_any_value_under_any_key_is_used_or_refused_in_one_line(kind, key):
    whole = byte_pairs() if kind == "gpt2" else scored(WORDS, kind)
    if kind == "gemma4":
        whole["tokenizer.ggml.merges"] = ["a b"]
    for value in WRONG:
        try:
            tokenizer = Tokenizer(whole | {key: value})
            tokenizer.decode(tokenizer.encode("ab </s> é")[:1])
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
        except Error as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
