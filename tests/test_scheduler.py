"""Many answers at once: each is the one it would be alone, whatever happens around it."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from choosing_cpu import choosing, speaking
from small_models import NOVEL, Sizes

import runtime
from runtime.errors import MemoryLimitError, OptionError
from runtime.model import Model
from runtime.requests import Request

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"dense": Sizes("qwen3", layers=2), "hybrid": NOVEL["qwen35"]}
WARM = {"temperature": 1.5, "top_k": 40, "top_p": 1.0, "min_p": 0.0}
LONG = {"max_tokens": 10**6, "ignore_eos": True}


@pytest.fixture(scope="module", params=SIZES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tmp_path_factory.mktemp("scheduler"), SIZES[request.param])


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with runtime.load(path, context=256, sequences=4, threads=1) as made:
        yield made


def prompt(seed: int, most: int = 90) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(40, 250) for _ in range(rng.choice([1, 2, 31, 33, most]))]


def everything(answer: Any) -> tuple[Any, ...]:
    return answer.text, answer.tokens, answer.reason, answer.logprobs


def at_rest(model: Model) -> bool:
    """Nothing is under way any more, and everything is given back."""
    for _ in range(2000):
        if model._scheduler._thread is None:
            break
        time.sleep(0.005)
    gc.collect()
    pools = model._engine.pools
    return (
        model._scheduler._thread is None
        and pools.pages.available == pools.pages.count
        and pools.slots.available == pools.slots.count
    )


def test_each_is_the_answer_alone(model: Model):
    options = [WARM | {"seed": n, "max_tokens": 5 + 3 * n} for n in range(8)]
    options[3] |= {"repeat_penalty": 1.3, "logprobs": 2}
    options[5] = {"temperature": 0, "max_tokens": 30}
    alone = []
    for n, given in enumerate(options):
        answer = model.generate(prompt(n), **given)
        assert answer.text is not None
        alone.append(everything(answer))
    requests = [model.submit(prompt(n), **given) for n, given in enumerate(options)]
    texts = ["".join(request) for request in requests]
    assert [everything(request) for request in requests] == alone
    assert texts == [text for text, *_ in alone] and at_rest(model)
    assert all(r.done and min(r.timings) >= 0 for r in requests)
    assert [r.prompt_tokens for r in requests] == [len(prompt(n)) for n in range(8)]


def traffic(model: Model, alone: Callable[..., Any], seed: int, requests: int) -> dict[str, int]:
    """Random requests, with everything that can happen to them; how often each came."""
    rng, live, seen = random.Random(seed), list[tuple[Request, tuple[int, int]]](), dict[str, int]()
    engine, preempted = model._engine, 0
    dropped = runtime.requests.Submitted.dropped

    def counted(task: Any) -> None:
        nonlocal preempted
        preempted += 1
        dropped(task)

    runtime.requests.Submitted.dropped = counted  # type: ignore[method-assign]
    try:
        for n in range(requests):
            if rng.random() < 0.2:
                model._scheduler._rounds.pace.token = 10 ** rng.uniform(-4, -2)  # another budget
            which = rng.randrange(24), rng.choice([1, 9, 40, 130])
            options = WARM | {"seed": which[0], "max_tokens": which[1]}
            kind = rng.random()
            if kind < 0.1:  # one that is read step by step beside them
                answer = model.generate(prompt(which[0]), **options)
                for k, _ in enumerate(answer):
                    if k == 7 and kind < 0.05:
                        answer.close()
                tokens = alone(*which)[1]
                assert answer.tokens == tokens[: len(answer.tokens)]
                continue
            priority, deadline = rng.choice([-1, 0, 0, 2]), rng.choice([None, None, 5, 0.02])
            live.append(
                (
                    model.submit(prompt(which[0]), priority=priority, deadline=deadline, **options),
                    which,
                )
            )
            if kind < 0.25:
                rng.choice(live[-3:])[0].cancel()
            elif kind < 0.3:
                live.pop(rng.randrange(len(live)))  # forgotten
            elif kind < 0.5:
                time.sleep(rng.random() * 0.01)
            while len(live) > 12 or (n == requests - 1 and live):
                request, which = live.pop(rng.randrange(len(live)))
                if rng.random() < 0.5:
                    "".join(request)
                request.result()
                reason = str(request.reason)
                seen[reason] = seen.get(reason, 0) + 1
                text, tokens, right, _ = alone(*which)
                if reason in ("deadline", "cancelled"):
                    assert request.tokens == tokens[: len(request.tokens)]
                    assert text.startswith(request.text)
                else:
                    assert (request.text, request.tokens, reason) == (text, tokens, right)
    finally:
        runtime.requests.Submitted.dropped = dropped  # type: ignore[method-assign]
    assert engine.pools.pages.count >= 8
    return seen | {"preempted": preempted}


def remembering(path: Path) -> tuple[Model, Callable[..., Any]]:
    """A model of its own, and what it answers alone."""
    right, known = runtime.load(path, context=256, sequences=1, threads=1), dict[Any, Any]()

    def alone(seed: int, most: int) -> Any:
        if (seed, most) not in known:
            options = WARM | {"seed": seed, "max_tokens": most}
            answer = right.generate(prompt(seed), **options)
            assert answer.text is not None
            known[seed, most] = everything(answer)
        return known[seed, most]

    return right, alone


def storm(path: Path, seed: int, requests: int, pages: int) -> dict[str, int]:
    right, alone = remembering(path)
    with right, runtime.load(path, context=256, sequences=2, threads=1) as model:
        model._engine.pools.pages.count = pages
        with patch("runtime.engine.scheduler._AHEAD", 0):  # so that some run out of it soon
            found = traffic(model, alone, seed, requests)
        assert at_rest(model)
    return found


def test_random_traffic(path: Path):
    found = storm(path, 1, 120, 8)
    assert found["length"] > 20 and found["cancelled"] > 3
    assert found["preempted"], "the pool is so small that some have to wait half way"


def test_who_finds_no_memory_half_way_waits_and_is_read_again(path: Path):
    right, alone = remembering(path)
    with right, runtime.load(path, context=256, sequences=2, threads=1) as model:
        model._engine.pools.pages.count = 6
        dropped, seen = runtime.requests.Submitted.dropped, list[int]()

        def noted(task: Any) -> None:
            seen.append(task.length)
            dropped(task)

        with (
            patch("runtime.engine.scheduler._AHEAD", 0),
            patch.object(runtime.requests.Submitted, "dropped", noted),
        ):
            requests = [model.submit(prompt(n), max_tokens=130, seed=n, **WARM) for n in (1, 2, 3)]
            for n, request in enumerate(requests, 1):
                assert request.result(60) == alone(n, 130)[0]
        assert at_rest(model) and seen and min(seen) > 2


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(4))
def test_much_random_traffic(path: Path, seed: int):
    print(storm(path, seed + 10, 2500, [8, 12, 20, 36][seed]))


def test_devices_that_choose_tokens_do_so_beside_prompts(path: Path):
    with choosing(path, False, context=256, sequences=4) as plain:
        wanted = [plain.generate(prompt(n), max_tokens=20, seed=n, **WARM).text for n in range(6)]
    with choosing(path, context=256, sequences=4) as model:
        requests = [model.submit(prompt(n), max_tokens=20, seed=n, **WARM) for n in range(6)]
        assert [request.result() for request in requests] == wanted and at_rest(model)
        assert sum(what == "begin" for what, _ in model.backend.log) >= 19  # type: ignore[attr-defined]


def test_from_many_threads(model: Model):
    wanted = [model.generate(prompt(n), max_tokens=12, seed=n, **WARM).text for n in range(4)]
    found: dict[int, str] = {}

    def ask(n: int) -> None:
        options = WARM | {"max_tokens": 12, "seed": n % 4}
        if n % 3:
            found[n] = model.submit(prompt(n % 4), **options).result()
        else:
            found[n] = model.generate(prompt(n % 4), **options).text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: wanted[n % 4] for n in range(12)} and at_rest(model)


def test_several_threads_read_without_any_request(model: Model):
    wanted = [model.generate(prompt(n), max_tokens=20, seed=n, **WARM).text for n in range(4)]
    found: dict[int, str] = {}

    def read(n: int) -> None:
        found[n] = model.generate(prompt(n), max_tokens=20, seed=n, **WARM).text

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == dict(enumerate(wanted)) and at_rest(model)


def test_asynchronous_reading(model: Model):
    wanted = [model.generate(prompt(n), max_tokens=9, seed=n, **WARM).text for n in range(4)]

    async def read(n: int) -> str:
        request = model.submit(prompt(n), max_tokens=9, seed=n, **WARM)
        return "".join([piece async for piece in request]) if n % 2 else await request

    async def main() -> list[str]:
        return await asyncio.gather(*map(read, range(4)))

    assert asyncio.run(main()) == wanted and at_rest(model)


def test_an_awaiting_task_that_is_cancelled_cancels_its_request(model: Model):
    async def main() -> Request:
        request = model.submit([50], on_token=lambda _: time.sleep(0.002), **LONG)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await request
        return request

    assert asyncio.run(main()).reason == "cancelled" and at_rest(model)


def test_cancelled_forgotten_late(model: Model):
    request = model.submit([50], **LONG)
    next(request)
    began = len(request.tokens)
    request.cancel()
    request.cancel()
    assert request.done and request.reason == "cancelled" and request.result() == request.text
    assert len(request.tokens) <= began + 40
    late = model.submit([50], deadline=0.2, on_token=lambda _: time.sleep(0.002), **LONG)
    assert late.result(30) and late.reason == "deadline" and late.tokens
    with model.submit([50], **LONG) as inside:
        next(inside)
    assert inside.reason == "cancelled"
    forgotten = model.submit([50], **LONG)
    next(forgotten)
    del forgotten
    assert at_rest(model)


def test_results_that_are_waited_for_too_long(model: Model):
    request = model.submit([50], **LONG)
    with pytest.raises(TimeoutError, match="not over after"):
        request.result(0.02)
    request.cancel()
    assert at_rest(model)


def test_higher_priorities_go_first_and_nobody_waits_for_ever(path: Path):
    with runtime.load(path, context=64, sequences=1, threads=1) as model:
        model._engine.pools.pages.count = 3  # one at a time
        first = model.submit([50] * 20, max_tokens=30, seed=1)
        order: list[str] = []

        def told(name: str) -> Callable[..., None]:
            return lambda token: order.append(name)

        options: dict[str, Any] = {"max_tokens": 2, "seed": 1}
        low = model.submit([50] * 20, on_token=told("low"), priority=-1, **options)
        some = [model.submit([50] * 20, on_token=told("some"), **options) for _ in range(2)]
        high = model.submit([50] * 20, on_token=told("high"), priority=1, **options)
        for request in (first, low, *some, high):
            request.result(60)
        assert order == ["high"] * 2 + ["some"] * 4 + ["low"] * 2


def test_what_never_fits_is_refused_with_both_numbers(path: Path):
    with runtime.load(path, context=64, sequences=1, threads=1) as model:
        with pytest.raises(MemoryLimitError, match="70 tokens do not fit in context=64"):
            model.submit([50] * 70)
        model._engine.pools.pages.count = 1
        with pytest.raises(MemoryLimitError, match=r"40 tokens need 2 pages .* has 1 "):
            model.submit([50] * 40)
        model._engine.pools.pages.count = 2
        with model.session() as session:
            session.eval([1], "none")
            with pytest.raises(MemoryLimitError, match=r"need 2 pages .*; 1 of 2 are not held"):
                model.submit([50] * 40).result(30)
        assert model.submit([50] * 40, max_tokens=2, temperature=0).result(30) is not None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "either a prompt"),
        ({"prompt": "a", "messages": "b"}, "either a prompt"),
        ({"prompt": "a", "priority": "high"}, "priority"),
        ({"prompt": "a", "deadline": -1}, "deadline"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_what_is_refused_at_once(model: Model, given: dict[str, Any], says: str):
    with pytest.raises(OptionError, match=says):
        model.submit(**given)
    with pytest.raises(TypeError, match="temprature"):
        model.submit("a", temprature=1)


def test_an_error_ends_one_request(model: Model):
    wanted = model.generate([50], max_tokens=20, seed=1, **WARM).text

    def refuses(token: Any) -> None:
        raise KeyError("mine")

    good = model.submit([50], max_tokens=20, seed=1, **WARM)
    bad = [model.submit([50], on_token=refuses, **LONG), model.submit([51], on_prompt=refuses)]
    for request in bad:
        with pytest.raises((KeyError, TypeError)):
            request.result(60)
        assert request.done and request.reason is None and "failed" in repr(request)
    assert good.result() == wanted and at_rest(model)


def awaited(request: Request) -> str:
    async def wait() -> str:
        return await request

    return asyncio.run(wait())


WAITS: list[Callable[[Model, Request], Any]] = [
    lambda model, _: model.generate([50], max_tokens=2).text,
    lambda model, _: list(model.together([model.generate([50], max_tokens=2)])),
    lambda model, _: model.submit([50], **LONG).result(),
    lambda _, other: other.result(30),
    lambda _, other: list(other),
    lambda _, other: awaited(other),
]


@pytest.mark.parametrize("how", ["on_token", "on_prompt"])
def test_a_callback_of_a_request_cannot_wait_for_its_model(model: Model, how: str):
    wanted = model.generate([50], max_tokens=20, seed=1, **WARM).text
    good = model.submit([50], max_tokens=20, seed=1, **WARM)
    live: list[Request] = []  # another, and its own
    for wait, which in [*((wait, 0) for wait in WAITS), *((wait, 1) for wait in WAITS[3:])]:
        call: dict[str, Any] = {how: lambda *_, wait=wait, n=which: wait(model, live[n])}
        with model._scheduler._turn:  # neither is over before the other begins
            live.append(model.submit([51], **LONG))
            live.append(model.submit([52] * 40, **LONG, **call))
        with pytest.raises(OptionError, match="cannot wait for this model"):
            live[1].result(60)
        live[0].cancel()
        live.clear()
    assert good.result(60) == wanted and at_rest(model)


def test_who_is_told_of_a_prompt_in_the_middle_of_its_step_cannot_wait(model: Model):
    def told(wait: Callable[[Model, Request], Any], *_: int) -> None:
        wait(model, model.submit([51], **LONG))

    for wait in WAITS[2:]:
        with (
            model.session() as session,
            pytest.raises(OptionError, match="cannot wait for this model"),
        ):
            session.eval([50] * 40, on_prompt=partial(told, wait))
    assert at_rest(model)


def test_callbacks_of_requests_use_the_model_without_waiting(model: Model):
    seen: list[Any] = []

    def uses(_: Any) -> None:
        seen.append(model.submit([51], max_tokens=2, ignore_eos=True))
        with model.session() as session:
            seen.append(len(session.eval([5, 6])))
        if len(seen) > 2:
            assert seen[0].cancel() is None and seen[0].result() == seen[0].text

    model.submit([50], on_token=uses, max_tokens=3, ignore_eos=True).result(60)
    assert len(seen) == 6 and all(len(request.result(60)) for request in seen[2::2])
    inside = model.generate(
        [50], max_tokens=3, ignore_eos=True,
        on_token=lambda _: seen.append(model.submit([51], max_tokens=2).result(60)),
    )  # fmt: skip
    assert inside.text and len(seen) == 9
    seen.clear()
    assert at_rest(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_would_end_a_thread_ends_one_request(model: Model, error: type[BaseException]):
    def raises(*_: Any) -> None:
        raise error("mine")

    wanted = model.generate([50], max_tokens=20, seed=1, **WARM).text
    good = model.submit([50], max_tokens=20, seed=1, **WARM)
    for call in ({"on_token": raises}, {"on_prompt": raises}):
        with pytest.raises(OptionError, match=f"raised {error.__name__}.*mine"):
            model.submit([51], **LONG, **call).result(60)
    assert good.result(60) == wanted and at_rest(model)


def test_requests_say_what_was_not_read_again_and_what_drafts_did(model: Model):
    given = {"max_tokens": 30, "temperature": 0, "ignore_eos": True, "spec": "ngram"}
    answer = model.generate([50, 51, 52] * 20, **given)
    assert answer.text and answer.speculation is not None
    request = model.submit([50, 51, 52] * 20, **given)
    assert request.result(60) == answer.text and "tokens" in request.explain()
    assert request.speculation is not None and isinstance(request.speculation.drafted, int)
    assert model.submit([50], max_tokens=1, spec="off").speculation is None
    with model._scheduler._turn:
        late = model.submit([50])
        assert "not begun yet" in late.explain()
        late.cancel()
        assert "not begun, and is over" in late.explain()
    assert at_rest(model)


def test_sessions_go_on_by_requests(model: Model):
    with model.session() as session, model.session() as other:
        wanted = model.generate([50] * 40, session=other, max_tokens=9, seed=2, **WARM)
        request = model.submit([50] * 40, session=session, max_tokens=9, seed=2, **WARM)
        assert wanted.text == request.result(60) and at_rest_but_sessions(model)
        assert session.tokens == other.tokens
        assert (session.eval([5]) == other.eval([5])).all()
    assert at_rest(model)


def at_rest_but_sessions(model: Model) -> bool:
    while model._scheduler._thread is not None:
        time.sleep(0.005)
    return True


def test_slow_readers_hold_nobody_up(model: Model):
    slow = model.submit([50], max_tokens=200, seed=1, ignore_eos=True)
    next(slow)
    assert model.submit([50], max_tokens=30, seed=1, ignore_eos=True).result(60)
    slow_text = slow.result(60)
    assert slow.reason == "length" and slow_text.endswith("".join(slow))


def test_closing_ends_all(path: Path):
    model = runtime.load(path, context=256, threads=1)
    requests = [model.submit([50 + n], **LONG) for n in range(3)]
    next(requests[0])
    model.close()
    for request in requests:
        with pytest.raises(OptionError, match="this model is closed"):
            request.result(30)
    with pytest.raises(OptionError, match="closed"):
        model.submit([50])


def test_closing_ends_requests_that_submit_others(path: Path):
    model = runtime.load(path, context=256, threads=1)
    made: list[Request] = []

    def more(_: Any) -> None:
        made.append(model.submit([50], on_token=more, **LONG))

    made.append(model.submit([50], on_token=more, **LONG))
    next(made[0])
    closing = threading.Thread(target=model.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive() and all(request.done for request in made)


def test_a_model_lives_as_long_as_its_requests(path: Path):
    gc.collect()
    model = runtime.load(path, context=256, threads=1)
    request = model.submit([50], max_tokens=40, seed=1)
    del model
    assert len(request.result(60)) > 0
    import weakref

    gone = weakref.ref(request._model)
    thread = request._model._scheduler._thread
    del request
    if thread is not None:
        thread.join(30)
    gc.collect()
    assert gone() is None


PROCESS = """
import os, signal, sys, threading, time
import runtime
model = runtime.load(sys.argv[1], context=256, sequences=4, threads=1)
long = {"max_tokens": 10**6, "ignore_eos": True}
"""


def run(path: Path, program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROCESS + program, str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_ends_with_requests_under_way(path: Path):
    program = """
requests = [model.submit([50 + n], **long) for n in range(4)]
next(requests[0])
print("end", flush=True)
"""
    assert run(path, program) == "end\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_ctrl_c_ends_what_the_main_thread_reads_and_nothing_else(path: Path):
    program = """
right = model.generate([51], max_tokens=150, seed=1, ignore_eos=True).text
other = model.submit([51], max_tokens=150, seed=1, ignore_eos=True)
signal.signal(signal.SIGINT, signal.default_int_handler)
long = {**long, "on_token": lambda _: time.sleep(0.002)}
for wait in (lambda: list(model.generate([50], **long)), model.submit([50], **long).result):
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        wait()
        print("not interrupted")
    except KeyboardInterrupt:
        pass
print(other.result(60) == right)
"""
    assert run(path, program) == "True\n"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_fork_leaves_requests_to_the_parent(path: Path):
    program = """
options = {"max_tokens": 200, "seed": 1, "ignore_eos": True}
right = model.generate([50], **options).text
request = model.submit([50], **options)
next(request)
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    try:
        request.result(20)
    except runtime.OptionError as error:
        ok = "forked" in str(error)
        os._exit(0 if ok and model.submit([50], **options).result() == right else 1)
    os._exit(2)
print(os.waitpid(pid, 0)[1], request.result(60) == right)
"""
    assert run(path, program) == "0 True\n"
