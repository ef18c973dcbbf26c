"""Tokenizer of the demo model and its GGUF file."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import gguf
import numpy as np
from demo_corpus import SEPARATOR, training_documents
from demo_model import DemoModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = (SEPARATOR, "<|im_start|>", "<|im_end|>")
# The pre-tokenizer that GGUF files call "qwen2".
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_NAMES = {
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.output": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def train_tokenizer(vocabulary: int, documents: int = 20_000) -> Tokenizer:
    """A byte-level BPE with `vocabulary` tokens in all, learnt from the first documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = islice(training_documents(1), documents)
    tokenizer.train_from_iterator((_plain(text) for text in texts), trainer)
    return tokenizer


def _plain(text: str) -> str:
    """Text without the marks of the chat format, which must not become ordinary tokens."""
    for mark in SPECIAL:
        text = text.replace(mark, " ")
    return text


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary is known to hold."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"{token!r} is not a token of this vocabulary")
    return found


def write_gguf(path: Path, model: DemoModel, tokenizer: Tokenizer, facts: dict[str, float]) -> None:
    """Writes weights (F16, norms F32), tokenizer and description; `facts` go under "demo." keys."""
    writer = gguf.GGUFWriter(path, "qwen3")
    _write_description(writer, facts)
    _write_hyperparameters(writer, model)
    write_tokenizer(writer, tokenizer)
    for name, weight in model.state_dict().items():
        values = weight.detach().numpy()
        writer.add_tensor(
            tensor_name(name), values.astype(np.float32 if values.ndim == 1 else np.float16)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_name(name: str) -> str:
    """The GGUF name of a parameter of `DemoModel`."""
    if name == "embed.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, layer, inner = name.split(".", 2)
    return f"blk.{layer}.{_NAMES[inner.removesuffix('.weight')]}.weight"


def _write_description(writer: gguf.GGUFWriter, facts: dict[str, float]) -> None:
    writer.add_type("model")
    writer.add_name("Demo stories")
    writer.add_basename("demo-stories")
    writer.add_size_label("2M")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_tags(["text-generation"])
    writer.add_description(
        "A small model of short stories and answers about Lantern Valley, trained on generated text"
    )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in facts.items():
        writer.add_float32(f"demo.{key}", value)


def _write_hyperparameters(writer: gguf.GGUFWriter, model: DemoModel) -> None:
    s = model.s
    writer.add_context_length(s.context)
    writer.add_embedding_length(s.hidden)
    writer.add_block_count(s.layers)
    writer.add_feed_forward_length(s.ff)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head)
    writer.add_value_length(s.head)
    writer.add_rope_freq_base(s.rope_base)
    writer.add_layer_norm_rms_eps(s.eps)
    writer.add_vocab_size(s.vocabulary)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    state = tokenizer.model.__getstate__()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([control if token in SPECIAL else normal for token, _ in vocabulary])
    writer.add_token_merges(_merges(state))
    writer.add_eos_token_id(token_id(tokenizer, "<|im_end|>"))
    writer.add_eot_token_id(token_id(tokenizer, "<|im_end|>"))
    writer.add_pad_token_id(token_id(tokenizer, SEPARATOR))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _merges(state: bytes) -> list[str]:
    return [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in json.loads(state)["merges"]
    ]
