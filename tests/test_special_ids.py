"""Which tokens end an answer, steer the model or are never chosen, as files name them or not.

Sets are those of llama.cpp b11434 on the same vocabularies.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from vocabularies import byte_pairs

from runtime.errors import TextError
from runtime.text.special_ids import CONTROL, NORMAL, USER_DEFINED
from runtime.text.tokenizer import Tokenizer


def tokenizer(tokens: dict[str, int], **keys) -> Tokenizer:
    """Byte letters and `tokens` (text -> kind); a text given for a key becomes its id."""
    metadata = byte_pairs()
    del metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.bos_token_id"]
    texts = metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][:-4]
    kinds = metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"][:-4]
    texts += tokens
    kinds += tokens.values()
    for key, value in keys.items():
        if isinstance(value, str):
            value = texts.index(value)
        metadata[f"tokenizer.ggml.{key}"] = value
    return Tokenizer(metadata)


def ends(found: Tokenizer) -> set[str]:
    return {found.token_text(i) for i in found.end_ids}


@pytest.mark.parametrize(
    ("tokens", "keys", "expected"),
    [
        ({"<e>": 3}, {"eos_token_id": "<e>"}, {"<e>"}),
        ({"<e>": 3, "<t>": 3, "<m>": 3}, {
            "eos_token_id": "<e>", "eot_token_id": "<t>", "eom_token_id": "<m>"
        }, {"<e>", "<t>", "<m>"}),
        ({"<|im_end|>": 3, "<|eom_id|>": 1, "<tag>": 4}, {}, {"<|im_end|>", "<|eom_id|>"}),
        # ONE token of each purpose by text, none where the file names one
        ({"<|fim_pad|>": 3, "[PAD]": 3, "<PAD>": 3, "<fim-pad>": 3}, {}, {"<fim-pad>"}),
        ({"<|fim_pad|>": 3, "x": 3}, {"fim_pad_token_id": "x"}, {"x"}),
        ({"<|repo_name|>": 3, "<reponame>": 3, "x": 3}, {"fim_rep_token_id": "x"}, {"x"}),
        ({"<|file_sep|>": 3, "x": 3}, {"fim_sep_token_id": "x"}, {"x"}),
        ({"<|file_sep|>": 3, "<reponame>": 3}, {}, {"<|file_sep|>", "<reponame>"}),
        # families where a token of others is none of theirs
        ({"<|plamo:eos|>": 3, "</s>": 3}, {"eos_token_id": "<|plamo:eos|>"}, {"<|plamo:eos|>"}),
        ({"<|tool_response>": 3, "</s>": 3}, {}, {"<|tool_response>"}),
        ({"</s>": 3, "<x>": 3}, {}, {"</s>"}),
        ({"<|end|>": 3, "<|call|>": 3}, {}, {"<|end|>", "<|call|>"}),
        ({"<|end|>": 3, "<|call|>": 3, "<|return|>": 3}, {}, {"<|call|>", "<|return|>"}),
        ({"<|end|>": 3, "<|calls|>": 3, "<|flush|>": 3}, {}, {"<|calls|>", "<|flush|>"}),
    ],
)  # fmt: skip
def test_end_tokens(tokens, keys, expected):
    assert ends(tokenizer(tokens, **keys)) == expected


@pytest.mark.parametrize("ids", [[290, 291], np.array([290, 291], np.uint32), (291, 290)])
def test_a_list_of_end_tokens(ids):
    tokens = dict.fromkeys((f"<{i}>" for i in range(30)), CONTROL)
    found = tokenizer(tokens, eos_token_id="<0>", eos_token_ids=ids)
    assert found.end_ids == {found._known.ids["<0>"], 290, 291}
    alone = tokenizer(tokens, eos_token_ids=ids)
    assert alone.end_ids == {290, 291} and alone.eos_id == ids[0]


def test_a_listed_end_token_ends_whatever_its_family_does():
    tokens = {"<|end|>": 3, "<|call|>": 3, "<|return|>": 3}
    listed = tokenizer(tokens, eos_token_ids=[tokenizer(tokens)._known.ids["<|end|>"]])
    assert "<|end|>" in ends(listed)


def test_kinds_that_careless_conversions_forget():
    tokens = {"<|eot_id|>": NORMAL, "<|fim_prefix|>": NORMAL, "<PRE>": USER_DEFINED, "<x>": NORMAL}
    found = tokenizer(tokens, eos_token_id="<x>")
    kinds = {text: found._known.kinds[i] for text, i in found._known.ids.items() if text in tokens}
    assert kinds == {
        "<|eot_id|>": CONTROL,
        "<|fim_prefix|>": NORMAL,  # the other one stands for the same purpose
        "<PRE>": CONTROL,
        "<x>": NORMAL,
    }
    tags = tokenizer({"<|tool_response>": CONTROL, "</s>": CONTROL})
    assert tags._known.kinds[tags._known.ids["</s>"]] == NORMAL


HARMONY = dict.fromkeys(
    ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"), CONTROL
)


def test_marks_of_harmony_are_shown_and_are_no_plain_text():
    found = tokenizer(HARMONY)
    text = "<|start|>he<|message|>ll<|end|>"
    ids = found.encode(text, add_special=False)
    assert len(ids) == 5
    assert found.decode(ids, skip_special=True) == text, "they are part of the visible text"
    assert found.decode(found.encode("<|return|>"), skip_special=True) == ""
    plain = found.encode(text, add_special=False, parse_special=False)
    assert not {found._known.ids[t] for t in HARMONY} & set(plain), "text of strangers is plain"
    assert found.decode(plain) == text


KEYS = (
    *("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "cls", "prefix"),
    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "suffix", "middle", "new"),
)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("value", ["text", 1.0, True, np.bool_(0), [1], {}, b"1", np.float32(2)])
def test_an_id_of_a_wrong_type_is_one_line(name, value):
    metadata = byte_pairs(**{f"tokenizer.ggml.{name}_token_id": value})
    with pytest.raises(TextError) as caught:
        Tokenizer(metadata)
    assert f"tokenizer.ggml.{name}_token_id is" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("value", [-1, 10**9, 2**64, np.uint32(0xFFFFFFFF)])
def test_an_id_outside_the_vocabulary_is_a_warning(name, value):
    with pytest.warns(UserWarning, match=rf"{name}_token_id = .* is outside the vocabulary"):
        found = Tokenizer(byte_pairs(**{f"tokenizer.ggml.{name}_token_id": value}))
    assert found.encode("hello")
    if name in ("bos", "eos"):
        assert getattr(found, f"{name}_id") is None


@pytest.mark.parametrize("key", ["eos_token_ids", "suppress_tokens"])
@pytest.mark.parametrize("value", ["text", [1.5], [True], ["1"], [[1]], 1.5])
def test_a_list_of_ids_of_a_wrong_type_is_one_line(key, value):
    with pytest.raises(TextError, match=f"tokenizer.ggml.{key} is"):
        Tokenizer(byte_pairs(**{f"tokenizer.ggml.{key}": value}))


def test_lists_of_ids_are_optional_and_leave_out_what_is_outside():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Tokenizer(byte_pairs()).suppressed
    with pytest.warns(UserWarning, match="suppress_tokens = 999999"):
        found = Tokenizer(byte_pairs(**{"tokenizer.ggml.suppress_tokens": [3, 999999]}))
    assert found.suppressed == {3}


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token", "add_space_prefix"])
@pytest.mark.parametrize("value", ["false", 0.0, [True]])
def test_a_switch_of_a_wrong_type_is_one_line(key, value):
    metadata = byte_pairs(**{f"tokenizer.ggml.{key}": value})
    with pytest.raises(TextError, match=f"tokenizer.ggml.{key} is .*, not true or false"):
        Tokenizer(metadata).decode([1])
