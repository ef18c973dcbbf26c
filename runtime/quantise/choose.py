"""Which type each tensor of a file gets, as llama-quantize chooses it.

A mix decides; what the user asks for comes before it, and what no block of a type fits into gets
another. Vectors, norms, routers and filters stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from runtime.ops.dtypes import DTYPES, DType, nbytes_for
from runtime.ops.errors import OptionError, shown

from .mixes import Counter, Facts, Mix, fitting, layer_of, mix_of

_KEPT = re.compile(r"_norm\.weight|ffn_gate_inp\.weight|ssm_conv1d|\.position_embd|\.patch_embd")
OUTER = _EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_COPY = "COPY"
_NEEDY = ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s")  # garbage without an imatrix


class Stored(Protocol):
    """A tensor of an open file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost axis first."""

    @property
    def dtype(self) -> DType:
        """As it is stored."""


class Choice(NamedTuple):
    """A tensor of the new file. wanted: the type before another took its place, or None."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    wanted: DType | None = None

    @property
    def nbytes(self) -> int:
        """Of its data in the new file."""
        return nbytes_for(self.dtype, self.shape)


@dataclass(frozen=True)
class Wishes:
    """What a user decides in place of a mix.

    tensors: (pattern, type) pairs; the first pattern that is found in a name, as a regular
    expression, gives its type. pure: the base type everywhere. keep_output: `output.weight` stays.
    """

    tensors: Sequence[tuple[str, str]] = ()
    output: str | None = None
    embedding: str | None = None
    pure: bool = False
    keep_output: bool = False


NONE = Wishes()


def choose(
    tensors: Mapping[str, Stored], mix_name: str, model: Facts, wishes: Wishes = NONE,
    has_imatrix: bool = False, plain: bool = False,
) -> list[Choice]:  # fmt: skip
    """The tensors of the new file in its order: those outside of blocks, then by block and name.
    A matrix of one row becomes the vector that it is.

    mix_name: as for `mix_of`, as is `plain`; or "COPY". OptionError for a name, type or pattern
    that cannot be used.
    """
    names = sorted(tensors, key=lambda name: (layer_of(name), name))
    copied = mix_name.upper() == _COPY
    chooser = _Chooser(mix_of("F32" if copied else mix_name, plain), model, wishes, names,
                       has_imatrix)  # fmt: skip
    found = []
    if copied and (wishes.tensors or wishes.output or wishes.embedding or wishes.pure):
        raise OptionError("COPY keeps all types: leave out what asks for others")
    chooser.check({name: tensors[name].shape for name in names})
    for name in names:
        shape = tensors[name].shape
        if copied or not chooser.is_quantised(name, shape):
            shape = shape[1:] if len(shape) == 2 and shape[0] == 1 else shape
            found.append(Choice(name, shape, tensors[name].dtype))
        else:
            found.append(chooser.choice(name, shape))
    return found


def needs_imatrix(choices: Sequence[Choice], mix_name: str) -> Choice | None:
    """The first tensor whose type is of no use without an importance matrix."""
    needy = (*_NEEDY, "q2_k") if mix_name.upper() == "Q2_K_S" else _NEEDY
    return next((c for c in choices if c.dtype.name in needy and c.name not in OUTER), None)


def weight_type(name: str) -> DType:
    """The element type of this name, which weights can have; OptionError lists them."""
    found = DTYPES.get(name.lower())
    if found and (found.is_blocked or found.name in ("f32", "f16", "bf16")):
        return found
    known = [n.upper() for n, d in DTYPES.items() if d.is_blocked or n in ("f32", "f16", "bf16")]
    raise OptionError(f"type {shown(name)} is not known; there are {', '.join(known)}")


class _Chooser:
    def __init__(
        self, mix: Mix, model: Facts, wishes: Wishes, names: list[str], has_imatrix: bool
    ) -> None:
        self._mix, self._wishes = mix, wishes
        self._tied = _OUTPUT not in names
        self._counter = Counter(mix, model, names, has_imatrix)
        self._patterns = [(_compiled(text), weight_type(t)) for text, t in wishes.tensors]
        self._output = weight_type(wishes.output) if wishes.output else None
        self._embedding = weight_type(wishes.embedding) if wishes.embedding else None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """OptionError for a pattern that gives no tensor its type."""
        names = [name for name, shape in shapes.items() if self.is_quantised(name, shape)]
        for pattern, _ in self._patterns:
            if not any(map(pattern.search, names)):
                raise OptionError(
                    f"tensor_types: {shown(pattern.pattern)} is found in the name of no tensor "
                    "that is quantised"
                )

    def is_quantised(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor's type changes at all."""
        if name == _OUTPUT and self._wishes.keep_output:
            return False
        matrix = any(n > 1 for n in shape[:-1])
        return matrix and name.endswith("weight") and not _KEPT.search(name)

    def choice(self, name: str, shape: tuple[int, ...]) -> Choice:
        wanted = self._wanted(name, shape)
        dtype = fitting(wanted, shape[-1])
        return Choice(name, shape, dtype, None if dtype is wanted else wanted)

    def _wanted(self, name: str, shape: tuple[int, ...]) -> DType:
        if self._embedding and name == _EMBEDDING:
            return self._embedding
        if self._output and name == _OUTPUT:
            return self._output
        for pattern, dtype in self._patterns:
            if pattern.search(name):
                return dtype
        base = DTYPES[self._mix.base]
        if self._wishes.pure or not base.is_blocked:
            return DTYPES[self._mix.experts or self._mix.base]
        if name == _OUTPUT or (self._tied and name == _EMBEDDING):
            divides = shape[-1] % base.block == 0
            return self._output or DTYPES[self._mix.output if divides else "q8_0"]
        if self._mix.experts:
            experts = len(shape) > 2 and shape[-3] > 1
            return DTYPES[self._mix.experts] if experts else base
        if name == _EMBEDDING:
            return DTYPES[self._mix.embedding or self._mix.base]
        return DTYPES[self._counter.type_of(name)]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.lower())  # as llama-quantize has it: names are lower case
    except re.error as error:
        raise OptionError(f"tensor_types: {shown(pattern)} is no pattern: {error}") from None
