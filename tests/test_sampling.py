"""Samplers against their definitions: references written out, and drawn distributions."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import BackendError, OptionError
from runtime.text.samplers.candidates import Candidates
from runtime.text.samplers.penalties import Penalties
from runtime.text.sampling import Sampler, Sampling

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0, 3.0, 0.5, -40.0, 1.5, 2.0], np.float32)


def draw(logits, n=1, prompt=(), **options):
    sampler = Sampler(Sampling(**{"seed": 1, **OFF, **options}), len(logits))
    for token in prompt:
        sampler.accept(token)
    return [sampler.sample(logits).id for _ in range(n)]


def distribution(logits, **options):
    """What the options leave, by the definitions, one filter after the other."""
    options = {"typical_p": 1.0, **OFF, **options}
    left = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    left = left[: options["top_k"]] if options["top_k"] > 0 else left
    left = typical(logits, left, options["typical_p"])
    left = until(softmax(logits, left), left, options["top_p"])
    p = softmax(logits, left)
    left = [i for i in left if p[i] >= options["min_p"] * max(p.values())]
    return softmax(np.asarray(logits, np.float64) / options["temperature"], left)


def softmax(logits, ids):
    powers = {i: math.exp(float(logits[i]) - max(float(logits[j]) for j in ids)) for i in ids}
    return {i: power / sum(powers.values()) for i, power in powers.items()}


def until(p, order, target):
    if target >= 1:
        return order
    total, kept = 0.0, []
    for i in order:
        kept.append(i)
        total += p[i]
        if total >= target:
            break
    return kept


def typical(logits, left, target):
    p = softmax(logits, left)
    entropy = -sum(q * math.log(q) for q in p.values() if q)
    order = sorted(left, key=lambda i: abs(-math.log(max(p[i], 1e-300)) - entropy))
    kept = set(until(p, order, target))
    return [i for i in left if i in kept]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.3},
        {"typical_p": 0.6},
        {"typical_p": 0.2, "top_k": 8},
        {"temperature": 0.5},
        {"temperature": 2.5, "top_k": 6},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.2, "typical_p": 0.9, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_definition(options):
    expected = distribution(LOGITS, **options)
    n = 4000
    counts = Counter(draw(LOGITS, n, **options))
    assert set(counts) <= set(expected)
    # Pearson's statistic of a right sampler stays below this with probability 1 - 1e-6
    chi = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in expected.items() if n * p > 5)
    degrees = max(1, len(expected) - 1)
    assert chi < degrees + 5 * math.sqrt(2 * degrees) + 25


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=30),
    st.integers(-1, 12),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.05, 0.7, 1.0]),
)
def test_only_tokens_that_the_filters_leave_are_drawn(values, top_k, top_p, min_p, typical_p):
    logits = np.array(values, np.float32) + np.arange(len(values), dtype=np.float32) / 97
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    assert set(draw(logits, 8, **options)) <= set(distribution(logits, **options))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_greedy_takes_the_best_and_the_lowest_id_of_equals(options):
    assert draw(LOGITS, 5, **options) == [1] * 5
    assert draw(np.zeros(9, np.float32), 3, **options) == [0] * 3


def test_equal_logits_at_the_border_of_top_k_go_to_the_lowest_ids():
    logits = np.array([0, 1, 1, 1, 2], np.float32)
    assert set(draw(logits, 200, top_k=3)) == {4, 1, 2}


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others():
    assert draw(LOGITS, 40, seed=5) == draw(LOGITS, 40, seed=5)
    assert draw(LOGITS, 40, seed=5) != draw(LOGITS, 40, seed=6)
    assert draw(LOGITS, 40, seed=None) != draw(LOGITS, 40, seed=None)


def test_a_pinned_sequence():
    """A seed means the same tokens tomorrow: this list must not change."""
    logits = np.linspace(-1, 1, 50, dtype=np.float32)
    assert draw(logits, 8, seed=42, temperature=0.8, top_k=40) == [28, 40, 23, 31, 48, 12, 28, 27]


def penalised(logits, seen, repeat, presence, frequency):
    logits = np.array(logits, np.float64)
    for token, count in Counter(seen).items():
        logits[token] = logits[token] / repeat if logits[token] > 0 else logits[token] * repeat
        logits[token] -= count * frequency + presence
    return logits


@pytest.mark.parametrize("last", [-1, 0, 1, 4, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"repeat_penalty": 1.7},
        {"presence_penalty": 1.2},
        {"frequency_penalty": 0.8},
        {"repeat_penalty": 1.2, "presence_penalty": -0.4, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_penalties(options, last):
    prompt = [1, 5, 3, 1, 2, 2, 9, 1, 7, 2]
    seen = prompt if last < 0 else prompt[len(prompt) - min(last, len(prompt)) :]
    whole = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, **options}
    expected = penalised(
        LOGITS,
        seen,
        whole["repeat_penalty"],
        whole["presence_penalty"],
        whole["frequency_penalty"],
    )
    penalties = Penalties(
        whole["repeat_penalty"], whole["presence_penalty"], whole["frequency_penalty"], last
    )
    penalties.begin(prompt)
    if last:  # 0 means off, and is left out of the chain
        changed = penalties(Candidates(LOGITS.copy())).values
        np.testing.assert_allclose(changed, expected, rtol=1e-6)
    assert draw(LOGITS, 1, prompt, temperature=0, penalty_last_n=last, **options) == [
        int(np.argmax(expected.astype(np.float32)))
    ]


def test_logit_bias_moves_and_forbids():
    assert draw(LOGITS, 1, temperature=0, logit_bias={2: 10.0}) == [2]
    assert draw(LOGITS, 1, temperature=0, logit_bias={1: -math.inf}) == [5]
    assert 1 not in draw(LOGITS, 300, logit_bias={1: -math.inf})
    with pytest.raises(OptionError, match="forbids every token"):
        draw(LOGITS, 1, logit_bias=dict.fromkeys(range(len(LOGITS)), -math.inf))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_the_model(temperature):
    options = {**OFF, "temperature": temperature, "logprobs": 3, "repeat_penalty": 1.5}
    sampler = Sampler(Sampling(seed=3, **options), len(LOGITS))
    sampler.accept(1)
    token = sampler.sample(LOGITS)
    p = softmax(LOGITS, range(len(LOGITS)))
    assert token.logprob == pytest.approx(math.log(p[token.id]), abs=1e-6)
    assert [i for i, _ in token.top] == [1, 5, 3]
    assert [v for _, v in token.top] == pytest.approx([math.log(p[i]) for i in (1, 5, 3)], abs=1e-6)
    assert Sampler(Sampling(), len(LOGITS)).sample(LOGITS).logprob is None


def test_logits_stay_as_they_are():
    logits = LOGITS.copy()
    draw(logits, 3, [1, 2], repeat_penalty=1.5, logit_bias={0: 1.0})
    np.testing.assert_array_equal(logits, LOGITS)


EVERY_CHAIN = [
    *({}, {"temperature": 0.0}, {"top_k": 3}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1}),
    *({"typical_p": 0.5}, {"top_n_sigma": 1.0}, {"mirostat": 2}, {"logit_bias": {0: 1.0}}),
    *({"repeat_penalty": 1.1}, {"dry_multiplier": 0.8, "dry_sequence_breakers": ()}),
    *({"xtc_probability": 1.0}, {"dynatemp_range": 0.5}, {"samplers": ()}, {"logprobs": 2}),
    {"samplers": "temperature;min_p;top_k", "temperature": 0.5, "min_p": 0.1, "top_k": 3},
]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of signalling NaN
@pytest.mark.parametrize("options", EVERY_CHAIN, ids=str)
@pytest.mark.parametrize("bad", ["7fc00000", "ffc00000", "7f800001", "ff800001", "7f800000"])
@pytest.mark.parametrize("at", [0, 4, 9])
def test_logits_that_are_not_finite_are_refused(options, bad, at):
    logits = LOGITS.copy()
    logits.view(np.uint32)[at] = int(bad, 16)  # NaN of both signs and kinds, and infinity
    with pytest.raises(BackendError, match="VALIDATE=1"):
        draw(logits, 1, [1, 2, 1], **options)
    with pytest.raises(BackendError, match="VALIDATE=1"):
        draw(np.full(10, -np.inf, np.float32), 1, [1, 2, 1], **options)


@pytest.mark.parametrize("options", EVERY_CHAIN, ids=str)
def test_tokens_that_the_model_excludes_are_not_drawn(options):
    logits = np.full(10, -np.inf, np.float32)
    logits[[3, 8]] = 1.0, 1.5
    assert set(draw(logits, 20, [1, 3, 1], **options)) <= {3, 8}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {0: 1e300, 1: -1e300}},
        {"presence_penalty": 1e300},
        {"frequency_penalty": -1e300},
        {"repeat_penalty": 1e-300},
        {"repeat_penalty": 1e300},
        {"dry_multiplier": 1e300, "dry_allowed_length": 1},
        {"temperature": 5e-324},
        {"samplers": "temperature;penalties", "temperature": 1e-300, "presence_penalty": 1e300},
        {"top_n_sigma": 1e300},
        {"mirostat": 2, "mirostat_tau": 1e300},
        {"mirostat": 2, "mirostat_tau": 0, "mirostat_eta": 1e300},
    ],
    ids=str,
)
def test_extreme_values_are_no_fault_of_the_model(options):
    sampler = Sampler(Sampling(**{**OFF, **options}), LOGITS.size, lambda token: b"")
    sampler.begin([1, 0, 2, 1, 0])
    assert all(0 <= sampler.sample(LOGITS).id < LOGITS.size for _ in range(3))


def test_extreme_temperatures_do_not_overflow():
    assert draw(LOGITS, 3, temperature=1e-300) == draw(LOGITS, 3, temperature=1e-300)
    assert set(draw(LOGITS, 300, temperature=1e300)) == set(range(len(LOGITS)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("min_p", 2),
        ("typical_p", -1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", True),
        ("repeat_penalty", 0),
        ("repeat_penalty", -1),
        ("presence_penalty", math.inf),
        ("penalty_last_n", -2),
        ("logprobs", -1),
        ("seed", -1),
        ("seed", 1.0),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", 1j),
        ("temperature", np.array([0.5])),
        ("top_k", 10.0),
        ("top_n_sigma", math.nan),
        ("xtc_probability", 1.1),
        ("xtc_threshold", -0.1),
        ("dry_multiplier", -1),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", [""]),
        ("dry_sequence_breakers", 5),
        ("dynatemp_range", -1),
        ("dynatemp_exponent", math.inf),
        ("mirostat", 1),
        ("mirostat", True),
        ("mirostat_tau", -1),
        ("mirostat_eta", None),
        ("samplers", "top_k;infill"),
        ("samplers", 5),
        ("samplers", [None]),
        ("samplers", {"top_k": 1}),
        ("logit_bias", None),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1: "x"}),
        ("stop", 5),
        ("stop", b"x"),
        ("stop", {"a": 1}),
        ("stop", np.array(3)),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", [1]),
        ("stop", [""]),
        ("stop", [3]),
    ],
)
def test_values_out_of_range_name_the_option(name, value):
    with pytest.raises(OptionError) as caught:
        Sampling(**{name: value})
    assert name.split("_")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_numpy_are_taken_and_become_plain():
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.uint8(200), seed=np.int64(3))
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 200, 3)
    assert {type(sampling.temperature), type(sampling.top_k)} == {float, int}
    assert Sampling(logit_bias={np.int32(3): np.float32(-np.inf)}).logit_bias == {3: -math.inf}


def test_one_stop_string_may_be_given_as_it_is():
    assert Sampling(stop="END").stop == ("END",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")


def test_bias_and_logits_have_to_fit_the_vocabulary():
    with pytest.raises(OptionError, match="token 99"):
        Sampler(Sampling(logit_bias={99: 1.0}), 10)
    with pytest.raises(OptionError, match="10 logits"):
        Sampler(Sampling(), 12).sample(LOGITS)


@pytest.mark.parametrize(
    ("options", "microseconds"),
    [
        ({"temperature": 0.0}, 150),
        ({}, 1000),
        ({"repeat_penalty": 1.1}, 1500),
        ({"dry_multiplier": 0.8}, 1500),
        ({"xtc_probability": 1.0}, 1000),
        ({"top_n_sigma": 1.0}, 2500),
        ({"dynatemp_range": 0.5}, 1000),
        ({"mirostat": 2}, 8000),
        ({"samplers": "temperature;top_k;top_p;min_p"}, 5000),
    ],
    ids=str,
)
def test_a_large_vocabulary_is_sampled_quickly(options, microseconds):
    logits = np.random.default_rng(0).normal(0, 3, 151_936).astype(np.float32)
    sampler = Sampler(Sampling(seed=1, **options), logits.size, lambda token: b"%d" % token)
    sampler.begin([i % 50 for i in range(4000)])
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        sampler.sample(logits)
        best = min(best, time.perf_counter() - start)
    assert best * 1e6 < microseconds
