"""Options as users of other programs type them, and names that are no files."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import re
import string
import subprocess
import sys
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner
from fake_model import DEMO, CommandLine, FakeModel, needs_demo

import runtime
from runtime.cli import COMMANDS, foreign, main
from runtime.cli.options import SAMPLING_FIELDS
from runtime.cli.parsing import Option


@pytest.fixture
def invoke(monkeypatch):
    return CommandLine(monkeypatch)


def command(name):
    return main.get_command(click.Context(main), name)


def names(of):
    return [n for p in command(of).params if isinstance(p, click.Option) for n in p.opts]


# commands that load no model, or more than one
NOT_OF_A_MODEL = {"compare", "convert", "devices", "imatrix", "quantize"}


@needs_demo
class TestFlags:
    @pytest.mark.parametrize(
        ("args", "option", "value"),
        [
            (("-n", "5"), "max_tokens", 5),
            (("-n5",), "max_tokens", 5),
            (("-n", "-1"), "max_tokens", -1),
            (("--n-predict", "5"), "max_tokens", 5),
            (("--n_predict", "5"), "max_tokens", 5),
            (("-n-predict", "5"), "max_tokens", 5),
            (("--predict=5",), "max_tokens", 5),
            (("--max-tokens", "5"), "max_tokens", 5),
            (("--temp", "0.5"), "temperature", 0.5),
            (("--temperature", "0.5"), "temperature", 0.5),
            (("--top-k", "3"), "top_k", 3),
            (("--top_k=3",), "top_k", 3),
            (("--top-p", "0.3"), "top_p", 0.3),
            (("--min-p", "0.3"), "min_p", 0.3),
            (("--typical-p", "0.3"), "typical_p", 0.3),
            (("--repeat-penalty", "1.2"), "repeat_penalty", 1.2),
            (("--repeat-last-n", "9"), "penalty_last_n", 9),
            (("--seed", "7"), "seed", 7),
            (("-s", "7"), "seed", 7),
            (("-s7",), "seed", 7),
            (("-l", "3-1"), "logit_bias", {3: -1.0}),
            (("-r", "User:"), "stop", ("User:",)),
            (("--reverse-prompt", "-User"), "stop", ("-User",)),
            (("--ignore-eos",), "ignore_eos", True),
            (("--top-n-sigma", "1.5"), "top_n_sigma", 1.5),
            (("--top-nsigma", "-1"), "top_n_sigma", -1.0),
            (("--xtc-probability", "0.5"), "xtc_probability", 0.5),
            (("--xtc-threshold", "0.2"), "xtc_threshold", 0.2),
            (("--dry-multiplier", "0.8"), "dry_multiplier", 0.8),
            (("--dry-base", "1.5"), "dry_base", 1.5),
            (("--dry-allowed-length", "3"), "dry_allowed_length", 3),
            (("--dry-penalty-last-n", "-1"), "dry_penalty_last_n", -1),
            (("--dry-sequence-breaker", "."), "dry_sequence_breakers", (".",)),
            (("--dry-sequence-breaker", "none"), "dry_sequence_breakers", ()),
            (("--dynatemp-range", "0.5"), "dynatemp_range", 0.5),
            (("--dynatemp-exp", "2"), "dynatemp_exponent", 2.0),
            (("--mirostat", "2"), "mirostat", 2),
            (("--mirostat-ent", "4"), "mirostat_tau", 4.0),
            (("--mirostat-lr", "0.2"), "mirostat_eta", 0.2),
            (("--samplers", "top_k;temperature"), "samplers", "top_k;temperature"),
            (("--json-schema", '{"type": "null"}'), "json_schema", '{"type": "null"}'),
            (("-j", "true"), "json_schema", "true"),
            (("--regex", "a+"), "regex", "a+"),
            (("--grammar", 'root ::= "a"'), "grammar", 'root ::= "a"'),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_of_sampling(self, invoke, args, option, value):
        model = FakeModel()
        result = invoke("run", "m.gguf", "-p", "x", *args, model=model)
        assert result.exit_code == 0, result.stderr
        assert model.calls[0][1][option] == value

    @pytest.mark.parametrize("name", ["run", "chat"])
    def test_grammars_may_be_in_files(self, invoke, tmp_path, name):
        schema, grammar = tmp_path / "s.json", tmp_path / "g.gbnf"
        schema.write_text('{"type": "null"}')
        grammar.write_text('root ::= "é"', "utf-8")
        for option, file, field in (
            ("--json-schema", schema, "json_schema"), ("-jf", schema, "json_schema"),
            ("--grammar-file", grammar, "grammar"),
        ):  # fmt: skip
            model = FakeModel()
            result = invoke(name, "m.gguf", option, str(file), model=model, stdin="hi")
            assert result.exit_code == 0, result.stderr
            assert model.calls[0][1][field] == file.read_text("utf-8")

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("-j", '{"not": {}}'), "json_schema uses not, which cannot be enforced"),
            (("-j", "{"), "json_schema is no JSON"),
            (("-j", "nothing.json"), "nothing.json"),
            (("-j", "true", "--regex", "a"), "--json-schema and --regex cannot go together"),
            (("--grammar", "a", "--grammar-file", "b"), "cannot go together"),
            (("--grammar-file", "nothing.gbnf"), "nothing.gbnf"),
        ],
    )
    def test_grammars_that_cannot_be_used(self, invoke, args, says):
        result = invoke("run", "m.gguf", "-p", "x", *args)
        assert result.exit_code != 0 and result.loaded == [] and says in result.stderr

    @pytest.mark.parametrize(
        ("args", "option", "value"),
        [
            (("-c", "64"), "context", 64),
            (("--ctx-size", "64"), "context", 64),
            (("--ctx_size=64",), "context", 64),
            (("-c", "0"), "context", None),
            (("-t", "2"), "threads", 2),
            (("-t2",), "threads", 2),
            (("-ctk", "q8_0"), "kv_type", "q8_0,f16"),
            (("-ctk=q8_0",), "kv_type", "q8_0,f16"),
            (("--cache-type-v", "q8_0"), "kv_type", "f16,q8_0"),
            (("-ctk", "q8_0", "-ctv", "q8_0"), "kv_type", "q8_0"),
            (("--kv-type", "f32,bf16", "-ctv", "f16"), "kv_type", "f32,f16"),
            (("--kv-type", "q6_0/Q4_0"), "kv_type", "q6_0,q4_0"),
            ((), "cache_rotation", True),
            (("--no-cache-rotation",), "cache_rotation", False),
            (("--no-graph",), "graphs", False),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    @pytest.mark.parametrize("name", ["run", "chat", "warmup"])
    def test_of_loading(self, invoke, name, args, option, value):
        result = invoke(name, "m.gguf", *args, stdin="hi")
        assert result.exit_code == 0, result.stderr
        assert result.loaded[0][1][option] == value

    @pytest.mark.parametrize("name", sorted({*COMMANDS} - NOT_OF_A_MODEL))
    @pytest.mark.parametrize("option", ["-m", "--model"])
    def test_the_model_may_be_an_option(self, invoke, name, option):
        more = ("-p", "1", "-n", "0", "-r", "1") if name == "bench" else ()
        result = invoke(name, *more, option, DEMO, stdin="hi")
        assert result.exit_code == 0, result.stderr
        loads = name not in ("inspect", "plan", "cache")
        assert [given[0] for given in result.loaded[:1]] == [str(DEMO)] * loads

    @pytest.mark.parametrize(("threads", "said"), [(8, 0), (9, 1), (1000, 1)])
    def test_more_threads_than_processors(self, invoke, monkeypatch, threads, said):
        monkeypatch.setattr("runtime.backends.cpu.run.cores.processors", lambda: 8)
        result = invoke("run", "-p", "x", "-t", threads)
        assert result.exit_code == 0 and result.loaded[0][1]["threads"] == threads
        line = f"-t {threads} is more than the 8 processors here, which makes it slower\n"
        assert result.stderr.count(line) == said == result.stderr.count("processors")

    def test_escapes(self, invoke):
        for args, text in (((r"a\nb\q\\",), r"a\nb\q\\"), ((r"a\nb\q\\n", "-e"), "a\nb\\q\\n")):
            model = FakeModel()
            invoke("run", "m.gguf", "-p", *args, model=model)
            assert model.calls[0][0][0]["content"] == text

    def test_instructions_from_a_file(self, invoke, tmp_path):
        (tmp_path / "s.txt").write_text("Be brief.\n")
        for name in ("run", "chat"):
            model = FakeModel()
            invoke(name, "m.gguf", "-sysf", tmp_path / "s.txt", model=model, stdin="hi")
            assert model.calls[0][0][0] == {"role": "system", "content": "Be brief."}

    def test_verbose_shows_plans(self, invoke, monkeypatch):
        monkeypatch.setenv("DEBUG", "")
        invoke("run", "m.gguf", "-p", "x", "-v")
        assert os.environ["DEBUG"] == "1"
        monkeypatch.setenv("DEBUG", "3")
        invoke("run", "m.gguf", "-p", "x", "--verbose")
        assert os.environ["DEBUG"] == "3"

    @pytest.mark.parametrize(
        ("args", "coloured"),
        [
            ((), False),
            (("--color",), True),
            (("-co", "m.gguf"), True),
            (("-co", "on"), True),
            (("--color=off",), False),
        ],
    )
    def test_colours(self, invoke, args, coloured):
        result = invoke("run", *args, "-p", "x", model=FakeModel())
        assert result.exit_code == 0 and ("\x1b[" in result.stderr) is coloured
        assert result.stdout == "one two\n"

    @pytest.mark.parametrize("args", [("-p", "-5 degrees"), ("-p=-5 degrees",), ("--prompt", "-m")])
    def test_values_may_look_like_options(self, invoke, args):
        model = FakeModel()
        invoke("run", "m.gguf", *args, model=model)
        assert model.calls[0][0][0]["content"] == args[-1].removeprefix("-p=")

    def test_words_after_two_dashes_are_the_prompt(self, invoke):
        model = FakeModel()
        invoke("run", "m.gguf", "--", "-why", "not", model=model)
        assert model.calls[0][0][0]["content"] == "-why not"


class TestWholeNames:
    """A letter is never cut off an unknown word: `-ngl` is not `-n gl`."""

    def test_no_two_letters_of_known_options_are_one(self, invoke):
        for name in COMMANDS:
            known = names(name)
            letters = [n[1] for n in known if len(n) == 2]
            for pair in itertools.product(letters, string.ascii_letters):
                word = "-" + "".join(pair)
                if word in known or word in foreign.OPTIONS:
                    continue
                result = invoke(name, word, "3")
                assert result.exit_code == 2 and f"no option {word}" in result.stderr, (name, word)

    @pytest.mark.parametrize(
        ("word", "near"),
        [("--tmp", "--temp"), ("-cttk", "-ctk"), ("--contxt", "--context"), ("-seed", "--seed"),
         ("--promt=a", "--prompt")],
    )  # fmt: skip
    def test_the_nearest_name_is_offered(self, invoke, word, near):
        result = invoke("run", word)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert f"no option {word.partition('=')[0]}: did you mean {near}?" in result.stderr

    @pytest.mark.parametrize(
        "args",
        ["quantize -o", "quantize --nothing", "convert -t", "convert -x", "run -nkvx",
         "inspect --kv-tipe", "convert --batch-siz"],
    )  # fmt: skip
    def test_none_is_offered_that_the_command_lacks(self, invoke, args):
        result = invoke(*args.split())
        assert f"error: no option {args.split()[1]} (" in result.stderr

    def test_the_most_threads(self, invoke):
        from runtime.backends.cpu import MAX_THREADS
        from runtime.cli.parsing import THREADS

        assert THREADS.max == MAX_THREADS
        for name in ("quantize", "imatrix", "perplexity", "run", "devices"):
            assert "'-t' / '--threads': 999999" in invoke(name, "-t", "999999", "x").stderr

    def test_names_are_plain(self):
        """No foreign name hides one of ours by mistake, and none is written twice."""
        rows = (*foreign._SILENT, *foreign._ACCEPTED, *foreign._REFUSED)
        words = [name for row in rows for name in row[0].split()]
        assert len(words) == len(set(words)) == len(foreign.OPTIONS)
        assert all(re.fullmatch(r"--?[a-z0-9A-Z-]+", word) for word in words)
        for name in COMMANDS:
            assert len(names(name)) == len(set(names(name)))


@needs_demo
class TestForeignOptions:
    @pytest.mark.parametrize("name", sorted(foreign.OPTIONS))
    @pytest.mark.parametrize("of", ["run", "bench", "chat"])
    def test_each_is_answered_in_one_line(self, invoke, of, name):
        if name in names(of):
            return
        found = foreign.OPTIONS[name]
        value = () if not found.values else ("0",)
        tail = ("-p", "1", "-n", "0", "-r", "1") if of == "bench" else ()
        model = FakeModel()
        result = invoke(of, name, *value, "m.gguf", *tail, model=model, stdin="hi")
        assert result.exit_code == (2 if found.refused else 0), result.stderr
        assert result.loaded == [] if found.refused else result.loaded[0][0] == "m.gguf"
        line = next((x for x in result.stderr.splitlines() if name in x), "")
        assert bool(line) == bool(found.line), result.stderr
        assert not line or (line.count(name) == 1 and len(line) < 160)

    def test_no_hint_leads_to_what_is_refused(self, invoke):
        refused = [name for name, what in foreign.OPTIONS.items() if what.refused]
        for name in ("-hfx", "--hf-rep", "--gramar", "--loras", "-spp", "--mmprj"):
            result = invoke("run", name, "-p", "x")
            assert result.exit_code == 2 and "no option " + name in result.stderr
            assert not any(f"did you mean {other}?" in result.stderr for other in refused)

    def test_a_wrong_value_names_the_option_as_the_help_does(self, invoke):
        result = invoke("run", "-n", "-5", "-p", "x")
        assert "Invalid value for '-n' / '--predict': -5" in result.stderr

    @pytest.mark.parametrize("args", [("-fa",), ("-fa", "on"), ("-fa=1",), ("--no-mmap",)])
    def test_an_optional_value_is_no_model(self, invoke, args):
        result = invoke("run", *args, "m.gguf", "-p", "x")
        assert result.exit_code == 0 and result.loaded[0][0] == "m.gguf"

    @pytest.mark.parametrize(
        "args",
        ["--rope-freq-base 1e6", "--rope-scale 2", "--yarn-orig-ctx 4096", "--lora a.gguf",
         "--chat-template chatml", "--mmproj a.gguf", "--image a.png",
         "--override-kv a=int:1", "--control-vector a.gguf", "-hfd a/b", "--prompt-cache f"],
    )  # fmt: skip
    def test_what_would_change_the_answer_is_refused(self, invoke, args):
        result = invoke("run", "m.gguf", "-p", "x", *args.split())
        assert result.exit_code == 2 and result.loaded == []

    @pytest.mark.parametrize(
        "args", ["-ngl 99", "-fa", "-fa on", "--no-mmap", "--mlock", "-t 2 -tb 4", "--numa isolate",
                 "-sm none", "-nkvo", "--jinja", "--no-warmup", "--prio 2", "--poll 0"],
    )  # fmt: skip
    def test_what_would_not_need_not_stop_a_run(self, invoke, args):
        result = invoke("run", "m.gguf", "-p", "x", *args.split())
        assert result.exit_code == 0 and result.stdout == "one two\n"

    def test_the_same_line_is_said_once(self, invoke):
        result = invoke("run", "-ncffn", "9", "-ncffn", "9", "-p", "x", "m.gguf")
        assert result.stderr.count("models run on the CPU here") == 1

    def test_hub_names_say_how_to_get_the_file(self, invoke):
        result = invoke("run", "-hf", "ggml-org/some-GGUF:Q4_K_M", "-p", "x")
        assert result.exit_code == 2
        assert "hf download ggml-org/some-GGUF --include '*Q4_K_M*.gguf'" in result.stderr


@needs_demo
class TestNames:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("ggml-org/gemma-3-GGUF", "hf download ggml-org/gemma-3-GGUF"),
            ("org/name:Q8_0", "hf download org/name --include '*Q8_0*.gguf'"),
            ("hf.co/org/name", "hf download org/name"),
            ("llama3.2:1b", "a name of Ollama's"),
            ("qwen3:0.6b-q4_K_M", "a name of Ollama's"),
            ("https://example.org/a/b.gguf", "curl -LO https://example.org/a/b.gguf"),
            ("", "the model's name is empty"),
            ("hf://org/name/b.gguf", "models are not downloaded here"),
        ],
    )
    @pytest.mark.parametrize(
        "way", [("run",), ("run", "-m"), (), ("chat",), ("bench",), ("inspect",)]
    )
    def test_of_other_programs(self, invoke, monkeypatch, tmp_path, way, text, says):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
        result = invoke(*way, text)
        assert result.exit_code == 2 and result.loaded == []
        assert says in result.stderr and result.stderr.count("\n") == 1
        assert "Traceback" not in result.output

    def test_a_bare_name(self, invoke, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
        result = invoke("run", "llama3.2")
        assert result.exit_code == 2 and result.loaded == []
        assert "llama3.2 is no file here, and models are not downloaded" in result.stderr
        (tmp_path / "small.Q4_0.gguf").write_bytes(b"GGUF")
        for way in ((), ("run",), ("inspect",)):
            said = invoke(*way, "small.Q4_0").stderr
            assert re.search(r"did you mean '?small\.Q4_0\.gguf'?\?", said)

    def test_a_file_is_a_file_whatever_its_name(self, invoke, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org").mkdir()
        for name in ("llama3.2:1b", "org/name", "https:x", "run.x"):
            (tmp_path / name).write_bytes(b"GGUF")
            result = invoke(name, "-p", "x") if name != "run.x" else invoke("run", name, "-p", "x")
            assert result.exit_code == 0 and result.loaded[0][0] == name

    def test_what_ollama_has_fetched_is_named(self, invoke, monkeypatch, tmp_path):
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
        manifest = tmp_path / "manifests/registry.ollama.ai/library/llama3.2/1b"
        manifest.parent.mkdir(parents=True)
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:abc"}]
        manifest.write_text(json.dumps({"layers": layers}))
        assert "give the path of a .gguf" in invoke("run", "llama3.2:1b").stderr
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "sha256-abc").write_bytes(b"GGUF")
        assert f"its file is here: {tmp_path / 'blobs/sha256-abc'}" in invoke("llama3.2:1b").stderr
        for broken in ("[]", "{}", '{"layers": [1]}', "\0", '{"layers": [{"mediaType": 1}]}'):
            manifest.write_text(broken)
            assert "give the path of a .gguf" in invoke("run", "llama3.2:1b").stderr

    def test_folders_say_what_is_in_them(self, invoke, tmp_path):
        assert "with no .gguf file in it" in invoke("run", tmp_path).stderr
        (tmp_path / "model.safetensors").touch()
        assert f"'runtime convert {tmp_path} OUT.gguf'" in invoke("run", tmp_path).stderr
        for name in "abcde":
            (tmp_path / f"{name}.gguf").touch()
        result = invoke(tmp_path)
        assert "a.gguf, b.gguf, c.gguf and 2 more" in result.stderr and result.exit_code == 2

    def test_a_file_of_nearly_that_name_is_offered(self, invoke, tmp_path):
        (tmp_path / "qwen3-0.6b-Q4_0.gguf").touch()
        for wrong in ("qwen3-0.6b-q4_0.gguf", "qwen3-0.6b-Q4_0", "qwen3-0.6B-Q4_O.gguf"):
            result = invoke("run", tmp_path / wrong)
            assert "did you mean" in result.stderr and result.exit_code == 1
            assert str(tmp_path / "qwen3-0.6b-Q4_0.gguf") in result.stderr

    @pytest.mark.parametrize("name", ["pull", "serve", "list", "show", "ps", "rm"])
    def test_commands_of_other_programs(self, invoke, name):
        result = invoke(name, "x")
        assert result.exit_code == 2 and f"no command {name!r}: " in result.stderr
        assert result.stderr.count("\n") == 1


class TestHelp:
    @pytest.mark.parametrize("name", [*COMMANDS, "help", "version"])
    def test_every_line_fits(self, name, monkeypatch):
        for columns in ("60", "80", "100", "300"):
            monkeypatch.setenv("COLUMNS", columns)
            text = CliRunner().invoke(main, [name, "--help"]).output
            assert max(map(len, text.splitlines())) <= 100
            assert "\t" not in text and text.startswith("Usage: ")

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_of_a_command_has_three_names(self, name):
        wanted = CliRunner().invoke(main, [name, "-h"]).output
        assert CliRunner().invoke(main, [name, "--usage"]).output == wanted
        assert CliRunner().invoke(main, ["help", name]).output == wanted
        assert CliRunner().invoke(main, ["help"]).output == CliRunner().invoke(main).output

    @pytest.mark.parametrize("way", [["version"], ["--version"]])
    def test_version(self, way):
        assert CliRunner().invoke(main, way).output == f"runtime, version {runtime.__version__}\n"

    def test_aliases_work_and_are_not_shown(self):
        text = CliRunner().invoke(main, ["run", "-h"]).output
        assert "--n-predict" not in text and "--n-predict" in names("run")
        for parameter in command("run").params:
            if isinstance(parameter, Option):
                shown = [n for n in parameter.opts if n not in parameter._aliases]
                assert 1 <= len(shown) <= 2 and all(n in text for n in shown)

    def test_python_m_runtime_is_the_command(self):
        done = subprocess.run(
            [sys.executable, "-m", "runtime", "version"], capture_output=True, text=True
        )
        assert done.stdout == f"runtime, version {runtime.__version__}\n" and not done.stderr

    @pytest.mark.parametrize("name", [*COMMANDS, "help", "version"])
    def test_help_imports_no_engine(self, name):
        code = (
            f"import sys; from runtime.cli import main\n"
            f"try: main([{name!r}, '-h'])\n"
            "except SystemExit: print([m for m in ('numpy', 'numba', 'llvmlite', 'rich', 'jinja2')"
            " if m in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stderr.strip() == "[]"


class TestSampling:
    """The options of sampling are the fields of `runtime.Sampling`, in one table."""

    ELSEWHERE = ("logprobs",)  # of the Python interface alone

    def test_every_field_has_an_option(self):
        declared = {f.name for f in fields(runtime.Sampling)}
        assert set(SAMPLING_FIELDS) == declared - set(self.ELSEWHERE)

    @needs_demo
    @pytest.mark.parametrize("name", ["run", "chat"])
    def test_what_the_file_asks_for_is_told(self, invoke, name):
        model = FakeModel()
        asked = {"temp": 0.6, "top_k": 20, "sequence": "top_k;temperature", "nonsense": 1}
        held = {**model.file.metadata, **{f"general.sampling.{k}": v for k, v in asked.items()}}
        model.file = dataclasses.replace(model.file, metadata=held)
        result = invoke(name, "m.gguf", model=model, stdin="hi")
        told = "the file asks for --temp 0.6 --top-k 20 --samplers top_k;temperature\n"
        assert result.stderr.count(told) == 1
        assert result.stderr.count("warning: the file's general.sampling.nonsense = 1 is not") == 1
        result = invoke(name, "m.gguf", "--temp", "1", "--top-k", "3", "--samplers", "top_k",
                        model=model, stdin="hi")  # fmt: skip
        assert "asks for" not in result.stderr
        held["general.sampling.top_p"] = "much"
        result = invoke(name, "m.gguf", model=model, stdin="hi")
        assert result.exit_code == 1 and "general.sampling.top_p" in result.stderr

    def test_help_tells_the_default(self):
        for parameter in command("run").params:
            default = getattr(runtime.Sampling(), parameter.name or "", None)
            told = re.search(r"\((-?[\d.]+)\)", getattr(parameter, "help", None) or "")
            if told and parameter.name != "seed" and default is not None:
                assert float(told[1]) == default, parameter.name

    def test_generate_and_chat_take_what_the_options_give(self):
        for function in (runtime.Model.generate, runtime.Model.chat):
            known = inspect.signature(function).parameters
            assert {*SAMPLING_FIELDS, "max_tokens", "ignore_eos"} <= set(known)
