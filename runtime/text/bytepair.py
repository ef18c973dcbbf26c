"""Byte-pair vocabularies ("gpt2" in GGUF files): words first, then merges by rank.

Tokens are written in byte letters: every byte is one printable character, as in GPT-2. The
merging itself is done by the `tokenizers` library, from the file's own merges.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from runtime.ops.errors import TextError
from runtime.text.pretokenize import PreTokenizer
from runtime.text.vocabulary import ESCAPED_SPACE, Vocabulary


def _byte_letters() -> dict[str, int]:
    """letter -> byte. Printable Latin-1 characters stand for themselves, the rest follow 0x100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable}
    return letters | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_LETTERS = _byte_letters()


def letters_to_bytes(text: str) -> bytes:
    """The bytes that a token in byte letters stands for; other characters count as UTF-8."""
    try:
        return bytes([BYTE_LETTERS[c] for c in text])
    except KeyError:
        return text.encode("utf-8", "replace")


def encoder(
    vocabulary: Vocabulary, merges: Iterable[str], pre: PreTokenizer
) -> Callable[[str], list[int]]:
    """A function from text to ids. `merges` are "left right", best first.

    Raises TextError when the merges cannot be read.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    steps: list = [pre_tokenizers.Split(Regex(p), "isolated") for p in pre.patterns]
    if not pre.raw:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(_model(vocabulary, merges, pre))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def encode(text: str) -> list[int]:
        if pre.raw:
            text = text.replace(" ", ESCAPED_SPACE)
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode


def _model(vocabulary: Vocabulary, merges: Iterable[str], pre: PreTokenizer):
    from tokenizers import models

    ids = dict(vocabulary.ids)
    # Half a million small objects: the collector would walk all of them several times.
    with _no_collection():
        pairs = [_pair(merge) for merge in merges]
        try:
            return models.BPE(ids, pairs, ignore_merges=pre.whole_words, byte_fallback=pre.raw)
        except Exception:
            known = [(a, b) for a, b in pairs if a in ids and b in ids and a + b in ids]
        try:
            return models.BPE(ids, known, ignore_merges=pre.whole_words, byte_fallback=pre.raw)
        except Exception as error:
            raise TextError(f"tokenizer.ggml.merges cannot be used: {error}") from None


def _pair(merge: str) -> tuple[str, str]:
    # from 1, because the left half may itself begin with a space
    cut = merge.find(" ", 1)
    if cut < 0:
        raise TextError(f"tokenizer.ggml.merges has {merge!r}, which is not two halves")
    return merge[:cut], merge[cut + 1 :]


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
