"""Streams of tokens give the same text as all tokens at once, and never half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import byte_pairs, scored

from runtime.text.stops import StopFilter
from runtime.text.tokenizer import Tokenizer

BYTES = Tokenizer(byte_pairs())
SCORED = Tokenizer(scored({"▁": -1.0, "a": -2.0, "▁a": -0.5, "é": -3.0}))


def stream_text(stream, ids):
    return "".join([*(stream.feed(i) for i in ids), stream.flush()])


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([BYTES, SCORED]), st.booleans())
def test_pieces_joined_are_the_decoded_text(data, tokenizer, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream(skip_special=skip, strip_space=tokenizer is SCORED)
    assert stream_text(stream, ids) == tokenizer.decode(ids, skip_special=skip)


def test_half_a_character_is_held_back():
    stream = BYTES.stream()
    pieces = [stream.feed(i) for i in BYTES.encode("a😀é", add_special=False)]
    assert pieces == ["a", "", "", "", "😀", "", "é"]
    assert stream.flush() == ""


def test_flush_shows_what_stayed_unfinished_and_starts_afresh():
    stream = BYTES.stream()
    ids = BYTES.encode("😀", add_special=False)
    assert [stream.feed(i) for i in ids[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream_text(stream, ids) == "😀"


def test_broken_bytes_become_replacement_characters_at_once():
    stream = SCORED.stream()
    lone = SCORED._known.byte_ids[0xFF]
    assert stream.feed(lone) == "\ufffd"


def test_continued_text_keeps_its_leading_space():
    ids = SCORED.encode("a", add_special=False)
    assert stream_text(SCORED.stream(), ids) == " a"
    assert stream_text(SCORED.stream(strip_space=True), ids) == "a"
    assert SCORED.decode(ids) == "a"


def test_control_tokens_are_hidden_or_shown():
    ids = BYTES.encode("he<|im_end|><tag>", add_special=False)
    assert BYTES.decode(ids) == "he<|im_end|><tag>"
    assert BYTES.decode(ids, skip_special=True) == "he<tag>"
    assert stream_text(BYTES.stream(), ids) == "he<tag>"


class TestStopFilter:
    @pytest.mark.parametrize(
        ("stops", "pieces", "shown", "stop"),
        [
            (["END"], ["abc E", "N", "D def"], ["abc ", "", ""], "END"),
            (["END"], ["abc E", "N", "x"], ["abc ", "", "ENx"], None),
            (["aab"], ["aaaaab"], ["aaa"], "aab"),
            (["abc", "b"], ["a", "b"], ["", "a"], "b"),
            (["bc", "abc"], ["xabc"], ["x"], "abc"),
            (["\n\n"], ["one\n", "two\n", "\n"], ["one", "\ntwo", ""], "\n\n"),
            ([], ["abc", ""], ["abc", ""], None),
        ],
    )
    def test_cuts_before_the_stop_across_borders(self, stops, pieces, shown, stop):
        found = StopFilter(stops)
        assert [found.feed(piece) for piece in pieces] == shown
        assert found.stop == stop and found.stopped == (stop is not None)
        assert found.feed("more") == ("" if stop else "more")

    def test_flush_gives_what_was_held_back(self):
        found = StopFilter(["STOP"])
        assert found.feed("go ST") == "go "
        assert found.flush() == "ST" and found.flush() == ""

    @settings(max_examples=300, deadline=None)
    @given(
        st.text("ab", max_size=20),
        st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
        st.data(),
    )
    def test_the_text_does_not_depend_on_how_it_was_cut(self, text, stops, data):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        cut, whole = StopFilter(stops), StopFilter(stops)
        shown = "".join(map(cut.feed, pieces)) + cut.flush()
        assert (shown, cut.stop) == (whole.feed(text) + whole.flush(), whole.stop)
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown + (cut.stop or ""))


class TestHiddenText:
    """Stop strings are found in the text of control tokens, which is never shown."""

    @pytest.mark.parametrize(
        ("stops", "pieces", "shown", "stop"),
        [
            (["<c>"], ["a", ("<c>",), "b"], "a", "<c>"),
            (["<c>"], ["a", ("<d>",), "b"], "ab", None),
            (["a<c>"], ["xa", ("<c>",)], "x", "a<c>"),
            (["<c>b"], ["a", ("<c>",), "b"], "a", "<c>b"),
            (["<c>user"], ["a", ("<c>",), "us", "er"], "a", "<c>user"),
            (["<c>user"], ["a", ("<c>",), "us", "ed"], "aused", None),
            (["a<c>b<d>"], ["xa", ("<c>",), "b", ("<d>",)], "x", "a<c>b<d>"),
            (["ab"], ["xa", ("<c>",), "b"], "x", "ab"),
            (["ab", "<c>"], ["xa", ("<c>",), "b"], "xa", "<c>"),
            (["c>b", "ab"], ["xa", ("<c>",), "b"], "x", "ab"),
            (["<"], ["a", ("<c>",)], "a", "<"),
            (["a<"], ["xa", ("<c>",), "b"], "x", "a<"),
            (["END"], ["E", ("<c>",), "N", ("<d>",), "D"], "", "END"),
            (["END"], ["E", ("<c>",), "N", ("<d>",), "E", "ND"], "EN", "END"),
            ([], ["a", ("<c>",), "b"], "ab", None),
        ],
    )
    def test_stop_strings(self, stops, pieces, shown, stop):
        found = StopFilter(stops)
        text = "".join(
            found.feed("", p[0]) if isinstance(p, tuple) else found.feed(p) for p in pieces
        )
        assert (text + found.flush(), found.stop) == (shown, stop)

    @settings(max_examples=500, deadline=None)
    @given(
        st.lists(st.tuples(st.booleans(), st.text("ab", min_size=1, max_size=3)), max_size=8),
        st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
        st.data(),
    )
    def test_it_does_what_the_definition_says(self, pieces, stops, data):
        """The first place where a stop string is complete, in all of the text or the visible."""
        found, shown = StopFilter(stops), []
        for hidden, text in pieces:
            if hidden:
                shown.append(found.feed("", text))
                continue
            cut = data.draw(st.integers(0, len(text)))
            shown += (found.feed(text[:cut]), found.feed(text[cut:]))
        assert ("".join(shown) + found.flush(), found.stop) == stopped_text(pieces, stops)

    def test_a_stream_says_what_it_hides(self):
        ids = BYTES.encode("he<|im_end|><tag>", add_special=False)
        assert [BYTES.stream().hidden_text(i) for i in ids] == ["", "<|im_end|>", ""]
        assert [BYTES.stream(skip_special=False).hidden_text(i) for i in ids] == [""] * 3


def stopped_text(pieces: list[tuple[bool, str]], stops: list[str]) -> tuple[str, str | None]:
    """(visible text, stop string), character by character; hidden pieces come at once."""
    steps = [
        step
        for hidden, text in pieces
        for step in ([(True, text)] if hidden else [(False, c) for c in text])
    ]
    everything = visible = ""
    where: list[int] = []  # of each character of everything: how much of visible is before it
    for hidden, text in steps:
        begin = len(everything)
        where += [len(visible)] * len(text)
        everything += text
        visible += "" if hidden else text
        found = ((everything.find(s, max(0, begin - len(s) + 1)), s) for s in stops)
        met = [(at + len(s), at, s) for at, s in found if at >= 0]
        if met:  # of those in all of the text, the one that is complete first
            end, at, stop = min(met)
            met = [(where[end] if end < len(where) else len(visible), where[at], stop)]
        if not hidden:
            met += [(len(visible), len(visible) - len(s), s) for s in stops if visible.endswith(s)]
        if met:
            _, start, stop = min(met)
            return visible[:start], stop
    return visible, None
