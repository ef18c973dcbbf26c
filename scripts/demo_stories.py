"""Stories and descriptions of the demo corpus, put together from `demo_plots` and `demo_world`."""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo_grammar import expand
from demo_plots import Plot
from demo_plots_two import PLOTS
from demo_world import (
    PLACE_FACTS,
    RESIDENTS,
    VALLEY,
    VISITOR_HOMES,
    VISITOR_KINDS,
    VISITOR_NAMES,
    WEATHER,
    Person,
    Thing,
    resident,
)

LANDMARKS = (
    "the well",
    "the old mill",
    "the stone bridge",
    "the orchard",
    "the village square",
    "the meadow",
    "the river bank",
    "the inn",
    "the bakery",
    "the forest",
    "the hill",
    "the clock tower",
    "the lake",
)

_DOING = (
    "[sitting by the window|walking along the river|drinking tea|sweeping the doorstep|"
    "on {A.their} way to the village|humming a little song|looking out of the door|"
    "thinking about supper|mending an old basket|having breakfast]"
)
_SIZE = "[little|young|small|clever|curious|cheerful|shy|brave]"
_WHEN = "[morning|morning|day|day|Saturday|Sunday|Monday]"

OPENINGS = (
    f"Once upon a time, there was a {_SIZE} {{A.kind}} [named|called] {{A}}, who lived {{A.home}}. "
    "{more}",
    f"Once upon a time, in {VALLEY}, there lived a {_SIZE} {{A.kind}} [named|called] {{A}}. "
    "{more} {sky}",
    f"Once there was a {_SIZE} {{A.kind}} [named|called] {{A}}. "
    "{A.They} lived {A.home}. {more}",
    f"There was once a {_SIZE} {{A.kind}} [whose name was|named|called] {{A}}. {{more}}",
    f"One {{adjective}} {_WHEN}, {{A.intro}} was {{doing}}. {{sky}}",
    f"It was a {{adjective}} {_WHEN} in {VALLEY}. {{sky}} {{A.intro_}} was {{doing}}.",
    "Early one {adjective} morning, {A.intro} was {doing}. {more}",
    "{A.intro_} lived {A.home}. {more} {sky}",
    f"{{sky}} {{A.intro_}} was {{doing}}. It was a {{adjective}} {_WHEN}.",
    f"On a {{adjective}} {_WHEN}, not long ago, {{A.intro}} was {{doing}}. {{more}}",
)
_ABOUT_RESIDENT = (
    "{A.They} was the {A.job} of the valley.",
    "Everybody knew that {A} loved {A.hobby}.",
    "{A} liked {A.food} best of all.",
    "{A.They} loved {A.hobby}, and {A.they} was afraid of {A.fear}.",
    "{A.Their} best friend was {A.friend}.",
    "",
)
_ABOUT_VISITOR = (
    "{A} liked [long walks|pancakes|old songs|rainy evenings|funny hats|stories about the sea].",
    "{A.They} was always [kind|polite|hungry|in a good mood|a little late].",
    "Everybody [liked|knew] {A}.",
    "{A} had [a big heart|a loud laugh|a red coat|many questions|a pair of green boots].",
    "",
)
_CLOSINGS = (
    "",
    "",
    "And that is how a bad day became a good one.",
    "That night everybody in the valley slept well.",
    "[In the valley they still talk about it.|They often talked about it afterwards.]",
    "And when the moon rose over the lake, all was well.",
    "It was a day that {A} never forgot.",
    "And if you visit {A} one day, {A.they} will tell you the whole story.",
)
_PORTRAIT = (
    "{A} lives {A.home}.",
    "{A.They} is the {A.job} of Lantern Valley.",
    "{A.They} likes {A.food} best of all.",
    "{A.They} loves {A.hobby}.",
    "{A.They} is afraid of {A.fear}.",
    "{A.Their} greatest treasure is {treasure}.",
    "{A.Their} best friend is {friend}.",
)


@dataclass(frozen=True)
class Story:
    """A finished story with all that is needed to ask about it."""

    text: str
    plot: Plot
    slots: dict[str, object]

    def question(self, index: int, rng: random.Random) -> tuple[str, str]:
        """The question of the plot with number `index` and its right answer."""
        question, answer = self.plot.asks[index]
        return expand(f"[{question}]", self.slots, rng), expand(answer, self.slots, rng)

    @property
    def hero(self) -> Person:
        hero = self.slots["A"]
        assert isinstance(hero, Person), "slot A of a story is its hero"
        return hero


def visitor(rng: random.Random) -> Person:
    """Somebody who is not one of the residents."""
    kind = rng.choice(VISITOR_KINDS)
    pronoun = {"girl": "she", "boy": "he", "hen": "she", "princess": "she"}.get(kind) or rng.choice(
        ("he", "she")
    )
    return Person(rng.choice(VISITOR_NAMES[pronoun]), kind, pronoun, rng.choice(VISITOR_HOMES))


def _cast(plot: Plot, hero: Person | None, rng: random.Random) -> dict[str, Person]:
    """Three people with different names; friends meet more often than chance would have it."""
    guest = plot.newcomer or rng.random() < 0.45
    first = hero or (visitor(rng) if guest else rng.choice(RESIDENTS))
    cast = [first]
    if first.resident and rng.random() < 0.3:
        cast.append(resident(first.friend))
    while len(cast) < 3:
        person = visitor(rng) if rng.random() < 0.2 else rng.choice(RESIDENTS)
        if person.name not in [other.name for other in cast]:
            cast.append(person)
    return dict(zip("ABC", cast, strict=True))


def make_story(rng: random.Random, plot: Plot | None = None, hero: Person | None = None) -> Story:
    """A story of a random or given plot; a newcomer's story ignores a resident as `hero`."""
    plot = plot or rng.choice(PLOTS)
    if hero and hero.resident and plot.newcomer:
        hero = None
    slots: dict[str, object] = dict(_cast(plot, hero, rng))
    slots["w1"], slots["w2"] = rng.sample(LANDMARKS, 2)
    for key, value in rng.choice(plot.rows).items():
        slots[key] = expand_inside(value, slots, rng) if isinstance(value, str) else value
    parts = [_opening(plot, slots, rng)]
    parts += [expand(f"[{beat}]", slots, rng) for beat in plot.beats]
    parts.append(expand(rng.choice(_CLOSINGS), slots, rng))
    return Story(" ".join(part for part in parts if part), plot, slots)


def expand_inside(value: str, slots: dict[str, object], rng: random.Random) -> str:
    """Like `expand`, but for words that stand inside a sentence: no capital at the start."""
    return expand("\0" + value, slots, rng)[1:]


def _opening(plot: Plot, slots: dict[str, object], rng: random.Random) -> str:
    hero = slots["A"]
    assert isinstance(hero, Person), "slot A of a story is its hero"
    adjectives, skies = WEATHER[rng.choice(plot.weather)]
    about = _ABOUT_RESIDENT if hero.resident else _ABOUT_VISITOR
    words = {
        "adjective": rng.choice(adjectives),
        "sky": rng.choice(skies),
        "more": rng.choice(about),
    }
    hobby = hero.hobby
    words["doing"] = hobby if hobby and rng.random() < 0.3 else _DOING
    return expand(rng.choice(OPENINGS), slots | words, rng)


def portrait(person: Person, rng: random.Random, length: int = 7) -> str:
    """What is known about a resident, as a few sentences in varied order."""
    slots = {"A": person, "treasure": Thing(person.treasure).a}
    slots["friend"] = resident(person.friend).intro
    lines = rng.sample(_PORTRAIT[1:], min(length, len(_PORTRAIT)) - 1)
    lines.insert(rng.randrange(2), _PORTRAIT[0])
    return " ".join(
        [f"{person} is {person.a_kind}.", *(expand(line, slots, rng) for line in lines)]
    )


def valley_text(rng: random.Random) -> str:
    """Some facts about the valley, as one paragraph."""
    facts = [
        answer
        for _, answer in PLACE_FACTS
        if not answer.startswith(("Yes", "No", "This", "It is called"))
    ]
    return " ".join([f"{VALLEY} is a quiet place.", *rng.sample(facts, rng.randint(3, 6))])
