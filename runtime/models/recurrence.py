"""Which layers of a hybrid model are recurrent: what the metadata says against the tensors."""

from __future__ import annotations

from runtime.errors import ModelError
from runtime.models.keys import Keys
from runtime.models.weights import Weights

INTERVAL = 4  # every fourth layer has attention where a file does not say


def recurrent_layers(keys: Keys, w: Weights, layers: int) -> tuple[bool, ...]:
    """Which layers are recurrent; ModelError where metadata and tensors contradict each other."""
    key, kinds = _told(keys, layers)
    if len(kinds) != layers:
        raise ModelError(f"{keys.source}: {key} has {len(kinds)} entries, not {layers}")
    for i, recurrent in enumerate(kinds):
        other = f"blk.{i}.attn_q.weight" if recurrent else f"blk.{i}.ssm_out.weight"
        if other in w:
            raise ModelError(
                f"{keys.source}: {keys.architecture}.{key} makes layer {i} "
                f"{'recurrent' if recurrent else 'an attention layer'}, but the file has "
                f"tensor {other!r}: the metadata contradicts the tensors"
            )
    return kinds


def _told(keys: Keys, layers: int) -> tuple[str, tuple[bool, ...]]:
    """The key that decides, and its answer: a list goes before the interval.

    Current converters write the interval by default, whatever the layers are.
    """
    interval = keys.count("full_attention_interval", INTERVAL)
    if listed := keys.counts("attention.recurrent_layers"):
        return "attention.recurrent_layers", tuple(map(bool, listed[:layers]))
    heads = keys.counts("attention.head_count_kv")[:layers]
    if len(heads) > 1 and 0 in heads:  # Ollama's way to say it
        return "attention.head_count_kv", tuple(n == 0 for n in heads)
    kinds = tuple((i + 1) % interval != 0 for i in range(layers))
    return f"full_attention_interval = {interval}", kinds
