"""Which layers of a hybrid model are recurrent: what the metadata says against the tensors."""

from __future__ import annotations

from runtime.errors import ModelError
from runtime.models.keys import Keys
from runtime.models.step import Weights

INTERVAL = 4  # every fourth layer has attention where a file does not say


def recurrent_layers(keys: Keys, w: Weights, layers: int) -> tuple[bool, ...]:
    """Which layers are recurrent; ModelError where metadata and tensors contradict each other."""
    if layers < 1:
        raise ModelError(f"{keys.source}: nextn_predict_layers leaves no layers of block_count")
    interval = keys.count("full_attention_interval", INTERVAL)
    listed = keys.counts("attention.recurrent_layers")[:layers]
    told: dict[str, tuple[bool, ...]] = {}
    if listed:
        told["attention.recurrent_layers"] = tuple(map(bool, listed))
    if not listed or keys.has("full_attention_interval"):
        told[f"full_attention_interval = {interval}"] = tuple(
            (i + 1) % interval != 0 for i in range(layers)
        )
    for key, kinds in told.items():
        if len(kinds) != layers:
            raise ModelError(f"{keys.source}: {key} has {len(kinds)} entries, not {layers}")
        for i, recurrent in enumerate(kinds):
            other = f"blk.{i}.attn_q.weight" if recurrent else f"blk.{i}.ssm_out.weight"
            if other in w.tensors:
                raise ModelError(
                    f"{keys.source}: {keys.architecture}.{key} makes layer {i} "
                    f"{'recurrent' if recurrent else 'an attention layer'}, but the file has "
                    f"tensor {other!r}: the metadata contradicts the tensors"
                )
    return next(iter(told.values()))
