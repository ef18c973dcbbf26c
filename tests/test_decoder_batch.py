"""Several sequences whose steps are begun before their tokens are known, as if none ever was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from choosing_cpu import choosing, speaking
from small_models import NOVEL, Sizes
from test_decoder import WARM, backend, seen

from runtime.engine.advance import Piece
from runtime.engine.decoder import Next
from runtime.errors import Error, MemoryLimitError, OptionError
from runtime.model import Model
from runtime.text.answer import Answer
from runtime.text.sampling import Sampling

SIZES = {"qwen3": Sizes(layers=1), "qwen35": NOVEL["qwen35"]}
PROMPTS = [list(range(40, 40 + n)) for n in (28, 29, 20)]  # two begin a page, one step apart
Pair = tuple[Model, Model]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    paths = {name: speaking(tmp_path_factory.mktemp(name), size) for name, size in SIZES.items()}
    return paths.__getitem__


@pytest.fixture(params=SIZES)
def pair(request: pytest.FixtureRequest, file: Callable[[str], Path]) -> Iterator[Pair]:
    """One whose device chooses tokens, and one where the host does."""
    path = file(request.param)
    with choosing(path, context=64) as ahead, choosing(path, False, context=64) as plain:
        yield ahead, plain


class Together:
    """Answers of a model that go on together, `most` tokens each."""

    def __init__(
        self, model: Model, most: Sequence[int], ends: Sequence[int] = (),
        prompts: Sequence[list[int]] = PROMPTS, **options: Any,
    ) -> None:  # fmt: skip
        self.model, self.errors = model, list[Error]()
        model.tokenizer.end_ids = frozenset(ends)
        self.sessions = [model.session() for _ in most]
        self.answers = []
        for n, (session, limit) in enumerate(zip(self.sessions, most, strict=True)):
            sampling = Sampling(**WARM | {"seed": n} | options)
            answer = Answer(model.tokenizer, sampling, model.vocab_size, 64, limit)
            answer.begin(prompts[n])
            answer.feed(session.eval(prompts[n], "last")[0])
            self.answers.append(answer)

    def live(self) -> list[int]:
        """Those that have not ended."""
        return [
            n for n, (answer, session) in enumerate(zip(self.answers, self.sessions, strict=True))
            if answer.reason is None and not session._sequence.record.closed
        ]  # fmt: skip

    def go(self, some: Sequence[int] | None = None) -> None:
        """One token more for each."""
        some = self.live() if some is None else some
        wanted = [(self.sessions[n]._sequence, self.answers[n]) for n in some]
        decoder, found = self.model._engine.decoder, None
        if decoder is not None:
            nexts = [Next(s, a.tokens[-1].id, a.choice(), a.choice(1)) for s, a in wanted]
            found = decoder.choose_all(nexts)
        if found is None:
            pieces = [Piece(s, [a.tokens[-1].id]) for s, a in wanted]
            found = self.model._engine.run(pieces)
        for result, (_, answer) in zip(found, wanted, strict=True):
            if isinstance(result, Error):
                self.errors.append(result)
            elif isinstance(result, int):
                answer.take(result)
            else:
                answer.feed(result[0])

    def end(self) -> list[list[int]]:
        """All tokens."""
        while self.live():
            self.go()
        if self.model._engine.decoder is not None:
            self.model._engine.decoder.end()
        return [[token.id for token in answer.tokens] for answer in self.answers]


def alike(ahead: Together, plain: Together) -> None:
    """Sessions are the same, now and with another token; but which pages they have may differ."""
    for _ in range(2):
        assert told(ahead) == told(plain)
        for pair in zip(ahead.sessions, plain.sessions, strict=True):
            if not pair[1]._sequence.record.closed:
                assert (pair[0].eval([5]) == pair[1].eval([5])).all()


def told(both: Together) -> list[Any]:
    """Of all sessions that are open."""
    found = [seen(s) for s in both.sessions if not s._sequence.record.closed]
    return [each | {"pages": len(each["pages"])} for each in found]


@pytest.mark.parametrize("options", [{"temperature": 0}, {}])
def test_the_same_tokens(pair: Pair, options: dict[str, Any]):
    """Some end before the others: their rows of the step ahead are nobody's."""
    both = [Together(model, (14, 6, 10), **options) for model in pair]
    assert both[0].end() == both[1].end()
    log = backend(pair[0]).log
    begun, waited = (sum(what == each for what, _ in log) for each in ("begin", "wait"))
    assert waited == 13, "one wait a step"
    assert begun - waited == 0, "no step was begun in vain: ends by length are foreseen"
    waits = [log.index(("wait", n)) for n in range(13)]
    ahead = [log.index(("begin", n + 1)) < waits[n] for n in range(12)]
    assert ahead == [n not in (4, 8) for n in range(12)], "none where one ends"
    alike(*both)


def test_an_end_that_nobody_foresaw(pair: Pair):
    """The rows that the others have in the step ahead are theirs, whatever their order now; of the
    one that ended it would have begun a page."""
    for last in range(3, 10):
        prompts = [PROMPTS[0], list(range(40, 72 - last)), PROMPTS[2]]
        plain = Together(pair[1], (12, 12, 12), prompts=prompts).end()
        end = plain[1][last]
        if end not in plain[0] + plain[1][:last] + plain[2]:
            break
    pair[1]._engine.prompts.clear()
    both = [Together(model, (12, 12, 12), ends=[end], prompts=prompts) for model in pair]
    for each in both:
        while each.answers[1].reason is None:
            each.go()
        assert each.answers[1].reason == "end" and len(each.sessions[1]) == 32
        each.go([2, 0])
    assert [what for what, _ in backend(pair[0]).log][-2:] == ["wait", "wait"]
    assert both[0].end() == both[1].end()
    alike(*both)


def test_pages_of_a_running_step_are_taken(pair: Pair):
    """The first step begins a page of one sequence, the step ahead a page of the other."""
    prompts = [list(range(40, 72)), list(range(40, 71))]
    both = [Together(model, (3, 3), prompts=prompts) for model in pair]
    assert both[0].end() == both[1].end()
    alike(*both)


@pytest.mark.parametrize("count", range(1, 6))
def test_one_is_cancelled(pair: Pair, count: int):
    """Closed between two steps, about where pages begin; its memory is free at once."""
    both = [Together(model, (12, 12, 12)) for model in pair]
    for each in both:
        for _ in range(count):
            each.go()
        each.sessions[1].close()
        each.go()
    assert both[0].end() == both[1].end()
    alike(*both)


def test_others_join_and_use_the_model_meanwhile(pair: Pair):
    both = [Together(model, (14, 14, 14)) for model in pair]
    forked: list[list[Any]] = [[], []]
    for each, seen_there in zip(both, forked, strict=True):
        for n in range(9):
            each.go([0, 1] if n < 3 else [0, 1, 2])
            if n == 5:
                with each.sessions[0].fork() as fork:
                    seen_there.append(fork.eval([7]).tolist())
            if n == 6:
                each.sessions[2].rewind(1)
                each.sessions[2].eval([each.answers[2].tokens[-2].id], "none")
    assert forked[0] == forked[1]
    assert both[0].end() == both[1].end()
    alike(*both)


def test_a_closed_sequence_fails_alone(pair: Pair):
    both = [Together(model, (8, 8, 8)) for model in pair]
    for each in both:
        each.go()
        each.sessions[0].close()
        each.go([0, 1, 2])
        assert [type(error) for error in each.errors] == [OptionError]
    assert str(both[0].errors[0]) == str(both[1].errors[0])
    assert both[0].end() == both[1].end()
    alike(*both)


def test_an_interrupt_leaves_all_as_they_were(pair: Pair):
    ahead, plain = (Together(model, (12, 12, 12)) for model in pair)
    for _ in range(3):
        ahead.go()
        plain.go()

    class Log(list):
        def append(self, entry):
            if entry[0] == "wait":
                raise KeyboardInterrupt
            super().append(entry)

    log = backend(pair[0]).log
    backend(pair[0]).log = Log(log)
    with pytest.raises(KeyboardInterrupt):
        ahead.go()
    backend(pair[0]).log = log
    assert [s.tokens for s in ahead.sessions] == [s.tokens for s in plain.sessions]
    pages = [[s._sequence.record.pages.used for s in each.sessions] for each in (ahead, plain)]
    assert pages[0] == pages[1]
    assert ahead.end() == plain.end()


def test_logits_that_are_not_finite(pair: Pair):
    """Of all rows of a step here; none of them goes on, and each is as it was."""
    ahead, plain = (Together(model, (12, 12)) for model in pair)
    backend(pair[0]).broken = {1}
    ahead.go()
    plain.go()
    ahead.go()
    assert [str(e).split(": ", 1)[1][:32] for e in ahead.errors] == 2 * [
        "the model's logits are not finit"
    ]
    assert [s.tokens for s in ahead.sessions] == [s.tokens for s in plain.sessions]
    assert ahead.end() == plain.end()


@pytest.mark.parametrize("pages", [4, 5, 6])
def test_no_memory_for_a_step_ahead(file: Callable[[str], Path], pages: int):
    """Who begins a page finds none; the others go on."""
    found = []
    for choose in (True, False):
        with choosing(file("qwen3"), choose, context=64, sequences=3) as model:
            model._engine.pools.pages.count = pages
            each = Together(model, (20, 20, 20))
            for _ in range(16):
                live = [n for n in each.live() if len(each.errors) < 3]
                if not live:
                    break
                before = len(each.errors)
                each.go(live)
                for error in each.errors[before:]:
                    assert isinstance(error, MemoryLimitError)
                if len(each.errors) > before:
                    break
            found.append(([s.tokens for s in each.sessions], list(map(str, each.errors))))
    assert found[0] == found[1]


def test_no_slots_for_a_step_ahead(file: Callable[[str], Path]):
    """It takes one for each sequence, beside those in use; without, tokens come one by one."""
    found = []
    for choose in (True, False):
        with choosing(file("qwen35"), choose, context=64, sequences=3) as model:
            each = Together(model, (9, 9, 9))
            used = set[int]().union(*(s._sequence.held_slots() for s in each.sessions))
            model._engine.pools.slots.count = max(used) + 3
            found.append(each.end())
            if choose:
                log = backend(model).log
                assert all(log[at + 1][0] == "wait" for at in range(0, len(log), 2))
    assert found[0] == found[1]
