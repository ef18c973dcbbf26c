"""The `runtime` command: what it prints where, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
from click.testing import CliRunner

import runtime
from runtime.cli import COMMANDS, facts, main
from runtime.cli.output import bar, bars, count, size, table
from runtime.errors import MemoryLimitError, OptionError
from runtime.gguf.reader import open_gguf
from runtime.ops.dtypes import DTYPES
from runtime.text.sampling import Token

DEMO = Path(runtime.__file__).parent / "data" / "demo.gguf"
needs_demo = pytest.mark.skipif(not DEMO.exists(), reason=f"no bundled model at {DEMO}")


BENCH_KEYS = {
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename"),
    *("model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads"),
    *("type_k", "type_v", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns"),
    *("avg_ts", "stddev_ts", "samples_ns", "samples_ts", "bandwidth_share", "gmac_per_s"),
}


class FakeTokenizer:
    def encode(self, text, add_special=True, parse_special=True):
        return [ord(c) % 50 for c in text]


class FakeSession:
    """Remembers what was evaluated; every evaluation takes a moment."""

    def __init__(self, log):
        self.tokens, self._log = [], log

    def __len__(self):
        return len(self.tokens)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def eval(self, ids, logits="all"):
        self.tokens += ids
        self._log.append(len(ids))
        time.sleep(0.001)

    def close(self):
        self._log.append("closed")


class FakeModel:
    """What the commands need of a model; answers are given."""

    vocab_size, kv_types = 50, ("f16", "f16")
    tokenizer = FakeTokenizer()

    def __init__(self, pieces=("one", " two"), raises=None, threads=3):
        self.pieces, self.raises, self.threads = pieces, raises, threads
        self.calls, self.evals, self.closed = [], [], False
        self.file = open_gguf(DEMO)

    def generate(self, prompt, *, on_token=None, session=None, **options):
        self.calls.append((prompt, options))
        for i, piece in enumerate(self.pieces):
            if on_token:
                on_token(Token(i))
            yield piece
        if self.raises:
            raise self.raises

    def chat(self, messages, **options):
        return self.generate([dict(m) for m in messages], **options)

    def session(self):
        return FakeSession(self.evals)

    def close(self):
        self.closed = True


@pytest.fixture
def invoke(monkeypatch):
    """Run the command line against a fake model; the result also has `.model` and `.loaded`."""
    runner = CliRunner()

    def run(*args, model=None, stdin="", loading=None):
        fake = model
        loaded = []

        def load(path=None, **options):
            loaded.append((path, options))
            if loading:
                raise loading
            return fake or FakeModel()

        monkeypatch.setattr(runtime, "load", load, raising=False)
        monkeypatch.setattr("runtime.backends.cpu.bandwidth.read_bandwidth", lambda threads: 2e9)
        result = runner.invoke(main, [str(a) for a in args], input=stdin)
        result.loaded = loaded
        return result

    return run


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
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
    assert done.stderr.strip() == "[]"
    assert min(times) < 0.6  # 0.15 s on a quiet machine


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["inspct"], "did you mean 'inspect'"),
        (["run", "--nope"], "--nope"),
        (["run", "-p", "a", "-f", "b"], "either --prompt or --file"),
        (["run", "-f", "no-such-file.txt"], "no-such-file.txt: No such file"),
        (["run", "-p", "a", "--temp", "-1"], "temperature"),
        (["run", "-p", "a", "--top-p", "2"], "top_p"),
        (["run", "-p", "a", "--logit-bias", "x"], "--logit-bias"),
        (["run", "-p", "a", "-t", "0"], "0 is not in the range"),
        (["bench", "-p", "many"], "no list of whole numbers"),
        (["bench", "-p", "0", "-n", "0"], "nothing to measure"),
        (["bench", "-o", "xml"], "xml"),
        (["inspect", "no-such-file.gguf"], "no-such-file.gguf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_1(invoke, args, says):
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
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_bug_stays_a_traceback(invoke):
    result = invoke("run", "-p", "a", loading=ZeroDivisionError("bug"))
    assert isinstance(result.exception, ZeroDivisionError)


@needs_demo
class TestRun:
    def test_tokens_on_stdout_and_timings_on_stderr(self, invoke):
        model = FakeModel()
        result = invoke("run", "m.gguf", "-p", "Hi", "-n", "7", "--temp", "0", model=model)
        assert result.exit_code == 0 and result.stdout == "one two\n"
        assert "prompt 2 tokens" in result.stderr and "answer 2 tokens" in result.stderr
        assert "\x1b" not in result.output
        assert model.calls == [
            ([22, 5], {"max_tokens": 7, "temperature": 0.0, "ignore_eos": False})
        ]
        assert model.closed and result.loaded[0][0] == "m.gguf"

    def test_quiet(self, invoke):
        result = invoke("run", "-q", "-p", "Hi", model=FakeModel())
        assert result.stderr == "" and result.loaded[0][1]["progress"] is False

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
        assert model.calls[0][1] == {
            "max_tokens": None,
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
            "devices": "cpu",
            "progress": True,
        }

    def test_seed_minus_one_is_a_new_one(self, invoke):
        model = FakeModel()
        invoke("run", "-p", "x", "-s", "-1", model=model)
        assert "seed" not in model.calls[0][1]

    def test_without_a_prompt_a_story_begins(self, invoke):
        model = FakeModel(pieces=(" there was",))
        result = invoke("run", model=model)
        assert result.stdout == "Once upon a time there was\n" and result.loaded[0][0] is None

    @pytest.mark.parametrize("args", [(), ("-p", "-"), ("-f", "-")])
    def test_the_prompt_may_come_from_stdin(self, invoke, args):
        model = FakeModel()
        result = invoke("run", *args, model=model, stdin="abc")
        assert result.stdout == "one two\n" and len(model.calls[0][0]) == 3

    def test_the_prompt_may_come_from_a_file(self, invoke, tmp_path):
        (tmp_path / "p.txt").write_bytes(b"ab\xff")
        result = invoke("run", "-f", tmp_path / "p.txt", "--echo", model=FakeModel())
        assert result.stdout == "ab\ufffdone two\n"

    def test_ctrl_c_keeps_what_was_printed_and_exits_130(self, invoke):
        model = FakeModel(raises=KeyboardInterrupt())
        result = invoke("run", "-p", "Hi", model=model)
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
        monkeypatch.setattr("runtime.cli.chat._interactive", lambda: True)
        lines = iter(["Hi", "Bye"])
        monkeypatch.setattr("runtime.cli.chat._lines", lambda: lines)
        model = FakeModel(pieces=(), raises=KeyboardInterrupt())
        assert invoke("chat", model=model).exit_code == 0
        assert [[m["content"] for m in messages] for messages, _ in model.calls] == [
            ["Hi"],
            ["Bye"],
        ]

    def test_errors_end_a_pipe_with_one_line(self, invoke):
        model = FakeModel(pieces=(), raises=MemoryLimitError("the prompt is too long"))
        result = invoke("chat", model=model, stdin="Hi\n")
        assert result.exit_code == 1 and "error: the prompt is too long" in result.stderr

    def test_ctrl_c_stops_and_keeps_the_answer(self, invoke):
        result = invoke("chat", model=FakeModel(raises=KeyboardInterrupt()), stdin="Hi\nmore\n")
        assert result.exit_code == 130 and result.stdout == "one two\n"


@needs_demo
class TestBench:
    ARGS = ("bench", "-p", "8", "-n", "4", "-d", "0,16", "-r", "3", "-t", "1")

    def test_markdown_is_drawn_like_llama_bench(self, invoke):
        lines = invoke(*self.ARGS, model=FakeModel()).stdout.splitlines()
        assert lines[0].startswith(
            "| model                          |       size |     params | backend    | threads |"
            "            test |                  t/s |"
        )
        assert lines[1].startswith(
            "| ------------------------------ | ---------: | ---------: | ---------- | ------: |"
            " --------------: | -------------------: |"
        )
        assert len({len(line) for line in lines[:6]}) == 1
        tests = [line.split("|")[6].strip() for line in lines[2:6]]
        assert tests == ["pp8", "pp8 @ d16", "tg4", "tg4 @ d16"]
        assert all(" ± " in line.split("|")[7] for line in lines[2:6])

    def test_json_has_the_keys_of_llama_bench(self, invoke):
        rows = json.loads(invoke(*self.ARGS, "-o", "json", model=FakeModel()).stdout)
        assert set(rows[0]) >= BENCH_KEYS
        prompt, decode = rows[0], rows[3]
        assert (prompt["n_prompt"], prompt["n_gen"], prompt["bandwidth_share"]) == (8, 0, None)
        assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 4, 16)
        assert len(prompt["samples_ns"]) == len(prompt["samples_ts"]) == 3
        file = open_gguf(DEMO)
        macs = facts.macs_per_token(file)
        assert prompt["gmac_per_s"] == pytest.approx(macs * prompt["avg_ts"] / 1e9)
        nbytes = facts.active_bytes(file, ("f16", "f16"), 18)
        assert decode["bandwidth_share"] == pytest.approx(nbytes * decode["avg_ts"] / 2e9)

    def test_csv_has_one_quoted_line_per_test(self, invoke):
        text = invoke(*self.ARGS, "-o", "csv", model=FakeModel()).stdout
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [(r["n_prompt"], r["n_gen"]) for r in rows] == [("8", "0")] * 2 + [("0", "4")] * 2
        assert "samples_ns" not in rows[0] and text.count("\n") == 5

    def test_what_is_evaluated(self, invoke):
        model = FakeModel()
        invoke("bench", "-p", "8", "-n", "2", "-d", "5", "-r", "2", model=model)
        prompts = [5, 8, "closed"] * 3
        decodes = [5, 1, 1, "closed"] * 3
        assert model.evals == prompts + decodes
        model = FakeModel()
        invoke("bench", "-p", "8", "-n", "0", "-r", "1", "--no-warmup", model=model)
        assert model.evals == [8, "closed"]

    def test_models_are_loaded_for_every_number_of_threads(self, invoke):
        result = invoke("bench", "a", "b", "-p", "1", "-n", "0", "-r", "1", "-t", "1,2")
        assert [(path, o["threads"]) for path, o in result.loaded] == [
            *(("a", 1), ("a", 2), ("b", 1), ("b", 2)),
        ]
        assert result.loaded[0][1]["context"] == 1


@needs_demo
class TestInspect:
    def test_text(self, invoke):
        result = invoke("inspect")
        assert result.exit_code == 0 and "\x1b" not in result.stdout
        for part in ("general.architecture", "token_embd.weight", "bytes by type", "KV q8_0"):
            assert part in result.stdout
        assert "█" in result.stdout

    def test_json_agrees_with_the_file(self, invoke):
        found = json.loads(invoke("inspect", DEMO, "--json", "-c", "64", "-c", "128").stdout)
        file = open_gguf(DEMO)
        assert [t["name"] for t in found["tensors"]] == list(file.tensors)
        assert found["model_size"] == sum(t["nbytes"] for t in found["tensors"])
        assert found["model_size"] == sum(found["bytes_by_role"].values())
        assert found["file_size"] == DEMO.stat().st_size
        heads = found["metadata"]["qwen3.attention.head_count_kv"]
        row = heads * found["metadata"]["qwen3.attention.key_length"] * 2
        layers = found["metadata"]["qwen3.block_count"]
        short, long = found["memory"]
        assert long["f16"] - short["f16"] == 64 * layers * row * 2

    def test_tensors_can_be_filtered(self, invoke):
        result = invoke("inspect", "-t", "blk.0.attn_q*")
        names = [line.split()[0] for line in result.stdout.splitlines()[2:]]
        assert names == ["blk.0.attn_q.weight", "blk.0.attn_q_norm.weight"]
        assert invoke("inspect", "-t", "nothing").exit_code == 1

    def test_models_that_cannot_be_run_are_shown(self, invoke, tmp_path):
        data = DEMO.read_bytes()
        place = data.index(b"general.architecture") + 20 + 4 + 8
        assert data[place : place + 5] == b"qwen3"
        other = tmp_path / "other.gguf"
        other.write_bytes(data[:place] + b"other" + data[place + 5 :])
        result = invoke("inspect", other)
        assert result.exit_code == 0 and "cannot run the architecture" in result.stdout


def test_devices(invoke):
    result = invoke("devices", "--bandwidth")
    assert result.exit_code == 0
    for part in ("instruction set", "generic", "2.0 GB/s", "cuda", "kernel cache"):
        assert part in result.stdout
    found = json.loads(invoke("devices", "--json").stdout)
    assert found["cuda"] is None and found["cpu"]["isa_selected"] in found["cpu"]["isa_available"]


def test_devices_names_a_wrong_instruction_set(invoke, monkeypatch):
    monkeypatch.setenv("RUNTIME_CPU_ISA", "mmx")
    result = invoke("devices")
    assert result.exit_code == 1 and "RUNTIME_CPU_ISA" in result.stderr


@needs_demo
def test_warmup_names_the_cache_folder(invoke, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    model = FakeModel()
    model.context, evals = 512, []
    model.eval = lambda ids, logits: evals.append(len(ids))
    result = invoke("warmup", "m.gguf", model=model)
    assert result.exit_code == 0 and str(tmp_path) in result.stdout
    assert evals[0] == 1 and max(evals) > 8 and model.closed


class FakeFile:
    """Tensors and metadata, enough for `facts`."""

    path = Path("fake.gguf")

    def __init__(self, shapes, **metadata):
        self.metadata = {"general.architecture": "unknown", **metadata}
        self.tensors = {
            name: SimpleNamespace(
                name=name, shape=shape, nbytes=math.prod(shape), dtype=DTYPES["i8"]
            )
            for name, shape in shapes.items()
        }

    def get(self, key, default=None):
        return self.metadata.get(key, default)

    @property
    def architecture(self):
        return self.metadata["general.architecture"]


class TestFacts:
    SHAPES = MappingProxyType(
        {
            "token_embd.weight": (100, 8),
            "blk.0.attn_q.weight": (8, 8),
            "blk.0.attn_norm.weight": (8,),
            "blk.0.ffn_up_exps.weight": (4, 16, 8),
        }
    )
    EXPERTS = MappingProxyType({"unknown.expert_count": 4, "unknown.expert_used_count": 1})

    def test_a_tied_embedding_is_read_as_the_output(self):
        file = FakeFile(self.SHAPES, **self.EXPERTS)
        assert facts.active_bytes(file, ("f16", "f16"), 10) == 800 + 64 + 8 + 128
        assert facts.macs_per_token(file) == 64 + 128

    def test_an_embedding_beside_an_output_is_only_looked_up(self):
        file = FakeFile({**self.SHAPES, "output.weight": (100, 8)}, **self.EXPERTS)
        assert facts.active_bytes(file, ("f16", "f16"), 10) == 800 + 64 + 8 + 128
        assert facts.macs_per_token(file) == 64 + 128

    @needs_demo
    def test_the_cache_counts_by_its_types(self):
        file = open_gguf(DEMO)
        f16, q8 = (facts.kv_bytes_per_token(file, kind) for kind in ("f16", "q8_0"))
        mixed = facts.active_bytes(file, ("q8_0", "f16"), 100)
        assert mixed - facts.active_bytes(file, ("f16", "f16"), 0) == 100 * (f16 + q8) / 2

    @pytest.mark.parametrize(
        ("metadata", "name"),
        [
            ({"general.file_type": 15, "general.size_label": "4B"}, "unknown 4B Q4_K - Medium"),
            ({"general.file_type": 999}, "unknown 0.0M I8"),
        ],
    )
    def test_model_type(self, metadata, name):
        assert facts.model_type(FakeFile(self.SHAPES, **metadata)) == name

    @pytest.mark.parametrize(
        ("name", "role"),
        [
            ("token_embd.weight", "embedding"),
            ("output.weight", "output"),
            ("output_norm.weight", "norms"),
            ("blk.3.attn_q_norm.weight", "norms"),
            ("blk.3.attn_output.weight", "attention"),
            ("blk.3.ffn_gate_exps.weight", "experts"),
            ("blk.3.ffn_gate_inp.weight", "feed-forward"),
            ("blk.3.ssm_in.weight", "recurrent"),
            ("rope_freqs.weight", "other"),
        ],
    )
    def test_roles(self, name, role):
        assert facts.role(name) == role


class TestOutput:
    @pytest.mark.parametrize(
        ("n", "text"),
        [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (2**40, "1024.00 GiB"),
         (376_200_000, "358.77 MiB")],
    )  # fmt: skip
    def test_size(self, n, text):
        assert size(n) == text

    @pytest.mark.parametrize(("n", "text"), [(5, "5"), (596_049_920, "596.05 M"), (8e9, "8.00 B")])
    def test_count(self, n, text):
        assert count(n) == text

    def test_table(self):
        text = table([("a", "1"), ("bbb", "22")], ("name", "n"), right="n")
        assert text == "name   n\n----  --\na      1\nbbb   22"

    def test_bars_fill_their_share(self):
        assert bar(0.5, 4) == "██  " and bar(1, 4) == "████" and bar(0, 4) == "    "
        assert bar(1e-9, 4) == "▏   " and len(bar(0.3, 10)) == 10
        lines = bars("title", {"a": 1024, "bb": 3072}).splitlines()
        assert lines[1].strip().startswith("bb") and "75.0 %" in lines[1] and "1.00 KiB" in lines[2]


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

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
    def test_ctrl_c_ends_a_generation_cleanly(self):
        args = (*self.COMMAND, "run", *self.SLOW, "-n", "-1", "--ignore-eos", "-q")
        process = subprocess.Popen(
            args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and errors == b""
        assert (begun + rest).startswith(b"Once upon a time") and rest.endswith(b"\n")
