"""Choosing the next token from logits: what can be asked for, and the state of one sequence.

Logit bias comes first, then the samplers in the order of `Sampling.samplers`. Every filter sees
the distribution that the one before it left, and keeps at least one token. Ties go to the lowest
id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from runtime.arguments import listed, number, whole, wrong
from runtime.backends.base import MOST_CANDIDATES, Choice
from runtime.ops.errors import BackendError, OptionError
from runtime.text.samplers import chain
from runtime.text.samplers.candidates import Candidates, best, ordered, softmax
from runtime.text.samplers.dry import Dry
from runtime.text.samplers.mirostat import Mirostat
from runtime.text.samplers.penalties import Penalties

_INF = math.inf
_NUMBERS: dict[str, tuple[float, float]] = {  # option -> smallest and largest value
    "temperature": (0, _INF), "dynatemp_range": (0, _INF), "dynatemp_exponent": (0, _INF),
    "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1), "top_n_sigma": (-_INF, _INF),
    "xtc_probability": (0, 1), "xtc_threshold": (0, 1),
    "repeat_penalty": (0, _INF), "presence_penalty": (-_INF, _INF),
    "frequency_penalty": (-_INF, _INF), "dry_multiplier": (0, _INF), "dry_base": (0, _INF),
    "mirostat_tau": (0, _INF), "mirostat_eta": (0, _INF),
}  # fmt: skip
_WHOLES = {
    "top_k": -1, "penalty_last_n": -1, "dry_allowed_length": 1, "dry_penalty_last_n": -1,
    "mirostat": 0, "logprobs": 0,
}  # fmt: skip
_ON_DEVICES = ("top_k", "top_p", "min_p", "temperature")  # in this order


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises OptionError for a value out of range.

    - `temperature`: 0 takes the most probable token; higher is more varied.
    - `top_k`: only the k most probable tokens (0 or -1: all).
    - `top_p`: the smallest set of most probable tokens whose sum reaches p (1: all).
    - `min_p`: only tokens at least this share as probable as the best one (0: all).
    - `typical_p`: tokens of typical information first, up to sum p (1: all).
    - `top_n_sigma`: only logits within so many standard deviations of the best (-1 or 0: all).
    - `xtc_probability`: how often all tokens of at least `xtc_threshold` but the least probable
      of them are left out (0: never; so does a threshold over 0.5).
    - `repeat_penalty`: divides positive and multiplies negative logits of tokens among the last
      `penalty_last_n` (0: none, -1: all).
    - `presence_penalty`, `frequency_penalty`: taken from such logits, once and per occurrence.
    - `dry_multiplier`: DRY; a token that would make a repeated passage one longer loses
      multiplier * `dry_base` ** (length - `dry_allowed_length`); 0: off. It looks at the last
      `dry_penalty_last_n` tokens (0: none, -1: all); passages end at `dry_sequence_breakers`.
    - `dynatemp_range`: the temperature varies by so much with the entropy (0: not), by the power
      `dynatemp_exponent`.
    - `mirostat`: 2 keeps the surprise near `mirostat_tau` bits with rate `mirostat_eta`, in place
      of every other sampler but temperature (0: off).
    - `samplers`: which ones in which order, a list or "top_k;top_p;temperature".
    - `logit_bias`: id -> number added to its logit; -inf forbids it.
    - `seed`: the same seed gives the same tokens; None takes a fresh one.
    - `logprobs`: report the natural log-probabilities of this many best tokens.
    - `stop`: strings that end the text before them.

    Definitions and their sources are in `runtime.text.samplers`.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    samplers: tuple[str, ...] = chain.ORDER
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            "dry_sequence_breakers": _texts("dry_sequence_breakers", self.dry_sequence_breakers),
            "samplers": _samplers(self.samplers),
            "logit_bias": _bias(self.logit_bias),
            "stop": _texts("stop", self.stop),
        }
        plain |= {n: number(n, getattr(self, n), *limits) for n, limits in _NUMBERS.items()}
        plain |= {n: whole(n, getattr(self, n), low) for n, low in _WHOLES.items()}
        if self.seed is not None:
            plain["seed"] = whole("seed", self.seed, 0, ", or None for a fresh one", _INF)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.repeat_penalty == 0:
            raise wrong("repeat_penalty", self.repeat_penalty, "more than 0 (1 means none)")
        if 0 < self.dry_base < 1:
            raise wrong("dry_base", self.dry_base, "at least 1, or 0 for no DRY")
        if self.mirostat not in (0, 2):
            raise wrong("mirostat", self.mirostat, "2, or 0 for none (version 1 is not made)")

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before change the logits."""
        plain = self.repeat_penalty == 1 and not (self.presence_penalty or self.frequency_penalty)
        return not plain and self.penalty_last_n != 0

    @property
    def dries(self) -> bool:
        """Whether DRY acts."""
        return self.dry_multiplier > 0 and self.dry_base >= 1 and self.dry_penalty_last_n != 0


class Token(NamedTuple):
    """A chosen token. With `Sampling.logprobs` > 0, `logprob` is its natural log-probability under
    the model's own distribution (before bias, penalties and filters; with a grammar that of the
    tokens it allows) and `top` holds the best tokens as (id, logprob), best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The state of one sequence: random numbers and what samplers remember of its tokens."""

    def __init__(
        self, sampling: Sampling, vocab_size: int,
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:  # fmt: skip
        """token_bytes: the text of a token, where DRY looks for its breakers.

        Raises OptionError when `logit_bias` names an id outside the vocabulary.
        """
        self.sampling = sampling
        self.vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        bias = sampling.logit_bias
        wrong_id = next((i for i in bias if not 0 <= i < vocab_size), None)
        if wrong_id is not None:
            raise OptionError(
                f"logit_bias names token {wrong_id}, outside the vocabulary of {vocab_size}"
            )
        self._bias_ids = np.array(list(bias), np.int64)
        # what is far from the largest float32 can be added as it is, -inf too
        self._plain_bias = bool(bias) and all(abs(v) < 1e30 or v == -_INF for v in bias.values())
        exact = np.float32 if self._plain_bias else np.float64
        self._bias: np.ndarray = np.array(list(bias.values()), exact)
        self._mirostat = None
        if sampling.mirostat:
            self._mirostat = Mirostat(sampling.mirostat_tau, sampling.mirostat_eta)
        self._memories = self._remember(token_bytes)
        self._steps, self._greedy = chain.steps(sampling, self._memories, self._random)
        self._drawn: list[float] = []  # chances that the next tokens take
        self._on_device = self._choice()
        changes = self._memories or self._bias.size
        self._scratch = np.empty(vocab_size if changes else 0, np.float32)

    def _remember(self, token_bytes: Callable[[int], bytes] | None) -> dict[str, Penalties | Dry]:
        o, found = self.sampling, dict[str, Penalties | Dry]()
        if o.mirostat:
            return found
        if o.penalises and "penalties" in o.samplers:
            found["penalties"] = Penalties(
                o.repeat_penalty, o.presence_penalty, o.frequency_penalty, o.penalty_last_n
            )
        if o.dries and "dry" in o.samplers:
            breakers = tuple(text.encode() for text in o.dry_sequence_breakers)
            if breakers and token_bytes is None:
                raise OptionError("DRY needs token_bytes to find dry_sequence_breakers")
            found["dry"] = Dry(
                o.dry_multiplier, o.dry_base, o.dry_allowed_length, o.dry_penalty_last_n,
                breakers, lambda i: token_bytes(i) if token_bytes and i < self.vocab_size else b"",
            )  # fmt: skip
        return found

    def begin(self, tokens: Sequence[int]) -> None:
        """Remember the tokens of a prompt."""
        for memory in self._memories.values():
            memory.begin(tokens)

    def accept(self, token: int) -> None:
        """Remember a token of the answer."""
        for memory in self._memories.values():
            memory.accept(token)

    def choice(self, ahead: int = 0) -> Choice | None:
        """How a device chooses the next token, or the one `ahead` of it; None: it cannot.

        The token is the same, but for what the device rounds.
        """
        if self._on_device is None or self._greedy:
            return self._on_device
        while len(self._drawn) <= ahead:
            self._drawn.append(self._random.random())
        return self._on_device._replace(chance=self._drawn[ahead])

    def chosen(self) -> None:
        """A device has chosen the next token."""
        if not self._greedy:
            self._chance()

    def sample(self, logits: np.ndarray, finite: bool = False) -> Token:
        """Choose from `logits`, float32 [vocabulary], which is left as it is.

        finite: they are known to be; else BackendError when they hold NaN or +inf, or nothing but
        -inf.
        """
        raw = np.asarray(logits, np.float32).reshape(-1)
        if raw.size != self.vocab_size:
            raise OptionError(f"{raw.size} logits for a vocabulary of {self.vocab_size}")
        chosen = self._choose(raw, self._biased(raw), finite and not self._bias.size)
        if not self.sampling.logprobs:
            return Token(chosen)
        return _with_logprobs(raw, chosen, self.sampling.logprobs)

    def _chance(self) -> float:
        return self._drawn.pop(0) if self._drawn else self._random.random()

    def _choice(self) -> Choice | None:
        """What all choices have in common where a device can make them."""
        o = self.sampling
        if self._memories or self._bias.size or self._mirostat is not None or o.logprobs:
            return None
        if self._greedy:
            return Choice(self.vocab_size)
        names = chain.acting(o)
        usual = [name for name in _ON_DEVICES if name in names]
        if names != usual or o.dynatemp_range or not 0 < o.top_k <= MOST_CANDIDATES:
            return None
        return Choice(self.vocab_size, o.temperature, o.top_k, o.top_p, o.min_p)

    def _biased(self, raw: np.ndarray) -> np.ndarray:
        """The logits, float32 [vocabulary], with logit bias; a copy where anything changes them."""
        if not self._scratch.size:
            return raw
        logits = self._scratch
        np.copyto(logits, raw)
        if self._plain_bias:
            logits[self._bias_ids] += self._bias
        elif self._bias.size:
            _check_finite(raw.max(), raw)
            Candidates(logits).change(self._bias_ids, logits[self._bias_ids] + self._bias)
        return logits

    def _choose(self, raw: np.ndarray, logits: np.ndarray, finite: bool) -> int:
        if self._greedy and not self._steps:
            chosen = int(logits.argmax())
            _check_finite(logits[chosen], raw)
            return chosen
        if not finite:
            _check_finite(logits.max(), raw)
        c = Candidates(logits)
        for step in self._steps:
            c = step(c)
        if self._greedy:
            return int(c.values.argmax())
        if self._mirostat is not None:
            c = self._mirostat(c)
        c = ordered(c)
        chances = softmax(c.values)
        sums = chances.cumsum()
        at = int(sums.searchsorted(self._chance() * sums[-1], side="right"))
        at = min(at, chances.size - 1)
        if self._mirostat is not None:
            self._mirostat.learn(float(chances[at]))
        return at if c.ids is None else int(c.ids[at])


def _check_finite(highest: np.floating, raw: np.ndarray) -> None:
    """OptionError or BackendError unless the highest logit, of those with bias, is finite."""
    if -_INF < highest < _INF:  # not so with NaN, of either sign
        return
    if highest == -_INF and raw.max() > -_INF:
        raise OptionError("logit_bias forbids every token: allow at least one")
    raise BackendError(
        "the model's logits are not finite, so no token can be chosen: the file or a kernel is "
        "broken; VALIDATE=1 names the op"
    )


def _with_logprobs(raw: np.ndarray, chosen: int, n: int) -> Token:
    top = best(Candidates(raw), min(n, int(np.count_nonzero(raw > -_INF))))
    highest = float(top.values[0])
    log_sum = highest + math.log(float(np.sum(np.exp(raw.astype(np.float64) - highest))))
    ids = range(raw.size) if top.ids is None else top.ids
    pairs = tuple((int(i), float(v) - log_sum) for i, v in zip(ids, top.values, strict=True))
    return Token(chosen, float(raw[chosen]) - log_sum, pairs)


def _samplers(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        return chain.parse(given.split(";"))
    legal = "a list of names, or text such as 'top_k;temperature'"
    return chain.parse(listed("samplers", given, legal))


def _bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise wrong("logit_bias", bias, "a mapping of token ids to numbers")
    found = {}
    for token, value in bias.items():
        i = whole("logit_bias, whose token id", token, 0)
        forbids = isinstance(value, Real) and value == -_INF
        found[i] = -_INF if forbids else number(f"logit_bias[{i}]", value)
    return found


def _texts(name: str, given: Any) -> tuple[str, ...]:
    """Strings of one character at least; a single one may be given as it is, None is none."""
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else listed(name, given, "text, or a list of texts")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise wrong(f"each {name} string", text, "text of at least one character")
    return tuple(texts)
