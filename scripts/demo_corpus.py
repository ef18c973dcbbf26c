"""The demo corpus: an endless, reproducible stream of stories, descriptions and conversations.

    python scripts/demo_corpus.py --documents 5

Documents are separated by `<|endoftext|>`; conversations are ChatML. The held-out documents come
from their own seed, and the training stream leaves out every document that is among them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import click
from demo_chat import chat_text, make_chat, random_system
from demo_stories import make_story, portrait, valley_text
from demo_world import RESIDENTS

SEPARATOR = "<|endoftext|>"
HELD_OUT_SEED = 20_011
HELD_OUT_CHARACTERS = 60_000
_SHORTEST_HELD_OUT = 250


def make_document(rng: random.Random) -> str:
    """One document: a story, a conversation, or a description of a resident or of the valley."""
    kind = rng.random()
    if kind < 0.50:
        return make_story(rng).text
    if kind < 0.96:
        return chat_text(make_chat(rng), random_system(rng))
    if kind < 0.985:
        return portrait(rng.choice(RESIDENTS), rng, rng.randint(4, 7))
    return valley_text(rng)


def documents(seed: int) -> Iterator[str]:
    """All documents of a seed, without end and without regard to what is held out."""
    rng = random.Random(seed)
    while True:
        yield make_document(rng)


def held_out() -> list[str]:
    """The documents that are never trained on; no short ones, which are everyday phrases."""
    chosen: list[str] = []
    for text in documents(HELD_OUT_SEED):
        if len(text) >= _SHORTEST_HELD_OUT and text not in chosen:
            chosen.append(text)
        if sum(map(len, chosen)) >= HELD_OUT_CHARACTERS:
            return chosen
    raise AssertionError("the stream of documents has no end")


def training_documents(seed: int) -> Iterator[str]:
    """The documents of a seed that are not held out."""
    reserved = set(held_out())
    return (text for text in documents(seed) if text not in reserved)


def held_out_text() -> str:
    """The held-out documents as one text, as it is stored beside the model."""
    return SEPARATOR.join(held_out()) + SEPARATOR


@click.command(help=__doc__)
@click.option(
    "--documents", "count", default=5, show_default=True, help="How many documents to print."
)
@click.option("--seed", default=1, show_default=True, help="Seed of the stream.")
def main(count: int, seed: int) -> None:
    for _, text in zip(range(count), training_documents(seed), strict=False):
        click.echo(text + SEPARATOR)


if __name__ == "__main__":
    main()
