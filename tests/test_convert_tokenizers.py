"""Tokenizers of checkpoints: how words are cut, special tokens, templates, SentencePiece."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA3, ROWS, change, dump, llama, tokenizer

import runtime
from runtime.conversion import pretokenizer
from runtime.gguf.reader import open_gguf
from runtime.text.pretokenize import PRE_TOKENIZERS, PreTokenizer
from runtime.text.special_ids import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from runtime.text.tokenizer import Tokenizer

LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# cut alike whatever the text: the last lines and spaces are one piece in both
ALIKE = ("qwen2", "bailingmoe")


def in_json(way: PreTokenizer) -> dict[str, Any]:
    """A way of cutting as a tokenizer.json has it."""
    steps = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in way.patterns
    ]
    letters = {**LETTERS, "use_regex": False}
    sequence = {"type": "Sequence", "pretokenizers": [*steps, letters]}
    return {"pre_tokenizer": sequence, "model": {}}


def test_the_probe_tells_all_ways_apart() -> None:
    seen: dict[tuple[str, ...], PreTokenizer] = {}
    for name, way in PRE_TOKENIZERS.items():
        other = seen.setdefault(tuple(pretokenizer.cuts(way)), way)
        same = other.patterns == way.patterns or way.raw or other.raw
        assert same or {PRE_TOKENIZERS[n].patterns for n in ALIKE} == {
            other.patterns, way.patterns,
        }, name  # fmt: skip


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "qwen35", "gpt-4o", "tekken"])
def test_a_way_is_found_by_what_it_does(name: str) -> None:
    assert pretokenizer.names_of(in_json(PRE_TOKENIZERS[name]), "x")[0] == name


def test_a_way_may_be_written_otherwise() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    words = {**LETTERS, "use_regex": True}
    for steps, name in (([digits, words], "smollm"), ([words], "gpt-2")):
        spec = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
        assert pretokenizer.names_of(spec, "x")[0] == name
    assert pretokenizer.names_of(tokenizer(LLAMA3), "x")[0] == "llama-bpe"


def test_whole_words_before_merges_or_not(tmp_path: Path) -> None:
    """ "xyz" is no merge: with ignore_merges it is one token, else letters."""
    folder = llama(tmp_path / "hf")
    spec = tokenizer()
    spec["model"]["vocab"]["xyz"] = 260
    for ignored, name in ((True, "llama-bpe"), (False, "dbrx")):
        spec["model"]["ignore_merges"] = ignored
        dump(folder / "tokenizer.json", spec)
        file = open_gguf(runtime.convert(folder, tmp_path / "m.gguf"))
        assert file.metadata["tokenizer.ggml.pre"] == name
        assert (Tokenizer.from_gguf(file).encode("xyz") == [260]) is ignored


def converted(folder: Path) -> dict[str, Any]:
    """The metadata of a checkpoint's file."""
    return dict(open_gguf(runtime.convert(folder, folder.parent / "m.gguf")).metadata)


def test_tokens_and_kinds(tmp_path: Path) -> None:
    found = converted(llama(tmp_path / "hf"))
    texts, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert [texts[i] for i in (0, 256, 258, 259, 260, ROWS - 1)] == [
        "!", "th", "<|end|>", "<tool>", "[PAD260]", f"[PAD{ROWS - 1}]",
    ]  # fmt: skip
    assert [kinds[i] for i in (0, 258, 259, 260)] == [NORMAL, CONTROL, USER_DEFINED, UNUSED]
    assert [*found["tokenizer.ggml.merges"]] == ["t h", "th e"]
    assert found["tokenizer.ggml.eos_token_id"] == 258
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_merges_as_texts_and_with_spaces(tmp_path: Path) -> None:
    folder, spec = llama(tmp_path / "hf"), tokenizer()
    spec["model"]["merges"] = ["t h", "th e"]
    dump(folder / "tokenizer.json", spec)
    assert [*converted(folder)["tokenizer.ggml.merges"]] == ["t h", "th e"]


def template(*pair: str) -> dict[str, Any]:
    """A post-processor: A and B are texts, all else special tokens."""
    items = [
        {"Sequence": {"id": p, "type_id": 0}} if p in "AB" else
        {"SpecialToken": {"id": p, "type_id": 0}} for p in pair
    ]  # fmt: skip
    single = items[: next(i for i, p in enumerate(pair) if p == "A") + 1]
    special = {p: {"id": p, "ids": [258], "tokens": [p]} for p in pair if p not in "AB"}
    ends = [items[-1]] if pair[-1] not in "AB" else []
    return {
        "type": "TemplateProcessing", "single": single + ends, "pair": items,
        "special_tokens": special,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("processor", "adds"),
    [
        (template("<|end|>", "A", "<|end|>", "B"), {"bos": True, "sep": True}),
        (template("<tool>", "A", "<tool>", "B"), {"bos": True, "sep": False}),
        (template("<|end|>", "A", "B"), {"bos": True}),
        (template("A", "<|end|>", "B", "<|end|>"), {"eos": True, "sep": False}),
        (LETTERS | {"use_regex": False}, {"bos": False, "eos": False}),
    ],
)
def test_what_is_put_around_a_text(
    tmp_path: Path, processor: dict[str, Any], adds: dict[str, bool]
) -> None:
    folder = llama(tmp_path / "hf")
    change(folder / "tokenizer.json", post_processor=processor)
    dump(folder / "tokenizer_config.json", {"eos_token": {"content": "<|end|>"}})
    found = converted(folder)
    names = ("bos", "eos", "sep")
    keys = {n: found.get(f"tokenizer.ggml.add_{n}_token") for n in names}
    assert {n: value for n, value in keys.items() if value is not None} == adds


def test_ids_of_the_config_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    folder = llama(tmp_path / "hf")
    change(folder / "config.json", bos_token_id=257, eos_token_id=7, pad_token_id=[1, 2])
    found = converted(folder)
    assert found["tokenizer.ggml.bos_token_id"] == 257
    assert found["tokenizer.ggml.eos_token_id"] == 258
    assert "tokenizer.ggml.padding_token_id" not in found


def test_chat_templates(tmp_path: Path) -> None:
    folder = llama(tmp_path / "hf")
    (folder / "chat_template.jinja").write_text("from a file")
    assert converted(folder)["tokenizer.chat_template"] == "from a file"
    named = [{"name": "default", "template": "plain"}, {"name": "tool-use", "template": "tools"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    found = converted(folder)
    assert found["tokenizer.chat_template"] == "plain"
    assert found["tokenizer.chat_template.tool_use"] == "tools"
    assert [*found["tokenizer.chat_templates"]] == ["tool_use"]


def sentencepiece(*pieces: tuple[str, float, int]) -> bytes:
    """A ModelProto of these pieces, and a field that does not matter."""
    raw = b""
    for text, score, kind in pieces:
        inner = b"\x0a" + bytes([len(text.encode())]) + text.encode()
        inner += b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        raw += b"\x0a" + bytes([len(inner)]) + inner
    return raw + b"\x12\x02\x08\x01"


BYTES = [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
MERGED = {"▁t": -0.0, "he": -1.0, "▁the": -2.0}
CHARACTERS = [(c, -10.0, NORMAL) for c in "▁the"]
PIECES = [
    ("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), *BYTES,
    *((text, score, NORMAL) for text, score in MERGED.items()), *CHARACTERS,
]  # fmt: skip


def spm_folder(tmp_path: Path) -> Path:
    folder = llama(tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    special = {"content": "<|im_end|>", "special": True}
    dump(folder / "tokenizer_config.json", {"added_tokens_decoder": {"280": special}})
    return folder


def test_sentencepiece(tmp_path: Path) -> None:
    folder = spm_folder(tmp_path)
    (folder / "tokenizer.model").write_bytes(sentencepiece(*PIECES))
    found = converted(folder)
    assert found["tokenizer.ggml.model"] == "llama"
    kinds = found["tokenizer.ggml.token_type"]
    assert [kinds[i] for i in (0, 1, 3, 259, 280, 281)] == [
        UNKNOWN, CONTROL, BYTE, NORMAL, CONTROL, UNUSED,
    ]  # fmt: skip
    assert found["tokenizer.ggml.scores"][260] == -1
    assert Tokenizer(found).encode("the the", add_special=False) == [261, 261]
    (folder / "tokenizer.model").write_bytes(sentencepiece(*PIECES)[:-3])
    with pytest.raises(runtime.TextError, match=r"tokenizer.model: no SentencePiece model"):
        converted(folder)


def test_sentencepiece_in_json_is_ranked_by_its_merges(tmp_path: Path) -> None:
    folder = spm_folder(tmp_path)
    model = {
        "type": "BPE", "byte_fallback": True,
        "vocab": {text: i for i, (text, _, _) in enumerate(PIECES)},
        "merges": [["▁", "t"], ["h", "e"], ["▁t", "he"]],
    }  # fmt: skip
    dump(folder / "tokenizer.json", {"model": model, "added_tokens": []})
    found = converted(folder)
    assert [found["tokenizer.ggml.scores"][i] for i in (259, 260, 261)] == [0, -1, -2]
    assert Tokenizer(found).encode("the he", add_special=False) == [261, 262, 260]
