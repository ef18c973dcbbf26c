"""The tables of `runtime bench` and `runtime inspect`, and the facts in them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import sqlite3
import time
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
from click.testing import CliRunner
from fake_model import DEMO, CommandLine, FakeModel, needs_demo
from gguf_files import gguf_bytes

from runtime import traffic
from runtime.cli import bandwidth, bench, bench_plan, facts, main, summary
from runtime.cli.output import bar, bars, count, size, table
from runtime.errors import ModelError
from runtime.gguf.reader import open_gguf
from runtime.ops.dtypes import DTYPES

# llama-bench's keys in its order, and then ours
BENCH_KEYS = [
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename"),
    *("model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads"),
    *("cpu_mask", "cpu_strict", "poll", "type_k", "type_v", "n_gpu_layers", "n_cpu_moe"),
    *("split_mode", "main_gpu", "no_kv_offload", "flash_attn", "devices", "tensor_split"),
    *("tensor_buft_overrides", "load_mode", "lazy_mode", "embeddings", "no_op_offload"),
    *("no_host", "repack", "fit_target", "fit_min_ctx", "n_prompt", "n_gen", "n_depth"),
    *("test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
    *("bandwidth_share", "gmac_per_s", "tensor_share", "gap_us", "idle_us"),
]


MEMORY = ("-c", "64", "-c", "128")


@pytest.fixture
def invoke(monkeypatch):
    return CommandLine(monkeypatch)


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
        assert tests == ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"], "depth by depth"
        assert all(" ± " in line.split("|")[7] for line in lines[2:6])

    def test_json_has_the_keys_of_llama_bench(self, invoke):
        rows = json.loads(invoke(*self.ARGS, "-o", "json", model=FakeModel()).stdout)
        assert [list(row) for row in rows] == [BENCH_KEYS] * 4
        prompt, decode = rows[0], rows[3]
        assert (prompt["n_prompt"], prompt["n_gen"], prompt["bandwidth_share"]) == (8, 0, None)
        assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 4, 16)
        assert len(prompt["samples_ns"]) == len(prompt["samples_ts"]) == 3
        file = open_gguf(DEMO)
        token = traffic.of_file(file, ("f16", "f16"), 18)
        assert prompt["gmac_per_s"] == pytest.approx(token.macs * prompt["avg_ts"] / 1e9)
        assert decode["bandwidth_share"] == pytest.approx(token.nbytes * decode["avg_ts"] / 2e9)

    def test_csv_has_one_quoted_line_per_test(self, invoke):
        text = invoke(*self.ARGS, "-o", "csv", model=FakeModel()).stdout
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [(r["n_prompt"], r["n_gen"]) for r in rows] == [("8", "0"), ("0", "4")] * 2
        assert rows[0]["cpu_strict"] == "0" and rows[0]["bandwidth_share"] == ""
        assert "samples_ns" not in rows[0] and text.count("\n") == 5

    def test_json_lines_are_the_objects_of_json(self, invoke):
        text = invoke(*self.ARGS, "-o", "jsonl", model=FakeModel()).stdout
        assert [list(json.loads(line)) for line in text.splitlines()] == [BENCH_KEYS] * 4

    def test_sql_fills_a_table(self, invoke):
        model = FakeModel()
        model.file = dataclasses.replace(model.file, path=Path("it's.gguf"))
        text = invoke(*self.ARGS, "-o", "sql", model=model).stdout
        base = sqlite3.connect(":memory:")
        base.executescript(text)
        base.row_factory = sqlite3.Row
        rows = base.execute("SELECT * FROM llama_bench").fetchall()
        assert rows[0].keys() == [k for k in BENCH_KEYS if not k.startswith("samples")]
        assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [
            *((8, 0, 0), (0, 4, 0), (8, 0, 16), (0, 4, 16)),
        ]
        assert rows[0]["model_filename"] == "it's.gguf" and rows[0]["bandwidth_share"] is None
        assert rows[1]["bandwidth_share"] > 0 and rows[0]["repack"] == 1

    def test_what_is_evaluated(self, invoke):
        model = FakeModel()
        invoke("bench", "-p", "8", "-n", "2", "-d", "5", "-r", "2", model=model)
        prompts = [8, "closed", *[5, 8, "closed"] * 2]  # the first, without depth, is not timed
        decodes = [1, "closed", *[5, 1, 1, "closed"] * 2]
        assert model.evals == prompts + decodes
        model = FakeModel()
        invoke("bench", "-p", "8", "-n", "0", "-r", "1", "--no-warmup", model=model)
        assert model.evals == [8, "closed"]

    def test_logits_of_the_last_token_that_is_sent_at_once(self):
        setting = bench_plan.Setting(None, 8, 3, "f16", "f16", None)
        pieces = bench._pieces(list(range(12)), bench_plan.Test(10, 2, 0), setting)
        assert list(pieces) == [
            ([0, 1, 2], "none"), ([3, 4, 5], "none"), ([6, 7], "last"), ([8, 9], "last"),
            ([10], "last"), ([11], "last"),
        ]  # fmt: skip

    def test_a_prompt_and_a_generation_as_one(self, invoke):
        model = FakeModel()
        args = ("bench", "-p", "0", "-n", "0", "-pg", "4,2", "-r", "1", "-o", "json")
        (row,) = json.loads(invoke(*args, model=model).stdout)
        assert model.evals == [4, 1, "closed", 4, 1, 1, "closed"]
        assert (row["n_prompt"], row["n_gen"]) == (4, 2)
        assert row["avg_ts"] == pytest.approx(6e9 / row["avg_ns"], rel=1e-6)
        assert row["bandwidth_share"] is None and row["gmac_per_s"] is None
        text = invoke(*args[:-1], "md", "-d", "3", model=FakeModel()).stdout
        assert "| pp4+tg2 @ d3 |" in " ".join(text.split())

    @pytest.mark.parametrize(
        ("options", "pieces"),
        [
            (("-b", "4"), [4, 4, 2]),
            (("-b", "8", "-ub", "3"), [3, 3, 2, 2]),
            (("-ub", "100000"), [10]),
        ],
    )
    def test_batches(self, invoke, options, pieces):
        model = FakeModel()
        args = ("bench", "-p", "10", "-n", "0", "-r", "1", "--no-warmup", "-o", "json")
        (row,) = json.loads(invoke(*args, *options, model=model).stdout)
        assert model.evals == [*pieces, "closed"]
        assert row["n_ubatch"] <= 512 and row["n_batch"] in (4, 8, 2048)

    def test_columns_show_what_is_not_the_default(self, invoke):
        args = ("bench", "-p", "1", "-n", "0", "-r", "1", "-b", "7", "-ub", "3", "-ctk", "q8_0,f16")
        lines = invoke(*args).stdout.splitlines()
        assert "| threads | n_batch | n_ubatch | type_k |            test |" in lines[0]
        assert [line.split("|")[6:9] for line in lines[2:4]] == [
            ["       7 ", "        3 ", "   q8_0 "], ["       7 ", "        3 ", "    f16 "]
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "numbers"),
        [
            ("128,512", [128, 512]),
            ("1-8", list(range(1, 9))),
            ("1-8+2", [1, 3, 5, 7]),
            ("16-128*2", [16, 32, 64, 128]),
            ("16-100*2,7", [16, 32, 64, 7]),
            ("0", []),
        ],
    )
    def test_numbers_and_ranges(self, invoke, text, numbers):
        args = ("bench", "-p", text, "-n", "3", "-r", "1", "-o", "jsonl")
        rows = [json.loads(line) for line in invoke(*args).stdout.splitlines()]
        assert [row["n_prompt"] for row in rows] == [*numbers, 0]

    @pytest.mark.parametrize(
        "text",
        ["", "a", "1-", "8-1", "1-8+0", "1-8*1", "0-8*2", "1-8/2", "-3", "1.5", "1,,2", "²",
         "0-999999999", "99999999999"],
    )  # fmt: skip
    def test_numbers_that_are_none(self, invoke, text):
        result = invoke("bench", f"--n-prompt={text}")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1

    def test_delay_comes_before_every_test(self, invoke, monkeypatch):
        waits = []
        monkeypatch.setattr(bench, "time", SimpleNamespace(
            sleep=waits.append, perf_counter=time.perf_counter))  # fmt: skip
        invoke("bench", "-p", "1,2", "-n", "0", "-r", "2", "--delay", "1.5")
        assert waits == [1.5, 1.5]

    def test_options_may_be_repeated(self, invoke):
        args = (
            "bench",
            "-p",
            "1",
            "-p",
            "2,3",
            "-n",
            "0",
            "-r",
            "1",
            "-o",
            "jsonl",
            "--delay",
            "0",
        )
        rows = [json.loads(line) for line in invoke(*args).stdout.splitlines()]
        assert [row["n_prompt"] for row in rows] == [1, 2, 3]

    def test_models_are_loaded_for_every_number_of_threads(self, invoke):
        result = invoke("bench", "a.gguf", "b.gguf", "-p", "1", "-n", "0", "-r", "1", "-t", "1,2")
        assert [(path, o["threads"]) for path, o in result.loaded] == [
            *(("a.gguf", 1), ("a.gguf", 2), ("b.gguf", 1), ("b.gguf", 2)),
        ]
        assert result.loaded[0][1]["context"] == 1
        result = invoke(
            "bench", "a.gguf", "-p", "1", "-n", "0", "-r", "1", "-b", "1,2", "-ctv", "q8_0"
        )
        assert [o["kv_type"] for _, o in result.loaded] == ["f16,q8_0"], "one load for both -b"


@needs_demo
class TestInspect:
    def test_text(self, invoke):
        result = invoke("inspect")
        assert result.exit_code == 0 and "\x1b" not in result.stdout
        for part in ("general.architecture", "bytes by type", "KV q8_0", "█"):
            assert part in result.stdout
        assert "token_embd.weight" not in result.stdout, "tensors are shown with -t"

    def test_the_summary_comes_first(self, invoke):
        lines = invoke("inspect", "-m", DEMO).stdout.splitlines()
        told = dict(line.split(maxsplit=1) for line in lines[2:9])
        assert lines[0] == str(DEMO) and told["model"] == "Demo stories"
        assert told["architecture"] == "qwen3, 4 layers, 256 wide"
        assert (told["parameters"], told["context"]) == ("1.84 M", "512 tokens")
        assert (told["chat"], told["type"][:3]) == ("template, without tools", "F16")
        assert lines[9].startswith("runs here     yes; ") and "memory is free" in lines[9]
        need = facts.memory(open_gguf(DEMO), "f16").of(512)
        assert lines[10].split(maxsplit=1) == ["memory", f"{size(need)} at 512 tokens"]
        token = traffic.of_file(open_gguf(DEMO), ("f16", "f16"), 512).nbytes
        assert f"up to {2e9 / token:.0f} tokens/s" in lines[11] and "2.0 GB/s" in lines[11]

    @pytest.mark.parametrize(
        ("free", "says"),
        [
            (None, "yes"),
            (3_700_000, "no: the model takes 3.5 MiB and 3.5 MiB of memory is free"),
            (4_200_000, "yes; 4.01 MiB of memory is free; memory is left for 224 of 512 tokens"),
        ],
    )
    def test_whether_it_runs_here(self, invoke, monkeypatch, free, says):
        monkeypatch.setattr("runtime.memory.budget.available_memory", lambda: free)
        line = next(x for x in invoke("inspect").stdout.splitlines() if x.startswith("runs here"))
        assert line.split(maxsplit=2)[2].startswith(says)

    def test_bandwidth_is_measured_once(self, invoke, monkeypatch, tmp_path):
        calls = []
        real = (bandwidth.measured, bandwidth.remembered)
        invoke("inspect")  # replaces both
        for name, function in zip(("measured", "remembered"), real, strict=True):
            monkeypatch.setattr(bandwidth, name, function)
        monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path / "new"))
        monkeypatch.setattr(
            "runtime.backends.cpu.run.bandwidth.read_bandwidth", lambda n: calls.append(n) or 3e9
        )
        monkeypatch.setattr("runtime.memory.budget.available_memory", lambda: 8 << 30)
        run = CliRunner().invoke
        first, second = run(main, ["inspect"]), run(main, ["inspect"])
        assert "3.0 GB/s" in first.stdout and first.stdout == second.stdout
        assert "measuring" in first.stderr and "measuring" not in second.stderr
        assert len(calls) == 1
        (tmp_path / "new" / "bandwidth.json").write_text("[]")
        assert bandwidth.remembered(1) is None

    def test_metadata_does_not_steer_the_terminal(self, invoke, tmp_path):
        path = tmp_path / "odd.gguf"
        evil = "\x1b]0;owned\x07\x9b2J"
        words = {"general.architecture": f"no{evil}", "general.name": evil, f"key{evil}": evil}
        path.write_bytes(gguf_bytes(words, {}))
        for args in (("inspect", path), ("run", path, "-p", "x")):
            output = invoke(*args).output
            assert "\x1b" not in output and "\x07" not in output and "\x9b" not in output
        assert r"\x1b]0;owned\x07\x9b2J" in invoke("inspect", path).stdout

    def test_lengths_shown(self, tmp_path):
        assert summary.contexts(FakeFile({}, **{"unknown.context_length": 131072})) == [
            4096, 32768, 131072
        ]  # fmt: skip
        assert summary.contexts(FakeFile({})) == [4096, 32768]

    @pytest.mark.parametrize(
        ("metadata", "says"),
        [
            ({}, "no template"),
            ({"tokenizer.chat_template": "{{ tools_of_mine }}"}, "template, without tools"),
            ({"tokenizer.chat_template": "{% if tools %}"}, "template, with tools"),
            ({"tokenizer.chat_template.tool_use": "x"}, "template, with tools"),
        ],
    )
    def test_what_the_template_can_do(self, metadata, says):
        told = dict(summary.rows(FakeFile(TestFacts.SHAPES, **metadata), {}, "why"))
        assert told["chat"].startswith(says) and told["runs here"] == "no: why"

    def test_json_agrees_with_the_file(self, invoke):
        found = json.loads(invoke("inspect", DEMO, "--json", "-c", "64", "-c", "128").stdout)
        again = json.loads(invoke("inspect", DEMO, "-o", "json", *MEMORY).stdout)
        assert found == again | {"memory_available": found["memory_available"]}
        assert found["runs"] is True and found["chat_template"] is True and not found["tools"]
        assert found["tokens_per_s"] == pytest.approx(2e9 / found["token_nbytes"])
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
        everything = invoke("inspect", "-t").stdout
        assert everything == invoke("inspect", "-t", DEMO).stdout
        assert len(everything.splitlines()) == 2 + len(open_gguf(DEMO).tensors)
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
        assert result.exit_code == 0 and "architecture 'other' is not supported" in result.stdout

    def test_a_vocabulary_alone_is_shown(self, invoke, tmp_path):
        path = tmp_path / "vocab.gguf"
        words = {"general.architecture": "qwen3", "tokenizer.ggml.tokens": ["a", "b"]}
        path.write_bytes(gguf_bytes(words, {}))
        result = invoke("inspect", path)
        assert result.exit_code == 0 and "bytes by type" not in result.stdout
        assert "a vocabulary alone (2 tokens) and no weights to run" in result.stdout


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

    @property
    def tensors_nbytes(self):
        return sum(tensor.nbytes for tensor in self.tensors.values())


class TestFacts:
    SHAPES = MappingProxyType({"token_embd.weight": (100, 8), "blk.0.attn_q.weight": (8, 8)})

    @needs_demo
    def test_memory_is_weights_pages_and_state(self):
        file = open_gguf(DEMO)
        f16, q8 = (facts.memory(file, kind) for kind in ("f16", "q8_0"))
        assert f16.weights == file.tensors_nbytes and f16.state == 0
        assert f16.page * 34 == q8.page * 64, "f16 takes 2 bytes a value, q8_0 34 for 32"
        assert f16.of(33) - f16.of(32) == f16.page and f16.of(64) == f16.of(33)
        with pytest.raises(ModelError, match="architecture 'unknown' is not supported"):
            facts.memory(FakeFile(self.SHAPES), "f16")

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
