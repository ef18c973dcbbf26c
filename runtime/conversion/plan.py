"""Which tensors a converted model has, in the order in which the checkpoint has theirs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from runtime.conversion import rules
from runtime.conversion.architectures import OUTSIDE, Conversion
from runtime.conversion.checkpoint import Checkpoint, Stored
from runtime.conversion.config import Config
from runtime.conversion.metadata import rope_frequencies
from runtime.conversion.pieces import Planned, Rows
from runtime.conversion.quantised import joined
from runtime.conversion.rules import Name
from runtime.conversion.words import original
from runtime.ops.dtypes import BF16, F16, F32, Q8_0, DType
from runtime.ops.errors import ModelError

OUTTYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
_PLAIN = ("F32", "F16", "BF16", "F64")
_SKIPPED = re.compile(r"(model\.)?visual\..*|.*\.rotary_emb\.inv_freq|.*\.(k|v|input)_scale")
_AHEAD = {
    "fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head.norm",
}  # fmt: skip
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or expert
_BIASES = {"attention_bias": "self_attn.q_proj.bias", "mlp_bias": "mlp.up_proj.bias"}
_PARTS = re.compile(
    r"(?:model\.)?(?:layers\.(?P<block>\d+)\.)?(?P<stem>.+?)(?P<tail>\.weight|\.bias)?"
)
_MTP = re.compile(r"(?:model\.)?mtp\.(?:layers\.(\d+)\.(.+)|(\w+)(\.\w+))")
_EXPERT = re.compile(r"(mlp\.experts)\.(\d+)\.(\w+)")
_FLOAT32 = re.compile(r".*_norm\.weight|.*\.(ffn_gate_inp|ffn_gate_inp_shexp|ssm_conv1d)\.weight")


def dtype_of(tensor: Planned, wanted: DType) -> DType:
    """The type a tensor has in a file of mostly `wanted`."""
    if tensor.dtype is not None:
        return tensor.dtype
    name = tensor.name
    if len(tensor.shape) < 2 or not name.endswith(".weight") or _FLOAT32.fullmatch(name):
        return F32
    return F16 if tensor.shape[-1] % wanted.block else wanted


def guessed(checkpoint: Checkpoint) -> DType:
    """The type of most of a checkpoint, by its first matrix of 16 bits."""
    kinds = (t.kind for t in checkpoint.tensors.values() if len(t.shape) > 1)
    return next((BF16 if k == "BF16" else F16 for k in kinds if k in ("BF16", "F16")), F16)


class Place(NamedTuple):
    """Where a tensor of a checkpoint belongs.

    name: in the file; without a stem where it is not known. stem: in the checkpoint, the number
    of an expert replaced. expert: that number.
    """

    name: Name
    stem: str
    expert: int | None


@dataclass
class Planner:
    """Turns the tensors of a checkpoint into those of a file, one after the other."""

    checkpoint: Checkpoint
    conversion: Conversion
    config: Config
    mtp: bool
    blocks: int = 0
    _experts: dict[int, dict[tuple[str, int], Any]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def __post_init__(self) -> None:
        self._layers = self.config.size("num_hidden_layers")
        self.blocks = self._layers + (self._ahead() if self.mtp else 0)
        self._count = 0

    def _ahead(self) -> int:
        """Blocks that predict further tokens: those that the checkpoint has tensors of."""
        found = map(_MTP.fullmatch, self.checkpoint.tensors) if self.conversion.ahead else ()
        return max((int(match[1] or 0) + 1 for match in found if match), default=0)

    def plan(self) -> list[Planned]:
        """All tensors. ModelError names one that is not known or does not fit."""
        weights = joined(self.checkpoint, self.config)
        made = [*self._packed(weights), *self._frequencies()]
        for name, weight in weights.items():
            made += self._made(name, weight)
        for block, left in self._experts.items():
            have = min(left.values(), key=lambda w: w.label).label
            raise ModelError(
                f"{have}: layer {block} has {len(left)} of {3 * self._count} matrices of experts"
            )
        self._check_tied(made)
        self._check_biases()
        return made

    def _packed(self, weights: dict[str, Any]) -> Iterator[Planned]:
        """Tensors in MXFP4, which come first and are taken out of `weights`."""
        for name in [n for n in weights if n.endswith("_proj_blocks")]:
            other = name.removesuffix("blocks") + "scales"
            if other not in weights:
                raise ModelError(f"{weights[name].label} has no scales ({other})")
            place = self._place(name.removesuffix("_blocks"))
            codes, scales = weights.pop(name), weights.pop(other)
            if place is None or not place.name.stem:
                raise self._unknown(codes)
            yield from rules.mxfp4(codes, scales, place.name)

    def _frequencies(self) -> Iterator[Planned]:
        if self.config.rope["rope_type"] == "llama3":
            values = rope_frequencies(self.config)
            rows = Rows(_Given(values), range(len(values)))
            yield Planned("rope_freqs.weight", values.shape, [rows])

    def _made(self, name: str, weight: Any) -> Sequence[Planned]:
        name = name.replace("language_model.", "")
        place = None if _SKIPPED.fullmatch(name) else self._place(name)
        if place is None:
            return []
        if not place.name.stem:
            raise self._unknown(weight)
        if isinstance(weight, Stored) and weight.kind not in _PLAIN:
            raise ModelError(
                f"{weight.label} is of type {weight.kind}: a quantised checkpoint that is not "
                "converted; give the original in bf16, f16 or f32"
            )
        if place.expert is not None:
            return self._gather(place.name, place.expert, weight)
        rule = self.conversion.rules.get(place.stem, rules.copied)
        return rule(weight, place.name, self.config)

    def _place(self, name: str) -> Place | None:
        """Where a tensor belongs; None for one that is left out."""
        ahead = _MTP.fullmatch(name)
        if ahead and self.conversion.ahead:
            if not self.mtp:
                return None
            inner = ahead[2] or _AHEAD.get(ahead[3], ahead[3]) + ahead[4]
            name = f"layers.{self._layers + int(ahead[1] or 0)}.{inner}"
        match = _PARTS.fullmatch(name)
        assert match is not None  # the pattern takes any text
        stem, tail = match["stem"], match["tail"] or ""
        if expert := _EXPERT.fullmatch(stem):
            stem = f"{expert[1]}.#.{expert[3]}"
        if not tail and stem.endswith("_proj"):
            tail = ".weight"  # a parameter of experts, all together
        names = self.conversion.names if match["block"] else OUTSIDE
        block = f"blk.{int(match['block'])}." if match["block"] else ""
        return Place(
            Name(block, names.get(stem, ""), tail), stem, int(expert[2]) if expert else None
        )

    def _unknown(self, weight: Any) -> ModelError:
        return ModelError(
            f"{weight.label} is not known for {self.conversion.architecture}: it would be left "
            "out, and the converted model answer differently"
        )

    def _gather(self, name: Name, number: int, weight: Any) -> list[Planned]:
        """The experts of a layer, once the last of their matrices is there."""
        block, self._count = int(name.block.split(".")[1]), self.config.size("num_experts")
        left = self._experts[block]
        left[name.stem, number] = weight
        if len(left) < 3 * self._count:
            return []
        del self._experts[block]
        try:
            return [
                rules.stacked([left[stem, i] for i in range(self._count)], name._replace(stem=stem))
                for stem in ("ffn_down_exps", "ffn_gate_exps", "ffn_up_exps")
            ]
        except KeyError as error:
            stem, i = error.args[0]
            whole = original(f"blk.{block}.{stem}.weight", self.conversion, self.checkpoint.tensors)
            raise ModelError(
                f"{weight.label}: tensor '{whole.replace('#', str(i))}' is missing"
            ) from None

    def _check_tied(self, made: list[Planned]) -> None:
        names = {tensor.name for tensor in made}
        if "output.weight" not in names and not self.config.get("tie_word_embeddings", False):
            raise ModelError(
                f"{self.checkpoint.folder}: no tensor lm_head.weight, and tie_word_embeddings is "
                "not true; the checkpoint is incomplete"
            )

    def _check_biases(self) -> None:
        names = self.checkpoint.tensors
        kinds = {_NUMBER.sub("#", name) for name in names if name.endswith("bias")}
        for name, end in product(names, (".bias", "_bias")):
            bias = name.removesuffix(".weight").removesuffix("_blocks") + end
            if bias not in names and _NUMBER.sub("#", bias) in kinds:
                raise ModelError(
                    f"{self.checkpoint.folder}: tensor '{bias}' is missing, which other layers have"
                )
        for setting, ending in _BIASES.items():
            told = self.config.get(setting)
            if told is True and not any(n.endswith(ending) for n in self.checkpoint.tensors):
                raise ModelError(
                    f"{self.config.path}: {setting} = True, but no tensor has a name that ends "
                    f"with {ending}"
                )


class _Given:
    """Numbers that no checkpoint holds, as a matrix of one column."""

    label, row_bytes = "rope_freqs.weight", 4

    def __init__(self, values: np.ndarray) -> None:
        self._values, self.shape = values, values.shape

    def take(self, index: np.ndarray) -> np.ndarray:
        """These of the numbers."""
        return self._values[index]
