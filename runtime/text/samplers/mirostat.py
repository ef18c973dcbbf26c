"""Mirostat 2: as many candidates as keep the text's surprise near a target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from runtime.text.samplers.candidates import Candidates, softmax

_RAREST = 2.0**-1074  # the smallest float


@dataclass
class Mirostat:
    """Version 2 of Basu et al. 2020, arXiv:2007.14966: tokens of more than `_most` bits of
    surprise are left out, and `_most`, from 2 tau on, moves by eta times what the surprise of the
    chosen token missed tau by."""

    tau: float
    eta: float
    _most: float = field(init=False)

    def __post_init__(self) -> None:
        self._most = 2 * self.tau

    def __call__(self, c: Candidates) -> Candidates:
        """The candidates of little enough surprise; the best one always."""
        chances = softmax(c.values)
        enough = min(2.0**-self._most if self._most > 0 else 1.0, float(chances.max()))
        return c.take(np.flatnonzero(chances >= enough))

    def learn(self, chance: float) -> None:
        """The probability that the chosen token had among the candidates left."""
        self._most -= self.eta * (-math.log2(max(chance, _RAREST)) - self.tau)
