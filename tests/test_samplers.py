"""Samplers one by one, against their definitions written out in plain Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import OptionError
from runtime.text.samplers import chain, filters
from runtime.text.samplers.candidates import Candidates, ordered
from runtime.text.samplers.dry import Dry
from runtime.text.samplers.mirostat import Mirostat
from runtime.text.sampling import Sampler, Sampling


def left(c: Candidates) -> dict[int, float]:
    """id -> probability of what candidates leave."""
    ids = range(c.values.size) if c.ids is None else c.ids.tolist()
    return shares(dict(zip(ids, c.values.tolist(), strict=True)))


def shares(logits: dict[int, float]) -> dict[int, float]:
    highest = max(logits.values())
    powers = {i: math.exp(v - highest) for i, v in logits.items()}
    return {i: power / sum(powers.values()) for i, power in powers.items() if power}


def cumulative(p: dict[int, float], order: list[int], target: float) -> set[int]:
    sums = itertools.accumulate(p[i] for i in order)
    return set(order[: sum(total < target for total in sums) + 1])


def by_chance(p: dict[int, float]) -> list[int]:
    return sorted(p, key=lambda i: (-p[i], i))


def ref_top_k(x: dict[int, float], k: int) -> dict[int, float]:
    return {i: x[i] for i in by_chance(shares(x))[:k]}


def ref_top_p(x: dict[int, float], target: float) -> dict[int, float]:
    p = shares(x)
    return {i: x[i] for i in cumulative(p, by_chance(p), target)}


def ref_min_p(x: dict[int, float], share: float) -> dict[int, float]:
    p = shares(x)
    return {i: x[i] for i in p if p[i] >= share * max(p.values())}


def ref_typical(x: dict[int, float], target: float) -> dict[int, float]:
    p = shares(x)
    entropy = -sum(q * math.log(q) for q in p.values())
    order = sorted(by_chance(p), key=lambda i: abs(-math.log(p[i]) - entropy))
    return {i: x[i] for i in cumulative(p, order, target)}


def ref_top_n_sigma(x: dict[int, float], n: float) -> dict[int, float]:
    known = [v for v in x.values() if v > -math.inf]
    mean = sum(known) / len(known)
    sigma = math.sqrt(sum((v - mean) ** 2 for v in known) / len(known))
    return {i: v for i, v in x.items() if v >= max(known) - n * sigma}


def ref_exclude_top(x: dict[int, float], threshold: float) -> dict[int, float]:
    p = shares(x)
    likely = [i for i in by_chance(p) if p[i] >= threshold]
    return {i: v for i, v in x.items() if i not in likely[:-1]}


def ref_dynamic(x: dict[int, float], t: float, spread: float, exponent: float) -> dict[int, float]:
    p, low = shares(x), max(0.0, t - spread)
    if len(x) == 1:
        return x
    share = -sum(q * math.log(q) for q in p.values()) / math.log(len(x))
    t = low + (t + spread - low) * max(0.0, share) ** exponent
    return {i: v / t for i, v in x.items()} if t > 1e-9 else ref_top_k(x, 1)


CASES: list[tuple[Callable, Callable, tuple]] = [
    *((filters.top_k, ref_top_k, (k,)) for k in (1, 3, 100)),
    *((filters.top_p, ref_top_p, (p,)) for p in (0.0, 0.3, 0.9)),
    *((filters.min_p, ref_min_p, (p,)) for p in (0.05, 0.5, 1.0)),
    *((filters.typical, ref_typical, (p,)) for p in (0.0, 0.3, 0.9)),
    *((filters.top_n_sigma, ref_top_n_sigma, (n,)) for n in (0.01, 1.0, 3.0)),
    *((filters.exclude_top, ref_exclude_top, (p,)) for p in (0.02, 0.1, 0.5)),
    *((filters.temperature, lambda x, t: {i: v / t for i, v in x.items()}, (t,)) for t in (0.3, 3)),
    (filters.dynamic_temperature, ref_dynamic, (1.0, 0.5, 1.0)),
    (filters.dynamic_temperature, ref_dynamic, (0.3, 0.8, 2.0)),
]


@pytest.mark.parametrize("sampler, reference, values", CASES)
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-900, 900), min_size=1, max_size=40, unique=True),
    st.sampled_from(["as they come", "best first", "some left out", "some impossible"]),
)
def test_what_a_sampler_leaves(sampler, reference, values, hundredths, form):
    logits = np.array(hundredths, np.float32) / np.float32(97)
    c = Candidates(logits)
    if form == "best first":
        c = ordered(c)
    elif form == "some left out":
        c = c.take(np.arange(0, logits.size, 2))
    elif form == "some impossible":
        logits[1::2] = -np.inf
    ids = range(logits.size) if c.ids is None else c.ids.tolist()
    before = dict(zip(ids, map(float, c.values), strict=True))
    expected, found = shares(reference(before, *values)), left(sampler(c, *values))
    assert set(found) == set(expected)
    assert found == pytest.approx(expected, abs=1e-7)


def longest_repeat(seen: list[int], token: int, breakers: set[int]) -> int:
    """How many tokens at the end of `seen` stood once before `token`, none of them a breaker."""
    most = 0
    for at in range(1, len(seen)):
        if seen[at] == token:
            same = 0
            while same < at and seen[at - 1 - same] == seen[-1 - same] not in breakers:
                same += 1
            most = max(most, same)
    return most


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=40),
    st.integers(1, 4),
    st.sampled_from([-1, 1, 6, 20]),
    st.sampled_from([1.0, 1.75, 3.0]),
    st.sets(st.integers(0, 4), max_size=2),
)
def test_dry(seen, allowed, last_n, base, breakers):
    texts = tuple(b"<%d>" % token for token in breakers)
    dry = Dry(0.8, base, allowed, last_n, texts, lambda token: b"<%d>" % token)
    half = len(seen) // 2
    dry.begin(seen[:half])
    for token in seen[half:]:
        dry.accept(token)
    window = seen if last_n < 0 else seen[-last_n:]
    expected = np.arange(6, dtype=np.float64)
    for token in set(range(6)) - breakers:
        length = longest_repeat(window, token, breakers)
        if length >= allowed:
            expected[token] -= 0.8 * base ** (length - allowed)
    np.testing.assert_allclose(dry(Candidates(np.arange(6, dtype=np.float32))).values, expected)


def test_a_breaker_of_dry_may_be_spread_over_tokens_or_inside_one():
    texts = [b"to be", b" or", b"\n", b"x\n\n", b"#", b"##"]

    def penalised(seen: list[int], *breakers: bytes) -> set[int]:
        dry = Dry(1.0, 2.0, 1, -1, breakers, texts.__getitem__)
        dry.begin(seen)
        return set(np.flatnonzero(dry(Candidates(np.zeros(6, np.float32))).values).tolist())

    assert penalised([0, 1, 0]) == {1}
    assert penalised([0, 1, 0], b"or") == set(), "the token itself holds the breaker"
    assert penalised([0, 2, 1, 0], b"e\n") == {2}
    assert penalised([0, 1, 0, 2], b"e\n") == set(), "it ends in the last token"
    assert penalised([3, 1, 3], b"\n\n") == set()
    assert penalised([4, 5, 1, 4, 5], b"###") == set()


def test_penalties_of_a_long_repetition_stay_finite():
    dry = Dry(1.0, 3.0, 1, -1, (), lambda token: b"")
    dry.begin([1] * 2000)
    values = dry(Candidates(np.zeros(3, np.float32))).values
    assert np.isfinite(values).all() and values[1] < -1e30


def test_mirostat_follows_its_target():
    """Twenty steps of the algorithm as the paper has it, with draws of its own."""
    rng, most, mirostat = np.random.default_rng(4), 6.0, Mirostat(3.0, 0.3)
    for _ in range(20):
        logits = rng.normal(0, 2, 200).astype(np.float32)
        p = shares(dict(enumerate(logits.tolist())))
        kept = [i for i in p if -math.log2(p[i]) <= most] or [max(p, key=p.__getitem__)]
        expected = shares({i: float(logits[i]) for i in kept})
        found = left(mirostat(Candidates(logits)))
        assert found == pytest.approx(expected, abs=1e-7)
        chosen = int(rng.choice(kept))
        most -= 0.3 * (-math.log2(expected[chosen]) - 3.0)
        mirostat.learn(expected[chosen])


def test_mirostat_moves_the_choice_towards_its_target():
    logits = np.random.default_rng(1).normal(0, 2, 5000).astype(np.float32)
    sampler = Sampler(Sampling(mirostat=2, mirostat_tau=4.0, temperature=1, seed=0), logits.size)
    assert sampler._mirostat is not None
    for _ in range(300):
        sampler.sample(logits)
    p = left(sampler._mirostat(Candidates(logits)))
    assert abs(-sum(q * math.log2(q) for q in p.values()) - 4.0) < 0.5


def drawn(logits: list[float], n: int = 200, seen: tuple[int, ...] = (), **options) -> set[int]:
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    row = np.array(logits, np.float32)
    sampler = Sampler(Sampling(**{**off, **options}), row.size, lambda token: b"")
    sampler.begin(seen)
    return {sampler.sample(row).id for _ in range(n)}


def test_the_order_of_samplers_decides():
    logits = [3.0, 2.0, 1.9, 0.0]
    both = {"xtc_probability": 1.0, "xtc_threshold": 0.2, "top_k": 2}
    assert drawn(logits, samplers="top_k;xtc", **both) == {1}
    assert drawn(logits, samplers="xtc;top_k", **both) == {1, 2}
    seen = {"top_k": 1, "presence_penalty": 5.0, "seen": (0,)}
    assert drawn(logits, samplers=["penalties", "top_k"], **seen) == {1}
    assert drawn(logits, samplers=["top_k", "penalties"], **seen) == {0}
    assert drawn([5.0, 4.0, 0.0], samplers="temperature;min_p", temperature=9, min_p=0.5) == {
        *(0, 1, 2)
    }
    assert drawn([5.0, 4.0, 0.0], samplers="min_p;temperature", temperature=9, min_p=0.3) == {0, 1}
    assert drawn(logits, samplers="", temperature=0.0) == {0, 1, 2, 3}, "nothing looks at it"


def test_the_best_token_is_not_always_the_coldest():
    logits = [3.0, 2.9, 2.8, 0.0]
    assert drawn(logits, 5, temperature=0) == {0}
    assert drawn(logits, 5, temperature=0, xtc_probability=1.0) == {2}
    assert drawn([3.0, 2.0, 2.0, 2.0, 2.0], 5, temperature=0, typical_p=0.1) == {1}
    assert drawn(logits, 5, temperature=0, presence_penalty=1.0, seen=(0,)) == {1}
    assert len(drawn(logits, 99, temperature=0, dynatemp_range=2.0)) > 1
    assert drawn(logits, 5, temperature=0, mirostat=2) == {0}


def test_the_chance_of_xtc():
    logits = [3.0, 2.9, 2.8, 2.7]
    with_seed = {"xtc_threshold": 0.1, "top_k": 4, "temperature": 1e-9}
    assert drawn(logits, xtc_probability=0.0, **with_seed) == {0}
    assert drawn(logits, xtc_probability=0.5, **with_seed) == {0, 3}
    assert drawn(logits, xtc_probability=1.0, **with_seed) == {3}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("top_k;top-p;MinP; temp ", ("top_k", "top_p", "min_p", "temperature")),
        (["typical", "nucleus", "typ", "TopNSigma"], ("typ_p", "top_p", "typ_p", "top_n_sigma")),
        ("", ()),
        (chain.ORDER, chain.ORDER),
    ],
)
def test_names_of_samplers(given, names):
    assert Sampling(samplers=given).samplers == names


def test_a_name_that_no_sampler_has():
    with pytest.raises(OptionError, match=r"no 'infill'; there are penalties;dry;top_n_sigma;"):
        Sampling(samplers="top_k;infill")


def test_every_option_belongs_to_a_sampler_or_to_none():
    of_samplers = {name for names in chain.OPTIONS.values() for name in names}
    others = {"mirostat", "mirostat_tau", "mirostat_eta", "samplers", "logit_bias", "seed"}
    assert of_samplers | others | {"logprobs", "stop"} == set(Sampling.__dataclass_fields__)


def test_ids_of_padding_in_a_prompt_are_not_penalised():
    options = {"presence_penalty": 9.0, "dry_multiplier": 9.0, "top_k": 2}
    assert drawn([1.0, 2.0, 3.0], seen=(7, 2, 7, 7, 7), **options) == {0, 1}
