"""The mixes of llama-quantize: a type for most matrices, and others where errors cost more.

A mix names rules for roles. The first rule of a role that holds for a tensor's place gives its
type; where none does, it is the base type of the mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from runtime.ops.dtypes import DTYPES, DType
from runtime.ops.errors import OptionError, shown


class Facts(NamedTuple):
    """What mixes ask about a model. sharing: heads of queries for each of keys in layer 0."""

    layers: int
    sharing: int
    experts: int
    large: bool = False  # 80 layers: attn_v is small beside the rest

    @staticmethod
    def of(metadata: Mapping[str, Any]) -> Facts:
        """Those that the metadata of a model's file tells."""
        name = metadata.get("general.architecture")

        def first(key: str, default: int = 0) -> int:
            values = np.ravel(metadata.get(f"{name}.{key}", default))
            return int(values[0]) if values.size else default

        layers, heads = first("block_count"), first("attention.head_count")
        keys = first("attention.head_count_kv", heads)
        large = layers == 80 and (name == "qwen2" or (name == "llama" and keys != heads))
        return Facts(layers, heads // keys if keys else 0, first("expert_count"), large)


class Place(NamedTuple):
    """Where a tensor stands: the `at`th of `of` of its role, in which model."""

    at: int
    of: int
    model: Facts
    has_imatrix: bool


When = Callable[[Place], bool]
Rule = tuple[When, str]


def more_bits(i: int, n: int) -> bool:
    """The first eighth, the last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _more(place: Place) -> bool:
    return more_bits(place.at, place.of)


def _first(share: int) -> When:
    return lambda place: place.at < place.of // share


def _below(count: int) -> When:
    return lambda place: place.at < count


def _middle(place: Place) -> bool:
    return place.of // 8 <= place.at < 7 * place.of // 8


def _always(place: Place) -> bool:
    return True


def _shared(place: Place) -> bool:
    return place.model.sharing >= 4


def _bare(place: Place) -> bool:
    return not place.has_imatrix


def _both(*parts: When) -> When:
    return lambda place: all(part(place) for part in parts)


def _eight(place: Place) -> bool:
    return place.model.experts == 8


@dataclass(frozen=True)
class Mix:
    """file_type: the number of `general.file_type`. output: of the output matrix, and of the
    embedding where that is the output matrix too; embedding: else ("": base).

    roles: value (attn_v and its like), attn_k, attn_q, attn_output, ffn_down, ffn_gate, ffn_up.
    """

    file_type: int | None
    base: str
    output: str = "q6_k"
    embedding: str = ""
    roles: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    tiny: bool = False  # of those below 3 bits, which count and keep otherwise
    experts: str = ""  # of 3-D tensors, whatever their role


def _rules(**roles: str | tuple[Rule, ...]) -> dict[str, tuple[Rule, ...]]:
    return {
        role: ((_always, rules),) if isinstance(rules, str) else rules
        for role, rules in roles.items()
    }


_EIGHT_OUTPUT = (_eight, "q5_k")  # attn_output is small beside eight experts


def _legacy(file_type: int, base: str, first: str) -> Mix:
    guarded = (_both(_first(8), lambda place: place.has_imatrix), first)
    return Mix(file_type, base, roles=_rules(ffn_down=(guarded,)))


def _iq4(file_type: int, base: str) -> Mix:
    return Mix(file_type, base, roles=_rules(
        value=((_shared, "q5_k"),), ffn_down=((_both(_first(8), _bare), "q5_k"),),
        attn_output=(_EIGHT_OUTPUT,),
    ))  # fmt: skip


def _tiny(file_type: int, base: str, good: str, out: str) -> Mix:
    """good: what the smallest important tensors get; out: attn_output."""
    busy = _shared, "q4_k"
    many = (lambda place: place.model.experts >= 4), "q4_k"
    return Mix(file_type, base, "q5_k", good, _rules(
        value=(busy, many, (_always, good)), attn_k=((_eight, "q4_k"),),
        ffn_down=((_first(8), good),), attn_output=(_EIGHT_OUTPUT, (_always, out)),
    ), tiny=True)  # fmt: skip


MIXES = {
    "F32": Mix(0, "f32", "f32"),
    "F16": Mix(1, "f16", "f16"),
    "BF16": Mix(32, "bf16", "bf16"),
    "Q8_0": Mix(7, "q8_0", "q8_0"),
    "Q4_0": _legacy(2, "q4_0", "q4_1"),
    "Q4_1": Mix(3, "q4_1"),
    "Q5_0": _legacy(8, "q5_0", "q5_1"),
    "Q5_1": Mix(9, "q5_1"),
    "Q2_K": Mix(10, "q2_k", roles=_rules(
        value=((_shared, "q4_k"), (_always, "q3_k")), ffn_down="q3_k",
        attn_output=(_EIGHT_OUTPUT, (_always, "q3_k")),
    )),
    "Q2_K_S": Mix(21, "q2_k", roles=_rules(
        value=((_shared, "q4_k"),), ffn_down=((_first(8), "q4_k"),),
    )),
    "Q3_K_S": Mix(11, "q3_k", roles=_rules(attn_output=(_EIGHT_OUTPUT,))),
    "Q3_K_M": Mix(12, "q3_k", roles=_rules(
        value=((_below(2), "q5_k"), (_always, "q4_k")),
        ffn_down=((_first(16), "q5_k"), (_always, "q4_k")),
        attn_output=(_EIGHT_OUTPUT, (_always, "q4_k")),
    )),
    "Q3_K_L": Mix(13, "q3_k", roles=_rules(
        value="q5_k", ffn_down="q5_k",
        attn_output=((_eight, "q3_k"), (_always, "q5_k")),
    )),
    "Q4_K_S": Mix(14, "q4_k", roles=_rules(
        value=((_below(4), "q5_k"),), ffn_down=((_first(8), "q5_k"),),
        attn_output=(_EIGHT_OUTPUT,),
    )),
    "Q4_K_M": Mix(15, "q4_k", roles=_rules(
        value=((_more, "q6_k"),), ffn_down=((_more, "q6_k"),), attn_output=(_EIGHT_OUTPUT,),
    )),
    "Q5_K_S": Mix(16, "q5_k"),
    "Q5_K_M": Mix(17, "q5_k", roles=_rules(value=((_more, "q6_k"),), ffn_down=((_more, "q6_k"),))),
    "Q6_K": Mix(18, "q6_k"),
    "IQ1_S": _tiny(24, "iq1_s", "q2_k", "iq2_xxs"),
    "IQ1_M": _tiny(31, "iq1_m", "q2_k", "iq2_xxs"),
    "IQ2_XXS": _tiny(19, "iq2_xxs", "q2_k", "iq2_xxs"),
    "IQ2_XS": _tiny(20, "iq2_xs", "q2_k", "iq2_xs"),
    "IQ2_S": _tiny(28, "iq2_xs", "iq3_s", "iq3_s"),
    "IQ2_M": _tiny(29, "iq2_s", "iq3_s", "iq3_s"),
    "IQ3_XXS": Mix(23, "iq3_xxs", "q5_k", "iq3_s", _rules(
        value=((_shared, "q4_k"), (_bare, "iq3_s")), attn_q="iq2_s", attn_k="iq2_s",
        ffn_down=((_both(_bare, _first(8)), "q4_k"), (_bare, "q3_k")),
        attn_output=(_EIGHT_OUTPUT, (_always, "iq3_s")),
    )),
    "IQ3_XS": Mix(22, "iq3_s", roles=_rules(
        value=((_shared, "q4_k"),), attn_q="iq3_xxs", attn_k="iq3_xxs",
        ffn_gate=((_middle, "iq3_xxs"),), ffn_up=((_middle, "iq3_xxs"),),
        attn_output=(_EIGHT_OUTPUT,),
    )),
    "IQ3_S": Mix(26, "iq3_s", roles=_rules(
        value=((_shared, "q4_k"),), attn_output=(_EIGHT_OUTPUT,),
    )),
    "IQ3_M": Mix(27, "iq3_s", roles=_rules(
        value="q4_k", ffn_down=((_first(8), "q4_k"), (_both(_eight, _more), "q4_k")),
        attn_output=(_EIGHT_OUTPUT, (_always, "q4_k")),
    )),
    "IQ4_NL": _iq4(25, "iq4_nl"),
    "IQ4_XS": _iq4(30, "iq4_xs"),
    "Q1_0": Mix(40, "q1_0"),
    "Q2_0": Mix(41, "q2_0", embedding="q4_k"),
    "TQ1_0": Mix(36, "tq1_0", embedding="q4_k"),
    "TQ2_0": Mix(37, "tq2_0", embedding="q4_k"),
    "MXFP4_MOE": Mix(38, "q8_0", "q8_0", experts="mxfp4"),
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# What takes the place of a type whose blocks do not fit into a row, by its size.
_FALLBACK = {
    "q2_k": "q4_0", "q3_k": "q4_0", "tq1_0": "q4_0", "tq2_0": "q4_0", "q1_0": "q4_0",
    "q2_0": "q4_0",
    "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
}  # fmt: skip
_ROLES = (
    *(("value", f"attn_{name}.weight") for name in ("v", "qkv", "kv_b")),
    *((f"attn_{name}", f"attn_{name}.weight") for name in ("k", "q", "output")),
    *((name, name) for name in ("ffn_up", "ffn_gate", "ffn_down")),
)
_BLOCK = re.compile(r"blk\.(\d+)\.")


def mix_of(name: str, plain: bool = False) -> Mix:
    """The mix of this name or file type number. plain: any element type is a mix too, of no number.

    OptionError lists what there is.
    """
    upper = name.upper()
    found = MIXES.get(ALIASES.get(upper, upper))
    if found is None and upper.isdecimal():
        found = next((mix for mix in MIXES.values() if mix.file_type == int(upper)), None)
    if found:
        return found
    types = [n for n, d in DTYPES.items() if d.is_blocked or d.is_float] if plain else []
    if name.lower() in types:
        return Mix(None, name.lower())
    known = sorted({*MIXES, *ALIASES, *map(str.upper, types)} | ({"COPY"} if not plain else set()))
    raise OptionError(f"weight type {shown(name)} is not known; there are {', '.join(known)}")


def fitting(dtype: DType, row: int) -> DType:
    """The type, or the one that takes its place for rows of that length."""
    other = _FALLBACK.get(dtype.name, "iq4_nl" if dtype.block > 32 else dtype.name)
    candidates = dtype, DTYPES[other], DTYPES["f16"]
    return next(each for each in candidates if row % each.block == 0)


def role_of(name: str) -> str:
    """The role of a weight in a mix, "" where mixes have none for it."""
    return next((role for role, part in _ROLES if part in name), "")


def layer_of(name: str) -> int:
    """The layer that a tensor belongs to, -1 for those outside."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else -1


class Counter:
    """Gives tensors their types in a mix, one after another in the order of a file."""

    def __init__(self, mix: Mix, model: Facts, names: list[str], has_imatrix: bool) -> None:
        self._mix, self._model, self._has_imatrix = mix, model, has_imatrix
        self._seen: dict[str, int] = {}
        self._values = sum(role_of(name) == "value" for name in names)

    def type_of(self, name: str) -> str:
        """The type of the next tensor, which is in a block."""
        role, mix, model = role_of(name), self._mix, self._model
        at = self._seen.get(role, 0)
        self._seen[role] = at + 1
        if model.experts > 1 and role.startswith("ffn") and not mix.tiny:
            at = layer_of(name)
        of = self._values if role == "value" else model.layers
        place = Place(at, of, model, self._has_imatrix)
        chosen = next((t for when, t in mix.roles.get(role, ()) if when(place)), mix.base)
        if mix.tiny or role not in ("value", "attn_k"):
            return chosen
        if model.experts == 8:
            return "q8_0"  # small beside eight experts
        raised = role == "value" and model.large and chosen in ("q3_k", "q4_k")
        return "q5_k" if raised else chosen
