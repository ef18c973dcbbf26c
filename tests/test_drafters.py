"""Who drafts: the text itself and a smaller model; how many drafts, and when none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from choosing_cpu import VOCABULARY, speaking
from small_models import Sizes, write_model

import runtime
from runtime.engine.costs import StepCosts
from runtime.errors import OptionError
from runtime.speculation.acceptance import Acceptance
from runtime.speculation.draft_model import DraftModel
from runtime.speculation.lengths import Lengths, Room
from runtime.speculation.ngram import Ngrams
from runtime.speculation.source import Source

WIDE = Room(15)
WARM = {"temperature": 1.5, "seed": 3, "max_tokens": 60}


def longest(tokens: list[int]) -> tuple[int, int]:
    """The plain search: how long the longest match is (40 at most) and where the text goes on."""
    n, best = len(tokens), (0, -1)
    for end in range(1, n):
        same = 0
        while same < min(40, end) and tokens[end - same - 1] == tokens[n - same - 1]:
            same += 1
        best = max(best, (same, end))
    return best


class TestNgrams:
    @pytest.mark.parametrize("words", [30, 300])
    def test_the_longest_match_goes_on(self, words: int):
        for seed in range(12):
            r = random.Random(seed)
            tokens = [r.randrange(words) for _ in range(r.randrange(1, 60))]
            drafter = Ngrams()
            drafter.begin(tokens)
            for _ in range(60):
                found = drafter.propose(tokens, 6)
                length, at = longest(tokens)
                if length >= 2 and drafter._length == min(length, drafter._length):
                    assert found[0] in tokens and len(found) == 6
                if length > 5:
                    period = len(tokens) - drafter._at
                    assert drafter._length >= length
                    assert found == [tokens[drafter._at + i % period] for i in range(6)]
                again = r.random() < 0.7 and at > 0
                tokens.append(tokens[at] if again else r.randrange(words))

    def test_a_longer_match_is_surer(self):
        source = list(range(100, 160))
        text = [*source, 1, 2, 3, *source[:2]]
        drafter, found = Ngrams(), []
        drafter.begin(text)
        for token in source[2:40]:
            assert drafter.propose(text, 4) == list(range(token, token + 4))
            found.append(drafter.certainty)
            text.append(token)
        assert found == sorted(found) and found[0] == 0 and found[-1] == 6
        text.append(7)
        assert drafter.propose(text, 4) == []

    def test_nothing_is_found_where_nothing_is(self):
        drafter = Ngrams()
        drafter.begin([5])
        assert drafter.propose([5], 4) == []

    def test_several_tokens_at_once_are_chained(self):
        one, many = Ngrams(), Ngrams()
        text = [1, 2, 3, 4, 5, 6]
        one.begin(text)
        many.begin(text)
        for token in [7, 1, 2, 3, 4, 9, 9, 1, 2]:
            text.append(token)
            found = one.propose(text, 5)
        assert many.propose(text, 5) == found == [3, 4, 9, 9, 1]


def costs(**shape: float) -> StepCosts:
    made = StepCosts()
    for _ in range(200):
        for name, seconds in shape.items():
            made.learn(int(name[1:]), seconds)
    return made


class TestCosts:
    def test_they_are_those_measured(self):
        found = costs(t1=4.0, t2=5.0, t4=6.0, t8=20.0)
        for tokens, seconds in ((1, 4.0), (2, 5.0), (3, 6.0), (4, 6.0), (7, 20.0)):
            assert found.of(tokens) == pytest.approx(seconds, rel=0.1)

    def test_one_step_that_waited_says_little(self):
        found = costs(t1=4.0, t4=6.0)
        found.learn(4, 600.0)
        assert found.of(4) < 8

    def test_a_slower_machine_is_slower_for_all(self):
        found = costs(t1=4.0, t4=6.0)
        for _ in range(30):
            found.learn(1, 8.0)
        assert found.of(4) == pytest.approx(12.0, rel=0.15)


class Steps:
    """What `Lengths` knows of an engine."""

    def __init__(self, made: StepCosts, sizes: tuple[int, ...] = (1, 2, 4, 8, 16)) -> None:
        self.costs, self.sizes, self.programs, self.vocabulary = made, sizes, self, 1000

    def made(self, tokens: int, rows: int) -> bool:
        return 1 << max(0, tokens - 1).bit_length() in self.sizes


class TestLengths:
    def best(self, followed: int, known: int, room: Room = WIDE, **shape: float) -> int:
        acceptance = Acceptance()
        for _ in range(200):
            acceptance.learn(3, followed, known)
        return Lengths(Steps(costs(**shape)), acceptance).best(room, 3)[0]  # type: ignore[arg-type]

    def test_as_many_as_pay(self):
        flat = {"t1": 1.0, "t2": 1.1, "t4": 1.2, "t8": 1.4, "t16": 1.8}
        steep = {"t1": 1.0, "t2": 1.1, "t4": 1.3, "t8": 3.0, "t16": 6.0}
        assert self.best(15, 15, **flat) == 15 and self.best(15, 15, **steep) == 3
        assert self.best(0, 1, **flat) == 0  # none of them follows
        dear = {f"t{n}": 1.2 * n - 0.2 for n in (1, 2, 4, 8, 16)}  # more than its tokens alone
        assert self.best(15, 15, **dear) == 0

    def test_the_room_is_kept(self):
        flat = {"t1": 1.0, "t2": 1.1, "t4": 1.2, "t8": 1.4, "t16": 1.8}
        assert self.best(15, 15, Room(5), **flat) == 5
        assert self.best(15, 15, Room(0), **flat) == 0

    def test_among_others_only_what_pays_for_all(self):
        """8 answers fill a step of 8; drafts make it one of 16, which takes twice as long."""
        steep = {"t1": 1.0, "t2": 1.1, "t4": 1.3, "t8": 2.0, "t16": 4.6}
        assert self.best(15, 15, Room(15, answers=8), **steep) == 0
        assert self.best(15, 15, Room(15, answers=2), **steep) == 3

    def test_a_program_is_made_once_it_would_have_paid(self):
        acceptance = Acceptance()
        for _ in range(200):
            acceptance.learn(3, 15, 15)
        engine = Steps(costs(t1=1.0, t4=1.2), sizes=(1,))
        engine.costs.made(20.0)
        lengths = Lengths(engine, acceptance)  # type: ignore[arg-type]
        asked = [lengths.best(Room(3), 3)[0] for _ in range(30)]
        first = asked.index(3)
        assert 4 < first < 20 and set(asked[:first]) == {0}


class Wrong:
    """Takes its time for drafts that never follow."""

    kind, free, certainty, most = "wrong", False, 7, 15
    asked = 0

    def begin(self, tokens: list[int]) -> None: ...
    def close(self) -> None: ...

    def propose(self, tokens: list[int], most: int) -> list[int]:
        self.asked += 1
        return [999] * most


def test_who_is_never_right_is_seldom_asked():
    drafter, tokens = Wrong(), [1]
    engine = Steps(costs(t1=1.0, t2=1.1, t4=1.3, t8=2.0, t16=4.0))
    source = Source(engine, drafter, tokens)  # type: ignore[arg-type]
    at = []
    for n in range(2000):
        offer = source.offer(Room(15))
        if offer.drafts:
            source.drafts(offer)
            at.append(n)
        tokens.append(n)
    assert at[0] == 0 and sum(n > 1000 for n in at) <= 5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tmp_path_factory.mktemp("drafting"), Sizes("qwen3", layers=2))


def test_a_model_drafts_for_itself(path: Path):
    """As its own draft model it is right whenever it is sure; another session is left as it is."""
    prompt = list(range(40, 90))
    options = {"context": 256, "threads": 1, "progress": False}
    with (
        runtime.load(path, **options) as draft,
        runtime.load(path, draft=draft, **options) as model,
    ):
        plain = model.generate(prompt, spec="off", **WARM)
        answer = model.generate(prompt, spec="draft", **WARM)
        assert answer.text == plain.text and answer.tokens == plain.tokens
        assert plain.speculation is None and answer.speculation is not None
        text = [*prompt, *answer.tokens]
        drafter = DraftModel(draft)
        drafter.begin(text[:51])
        for n in (51, 52, 60, 57 + 8):
            found = drafter.propose(text[:n], 4)
            rows = model.eval([*text[:n], *found])[n - 1 :]
            assert found == rows.argmax(-1)[: len(found)].tolist()
            assert len(drafter._session) < n + 4
        drafter.close()
        drafter.close()


def test_a_file_drafts_and_is_closed(path: Path):
    with runtime.load(path, draft=path, context=64, threads=1, progress=False) as model:
        assert model.draft is not None and model.draft.context == 64
        draft = model.draft
    with pytest.raises(OptionError, match="closed"):
        draft.session()


def test_what_cannot_draft_is_refused(path: Path, tmp_path: Path):
    other = dict(VOCABULARY)
    tokens = list(other["tokenizer.ggml.tokens"])
    tokens[7] = "other"
    other["tokenizer.ggml.tokens"] = tokens
    size = Sizes("qwen3", layers=1, vocabulary=len(tokens))
    wrong = write_model(tmp_path / "other.gguf", size, extra=other)
    with pytest.raises(OptionError, match=r"has 'other' as token 7 and the model .*; a smaller"):
        runtime.load(path, draft=wrong, progress=False)
    short = {**other, "tokenizer.ggml.tokens": VOCABULARY["tokenizer.ggml.tokens"][:200]}
    for name in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if name in short:
            short[name] = short[name][:200]
    few = write_model(tmp_path / "few.gguf", Sizes("qwen3", layers=1, vocabulary=200), extra=short)
    with pytest.raises(OptionError, match=r"has 200 tokens and the model \d+; a smaller model"):
        runtime.load(path, draft=few, progress=False)
    with pytest.raises(OptionError, match="needs a draft model"):
        runtime.load(path, spec="draft", progress=False)
    with pytest.raises(OptionError, match="spec='fast' must be one of auto, off, ngram, draft"):
        runtime.load(path, spec="fast", progress=False)
    with pytest.raises(OptionError, match="draft=3 must be the path"):
        runtime.load(path, draft=3, progress=False)  # type: ignore[arg-type]
    with runtime.load(path, context=64, threads=1, progress=False) as model:
        with pytest.raises(OptionError, match="needs a draft model"):
            model.generate([1, 2], spec="draft")
        with pytest.raises(OptionError, match="spec=1 must be"):
            model.generate([1, 2], spec=1)  # type: ignore[arg-type]
