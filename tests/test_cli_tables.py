"""The tables of `runtime bench` and `runtime inspect`, and the facts in them."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
from fake_model import DEMO, CommandLine, FakeModel, needs_demo
from gguf_files import gguf_bytes

from runtime import traffic
from runtime.cli import facts
from runtime.cli.output import bar, bars, count, size, table
from runtime.errors import ModelError
from runtime.gguf.reader import open_gguf
from runtime.ops.dtypes import DTYPES

BENCH_KEYS = {
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename"),
    *("model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads"),
    *("type_k", "type_v", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns"),
    *("avg_ts", "stddev_ts", "samples_ns", "samples_ts", "bandwidth_share", "gmac_per_s"),
}


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
        token = traffic.of_file(file, ("f16", "f16"), 18)
        assert prompt["gmac_per_s"] == pytest.approx(token.macs * prompt["avg_ts"] / 1e9)
        assert decode["bandwidth_share"] == pytest.approx(token.nbytes * decode["avg_ts"] / 2e9)

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
