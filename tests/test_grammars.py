"""Answers that are held to a grammar: JSON of a schema, GBNF, Lark, a regular expression."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from random_schemas import random_schema
from vocabularies import WORDS, byte_pairs, scored

from runtime.errors import OptionError
from runtime.text.answer import Answer
from runtime.text.grammar.asked import asked_grammar
from runtime.text.sampling import Sampler, Sampling
from runtime.text.tokenizer import Tokenizer

SCHEMAS = int(os.environ.get("GRAMMAR_SCHEMAS", "300"))  # random ones, tried in this run
VOCABULARIES = Path(__file__).resolve().parents[2] / "shared" / "golden" / "vocab"
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
COLOURS = {
    "type": "object", "required": ["colour", "n"], "additionalProperties": False,
    "properties": {"colour": {"enum": ["red", "hello"]}, "n": {"type": "integer", "maximum": 99}},
}  # fmt: skip


def unused(metadata: dict[str, Any]) -> dict[str, Any]:
    """With a token that is not used, one twice, and one longer than a character."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens += ["[unused]", tokens[40], '":"']
    kinds += [5, 1, 1]
    if "tokenizer.ggml.scores" in metadata:
        metadata["tokenizer.ggml.scores"] += [0.0, 0.0, -0.1]
    return metadata


MADE = {
    **{name: byte_pairs(name) for name in ("gpt-2", "llama-bpe", "qwen2", "qwen35")},
    "spm": scored(WORDS), "unigram": scored(WORDS, "t5"),
    "odd": unused(byte_pairs()), "odd spm": unused(scored(WORDS)),
    "no end": {**byte_pairs(), "tokenizer.ggml.eos_token_id": None},
}  # fmt: skip


def made(name: str) -> Tokenizer:
    metadata = {key: value for key, value in MADE[name].items() if value is not None}
    if name == "no end":
        tokens = metadata["tokenizer.ggml.tokens"]
        other = ["<|nothing|>" if text == "<|im_end|>" else text for text in tokens]
        metadata["tokenizer.ggml.tokens"] = other
    return Tokenizer(metadata)


def answer(
    tokenizer: Tokenizer, seed: int = 0, most: int = 400, options: Any = PLAIN, **asked: Any
):
    """What random logits make of a grammar."""
    constraint = tokenizer.guide.constraint(asked_grammar(asked))
    sampling = Sampling(**{"seed": seed, **options})
    found = Answer(tokenizer, sampling, tokenizer.vocab_size + 3, most + 1, most, constraint)
    found.begin([1])
    random = np.random.default_rng(seed)
    likely = [i for c in '"}]' for i in tokenizer.encode_continued(c)]
    while found.reason is None:
        row = 2 * random.standard_normal(tokenizer.vocab_size + 3).astype(np.float32)
        row[likely] += 3
        row[sorted(tokenizer.end_ids)] += 2
        found.feed(row)
    return found


@pytest.mark.parametrize("name", MADE)
def test_tokens_are_the_bytes_that_they_show(name: str):
    check_table(made(name))


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "gpt-2", "qwen2"])
def test_tokens_of_whole_vocabularies_are_the_bytes_that_they_show(name: str):
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip("no vocabularies here")
    check_table(Tokenizer.from_gguf(path))


def check_table(tokenizer: Tokenizer) -> None:
    inner = tokenizer.guide._tokens
    special = set(tokenizer.ids_of_kind(2, 3, 5))
    lone = {b"\xff"}  # no text holds it
    for token in range(tokenizer.vocab_size):
        own = tokenizer.token_bytes(token)
        if token not in special and own not in lone:
            assert inner.decode_bytes([token]) == own and not inner.is_special_token(token), token
    assert sorted(inner.eos_tokens) == (sorted(tokenizer.end_ids) or [tokenizer.vocab_size])
    for text in ('{"hello": 123}', " hello world\n", "é▁ \t<|im_end|><tag>", "aba bb"):
        ids = inner.tokenize_str(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert not special & set(ids)
        exact = tokenizer.kind == "gpt2" or (tokenizer.kind == "llama" and "▁" not in text)
        assert ids == tokenizer.encode_continued(text) or not exact


@pytest.mark.parametrize("name", MADE)
def test_answers_are_texts_of_the_grammar(name: str):
    tokenizer = made(name)
    found = answer(tokenizer, json_schema=COLOURS)
    assert found.reason == "end"
    jsonschema.validate(json.loads(found.text), COLOURS)
    regex = "(hello|ab)+ é[0-9]{2}"
    assert re.fullmatch(regex, answer(tokenizer, regex=regex).text)
    gbnf = 'root ::= "a" item{2} # a "comment" [\nitem ::= [b-d]+ "#" | "hello" | (\n"x" # y\n)'
    assert re.fullmatch("a([b-d]+#|hello|x){2}", answer(tokenizer, grammar=gbnf).text)
    lark = 'start: "ab" (/[x-z]{1,9}/ "é"){1,3}'
    assert re.fullmatch("ab([x-z]{1,9}é){1,3}", answer(tokenizer, grammar=lark).text)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"mirostat": 2}, {"typical_p": 0.9, "xtc_probability": 0.7, "xtc_threshold": 0.05},
    {"repeat_penalty": 1.4, "dry_multiplier": 1.0, "presence_penalty": 0.5, "top_n_sigma": 1.0},
    {"logit_bias": {5: 3.0, 9: -math.inf}, "dynatemp_range": 0.5, "logprobs": 3},
    {"temperature": 0, "repeat_penalty": 1.5, "logit_bias": {0: -1e38}},
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=lambda o: next(iter(o)))
def test_whatever_chooses_the_tokens(options: dict[str, Any]):
    tokenizer = made("gpt-2")
    for seed in range(3):
        found = answer(tokenizer, seed, options=options, json_schema=COLOURS)
        jsonschema.validate(json.loads(found.text), COLOURS)


def test_random_schemas():
    """Every answer that has ended validates, and nearly all end."""
    tokenizer, ended = made("gpt-2"), 0
    for seed in range(SCHEMAS):
        schema = random_schema(seed)
        jsonschema.Draft202012Validator.check_schema(schema)
        found = answer(tokenizer, seed, json_schema=schema)
        if found.reason == "end":
            ended += 1
            check = jsonschema.Draft202012Validator.FORMAT_CHECKER
            try:
                value = json.loads(found.text)
                jsonschema.Draft202012Validator(schema, format_checker=check).validate(value)
            except (ValueError, jsonschema.ValidationError) as error:
                raise AssertionError(f"{seed}: {schema} {found.text!r}") from error
    assert ended >= 0.9 * SCHEMAS


def test_no_name_is_written_twice_in_two_ways():
    schema = {"type": "object", "properties": {"b": {"const": "x"}}, "required": ["b"]}
    constants = {"enum": ["\x01\n\x7f", "é"]}
    texts = [
        (schema, '{"b":"x","\\u0062":1}', False),
        (schema, '{"b":"x","c":"\\n"}', True),
        (schema, '{"b":"x","b":1}', False),
        (constants, json.dumps("\x01\n\x7f"), True),
    ]
    for asked, text, fits in texts:
        tokenizer = made("gpt-2")
        constraint = tokenizer.guide.constraint(asked_grammar({"json_schema": asked}))
        ids = tokenizer.encode_continued(text)
        assert (constraint.fitting(ids) == ids) == fits, text


def test_the_end_is_possible_where_the_text_may_end_and_nowhere_else():
    tokenizer = made("gpt-2")
    constraint = tokenizer.guide.constraint(asked_grammar({"regex": "a(b|bc)?"}))
    row, (end,) = np.zeros(tokenizer.vocab_size, np.float32), tokenizer.end_ids
    for letter, may_end in (("a", True), ("b", True)):
        assert constraint.masked(row)[end] == -np.inf or letter == "b"
        constraint.accept(*tokenizer.encode_continued(letter))
        assert (constraint.masked(row)[end] == 0) == may_end and not constraint.over
    assert not row.any()
    constraint.accept(*tokenizer.encode_continued("c"))
    assert constraint.over


def test_a_token_that_ends_answers_is_no_text():
    metadata = byte_pairs(**{"tokenizer.ggml.eos_token_ids": [259, 273]})  # "hello" and "<tag>"
    tokenizer = Tokenizer(metadata)
    assert tokenizer.end_ids >= {259, 273} and not tokenizer.is_control(259)
    for regex in ("hello<tag>", "(hello|<tag>){3}x"):
        found = answer(tokenizer, regex=regex)
        assert re.fullmatch(regex, found.text) and found.reason == "end"


def test_probabilities_are_those_of_tokens_that_are_allowed():
    tokenizer = made("gpt-2")
    found = answer(tokenizer, options={**PLAIN, "logprobs": 4}, regex="[ab]c")
    first, second = found.tokens
    assert len(first.top) == 2 and sum(math.exp(p) for _, p in first.top) == pytest.approx(1)
    assert second.logprob == 0 and second.top == ((second.id, 0.0),)
    raw = np.linspace(-1, 1, tokenizer.vocab_size, dtype=np.float32)
    assert len(Sampler(Sampling(logprobs=4), raw.size).sample(raw).top) == 4


def test_an_answer_that_is_cut_has_the_reason_that_it_has_without_a_grammar():
    tokenizer = made("gpt-2")
    assert answer(tokenizer, most=5, json_schema=COLOURS).reason == "length"
    assert answer(tokenizer, options={**PLAIN, "stop": "ll"}, regex="a+hello").reason == "stop"
    whole = answer(tokenizer, regex="ab", most=2)
    assert (whole.text, whole.reason) == ("ab", "end")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"json_schema": {"not": {}}}, "json_schema uses not, which cannot be enforced"),
    ({"json_schema": {"items": {"uniqueItems": True}}}, "uses uniqueItems,"),
    ({"json_schema": {"if": {}, "then": {}}}, "uses if, then,"),
    ({"json_schema": {"format": "nope", "type": "string"}}, "uses the format 'nope',"),
    ({"json_schema": {"format": "unknown", "type": "string"}}, "uses the format 'unknown',"),
    ({"json_schema": {"properties": {"a": {"disallow": "x"}}}}, "uses disallow,"),
    ({"json_schema": {"anyOf": [{"divisibleBy": 3}]}}, "uses divisibleBy,"),
    ({"json_schema": {"type": "object", "minProperties": 2}}, "uses minProperties 2 with 0"),
    ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "look-ahead"),
    ({"json_schema": {"$ref": "#/nope"}}, "'/nope' does not exist"),
    ({"json_schema": {"$ref": "#"}}, "json_schema cannot be met"),
    ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "greater than maximum"),
    ({"json_schema": False}, "json_schema uses not,"),
    ({"json_schema": "{"}, "json_schema is no JSON"),
    ({"json_schema": "[" * 100_000}, "json_schema is no JSON"),
    ({"json_schema": '{"items":' * 900 + "{}" + "}" * 900}, "json_schema"),
    ({"json_schema": 3}, "json_schema=3 must be a JSON schema"),
    ({"json_schema": {"a": {1, 2}}}, "json_schema cannot be written as JSON"),
    ({"json_schema": {"minimum": math.nan}}, "json_schema cannot be written as JSON"),
    ({"json_schema": {"enum": ["a" * (1 << 20)]}}, "json_schema has 1048"),
    ({"json_schema": True, "regex": "a"}, "json_schema and regex cannot go together"),
    ({"regex": "("}, "regex cannot be met or enforced"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": "(" * 100_000}, "regex cannot be met or enforced"),
    ({"regex": ""}, "regex='' must be text"),
    ({"regex": 3}, "regex=3 must be text"),
    ({"grammar": "root ::= nope"}, "Rule 'nope' not found"),
    ({"grammar": 'root ::= "a'}, "grammar cannot be met or enforced"),
    ({"grammar": "root ::= " + "(" * 100_000}, "grammar"),
    ({"grammar": "start: start"}, "grammar cannot be met"),
    ({"grammar": 'start: %json {"not": {}}'}, "not"),
    ({"grammar": "nonsense"}, "grammar cannot be met or enforced"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "says"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_enforced_is_refused(asked: dict[str, Any], says: str):
    tokenizer = made("gpt-2")
    with pytest.raises(OptionError, match=re.escape(says)) as caught:
        tokenizer.guide.constraint(asked_grammar(asked))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_grammar_that_becomes_too_complex_ends_the_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("runtime.text.grammar.guide._LEXER_STATES", 50)
    with pytest.raises(OptionError, match="lexer error: too many states"):
        answer(made("gpt-2"), regex="(a|b)*a(a|b){18}c")


def test_without_llguidance_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match=re.escape("pip install 'graph-runtime[serve]'")) as e:
        made("gpt-2").guide  # noqa: B018  made when it is first read
    assert "\n" not in str(e.value)


def test_llguidance_is_imported_when_it_is_wanted():
    code = (
        "import sys, runtime, runtime.generate, runtime.generation, runtime.text.answer\n"
        "import runtime.text.calls.wanted, runtime.text.grammar.guide, runtime.cli.run\n"
        "assert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_forced_tokens_are_proposed():
    from runtime.speculation.forced import Forced

    tokenizer = made("gpt-2")
    constraint = tokenizer.guide.constraint(asked_grammar({"regex": "hello world( a| b)"}))
    drafter = Forced(constraint)
    found = drafter.propose([], 15)
    assert b"".join(map(tokenizer.token_bytes, found)) == b"hello world "
    assert drafter.propose([], 1) == found[:1]
    for token in found:
        constraint.accept(token)
    assert drafter.propose([], 15) == []
