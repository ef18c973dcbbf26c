"""Hyperparameters from GGUF metadata: typed, checked, and never silently ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from operator import index
from typing import Any

from runtime.errors import ModelError

LARGEST = 1 << 24  # no count or size of a model comes near; guards every allocation behind it


@dataclass(frozen=True)
class Keys:
    """The metadata of one file under its architecture's prefix.

    `read` collects the keys that were asked for: what is left is looked at in unread.py.
    """

    metadata: Mapping[str, Any]
    architecture: str
    source: str
    read: set[str] = field(default_factory=set)

    def layers(self) -> int:
        """Blocks that a step goes through; those behind them predict further tokens (NextN)."""
        layers = self.count("block_count") - self.count("nextn_predict_layers", 0, least=0)
        if layers < 1:
            raise ModelError(f"{self.source}: nextn_predict_layers leaves no layers of block_count")
        return layers

    def refuse_experts(self) -> None:
        """ModelError when the file has experts and its architecture none."""
        self.read.add("expert_used_count")  # says nothing without experts
        if experts := self.count("expert_count", 0, least=0):
            raise ModelError(
                f"{self.source}: {self.architecture}.expert_count = {experts} is not implemented "
                f"for architecture {self.architecture!r}"
            )

    def count(
        self, key: str, default: int | None = None, least: int = 1, holes: bool = False
    ) -> int:
        """A whole number from `least` to LARGEST; with `holes` layers of another kind have a 0."""
        value = self._get(key, default)
        if hasattr(value, "__len__") and not isinstance(value, str):
            value = self._uniform(key, holes)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise ModelError(
                f"{self.source}: {self.architecture}.{key} = {value!r:.60} must be a whole number "
                f"from {least} to {LARGEST}"
            )
        return value

    def number(self, key: str, default: float | None = None, least: float = -inf) -> float:
        """A finite number from `least` on."""
        value = self._get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not number or value < least:
            bound = "" if least == -inf else f" from {least:g} on"
            raise ModelError(
                f"{self.source}: {self.architecture}.{key} = {value!r:.60} must be a finite number"
                f"{bound}"
            )
        return float(value)

    def norm_eps(self) -> float:
        """What RMS norms add to the mean of squares."""
        return self.number("attention.layer_norm_rms_epsilon", least=0.0)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelError(
                f"{self.source}: {self.architecture}.{key} = {value!r:.60} must be true or false"
            )
        return value

    def counts(self, key: str, *default: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 (or of flags, as 0 and 1); one alone is a list of it."""
        self.read.add(key)
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
        self.read.add(key)
        return f"{self.architecture}.{key}" in self.metadata

    def _get(self, key: str, default: Any) -> Any:
        self.read.add(key)
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            by_hand = self.source.endswith((".json", ".toml"))
            advice = "add it" if by_hand else "convert the model again with a current converter"
            raise ModelError(
                f"{self.source}: metadata key {self.architecture}.{key} is missing; {advice}"
            )
        return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value

    def _uniform(self, key: str, holes: bool) -> int:
        """Some converters write one value per layer; equal ones are one value."""
        distinct = set(self.counts(key)) - ({0} if holes else set())
        if len(distinct) != 1:
            what = "differs between layers, which is not implemented" if distinct else "is empty"
            raise ModelError(f"{self.source}: {self.architecture}.{key} {what}")
        return distinct.pop()
