"""`--session FILE`: what is said in one process goes on in the next."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result
from fake_model import DEMO, needs_demo

import runtime
from runtime.cli import main
from runtime.session import load_session

pytestmark = needs_demo
GREEDY = ["-n", "12", "--temp", "0", "-t", "1", "-c", "512"]


def run(*words: object, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin)


def said(*words: object, stdin: str = "") -> str:
    result = run(*words, *GREEDY, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_text_goes_on_as_if_it_had_never_ended(tmp_path: Path):
    file = tmp_path / "s.rt"
    begun = said("run", DEMO, "--raw", "-p", "Once upon", "--session", file)
    more = said("run", DEMO, "--raw", "-p", " and then", "--session", file, "-q")
    with runtime.load(DEMO, threads=1, context=512) as model:
        session, beside = load_session(model, file)
        assert beside == {} and len(session) > 24
        text = model.tokenizer.decode(session.tokens)
        assert text.replace("\n", "").endswith((begun[:-1] + " and then" + more[:-1]).strip("\n"))
        with model.session() as other:
            other.eval(session.tokens, "none")
            assert (session.eval([5]) == other.eval([5])).all()
    assert "going on from" in run("run", DEMO, "--raw", "-p", ".", "--session", file).stderr


def test_a_conversation_goes_on(tmp_path: Path):
    file, both = tmp_path / "s.rt", "Where does Pip live?\nWhat does he eat?\n"
    whole = said("chat", DEMO, "-q", stdin=both)
    first = said("run", DEMO, "-q", "-p", "Where does Pip live?", "--session", file)
    second = said("chat", DEMO, "-q", "--session", file, stdin="What does he eat?\n")
    assert first + second == whole
    with runtime.load(DEMO, threads=1, context=512) as model:
        session, beside = load_session(model, file)
        roles = [message["role"] for message in beside["messages"]]
        assert roles == ["user", "assistant"] * 2 and len(session) > 40


def test_instructions_that_are_given_now_hold(tmp_path: Path):
    file = tmp_path / "s.rt"
    said("run", DEMO, "-q", "-p", "Hello", "--system", "Be brief.", "--session", file)
    said("run", DEMO, "-q", "-p", "Hello", "--system", "Be kind.", "--session", file)
    with runtime.load(DEMO, threads=1, context=512) as model:
        messages = load_session(model, file)[1]["messages"]
    assert [m["content"] for m in messages if m["role"] == "system"] == ["Be kind."]
    assert len(messages) == 5


def test_what_does_not_go_together_is_one_line(tmp_path: Path):
    text, talk, other = tmp_path / "t.rt", tmp_path / "c.rt", tmp_path / "o.rt"
    said("run", DEMO, "--raw", "-p", "Once", "--session", text)
    said("run", DEMO, "-p", "Hello", "--session", talk)
    other.write_bytes(b"GGUF" + bytes(300))
    for words, wanted in (
        (["run", "--raw", "-p", "x", "--session", talk], "leave --raw out"),
        (["chat", "--session", text], "go on with --raw"),
        (["run", "--raw", "-p", "x", "--session", text, "--kv-type", "q8_0"], "kv_type f16"),
        (["run", "--raw", "-p", "x", "--session", other], "no such file"),
        (["run", "--raw", "-p", "x", "--session", tmp_path], "directory"),
        (["run", "--raw", "-p", "x", "--session", tmp_path / "absent" / "s.rt"], "cannot be"),
    ):
        result = run(words[0], DEMO, *words[1:], *GREEDY)
        assert result.exit_code and wanted in result.stderr, (words, result.stderr)
        assert "Traceback" not in result.stderr
    assert run("run", DEMO, "-q", "-p", "And", "--session", talk, *GREEDY).exit_code == 0
