"""An answer fed with rows of logits: no model, no session."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from vocabularies import byte_pairs

from runtime.text.answer import Answer
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(byte_pairs())
WIDTH = TOKENIZER.vocab_size + 3  # the output matrix of a model may have padding
END = TOKENIZER.eos_id


def _answer(room: int = 100, most: int | None = None, **sampling) -> Answer:
    answer = Answer(TOKENIZER, Sampling(temperature=0, **sampling), WIDTH, room, most)
    answer.begin([1, 2])
    return answer


def _fed(answer: Answer, ids: Iterable[int]) -> list[tuple[str, str | None]]:
    """Texts and ends of tokens that the model is sure of, until there is an end."""
    found = []
    for i in ids:
        row = np.zeros(WIDTH, np.float32)
        row[[i, -1]] = 5, 9
        token, text, end = answer.feed(row)
        assert token.id == i and (end is not None) == (answer.reason is not None)
        found.append((text, end))
        if end:
            break
    return found


def _ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special=False)


@pytest.mark.parametrize(
    ("text", "options", "shown", "reason"),
    [
        ("hello world", {"most": 3}, "hello world", None),
        ("hello world", {"most": 2}, "hello world", "length"),
        ("hello world", {"most": 1}, "hello", "length"),
        ("hello world", {"room": 1}, "hello", "context"),
        ("hello world", {"room": 1, "most": 1}, "hello", "length"),
        ("hello world", {"stop": " wor"}, "hello", "stop"),
        ("hello wo", {"stop": " world", "most": 3}, "hello wo", "length"),
        ("hello world", {"stop": "ld", "most": 2}, "hello wor", "stop"),
        ("é", {"most": 1}, "\ufffd", "length"),
        ("é", {"most": 2}, "é", "length"),
        ("hello<|im_start|>", {"stop": "<|im_start|>"}, "hello", "stop"),
    ],
)
def test_what_is_shown_and_why_it_ends(text: str, options: dict, shown: str, reason: str | None):
    answer = _answer(**options)
    found = _fed(answer, TOKENIZER.encode(text, add_special=False, parse_special=True))
    assert "".join(piece for piece, _ in found) == answer.text == shown
    assert answer.reason == found[-1][1] == reason


def test_an_end_token_shows_what_was_held_back():
    answer = _answer(stop="hello!")
    assert _fed(answer, [*_ids("hello"), END]) == [("", None), ("hello", "end")]
    assert [token.id for token in answer.tokens] == [*_ids("hello"), END]


@pytest.mark.parametrize(
    ("room", "most", "reason"), [(5, 0, "length"), (0, None, "context"), (0, 0, "length")]
)
def test_no_room_is_the_end_before_the_first_token(room: int, most: int | None, reason: str):
    assert _answer(room, most).reason == reason and _answer(1, 1).reason is None


def test_penalties_look_at_what_came_before():
    answer = Answer(TOKENIZER, Sampling(temperature=0, repeat_penalty=2.0), WIDTH, 9)
    answer.begin([4, 5])
    row = np.zeros(WIDTH, np.float32)
    row[[4, 6, 7]] = 3, 2, 1.9
    assert [answer.feed(row).token.id for _ in range(3)] == [6, 7, 4]
