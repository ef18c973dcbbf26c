"""Conversations in a real terminal: keys, paste, Ctrl-C, wrapping, progress."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from fake_model import needs_demo

pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
from terminal import Terminal

from runtime.cli.wrap import Wrapper, width

CHILD = (sys.executable, str(Path(__file__).parent / "echoing.py"))
BREATH = 0.3  # seconds until a prompt that is shown also waits: no hand is quicker
SOON = 0.6  # seconds; 0.3 and the slack of a busy machine


def talk(*args, columns=80):
    return Terminal([*CHILD, *(args or ("run", "model.gguf"))], columns)


@needs_demo
class TestConversation:
    @pytest.mark.parametrize("args", [("run", "m.gguf"), ("m.gguf",), ("chat",), ("run", "-cnv")])
    def test_messages_are_answered_until_bye(self, args):
        with talk(*args) as terminal:
            terminal.expect("/? for help, /bye to leave")
            terminal.expect("> ")
            terminal.send("hello\r")
            terminal.expect("1: 'hello' ok")
            terminal.expect("> ")
            terminal.send("again\r")
            terminal.expect("3: 'again' ok")
            terminal.expect("> ")
            terminal.send("/bye\r")
            assert terminal.status() == 0

    @pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
    def test_no_colours_where_none_are_wanted(self, env):
        with Terminal([*CHILD, "run", "m.gguf"], env=env) as terminal:
            terminal.expect("> ")
            terminal.send("long text\r")
            terminal.expect("1: 'long text' ok")
            terminal.expect("> ")
            terminal.send("/bye\r")
            assert terminal.status() == 0
        assert not re.search(r"\x1b\[[0-9;]*m", terminal.seen)
        assert ("\x1b[K" in terminal.seen) == ("NO_COLOR" in env)

    def test_commands_of_other_programs(self):
        with talk() as terminal:
            for word, says in (("/set x", "options are given"), ("/show info", "runtime inspect")):
                terminal.expect("> ")
                terminal.send(f"{word}\r")
                terminal.expect(says)

    @pytest.mark.parametrize("how", [("run", "m.gguf", "-cnv"), ("chat", "m.gguf")])
    def test_a_prompt_can_be_the_first_message(self, how):
        with talk(*how, "-p", "first") as terminal:
            terminal.expect("1: 'first' ok")
            terminal.expect("> ")
            terminal.send("second\r")
            terminal.expect("3: 'second' ok")
            terminal.expect("> ")
            terminal.send("\x04")  # Ctrl-D
            assert terminal.status() == 0

    def test_with_a_prompt_run_answers_and_ends(self):
        with talk("run", "m.gguf", "-p", "one") as terminal:
            terminal.expect("answering through the chat template")
            terminal.expect("1: 'one' ok")
            assert terminal.status() == 0
        with talk("run", "m.gguf", "-st") as terminal:
            terminal.expect("> ")
            terminal.send("one\r")
            terminal.expect("1: 'one' ok")
            assert terminal.status() == 0

    def test_without_a_model_a_story_is_told(self):
        with talk("run") as terminal:
            terminal.expect("telling a story")
            terminal.expect("Once upon a time")
            assert terminal.status() == 0

    def test_a_paste_is_one_message(self):
        with talk() as terminal:
            terminal.expect("> ")
            assert "\x1b[?2004h" in terminal.seen, "the terminal is asked to mark what is pasted"
            terminal.send("\x1b[200~two\nlines\x1b[201~")
            terminal.send(" more\r")
            terminal.expect(r"1: 'two\nlines more' ok")

    def test_blocks_and_backslashes_go_on(self):
        with talk() as terminal:
            terminal.expect("> ")
            terminal.send('"""first\r')
            terminal.expect("... ")
            terminal.send(' second\rend"""\r')
            terminal.expect(r"1: 'first\n second\nend' ok")
            terminal.expect("> ")
            terminal.send("one \\\rtwo\r")
            terminal.expect(r"3: 'one \ntwo' ok")
            terminal.expect("> ")
            terminal.send('"""in one line"""\r')
            terminal.expect("5: 'in one line' ok")

    def test_ctrl_c_at_the_prompt_clears_the_line(self):
        with talk() as terminal:
            terminal.expect("> ")
            terminal.send("not this")
            terminal.expect("not this")
            time.sleep(BREATH)
            terminal.interrupt()
            terminal.expect("Ctrl-C again")
            terminal.expect("> ")
            terminal.send("but this\r")
            terminal.expect("1: 'but this' ok")
            for expected in ("> ", "Ctrl-C again"):
                terminal.expect(expected)
                time.sleep(BREATH)
                terminal.interrupt()
            assert terminal.status() == 130
            assert "Traceback" not in terminal.seen

    def test_ctrl_c_stops_an_answer_and_keeps_its_part(self, tmp_path):
        kept = tmp_path / "kept.json"
        with talk() as terminal:
            terminal.expect("> ")
            terminal.send("slow " + "word " * 20 + "\r")
            terminal.expect("1: 's")
            started = time.monotonic()
            terminal.interrupt()
            terminal.expect("> ")
            assert time.monotonic() - started < SOON
            terminal.send(f"/save {kept}\r")
            terminal.expect("2 messages kept in")
            terminal.send("next\r")
            terminal.expect("3: 'next' ok")
        user, assistant = json.loads(kept.read_text())
        assert user["role"] == "user" and assistant["role"] == "assistant"
        assert assistant["content"].startswith("1: 's") and len(assistant["content"]) < 60

    def test_ctrl_c_while_a_prompt_is_read_takes_the_message_back(self):
        with talk() as terminal:
            terminal.expect("> ")
            terminal.send("long text\r")
            terminal.expect("reading the prompt: 10 of 30 tokens")
            started = time.monotonic()
            terminal.interrupt()
            terminal.expect("stopped: the message is taken back")
            terminal.expect("> ")
            assert time.monotonic() - started < SOON
            terminal.send("short\r")
            terminal.expect("1: 'short' ok")

    def test_progress_is_gone_before_the_answer(self):
        with talk("run", "m.gguf", "-p", "long") as terminal:
            terminal.expect("reading the prompt: 29 of 30 tokens")
            terminal.expect("1: 'long' ok")
            end = terminal.seen.rindex("of 30 tokens")
            assert "\r\x1b[K" in terminal.seen[end : terminal.seen.index("1: 'long'")]

    def test_ctrl_c_ends_a_single_answer(self):
        with talk("run", "m.gguf", "-p", "slow answer of words") as terminal:
            terminal.expect("1: 's")
            terminal.interrupt()
            assert terminal.status() == 130 and "Traceback" not in terminal.seen


@needs_demo
class TestCommands:
    """Through a pipe: the same conversation, and every line is a message."""

    def talk(self, *lines, args=("chat",)):
        return subprocess.run(
            [*CHILD, *args], input="\n".join(lines), capture_output=True, text=True, timeout=60
        )

    def test_system(self):
        done = self.talk(
            "/system", "/system Be brief.", "/system", "hi", "/clear", "ho", "/exit", "no"
        )
        assert done.stdout == "2: 'hi' ok\n2: 'ho' ok\n" and done.returncode == 0
        assert "no instructions are given\nthese instructions hold" in done.stderr
        assert "\nBe brief.\n" in done.stderr

    def test_save_and_load(self, tmp_path):
        file = tmp_path / "talk.json"
        done = self.talk("/system Be brief.", "hi", f"/save {file}", "ho")
        assert "3 messages kept" in done.stderr
        assert [m["role"] for m in json.loads(file.read_text())] == ["system", "user", "assistant"]
        done = self.talk(f"/load {file}", "ho", "/clear", "he")
        assert done.stdout == "4: 'ho' ok\n2: 'he' ok\n" and "3 messages read" in done.stderr
        file.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
        assert self.talk(f"/load {file}", "ho").stdout == "2: 'ho' ok\n"

    @pytest.mark.parametrize("text", ["", "[1]", "{}", '[{"role": "user"}]', "[" * 100_000, "\xff"])
    def test_a_file_that_is_no_conversation(self, tmp_path, text):
        (tmp_path / "x").write_bytes(text.encode("latin-1"))
        done = self.talk(f"/load {tmp_path / 'x'}", "hi")
        assert done.stdout == "1: 'hi' ok\n" and done.returncode == 0
        assert "holds no messages" in done.stderr and "Traceback" not in done.stderr

    def test_files_that_cannot_be_used(self, tmp_path):
        done = self.talk(f"/save {tmp_path}", f"/load {tmp_path / 'none'}", "/save", "/load")
        assert done.returncode == 0 and done.stderr.count("give a file: /") == 2
        assert f"cannot write {tmp_path}: Is a directory" in done.stderr
        assert f"cannot read {tmp_path / 'none'}: No such file" in done.stderr

    def test_regen(self):
        done = self.talk("/regen", "hi", "/regen", "ho")
        assert done.stdout == "1: 'hi' ok\n1: 'hi' ok\n3: 'ho' ok\n"
        assert "there is no answer yet" in done.stderr

    @pytest.mark.parametrize("leave", ["/bye", "/exit", "/quit"])
    def test_leaving(self, leave):
        assert self.talk("hi", leave, "ho").stdout == "1: 'hi' ok\n"

    def test_unknown_commands_are_one_line(self):
        done = self.talk("/sav x", "/jump", "/help", "/?", "/etc/passwd is a file", "/")
        assert "no command /sav: did you mean /save? /help lists them\n" in done.stderr
        assert "no command /jump: /help lists them\n" in done.stderr
        assert done.stderr.count("/regen") == 2, "both /help and /? list the commands"
        assert done.stdout == "1: '/etc/passwd is a file' ok\n3: '/' ok\n"

    def test_blocks_in_a_pipe(self):
        done = self.talk('"""a', 'b"""', "c \\", "d", '"""open')
        assert done.stdout == "1: 'a\\nb' ok\n3: 'c \\nd' ok\n5: 'open' ok\n"


def wrapped(text, columns=20, pieces=3):
    """What a Wrapper writes when the text comes `pieces` letters at a time."""
    out = []
    wrapper = Wrapper(out.append, lambda: columns)
    for i in range(0, len(text), pieces):
        wrapper.feed(text[i : i + pieces])
    wrapper.end()
    return "".join(out)


class TestWrap:
    WORDS = "It is told that in the evening the lighthouse keeper counts his boats. " * 3

    @pytest.mark.parametrize("columns", [12, 20, 39, 60, 79, 200])
    @pytest.mark.parametrize("pieces", [1, 2, 7, 1000])
    def test_no_word_is_broken(self, columns, pieces):
        shown = wrapped(self.WORDS, columns, pieces)
        assert shown.split() == self.WORDS.split()
        lines = shown.splitlines()
        assert max(map(len, lines)) <= columns and all(
            line == line.strip(" ") for line in lines[:-1]
        )
        for line, after in pairwise(lines):
            assert len(line) + 1 + len(after.split()[0]) > columns, "no line is too short"

    @pytest.mark.parametrize("pieces", [1, 3, 1000])
    def test_wide_characters_count_twice(self, pieces):
        text = "灯塔看守人每晚都数他的船。" * 4 + " and Pip " + "海" * 30
        lines = wrapped(text, 20, pieces).splitlines()
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert max(map(width, lines)) <= 20 and min(map(width, lines[:-1])) >= 16
        assert all(line[0] != "。" for line in lines)

    def test_width(self):
        assert width("a\u0301") == 1 and width("海a") == 3 and width("\u200b") == 0
        assert width("😀") == 2 and unicodedata.east_asian_width("é") != "W"

    def test_ctrl_c_while_a_word_is_written_shows_it_once(self):
        out = []

        def write(text):
            out.append(text)
            if text == " word":
                raise KeyboardInterrupt

        wrapper = Wrapper(write, lambda: 79)
        with pytest.raises(KeyboardInterrupt):
            wrapper.feed("one word ")
        wrapper.end()
        assert "".join(out).rstrip() == "one word"

    def test_an_answer_does_not_steer_the_terminal(self):
        assert wrapped("a\x1b[2Jb \x9b1m\x07", 79) == "a\ufffd[2Jb \ufffd1m\ufffd"

    def test_lines_of_the_answer_stay(self):
        assert wrapped("a\n\n  b\n- c  d\n") == "a\n\n  b\n- c  d\n"

    def test_words_longer_than_a_line_are_left_to_the_terminal(self):
        url = "https://example.org/" + "x" * 40
        assert wrapped(f"see {url} now", 20, 4) == f"see\n{url}\nnow"
        assert wrapped(f"see {url} a", 20, 4) == f"see\n{url} a"

    def test_code_is_not_wrapped(self):
        code = "```python\nvalue = call(first, second, third)\n```\n"
        assert wrapped(code, 20) == code
        assert wrapped(code + "a b " * 10, 20).count("\n") == 4, "after the block lines wrap again"

    def test_pieces_are_shown_at_once_where_there_is_room(self):
        out = []
        wrapper = Wrapper(out.append, lambda: 79)
        wrapper.feed("Hel")
        assert out == ["Hel"]
        wrapper.feed("lo")
        assert "".join(out) == "Hello"

    @needs_demo
    def test_in_a_terminal_and_in_a_pipe(self):
        words = "alpha beta gamma delta epsilon zeta eta theta iota kappa"
        with talk("run", "m.gguf", "-p", f"say {words}", "-q", columns=30) as terminal:
            shown = terminal.rest().strip()
        assert shown.split() == words.split() and max(map(len, shown.splitlines())) < 30
        assert len(shown.splitlines()) == 3
        done = subprocess.run(
            [*CHILD, "run", "m.gguf", "-p", f"say {words}", "-q"], capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.stdout == words + "\n"

    @needs_demo
    def test_another_width_holds_from_then_on(self):
        with talk(columns=30) as terminal:
            terminal.expect("> ")
            for columns in (30, 50):
                terminal.resize(columns)
                terminal.send("say " + "word " * 30 + "\r")
                terminal.expect("word \n")  # what was typed
                lines = terminal.expect("> ").splitlines()
                most = max(len(line) for line in lines if line.startswith("word"))
                assert columns - 6 < most < columns
