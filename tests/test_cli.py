"""The `runtime` command: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from fake_model import CommandLine, FakeModel, needs_demo

from runtime.backends.meta.expression import parse
from runtime.backends.meta.stages import stages
from runtime.cli import COMMANDS, main
from runtime.errors import MemoryLimitError, OptionError


@pytest.fixture
def invoke(monkeypatch):
    return CommandLine(monkeypatch)


def test_help_names_every_command():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name, text in COMMANDS.items():
        assert f"  {name}" in result.output and text in result.output
    assert CliRunner().invoke(main, []).output == result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_with_examples(name):
    result = CliRunner().invoke(main, [name, "-h"])
    assert result.exit_code == 0
    assert "Examples:" in result.output and f"runtime {name}" in result.output


def test_help_is_quick_and_imports_no_engine():
    code = (
        "import sys; from runtime.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([m for m in ('numpy', 'numba', 'rich', 'jinja2', 'gguf') "
        "if m in sys.modules], file=sys.stderr)"
    )
    times = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()  # the processor's seconds, which other programs hardly change
        times.append(sum(after[2:4]) - sum(before[2:4]))
    assert done.stderr.strip() == "[]"
    assert min(times) < 0.6  # 0.15 s on a quiet machine


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["inspct"], "did you mean 'inspect'"),
        (["run", "--nope"], "--nope"),
        (["run", "-p", "a", "-f", "b"], "the prompt is given twice"),
        (["run", "m.gguf", "hello", "-p", "b"], "the prompt is given twice"),
        (["run", "--system", "a", "-sysf", "b"], "either --system or"),
        (["run", "--raw", "--system", "a", "-p", "b"], "--raw is no conversation"),
        (["run", "m.gguf", "-m", "m.gguf", "-p", "b"], "the prompt is given twice"),
        (["chat", "m.gguf", "-m", "m.gguf"], "the model is given twice"),
        (["chat", "m.gguf", "hello"], "unexpected 'hello': the first message goes after -p"),
        (["run", "-p", "a", "--temp", "-1"], "temperature"),
        (["run", "-p", "a", "--top-p", "2"], "top_p"),
        (["run", "-p", "a", "--logit-bias", "x"], "--logit-bias"),
        (["run", "-p", "a", "-t", "0"], "0 is not in the range"),
        (["run", "m.gguf", "--pack-cache", "besides", "-p", "a"], "takes folder or beside"),
        (["bench", "-p", "many"], "no whole number or range"),
        (["bench", "-p", "0", "-n", "0"], "nothing to measure"),
        (["bench", "-o", "xml"], "xml"),
        (["help", "nope"], "no command and no file 'nope'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_and_exit_2(invoke, args, says):
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr and result.stdout == "" and not result.loaded


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "-f", "no-such-file.txt"], "no-such-file.txt: No such file"),
        (["inspect", "no-such-file.gguf"], "no-such-file.gguf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_mistakes_are_one_line_and_exit_1(invoke, args, says):
    result = invoke(*args)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    "error",
    [
        OptionError("kv_type='q3' must be\none of f16"),
        MemoryLimitError("context=9 needs 1 GiB"),
        FileNotFoundError(2, "No such file or directory", "weights.gguf"),
        PermissionError(13, "Permission denied", "weights.gguf"),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_of_the_engine_are_one_line(invoke, error):
    result = invoke("run", "-p", "a", loading=error)
    assert result.exit_code == (2 if isinstance(error, OptionError) else 1)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@needs_demo
@pytest.mark.parametrize("option", ["--kv-type=q3", "-ctk=q3,f16", "-dev=tpu", "-ctv=f16,q8_0"])
@pytest.mark.parametrize("name", ["run", "chat", "warmup", "bench"])
def test_options_that_loading_refuses_are_usage_errors(name, option):
    if (name, option) == ("bench", "-ctv=f16,q8_0"):
        return  # a list there
    result = CliRunner().invoke(main, [name, option], input="hi")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_v_alone_is_the_version(invoke):
    result = invoke("-v")
    assert result.stdout == invoke("--version").stdout and "version" in result.stdout
    assert not result.loaded


def test_without_a_prompt_nothing_is_loaded(invoke):
    result = invoke("run", "model.gguf")
    assert result.exit_code == 2 and "there is no prompt" in result.stderr
    assert not result.loaded


def test_a_bug_stays_a_traceback(invoke):
    result = invoke("run", "-p", "a", loading=ZeroDivisionError("bug"))
    assert isinstance(result.exception, ZeroDivisionError)


@needs_demo
class TestRun:
    def test_tokens_on_stdout_and_timings_on_stderr(self, invoke):
        model = FakeModel()
        result = invoke("run", "m.gguf", "--raw", "-p", "Hi", "-n", "7", "--temp", "0", model=model)
        assert result.exit_code == 0 and result.stdout == "one two\n"
        assert "prompt 2 tokens" in result.stderr and "answer 2 tokens" in result.stderr
        assert "\x1b" not in result.output
        assert model.calls == [([22, 5], {"max_tokens": 7, "temperature": 0.0})]
        assert model.closed and result.loaded[0][0] == "m.gguf"

    def test_quiet(self, invoke):
        for way in ((), ("--raw",)):
            result = invoke("run", "-q", "-p", "Hi", "-ngl", "9", *way, model=FakeModel())
            assert result.stderr == "" and result.loaded[0][1]["progress"] is False

    @pytest.mark.parametrize(
        ("size", "nbytes"),
        [("256M", 256 << 20), ("1.5g", 3 << 29), ("8", 8 << 20), ("64KiB", 65536)],
    )
    def test_a_budget_of_the_cache(self, invoke, size: str, nbytes: int):
        result = invoke("run", "-p", "x", "--cache-ram", size, "--no-prompt-cache")
        given = result.loaded[0][1]
        assert (given["cache_bytes"], given["prompt_cache"]) == (nbytes, False)

    @pytest.mark.parametrize("size", ["0", "-1", "x", "1 M B", "", "1e3"])
    def test_what_no_budget_can_be(self, invoke, size: str):
        result = invoke("run", "-p", "x", "--cache-ram", size)
        assert result.exit_code == 2 and "no size, such as 256M or 4G" in result.stderr

    def test_all_options_reach_the_model(self, invoke):
        model = FakeModel()
        result = invoke(
            *("run", "-p", "x", "-n", "-1", "--top-k", "0", "--top-p", "0.5", "--min-p", "0"),
            *("--typical", "0.9", "--repeat-penalty", "1.2", "--presence-penalty", "0.1"),
            *("--frequency-penalty", "0.2", "--repeat-last-n", "0", "--logit-bias", "3+1.5"),
            *("--logit-bias", "4-inf", "-s", "5", "--stop", "END", "--stop", "###"),
            *("--ignore-eos", "-c", "99", "-t", "2", "--kv-type", "q8_0", "--activations", "f32"),
            model=model,
        )
        assert result.exit_code == 0, result.output
        options = {k: v for k, v in model.calls[0][1].items() if k != "session"}
        assert options == {
            "max_tokens": -1,
            "top_k": 0,
            "top_p": 0.5,
            "min_p": 0.0,
            "typical_p": 0.9,
            "repeat_penalty": 1.2,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "penalty_last_n": 0,
            "logit_bias": {3: 1.5, 4: float("-inf")},
            "seed": 5,
            "stop": ("END", "###"),
            "ignore_eos": True,
        }
        assert result.loaded[0][1] == {
            "context": 99,
            "threads": 2,
            "kv_type": "q8_0",
            "activations": "f32",
            "cache_rotation": True,
            "devices": "cpu",
            "progress": True,
        }

    def test_seed_minus_one_is_a_new_one(self, invoke):
        model = FakeModel()
        invoke("run", "-p", "x", "-s", "-1", model=model)
        assert "seed" not in model.calls[0][1]

    def test_a_prompt_is_answered_through_the_template_of_the_file(self, invoke):
        model = FakeModel()
        result = invoke("run", "m.gguf", "-p", "Hi", "-sys", "Brief.", model=model)
        assert result.exit_code == 0 and result.stdout == "one two\n"
        messages, options = model.calls[0]
        assert messages == [
            {"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}
        ]  # fmt: skip
        assert "max_tokens" not in options, "until the model is done"
        assert "answering through the chat template (--raw" in result.stderr

    @pytest.mark.parametrize("how", ["--raw", "-no-cnv", "--no-conversation"])
    def test_raw_continues_the_text(self, invoke, how):
        model = FakeModel()
        result = invoke("run", "m.gguf", how, "-p", "Hi", model=model)
        assert model.calls == [([22, 5], {"max_tokens": 256})]
        assert "continuing the text as it is (--raw)\n" in result.stderr

    def test_a_file_without_a_template_continues_the_text(self, invoke):
        model = FakeModel(template=False)
        result = invoke("run", "m.gguf", "-p", "Hi", model=model)
        assert model.calls == [([22, 5], {"max_tokens": 256})]
        assert "(the file has no chat template)\n" in result.stderr
        model = FakeModel(template=False)
        result = invoke("run", "m.gguf", "-p", "Hi", "--system", "Brief.", model=model)
        assert len(model.calls[0][0]) == 2, "instructions need a template: ChatML stands in"

    @pytest.mark.parametrize(
        "args",
        [("m.gguf", "why is", "the sky"), ("-m", "m.gguf", "why is", "the sky"),
         ("m.gguf", "-p", r"why is\tthe sky", "-e")],
    )  # fmt: skip
    def test_words_after_the_model_are_the_prompt(self, invoke, args):
        model = FakeModel()
        result = invoke("run", *args, model=model)
        assert " ".join(model.calls[0][0][0]["content"].split()) == "why is the sky"
        assert result.loaded[0][0] == "m.gguf"

    def test_without_a_prompt_an_instruct_model_says_so(self, invoke):
        result = invoke("run", "m.gguf", model=FakeModel())
        assert result.exit_code == 2 and "there is no prompt: give one with -p" in result.stderr

    def test_conversation_answers_every_line_of_a_pipe(self, invoke):
        model = FakeModel()
        result = invoke("run", "m.gguf", "-cnv", "-p", "A", model=model, stdin="B\nC\n")
        assert result.stdout == "one two\n" * 3
        assert [m[-1]["content"] for m, _ in model.calls] == ["A", "B", "C"]
        model = FakeModel()
        invoke("run", "m.gguf", "-i", "-st", model=model, stdin="B\nC\n")
        assert [m[-1]["content"] for m, _ in model.calls] == ["B"]

    def test_without_a_prompt_a_story_begins(self, invoke):
        model = FakeModel(pieces=(" there was",))
        result = invoke("run", model=model)
        assert result.stdout == "Once upon a time there was\n" and result.loaded[0][0] is None

    @pytest.mark.parametrize("args", [(), ("-p", "-"), ("-f", "-")])
    def test_the_prompt_may_come_from_stdin(self, invoke, args):
        model = FakeModel()
        result = invoke("run", *args, model=model, stdin="abc")
        assert result.stdout == "one two\n" and model.calls[0][0][0]["content"] == "abc"

    def test_the_prompt_may_come_from_a_file(self, invoke, tmp_path):
        (tmp_path / "p.txt").write_bytes(b"ab\xff")
        result = invoke("run", "-f", tmp_path / "p.txt", "--echo", "--raw", model=FakeModel())
        assert result.stdout == "ab\ufffdone two\n"

    def test_an_empty_prompt_is_said_to_be_empty(self, invoke):
        result = invoke("run", "--raw", "-p", "", model=FakeModel())
        assert result.stdout == "one two\n" and "the prompt is empty" in result.stderr
        refused = FakeModel(refuses=OptionError("the prompt is empty and so on"))
        result = invoke("run", "--raw", "-p", "", model=refused)
        assert result.exit_code == 1 and result.stdout == ""
        assert "error: the prompt is empty and so on\n" in result.stderr

    def test_options_the_model_refuses_are_told_before_the_prompt(self, invoke):
        refused = FakeModel(refuses=OptionError("logit_bias names token 99"))
        result = invoke("run", "-p", "Hi", "--echo", "--logit-bias", "99+1", model=refused)
        assert result.exit_code == 1 and result.stdout == ""

    @pytest.mark.parametrize("reason", ["end", "length", "context"])
    def test_a_full_context_is_told(self, invoke, reason):
        result = invoke("run", "-q", "-p", "Hi", model=FakeModel(reason=reason))
        told = "the answer was cut: the context of 512 tokens is full (-c sets it)\n"
        assert result.stderr == (told if reason == "context" else "")

    @pytest.mark.parametrize("way", [(), ("--raw",)])
    def test_ctrl_c_keeps_what_was_printed_and_exits_130(self, invoke, way):
        model = FakeModel(raises=KeyboardInterrupt())
        result = invoke("run", "-p", "Hi", *way, model=model)
        assert result.exit_code == 130 and result.stdout == "one two\n"
        assert "answer 2 tokens" in result.stderr and model.closed

    def test_ctrl_c_while_loading_exits_130(self, invoke):
        result = invoke("run", "-p", "Hi", loading=KeyboardInterrupt())
        assert result.exit_code == 130 and "Traceback" not in result.stderr


@needs_demo
class TestChat:
    def test_every_line_of_a_pipe_is_answered_in_one_session(self, invoke):
        model = FakeModel()
        result = invoke("chat", "--system", "Brief.", model=model, stdin="Hi\n\nBye\n")
        assert result.exit_code == 0 and result.stdout == "one two\none two\n"
        roles = [[m["role"] for m in messages] for messages, _ in model.calls]
        assert roles == [["system", "user"], ["system", "user", "assistant", "user"]]
        assert model.calls[1][0][2]["content"] == "one two"
        assert model.evals == [] and model.closed

    def test_clear_forgets_and_exit_leaves(self, invoke):
        model = FakeModel()
        result = invoke("chat", model=model, stdin="Hi\n/clear\nBye\n/exit\nnever\n")
        assert result.stdout.count("one two") == 2
        assert [len(messages) for messages, _ in model.calls] == [1, 1]
        assert model.evals == ["closed"]

    def test_help_and_unknown_commands_answer_on_stderr(self, invoke):
        result = invoke("chat", model=FakeModel(), stdin="/help\n/jump\n")
        assert result.stdout == "" and "/clear" in result.stderr
        assert "no command /jump" in result.stderr

    def test_a_message_that_got_no_answer_is_taken_back(self, invoke, monkeypatch):
        monkeypatch.setattr("runtime.cli.talk.at_terminal", lambda: True)
        lines = iter(["Hi", "Bye"])
        monkeypatch.setattr("runtime.cli.typed.messages", lambda interactive: lines)
        model = FakeModel(pieces=(), raises=KeyboardInterrupt())
        assert invoke("chat", model=model).exit_code == 0
        assert [[m["content"] for m in messages] for messages, _ in model.calls] == [
            ["Hi"],
            ["Bye"],
        ]

    def test_errors_end_a_pipe_with_one_line(self, invoke):
        model = FakeModel(refuses=MemoryLimitError("the prompt is too long"))
        result = invoke("chat", model=model, stdin="Hi\n")
        assert result.exit_code == 1 and "error: the prompt is too long" in result.stderr

    def test_a_full_context_forgets_the_oldest_turns(self, invoke):
        model = FakeModel()
        model.context = 120  # characters here; a quarter is left for the answer
        lines = ["a" * 30, "b" * 30, "c" * 30, "d" * 30]
        result = invoke("chat", "-q", "--system", "Brief.", model=model, stdin="\n".join(lines))
        assert result.exit_code == 0 and result.stdout == "one two\n" * 4
        told = [[m["content"][0] for m in messages] for messages, _ in model.calls]
        assert told == [
            ["B", "a"],
            ["B", "a", "o", "b"],
            ["B", "b", "o", "c"],
            ["B", "c", "o", "d"],
        ]
        assert result.stderr == "the context is full: the oldest 2 messages are forgotten\n" * 2

    def test_a_message_longer_than_the_context_is_refused(self, invoke, monkeypatch):
        model = FakeModel()
        model.context = 100
        lines = ["a" * 90, "b" * 101, "c" * 20]
        monkeypatch.setattr("runtime.cli.talk.at_terminal", lambda: True)
        monkeypatch.setattr("runtime.cli.typed.messages", lambda interactive: iter(lines))
        result = invoke("chat", "-q", model=model)
        assert result.exit_code == 0 and "error: the messages do not fit" in result.stderr
        told = [[m["content"][0] for m in messages] for messages, _ in model.calls]
        assert told == [["a"], ["c"]], "the first fits without room, and is forgotten by the third"

    def test_an_answer_cut_by_the_context_is_told(self, invoke):
        result = invoke("chat", "-q", model=FakeModel(reason="context"), stdin="Hi\n")
        assert result.stderr == (
            "the answer was cut: the context of 512 tokens is full (-c sets it)\n"
        )

    def test_ctrl_c_stops_and_keeps_the_answer(self, invoke):
        result = invoke("chat", model=FakeModel(raises=KeyboardInterrupt()), stdin="Hi\nmore\n")
        assert result.exit_code == 130 and result.stdout == "one two\n"


def test_devices(invoke):
    result = invoke("devices", "--bandwidth")
    assert result.exit_code == 0
    for part in ("instruction set", "generic", "2.0 GB/s", "cuda", "kernel cache"):
        assert part in result.stdout
    found = json.loads(invoke("devices", "--json").stdout)
    assert found["cpu"]["numa_nodes"][0] and "NUMA nodes" in result.stdout
    assert (
        found["cuda"]["devices"] == []
        and found["cpu"]["isa_selected"] in found["cpu"]["isa_available"]
    )


def test_devices_shows_numa_nodes_and_examples_that_can_be_used(invoke, monkeypatch):
    nodes = [frozenset((0, 1, 2, 8, 10, 11)), frozenset((3,))]
    monkeypatch.setattr("runtime.backends.cpu.run.cores.numa_nodes", lambda: nodes)
    lines = invoke("devices").stdout.splitlines()
    rows = [line.strip().rsplit("  ", 1)[1] for line in lines if "NUMA node " in line]
    assert [row.strip() for row in rows] == ["processors 0-2,8,10-11", "processors 3"]
    first = next(n for n, line in enumerate(lines) if line.startswith("--devices"))
    for line in lines[first:]:
        assert stages(parse(line.split()[-1]))


def test_devices_names_a_wrong_instruction_set(invoke, monkeypatch):
    monkeypatch.setenv("RUNTIME_CPU_ISA", "mmx")
    result = invoke("devices")
    assert result.exit_code == 1 and "RUNTIME_CPU_ISA" in result.stderr


@needs_demo
def test_warmup_names_the_cache_folder(invoke, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    model = FakeModel()
    result = invoke("warmup", "m.gguf", model=model)
    assert result.exit_code == 0 and str(tmp_path) in result.stdout
    assert model.warmed and model.closed


@needs_demo
class TestProcess:
    """The real command in a process of its own, on the bundled model and the numpy backend."""

    COMMAND = (sys.executable, "-m", "runtime.cli")
    SLOW = ("--devices", "reference")

    def test_a_pipe_gets_the_story_and_nothing_else(self):
        args = (*self.COMMAND, "run", *self.SLOW, "-p", "Once upon", "-n", "5", "-q", "--temp", "0")
        done = subprocess.run(args, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
        assert done.returncode == 0 and done.stderr == b""
        assert done.stdout.strip() and b"\x1b" not in done.stdout

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
    @pytest.mark.parametrize("args", [("inspect", "-t"), ("run", "--devices", "null", "-q")])
    def test_a_full_disk_is_one_line(self, args):
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            done = subprocess.run(
                (*self.COMMAND, *args), stdin=subprocess.DEVNULL, stdout=full,
                stderr=subprocess.PIPE, timeout=120,
            )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == b"error: cannot write to stdout: No space left on device\n"

    @pytest.mark.skipif(os.name == "nt", reason="a shell's way to close streams")
    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    @pytest.mark.parametrize("args", ["run --devices null -n 2 -p hi", "chat --devices null -n 2"])
    def test_streams_that_are_closed(self, args, closed):
        line = f"{shlex.join(self.COMMAND)} {args} </dev/null {closed}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "Traceback" not in done.stderr

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
    def test_ctrl_c_ends_a_generation_cleanly(self):
        args = (*self.COMMAND, "run", "-c", "60000", "-n", "-1", "--ignore-eos", "-q")
        process = subprocess.Popen(
            args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A shell starts background jobs with the signal ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        assert process.stdout is not None
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and errors == b""
        assert (begun + rest).startswith(b"Once upon a time") and rest.endswith(b"\n")
