"""Choosing the next token from logits.

The order is llama.cpp's default: logit bias, penalties, top-k, typical, top-p, min-p,
temperature. Every filter sees the distribution that the one before it left, and keeps at least
one token. Ties go to the lowest id.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from runtime.ops.errors import BackendError, OptionError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises OptionError for a value out of range.

    - `temperature`: 0 takes the most probable token; higher is more varied.
    - `top_k`: only the k most probable tokens (0 or -1: all).
    - `top_p`: the smallest set of most probable tokens whose sum reaches p (1: all).
    - `min_p`: only tokens at least this share as probable as the best one (0: all).
    - `typical_p`: tokens of typical information first, up to sum p (1: all), arXiv:2202.00666.
    - `repeat_penalty`: divides positive and multiplies negative logits of tokens among the last
      `penalty_last_n` (0: none, -1: all), arXiv:1909.05858.
    - `presence_penalty`, `frequency_penalty`: taken from such logits, once and per occurrence.
    - `logit_bias`: id -> number added to its logit; -inf forbids it.
    - `seed`: the same seed gives the same tokens; None takes a fresh one.
    - `logprobs`: report the natural log-probabilities of this many best tokens.
    - `stop`: strings that end the text before them.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, low=0.0)
        for name in ("top_p", "min_p", "typical_p"):
            _number(name, getattr(self, name), low=0.0, high=1.0)
        _number("repeat_penalty", self.repeat_penalty, low=0.0)
        if self.repeat_penalty == 0:
            raise OptionError("repeat_penalty must be more than 0 (1 means none), not 0")
        _number("presence_penalty", self.presence_penalty)
        _number("frequency_penalty", self.frequency_penalty)
        _whole("top_k", self.top_k, low=-1)
        _whole("penalty_last_n", self.penalty_last_n, low=-1)
        _whole("logprobs", self.logprobs, low=0)
        if self.seed is not None:
            _whole("seed", self.seed, low=0)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "stop", _stops(self.stop))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before change the logits."""
        plain = self.repeat_penalty == 1 and not (self.presence_penalty or self.frequency_penalty)
        return not plain and self.penalty_last_n != 0


class Token(NamedTuple):
    """A chosen token. With `Sampling.logprobs` > 0, `logprob` is its natural log-probability under
    the model's own distribution (before bias, penalties and filters) and `top` holds the best
    tokens as (id, logprob), best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The state of one sequence: random numbers and the tokens seen so far."""

    def __init__(self, sampling: Sampling, vocab_size: int):
        """Raises OptionError when `logit_bias` names an id outside the vocabulary."""
        self.sampling = sampling
        self.vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._seen: deque[int] = deque()
        self._counts: Counter[int] = Counter()
        self._scratch = np.empty(vocab_size, np.float32)
        wrong = [i for i in sampling.logit_bias if not 0 <= i < vocab_size]
        if wrong:
            raise OptionError(
                f"logit_bias names token {wrong[0]}, outside the vocabulary of {vocab_size}"
            )
        self._bias_ids = np.array(list(sampling.logit_bias), np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)

    def accept(self, token: int) -> None:
        """Remember a token of the prompt or of the answer, for the penalties."""
        if not self.sampling.penalises:
            return
        self._seen.append(token)
        self._counts[token] += 1
        if 0 <= self.sampling.penalty_last_n < len(self._seen):
            oldest = self._seen.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def begin(self, tokens: Sequence[int]) -> None:
        """Remember the tokens of a prompt."""
        for token in tokens if self.sampling.penalises else ():
            self.accept(token)

    def sample(self, logits: np.ndarray) -> Token:
        """Choose from `logits`, float32 [vocabulary], which is left as it is.

        Raises BackendError when the logits are NaN.
        """
        raw = np.asarray(logits, np.float32).reshape(-1)
        if raw.size != self.vocab_size:
            raise OptionError(f"{raw.size} logits for a vocabulary of {self.vocab_size}")
        adjusted = self._adjust(raw)
        if self.sampling.greedy:
            chosen = int(adjusted.argmax())
            _check_best(adjusted[chosen])
        else:
            chosen = self._draw(adjusted)
        if not self.sampling.logprobs:
            return Token(chosen)
        return _with_logprobs(raw, chosen, self.sampling.logprobs)

    def _adjust(self, raw: np.ndarray) -> np.ndarray:
        if not self._bias.size and not self._counts:
            return raw
        logits = self._scratch
        np.copyto(logits, raw)
        logits[self._bias_ids] += self._bias
        if self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[ids] = _penalised(logits[ids], counts, self.sampling)
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        options = self.sampling
        ids, values = _top_k(logits, options.top_k)
        _check_best(values[0])
        ids, values = _typical(ids, values, options.typical_p)
        ids, values = _top_p(ids, values, options.top_p)
        ids, values = _min_p(ids, values, options.min_p)
        sums = np.cumsum(_softmax((values - values[0]) / options.temperature))
        at = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(ids[min(at, ids.size - 1)])


def _penalised(values: np.ndarray, counts: np.ndarray, options: Sampling) -> np.ndarray:
    repeat = np.float32(options.repeat_penalty)
    scaled = np.where(values > 0, values / repeat, values * repeat)
    return scaled - counts * options.frequency_penalty - options.presence_penalty


def _top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits (float64) of the k best, best first, ties by id."""
    if 0 < k < logits.size:
        # A threshold from np.partition is several times faster than np.argpartition.
        best = np.partition(logits, logits.size - k)[logits.size - k :]
        _check_best(best.max())  # NaN counts as the largest
        ids = np.flatnonzero(logits >= best[0])
    else:
        ids = np.arange(logits.size)
    order = _descending(logits[ids])
    ids = ids[order[:k] if k > 0 else order]
    return ids, logits[ids].astype(np.float64)


def _descending(values: np.ndarray) -> np.ndarray:
    """The stable descending order of float32 `values`.

    Sorts integers that hold the value's bits above its place: five times faster than argsort.
    """
    bits = (values + np.float32(0)).view(np.int32)  # + 0 makes -0 equal 0
    ascending = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = ((~ascending).astype(np.int64) << 32) | np.arange(values.size)
    keys.sort()
    return keys & 0xFFFFFFFF


def _typical(ids: np.ndarray, values: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    if p >= 1:
        return ids, values
    probabilities = _softmax(values)
    surprise = -np.log(probabilities, where=probabilities > 0, out=np.full_like(values, -np.inf))
    surprise[probabilities == 0] = np.inf
    entropy = float(np.sum(np.where(probabilities > 0, probabilities * surprise, 0.0)))
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    keep = order[: _reaching(probabilities[order], p)]
    keep.sort()  # back to best first
    return ids[keep], values[keep]


def _top_p(ids: np.ndarray, values: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    if p >= 1:
        return ids, values
    keep = _reaching(_softmax(values), p)
    return ids[:keep], values[:keep]


def _min_p(ids: np.ndarray, values: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    if p <= 0:
        return ids, values
    keep = max(1, int(np.count_nonzero(values >= values[0] + math.log(p))))
    return ids[:keep], values[:keep]


def _reaching(probabilities: np.ndarray, p: float) -> int:
    """How many of `probabilities` have to be added up to reach `p`; at least one."""
    return int(np.searchsorted(np.cumsum(probabilities), p)) + 1


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def _with_logprobs(raw: np.ndarray, chosen: int, n: int) -> Token:
    ids, values = _top_k(raw, min(n, raw.size))
    highest = values[0]
    log_sum = float(highest) + math.log(float(np.sum(np.exp(raw.astype(np.float64) - highest))))
    top = tuple((int(i), float(v) - log_sum) for i, v in zip(ids, values, strict=True))
    return Token(chosen, float(raw[chosen]) - log_sum, top)


def _check_best(value: np.floating) -> None:
    if np.isnan(value) or value == np.inf:
        raise BackendError(
            "the model's logits are not finite, so no token can be chosen: the file or a kernel "
            "is broken; VALIDATE=1 names the op"
        )
    if value == -np.inf:
        raise OptionError("logit_bias forbids every token: allow at least one")


def _number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    fits = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not low <= value <= high:
        bounds = "a finite number"
        if high < math.inf:
            bounds = f"a number from {low:g} to {high:g}"
        elif low > -math.inf:
            bounds = f"a finite number of at least {low:g}"
        raise OptionError(f"{name} must be {bounds}, not {value!r}")


def _whole(name: str, value: int, low: int) -> None:
    fits = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not fits or value < low:
        raise OptionError(f"{name} must be a whole number of at least {low}, not {value!r}")


def _bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias must map token ids to numbers, not {bias!r}")
    for token, value in bias.items():
        _whole("a token id in logit_bias", token, low=0)
        if value != -math.inf:
            _number(f"logit_bias[{token}]", value)
    return {int(token): float(value) for token, value in bias.items()}


def _stops(stop: Iterable[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in stops:
        if not isinstance(text, str) or not text:
            raise OptionError(f"a stop string must be text with at least one character: {text!r}")
    return stops
