"""Hyperparameters from GGUF metadata: typed, checked, and never silently ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from operator import index
from typing import Any

from runtime.errors import ModelError

LARGEST = 1 << 24  # no count or size of a model comes near; guards every allocation behind it

# Keys that change the arithmetic and that nothing here implements, with their neutral value.
_NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "attention.scale": 0.0,
    "use_parallel_residual": False,
    "expert_shared_count": 0,
    "expert_group_count": 1,
}


@dataclass(frozen=True)
class Keys:
    """The metadata of one file under its architecture's prefix."""

    metadata: Mapping[str, Any]
    architecture: str
    source: str

    def refuse_unknown(self, *handled: str) -> None:
        """ModelError when a key that changes the arithmetic has a value nothing here implements."""
        for key, neutral in _NEUTRAL.items():
            value = self.metadata.get(f"{self.architecture}.{key}", neutral)
            if key not in handled and value != neutral and not (neutral == 1 and value == 0):
                raise ModelError(
                    f"{self.source}: {self.architecture}.{key} = {value} is not implemented "
                    f"(only {neutral}); this model cannot be run correctly yet"
                )

    def refuse_experts(self) -> None:
        """ModelError when the file has experts and its architecture none."""
        if experts := self.count("expert_count", 0, least=0):
            raise ModelError(
                f"{self.source}: {self.architecture}.expert_count = {experts} is not implemented "
                f"for architecture {self.architecture!r}"
            )

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to LARGEST."""
        value = self._get(key, default)
        if hasattr(value, "__len__") and not isinstance(value, str):
            value = self._uniform(key, value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise ModelError(
                f"{self.source}: {self.architecture}.{key} = {value!r} must be a whole number "
                f"from {least} to {LARGEST}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not (isinstance(value, int | float) and isfinite(value)):
            raise ModelError(
                f"{self.source}: {self.architecture}.{key} = {value!r} must be a finite number"
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelError(
                f"{self.source}: {self.architecture}.{key} = {value!r} must be true or false"
            )
        return value

    def counts(self, key: str, *default: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 (or of flags, as 0 and 1); one alone is a list of it."""
        values = self.metadata.get(f"{self.architecture}.{key}", default)
        values = values.tolist() if hasattr(values, "tolist") else values
        try:
            found = tuple(map(index, values if isinstance(values, list | tuple) else [values]))
        except TypeError:
            found = (-1,)
        if min(found, default=0) < 0:
            raise ModelError(
                f"{self.source}: {self.architecture}.{key} must be a list of whole numbers from 0"
            )
        return found

    def text(self, key: str, default: str) -> str:
        """A string."""
        return str(self._get(key, default))

    def has(self, key: str) -> bool:
        """Whether the file gives the key."""
        return f"{self.architecture}.{key}" in self.metadata

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(
                f"{self.source}: metadata key {self.architecture}.{key} is missing; "
                "convert the model again with a current converter"
            )
        return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value

    def _uniform(self, key: str, values: Any) -> int:
        """Some converters write one value per layer; equal ones are one value."""
        distinct = {int(v) for v in values}
        if len(distinct) != 1:
            raise ModelError(
                f"{self.source}: {self.architecture}.{key} differs between layers, which is not "
                "implemented"
            )
        return distinct.pop()
