"""Small vocabularies for tests, as the metadata of a GGUF file would hold them."""

from __future__ import annotations

from typing import Any

from runtime.text.bytepair import BYTE_LETTERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


# Scores of a small vocabulary for tokenizers that merge by score.
WORDS = {"▁": -1.0, "a": -2.0, "b": -3.0, "▁a": -0.5, "ab": -1.5, "ba": -1.6, "aa": -1.2}
WORDS |= {"aba": -0.9, "aaa": -0.8, "▁▁": -0.7, "▁aba": -0.6, "bb": -1.2, "é": -4.0}


def byte_pairs(pre: str = "gpt-2", **extra: Any) -> dict[str, Any]:
    """All byte letters, a few merges, three control tokens and one user-defined token."""
    merges = [
        "h e",
        "l l",
        "he ll",
        "hell o",
        "Ġ w",
        "o r",
        "Ġw or",
        "l d",
        "Ġwor ld",
        "1 2",
        "12 3",
    ]
    merges += ["Ġ Ġ", "ĠĠ ĠĠ", "Ġ hello"]
    tokens = [*BYTE_LETTERS, *(m.replace(" ", "") for m in merges)]
    kinds = [NORMAL] * len(tokens)
    special = {"<|bos|>": CONTROL, "<|im_end|>": CONTROL, "<|im_start|>": CONTROL, "<tag>": 4}
    tokens += special
    kinds += special.values()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|bos|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        **extra,
    }


def scored(words: dict[str, float], model: str = "llama", **extra: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: <unk> <s> </s>, 256 bytes, then `words` with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * 259 + list(words.values()),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        **extra,
    }


def charsmap(texts: dict[str, str]) -> bytes:
    """A character map of SentencePiece models: a double array of the keys, then the texts."""
    keys = sorted((key.encode(), text.encode()) for key, text in texts.items())
    units, taken, values = {0: 0}, {0}, b""

    def place(node: int, parent: int, prefix: bytes) -> None:
        """Give the children of a node a free block and say in its unit how far away that is."""
        nonlocal values
        rest = [(k[len(prefix) :], v) for k, v in keys if k.startswith(prefix)]
        labels = sorted({k[0] for k, _ in rest if k} | ({0} if rest[0][0] == b"" else set()))
        block = next(
            b for b in range(256, 1 << 20, 256)
            if not any((b ^ label) in taken for label in range(256))
        )  # fmt: skip
        taken.update(block ^ label for label in range(256))
        distance = parent ^ block
        assert distance < 1 << 21, "small maps only"
        units[node] |= distance << 10
        for label in labels:
            child = block ^ label
            if label == 0:
                units[node] |= 0x100
                units[child] = 0x80000000 | len(values)
                values += rest[0][1] + b"\0"
            else:
                units[child] = label
                place(child, child, prefix + bytes([label]))

    place(0, 0, b"")
    array = [units.get(i, 0) for i in range(max(taken) + 1)]
    packed = b"".join(unit.to_bytes(4, "little") for unit in array)
    return len(packed).to_bytes(4, "little") + packed + values
