"""Nothing that a file says is ignored in silence.

Every tensor and every metadata key is read by the model, known to change nothing, or refused by
name. What was read is what `Keys` and `Weights` recorded and what stands in the model's graph, so a
new architecture gets the check for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from runtime.errors import ModelError
from runtime.models.keys import Keys
from runtime.models.weights import Weights
from runtime.ops import Graph
from runtime.ops.tensor import stored_name

_SHOWN = 3  # names in a message

# Tensors that take no part in the next token of a text.
_SPARE_TENSORS = (
    r"(v|a|mm)\..*",  # the encoder of images or sound, and its projector (Ollama's files)
    r"mtp\..*",  # predict further tokens ahead
    r".*\.attn_rot_embd(\.weight)?",  # rotary frequencies, which follow from the metadata
    r".*\.input_scale",  # calibration of 4-bit activations: they are not rounded that way here
)

# Keys under the architecture's prefix that change no number.
_SPARE_KEYS = (
    "vocab_size",  # the rows of the embedding decide
    "tensor_data_layout",  # of the file it was converted from
    "rope.scaling.finetuned",  # how it was trained
    "pooling_type",  # of embeddings
    "attention.layer_norm_epsilon",  # of norms with a mean, which no model here has
    r"(vision|audio|mtp)\..*",  # of the parts whose tensors are spare
    r"(image|video|audio|vision_start|vision_end)_token_id",
    r"split\..*",  # of a model in several files
)

# Tokenizer keys that runtime.text reads, or that no tokenizer needs.
_TOKENIZER_KEYS = (
    r"ggml\.(model|pre|tokens|token_type|scores|merges|precompiled_charsmap)",
    r"ggml\.(add_\w+_token|add_space_prefix|remove_extra_whitespaces|\w+_token_ids?)",
    r"ggml\.(suppress_tokens|token_type_count|added_tokens)",  # BERT's; among the tokens as well
    r"chat_templates?(\..*)?",
    r"huggingface\.json|rwkv\.world",
)

# What nothing here implements, with the value that changes nothing; 0 stands for unset.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "router_logit_softcapping": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "use_parallel_residual": False,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "leading_dense_block_count": 0,
    "moe_every_n_layers": 1,
    "interleave_moe_layer_step": 1,
    "n_deepstack_layers": 0,
    "rope.scaling.alpha": 1,
    "tokenizer.ggml.normalizer.lowercase": False,
    "tokenizer.ggml.normalizer.strip_accents": False,
}


def refuse_unread(keys: Keys, w: Weights, graph: Graph, layers: int) -> None:
    """ModelError that names what the file says and a model of so many layers does not read."""
    leaves = [leaf for leaf in graph.leaves("weight") if "source" not in leaf.attrs]
    used = w.looked_up | set(map(stored_name, leaves))
    stray = [n for n in w.tensors if n not in used and not _spare_tensor(n, w, keys, layers)]
    if stray:
        raise ModelError(
            f"{keys.source}: {_listed(stray, 'tensor')} of this file {_are(stray)} not used by "
            f"architecture {keys.architecture!r} as it is known here, so its answers would be "
            "wrong: convert the model with llama.cpp's converter, or ask for support of it"
        )
    unknown = [key for key in _keys_that_matter(keys) if not _neutral(keys, key)]
    if unknown:
        first = keys.metadata[unknown[0]]
        value = f" = {first!s:.40}" if len(unknown) == 1 else ""
        raise ModelError(
            f"{keys.source}: {_listed(unknown, 'metadata key')}{value} is not implemented for "
            f"architecture {keys.architecture!r}: this model cannot be run correctly yet"
        )


def _spare_tensor(name: str, w: Weights, keys: Keys, layers: int) -> bool:
    """Whether a tensor takes no part: by its name, or in a block behind the layers (NextN)."""
    if any(re.fullmatch(pattern, name) for pattern in _SPARE_TENSORS):
        return True
    block = re.match(r"blk\.(\d{1,9})\.", name)
    if block is None or int(block[1]) < layers:
        return False
    ahead = f"{block[0]}nextn."
    return int(block[1]) < keys.count("block_count") or any(n.startswith(ahead) for n in w.tensors)


def _keys_that_matter(keys: Keys) -> Iterable[str]:
    """Full names of the architecture's and the tokenizer's keys that nothing reads or knows."""
    for prefix, spare in ((f"{keys.architecture}.", _SPARE_KEYS), ("tokenizer.", _TOKENIZER_KEYS)):
        read = keys.read if spare is _SPARE_KEYS else ()
        for name in keys.metadata:
            key = name.removeprefix(prefix)
            if key != name and key not in read and not any(re.fullmatch(p, key) for p in spare):
                yield name


def _neutral(keys: Keys, name: str) -> bool:
    """Whether a key has the value that changes nothing, perhaps once for each layer."""
    neutral, value = _NEUTRAL.get(name.removeprefix(f"{keys.architecture}.")), keys.metadata[name]
    values = value.tolist() if hasattr(value, "tolist") else [value]
    if isinstance(neutral, bool):
        return all(v is neutral for v in values)
    return neutral is not None and all(type(v) is not bool and v in (neutral, 0) for v in values)


def _listed(names: list[str], what: str) -> str:
    """ "tensor 'a'", or "5 tensors ('a', 'b', 'c' and more)"."""
    shown = ", ".join(ascii(n if len(n) <= 80 else n[:77] + "...") for n in names[:_SHOWN])
    if len(names) == 1:
        return f"{what} {shown}"
    return f"{len(names)} {what}s ({shown}{' and more' if len(names) > _SHOWN else ''})"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
