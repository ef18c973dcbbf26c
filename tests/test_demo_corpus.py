"""The generated text of the demo model: reproducible, well formed, true to its world."""

from __future__ import annotations

import importlib
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
chat = importlib.import_module("demo_chat")
corpus = importlib.import_module("demo_corpus")
grammar = importlib.import_module("demo_grammar")
stories = importlib.import_module("demo_stories")
world = importlib.import_module("demo_world")

DATA = ROOT / "runtime" / "data"
# How a document states a fact of a resident: pattern with the resident's name -> field of Person.
STATED = {
    r"\b{name} (?:lives|lived|who lived) ([a-z][^.,?]*)[.]": "home",
    r"\b{name} is afraid of ([^.,?]*)[.]": "fear",
    r"\b{name} (?:likes|liked) ([^.,?]*) best of all[.]": "food",
    r"\b{name} is the ([^.,?]*) of Lantern Valley[.]": "job",
    r"\b{name}'s greatest treasure is an? ([^.,?]*)[.]": "treasure",
}


USER = re.compile(r"<\|im_start\|>user\n.*?<\|im_end\|>\n", re.DOTALL)


def told(text: str) -> str:
    """What the corpus itself says: a user may ask anything, as carelessly as people do."""
    return re.sub(r"<\|[a-z_]+\|>(assistant|system)?", "", USER.sub("", text))


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return list(islice(corpus.training_documents(5), 6000))


def test_a_seed_gives_the_same_documents_and_another_seed_others() -> None:
    first, again, other = (list(islice(corpus.documents(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert set(first).isdisjoint(other)


def test_held_out_documents_are_never_trained_on(sample: list[str]) -> None:
    held_out = corpus.held_out()
    assert set(held_out).isdisjoint(sample)
    assert len(set(held_out)) == len(held_out)
    assert any(text.startswith("<|im_start|>") for text in held_out)
    assert any(not text.startswith("<|im_start|>") for text in held_out)


def test_training_skips_a_document_that_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = islice(corpus.documents(8), 2)
    monkeypatch.setattr(corpus, "held_out", lambda: [first])
    assert next(corpus.training_documents(8)) == second


def test_the_stored_held_out_text_is_the_generated_one() -> None:
    stored = (DATA / "demo-heldout.txt").read_text(encoding="utf-8")
    assert stored == corpus.held_out_text()


def test_documents_are_varied(sample: list[str]) -> None:
    long_ones = [text for text in sample if len(text) > 400]
    assert len(set(long_ones)) == len(long_ones)
    assert len({text[:40] for text in long_ones}) > len(long_ones) / 4


@pytest.mark.parametrize(
    "flaw",
    [
        r"[\[\]{}\0]",
        r"  ",
        r"\b([A-Za-z]+) \1\b",
        r"\ba (?!one)[aeio]",
        r"\ban (?!hour)[^aeiou\W]",
        r" [,.;?!]",
        r"[.!?] [a-z]",
    ],
)
def test_prose_is_well_formed(sample: list[str], flaw: str) -> None:
    for text in map(told, sample):
        match = re.search(flaw, text)
        assert match is None, f"{match} in {text!r}"


@pytest.mark.parametrize("pattern, field", STATED.items())
def test_stated_facts_are_those_of_the_world(sample: list[str], pattern: str, field: str) -> None:
    seen = 0
    residents = {person.name: person for person in world.RESIDENTS}
    finder = re.compile(pattern.format(name=f"(?P<who>{'|'.join(residents)})"))
    for text in map(told, sample):
        for match in finder.finditer(text):
            assert match[2] == getattr(residents[match["who"]], field), match[0]
            seen += 1
    assert seen > 50


def test_residents_are_what_they_are_everywhere(sample: list[str]) -> None:
    kinds = {person.name: person.kind for person in world.RESIDENTS}
    finder = re.compile(rf"\b({'|'.join(kinds)}) the ([a-z]+)\b")
    pairs = {match.groups() for text in map(told, sample) for match in finder.finditer(text)}
    assert pairs == set(kinds.items())


def test_the_world_is_unambiguous() -> None:
    for field in ("name", "kind", "home", "job", "food", "hobby", "fear", "treasure"):
        values = [getattr(person, field) for person in world.RESIDENTS]
        assert len(set(values)) == len(values), field
    for person in world.RESIDENTS:
        assert world.resident(world.resident(person.friend).friend) == person
    names = [name for group in world.VISITOR_NAMES.values() for name in group]
    assert set(names).isdisjoint(world.BY_NAME)
    questions = [question for group, _ in world.PLACE_FACTS for question in group]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("plot", stories.PLOTS, ids=lambda plot: plot.name)
def test_a_story_tells_what_may_be_asked_about_it(plot: object) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        story = stories.make_story(rng, plot)
        text = story.text.lower()
        for index, (_, template) in enumerate(story.plot.asks):
            question, answer = story.question(index, rng)
            assert question.endswith("?") and answer.endswith((".", '."'))
            for name in re.findall(r"\{(\w+)", template):
                assert str(story.slots[name]).lower() in text, f"{name} in {story.text!r}"


def test_nobody_is_known_who_does_not_live_in_the_valley() -> None:
    rng = random.Random(2)
    for question, answer in (turn for _ in range(500) for turn in chat._unknown_turn(rng)):
        known = [name for name in world.BY_NAME if re.search(rf"\b{name}\b", question)]
        assert answer.startswith("I don't know.")
        assert (answer == chat.UNKNOWN_FACT) == bool(known), question


def test_a_doubtful_claim_is_answered_with_what_is_true() -> None:
    rng = random.Random(4)
    for question, answer in (turn for _ in range(400) for turn in chat._yes_no_turn(rng)):
        asked = next(person for name, person in world.BY_NAME.items() if f" {name} " in question)
        assert answer in [chat.fact_answer(asked, fact) for fact in chat.FACTS]


def test_conversations_fit_the_context() -> None:
    rng = random.Random(6)
    assert max(len(chat.chat_text(chat.make_chat(rng))) for _ in range(2000)) < 2500


def test_templates() -> None:
    rng = random.Random(0)
    assert grammar.expand("[a [b|b]|a b] {x.name}", {"x": world.Thing("oak")}, rng) == "A b oak"
    assert grammar.expand('"{x}"', {"x": "[yes|yes]"}, rng) == '"Yes"'
    with pytest.raises(ValueError, match="nests more than"):
        grammar.expand("{x}", {"x": "{x}"}, rng)
    with pytest.raises(KeyError):
        grammar.expand("{missing}", {}, rng)
