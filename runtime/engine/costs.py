"""What steps cost on this machine: learnt from those that are run."""

from __future__ import annotations

from runtime.engine.graphs import bucket

MOST_TOKENS = 64  # of a step that is learnt from
_MAKING = 20  # steps of one token that making a program takes, until one was made
# steps of 1, 2, 4, ... tokens, of which few are known: as many of one token
_BEFORE = (1.0, 1.25, 1.5, 2.4, 4.4, 8.0, 15.0)
_LEVEL, _SHAPE = 0.1, 0.1  # how much a step changes of what is known
_FORGOTTEN, _EVERY = 0.03, 64  # of what is known, after so many steps


class StepCosts:
    """Of one model: seconds of a step by its tokens.

    How long a step of one token takes changes with the depth and with who else uses the machine;
    how many of those a step of several tokens takes changes little. `making`: of a program.
    saved: what a program of these sizes, which is not there, would have saved so far.
    """

    def __init__(self) -> None:
        self.saved = dict[tuple[int, ...], float]()
        self._level = 0.0  # seconds of one token; 0: not known
        self._shape = list(_BEFORE)
        self._making = 0.0
        self._steps = 0

    @property
    def making(self) -> float:
        """Seconds that it takes to make a program for steps of another size."""
        return self._making or _MAKING * self._level

    def made(self, seconds: float) -> None:
        """A step took so long for which a program was made."""
        self._making = seconds

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if tokens > MOST_TOKENS:
            return
        size = bucket(tokens).bit_length() - 1
        expected = self._level * self._shape[size]
        if not expected:
            self._level = seconds / self._shape[size]
            return
        off = min(2.0, max(0.5, seconds / expected))
        self._level *= off**_LEVEL
        if size:
            self._shape[size] *= off**_SHAPE
        self._steps += 1
        if self._steps % _EVERY == 0:
            self._forget()

    def _forget(self) -> None:
        """Some of what is known, which may be of another time: it is learnt again."""
        for size, before in enumerate(_BEFORE):
            self._shape[size] += _FORGOTTEN * (before - self._shape[size])

    def of(self, tokens: int) -> float:
        """Seconds that a step of so many tokens is likely to take."""
        size = min(bucket(tokens).bit_length(), len(_BEFORE)) - 1
        return self._level * self._shape[size] * max(1.0, tokens / MOST_TOKENS)
