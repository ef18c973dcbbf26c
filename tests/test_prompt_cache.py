"""The cache of prompts: what is begun from it has the bits of what is evaluated anew."""

from __future__ import annotations

import gc
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from choosing_cpu import choosing, speaking
from random_edits import Edits, check
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.generation import Generation
from runtime.model import Model
from runtime.ops.kv_formats import KV_FORMATS

SIZES = {"dense": Sizes(layers=1), "hybrid": replace(NOVEL["qwen35"], layers=2)}
STEPS = int(os.environ.get("EDIT_STEPS", 0))
LONG = [(name, kind) for kind in KV_FORMATS for name in SIZES]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    return {name: write_model(folder / f"{name}.gguf", size) for name, size in SIZES.items()}


def edited(path: Path, seed: int, steps: int, sequences: int = 2, **options) -> Edits:
    options = {"context": 256, "threads": 1, **options}
    with (
        runtime.load(path, sequences=sequences, **options) as model,
        runtime.load(path, prompt_cache=False, sequences=1, **options) as cold,
    ):
        edits = Edits(model, cold, seed)
        edits.run(steps)
    return edits


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {}), ("hybrid", {}), ("dense", {"kv_type": "q8_0,q4_0"}),
        ("hybrid", {"devices": "tensor(cpu:0,cpu:1)", "threads": 2}), ("hybrid", {"sequences": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_random_edits(files: dict[str, Path], name: str, options: dict):
    edits = edited(files[name], 5, 300, **options)
    assert edits.cached > 1000


@pytest.mark.sweep
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("name", "kind"), LONG, ids="-".join)
@pytest.mark.parametrize("devices", ["cpu", "tensor(cpu:0,cpu:1)"])
def test_many_random_edits(files: dict[str, Path], name: str, kind: str, devices: str):
    """EDIT_STEPS of them, over all kinds together."""
    steps = (STEPS or 10_000) // (2 * len(LONG))
    for seed, sequences in enumerate((1, 2, 4)):
        edited(files[name], seed, -(-steps // 3), sequences, kv_type=kind, devices=devices)


def nbytes(x: object, seen: set[int]) -> int:
    """Of an object and all it refers to, but types and what is seen already."""
    if id(x) in seen or isinstance(x, type):
        return 0
    seen.add(id(x))
    refers = [x.base] if isinstance(x, np.ndarray) and x.base is not None else gc.get_referents(x)
    return sys.getsizeof(x) + sum(nbytes(each, seen) for each in refers)


@pytest.mark.parametrize("name", SIZES)
def test_a_budget_is_never_exceeded(files: dict[str, Path], name: str):
    """With all that is held and what it takes to find it, by prompts that have starts alike."""
    budget, rng = (600_000 if name == "dense" else 1_200_000), random.Random(3)
    with runtime.load(files[name], context=256, threads=1, cache_bytes=budget) as model:
        engine, memory = model._engine, model.memory()
        pool = memory.pages * memory.page + memory.slots * memory.state
        seen = {id(engine.pools)}
        assert budget * 0.7 < pool < budget
        starts = [rng.choices(range(80), k=rng.randint(1, 90)) for _ in range(20)]
        most = used = 0
        for n in range(400):
            tokens = [*rng.choice(starts), *rng.choices(range(80), k=rng.randint(1, 60))]
            with model.session() as session:
                with engine.alone():
                    used += engine.prompts.resume(session._sequence, 0, tokens).cached_tokens
                session.eval(tokens[len(session) :], "last")
            if n % 10 == 0:
                most = max(most, nbytes(engine.prompts, set(seen)))
        assert used > 1000 and engine.pools.pages.free < memory.pages // 2
        assert pool + most <= budget


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cache_bytes": 1 << 60}, "cache_bytes=1073741824.00 GiB: .* is free beside the"),
        ({"cache_bytes": 100}, "cache_bytes=100 bytes holds at most context=0, and .* is the"),
        ({"cache_bytes": 90_000, "context": 256}, "holds at most context=.*context=256; give"),
        ({"cache_bytes": "1G"}, "cache_bytes='1G' must be a whole number, or None"),
        ({"prompt_cache": 1}, "prompt_cache=1 must be True or False"),
    ],
)  # fmt: skip
def test_what_no_budget_can_be(files: dict[str, Path], given: dict, says: str):
    with pytest.raises(runtime.Error, match=says):
        runtime.load(files["hybrid"], **given)


@pytest.fixture(scope="module")
def speaking_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("speaking")
    return {name: speaking(folder, size) for name, size in SIZES.items()}


def asked(model: Model, tokens: list[int], **options) -> Generation:
    with model.generate(tokens, max_tokens=1, temperature=0, **options) as answer:
        assert len(answer.tokens) <= 1 and answer.text is not None
    assert answer.reuse is not None and answer.reuse.prompt_tokens >= len(tokens)
    return answer


def test_answers_say_what_was_reused(speaking_files: dict[str, Path]):
    with runtime.load(speaking_files["dense"], context=256, sequences=1) as model:
        start = list(range(40, 110))
        first = asked(model, [*start, 7])
        assert first.cached_tokens == 0 and first.prompt_tokens == 71
        assert first.reuse is not None and first.reuse.reason == "new"
        again = asked(model, [*start, 7])
        assert again.cached_tokens == 70 and again.prompt_tokens == 71 and not again.reuse.reason
        other = asked(model, [*start, 9, 8])
        assert other.cached_tokens == 70 == other.reuse.differs and other.reuse.blocks == 3
        assert other.reuse.cached_next[0] == 7 and other.reuse.prompt_next == (9, 8)
        text = other.explain()
        words = model.tokenizer.decode
        assert "70 of 72 tokens were not read again: 3 blocks of the cache" in text
        assert f"prompt: {words([9, 8])!r}" in text and "first difference: token 71" in text
        middle = asked(model, [*start[:45], 9])
        assert middle.cached_tokens == 45 and middle.reuse.reason == "" and middle.reuse.blocks == 2
        with model.session() as session:
            asked(model, [*start, 7], session=session)
            kept = asked(model, [5], session=session)
            assert kept.reuse.source == "session" and "the session had them" in kept.explain()
        with model._engine.alone():
            model._engine.prompts.evict(100, 0)
        gone = asked(model, [*start, 7])
        assert gone.reuse.reason == "evicted" and "had been cached and made room" in gone.explain()
    with runtime.load(speaking_files["dense"], context=256, prompt_cache=False) as model:
        for _ in range(2):
            answer = asked(model, [1, 2, 3])
            assert answer.cached_tokens == 0 and answer.reuse.reason == "off"
            assert "without a cache" in answer.explain()


def test_a_state_that_is_cached_gives_way_to_who_goes_on_from_it(speaking_files: dict[str, Path]):
    """When nobody else has a slot to give, as without the cache."""
    found = []
    for cached in (False, True):
        with (
            runtime.load(
                speaking_files["hybrid"], context=256, sequences=1, prompt_cache=cached
            ) as model,
            model.session() as session,
        ):
            session.eval(range(40, 80), "none")
            others = [model.session() for _ in range(model._engine.pools.slots.count - 1)]
            for other in others:
                other.eval([1], "none")
            assert not model._engine.pools.slots.available
            found.append(session.eval(range(20, 25)))
            for other in others:
                other.close()
    np.testing.assert_array_equal(*found)


def test_a_state_is_kept_where_prompts_part(speaking_files: dict[str, Path]):
    """The first that parts reads from the last state before, the next no more than it must."""
    with runtime.load(speaking_files["hybrid"], context=256, sequences=1) as model:
        start = list(range(40, 90))
        assert asked(model, [*start, 7, 7]).cached_tokens == 0
        second = asked(model, [*start, 8, 8])
        assert second.cached_tokens == 0 and second.reuse.known == 50
        assert second.reuse.reason == "state" and "no recurrent state was kept" in second.explain()
        third = asked(model, [*start, 9, 9])
        assert third.cached_tokens == 50 == third.reuse.snapshot and third.prompt_tokens == 52
        assert "after token 50 was kept" in third.explain()
        longer = asked(model, [*start, 9, 9, 3, 4])
        assert longer.cached_tokens == 52 and longer.reuse.reason == "new"


def test_an_answer_is_asked_for_again(speaking_files: dict[str, Path]):
    """The first reading of a prompt leaves a state near its end."""
    with (
        runtime.load(speaking_files["hybrid"], context=256, sequences=1) as model,
        runtime.load(speaking_files["hybrid"], context=256, prompt_cache=False) as cold,
    ):
        for n in (65, 100, 200):
            prompt = [n - 20, *range(50, 50 + n // 4)] * 4
            want = cold.generate(prompt, max_tokens=9, temperature=0, ignore_eos=True).text
            for again in (False, True, True):
                answer = model.generate(prompt, max_tokens=9, temperature=0, ignore_eos=True)
                assert answer.text == want and answer.tokens
                assert (len(prompt) - answer.cached_tokens <= 32) == again


def test_the_last_message_is_edited(golden: Path):
    """A state is kept where it begins; without one a chat is read again from its beginning."""
    file = golden / "qwen35" / "model-f16.gguf"
    chat = [("system", "be good " * 20), ("user", "hello there " * 10), ("assistant", "yes " * 10)]
    talk = [{"role": role, "content": content} for role, content in chat]
    with (
        runtime.load(file, context=900) as model,
        runtime.load(file, context=900, prompt_cache=False) as cold,
    ):
        for word, least in (("more ", 0), ("other ", 150), ("more ", 230), ("new ", 150)):
            messages = [*talk, {"role": "user", "content": word * 20}]
            answers = [m.chat(messages, max_tokens=9, temperature=0) for m in (model, cold)]
            assert answers[0].text == answers[1].text and answers[0].tokens == answers[1].tokens
            assert answers[0].cached_tokens >= least and not answers[1].cached_tokens


@pytest.mark.parametrize("name", SIZES)
def test_a_device_that_begins_steps_ahead(speaking_files: dict[str, Path], name: str):
    """What it holds for the step ahead is not what the cache has, and the other way round."""
    rng, path = random.Random(4), speaking_files[name]
    told: list[list[list[int]]] = []
    for choose, cached in ((True, True), (False, False)):
        with choosing(path, choose, context=128, sequences=1, prompt_cache=cached) as model:
            rng.seed(4)
            talk, answers, used = list(range(40, 75)), list[list[int]](), 0
            for _ in range(8):
                prompt = [*talk[: rng.randint(20, len(talk))], *rng.choices(range(40, 50), k=3)]
                both = [
                    model.generate(ids, max_tokens=rng.randint(8, 25), temperature=0)
                    for ids in (prompt, [*prompt[:-1], 77])
                ]
                list(model.together(both))
                used += sum(answer.cached_tokens for answer in both)
                answers += [answer.tokens for answer in both]
                talk = [*prompt, *answers[-2]][:70]
                check(model._engine.prompts)
            assert (used > 100) == cached
            told.append(answers)
    assert told[0] == told[1]


def test_threads_share_what_is_cached(speaking_files: dict[str, Path]):
    start = list(range(40, 110))
    with runtime.load(speaking_files["hybrid"], context=256, threads=1) as model:
        want = [model.generate([*start, n], max_tokens=9, seed=n).text for n in range(6)]
        with ThreadPoolExecutor(3) as pool:
            found = [
                pool.submit(lambda n=n: model.generate([*start, n], max_tokens=9, seed=n).text)
                for n in (*range(6), *range(6))
            ]
        assert [each.result() for each in found] == want * 2
        check(model._engine.prompts)
        pools = model._engine.pools
        assert pools.pages.available == pools.pages.count
