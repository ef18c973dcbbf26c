"""The order of samplers, and the steps that a choice of options takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.ops.errors import OptionError, shown
from runtime.text.samplers import filters
from runtime.text.samplers.candidates import Candidates

if TYPE_CHECKING:
    from runtime.text.sampling import Sampling

Step = Callable[[Candidates], Candidates]

# name -> options of `Sampling` it goes by; in the default order, which is llama.cpp's
OPTIONS = {
    "penalties": ("repeat_penalty", "presence_penalty", "frequency_penalty", "penalty_last_n"),
    "dry": (
        *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
        "dry_sequence_breakers",
    ),
    "top_n_sigma": ("top_n_sigma",),
    "top_k": ("top_k",),
    "typ_p": ("typical_p",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "xtc": ("xtc_probability", "xtc_threshold"),
    "temperature": ("temperature", "dynatemp_range", "dynatemp_exponent"),
}
ORDER = tuple(OPTIONS)
_ALIASES = {
    **{name.replace("_", ""): name for name in ORDER},
    **{"typical": "typ_p", "typical_p": "typ_p", "typ": "typ_p"},
    **{"nucleus": "top_p", "temp": "temperature"},
}
# After a change of logits these and nothing else leave the best token in, so that the best of
# all is the best of what they leave.
_KEEP_THE_BEST = ("top_n_sigma", "top_k", "top_p", "min_p", "temperature")
_CHANGE_LOGITS = ("penalties", "dry")


def parse(names: Iterable[Any]) -> tuple[str, ...]:
    """These names as `ORDER` has them, without empty ones; OptionError for an unknown one."""
    return tuple(_name(name) for name in names if not (isinstance(name, str) and not name.strip()))


def _name(given: Any) -> str:
    plain = given.strip().lower().replace("-", "_") if isinstance(given, str) else ""
    name = _ALIASES.get(plain, plain)
    if name not in OPTIONS:
        raise OptionError(f"samplers: there is no {shown(given)}; there are {';'.join(ORDER)}")
    return name


def check_used(o: Sampling, given: Collection[str]) -> None:
    """OptionError for an option that was given and that this order of samplers never looks at."""
    if o.mirostat and "samplers" in given:
        raise OptionError(
            f"samplers has no effect with mirostat={o.mirostat}; give one or the other"
        )
    names, acting = _names(o), _steps_that_act(o)
    for sampler, options in OPTIONS.items():
        idle = next((name for name in options if name in given), None)
        if idle is not None and sampler in acting and sampler not in names:
            why = f"mirostat={o.mirostat}" if o.mirostat else f"samplers={';'.join(names)!r}"
            of_file = " of the file" * (why.partition("=")[0] not in given)
            raise OptionError(
                f"{idle}={shown(getattr(o, idle))} has no effect with {why}{of_file}, which leaves "
                f"out the sampler {sampler}; give one or the other"
            )


def steps(
    o: Sampling, memories: Mapping[str, Step], random: np.random.Generator
) -> tuple[list[Step], bool]:
    """The samplers that act, in order, and whether simply the best token is wanted after them.

    memories: penalties and dry, where they act. random: of the chance that XTC takes.
    """

    def exclude_top(c: Candidates) -> Candidates:
        by_chance = random.random() < o.xtc_probability
        return filters.exclude_top(c, o.xtc_threshold) if by_chance else c

    made: dict[str, Step] = {
        "top_n_sigma": lambda c: filters.top_n_sigma(c, o.top_n_sigma),
        "top_k": lambda c: filters.top_k(c, o.top_k),
        "typ_p": lambda c: filters.typical(c, o.typical_p),
        "top_p": lambda c: filters.top_p(c, o.top_p),
        "min_p": lambda c: filters.min_p(c, o.min_p),
        "xtc": exclude_top,
        "temperature": lambda c: _cooled(c, o),
        **memories,
    }
    names = acting(o)
    if _greedy(o, names):
        return [made[name] for name in names if name in _CHANGE_LOGITS], True
    return [made[name] for name in names], False


def acting(o: Sampling) -> list[str]:
    """The samplers that act, in order."""
    found = _steps_that_act(o)
    return [name for name in _names(o) if name in found]


def _names(o: Sampling) -> tuple[str, ...]:
    return ("temperature",) if o.mirostat else o.samplers


def _cooled(c: Candidates, o: Sampling) -> Candidates:
    if o.dynatemp_range:
        return filters.dynamic_temperature(c, o.temperature, o.dynatemp_range, o.dynatemp_exponent)
    return filters.temperature(c, o.temperature)


def _steps_that_act(o: Sampling) -> set[str]:
    """Samplers whose options are not at values that mean "off"."""
    acts = {
        "penalties": o.penalises,
        "dry": o.dries,
        "top_n_sigma": o.top_n_sigma > 0,
        "top_k": o.top_k > 0,
        "typ_p": o.typical_p < 1,
        "top_p": o.top_p < 1,
        "min_p": o.min_p > 0,
        "xtc": o.xtc_probability > 0 and o.xtc_threshold <= 0.5,
        "temperature": o.temperature != 1 or o.dynatemp_range > 0,
    }
    return {name for name, act in acts.items() if act}


def _greedy(o: Sampling, names: list[str]) -> bool:
    """Whether the best token is taken, whatever the filters among these samplers leave."""
    cold = "temperature" in names and o.temperature == 0 and not o.dynatemp_range
    single = "top_k" in names and o.top_k == 1
    rest = names[sum(name in _CHANGE_LOGITS for name in names) :]  # changes come first, or not
    return (cold or single) and all(name in _KEEP_THE_BEST for name in rest)
