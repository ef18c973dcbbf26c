"""Perplexity, base files and divergence, beside numpy and what llama-perplexity printed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from fake_model import DEMO, needs_demo

import runtime
from runtime.cli import main
from runtime.errors import FileError, OptionError
from runtime.quality import rows
from runtime.quality.base import BaseFile, encoded, writing
from runtime.quality.divergence import divergence, mean
from runtime.quality.divergence import perplexity as estimate
from runtime.quality.windows import Windows, bundled_text, ids_of

HELD_OUT = DEMO.with_name("demo-heldout.txt")
IDS = np.random.default_rng(1).integers(0, 80, 700).tolist()


@pytest.fixture(scope="module", params=["small_model", "hybrid_model"])
def model(request):
    with runtime.load(request.getfixturevalue(request.param), kv_type="f32") as loaded:
        yield loaded


def log_probabilities(logits):
    x = np.asarray(logits, np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


class TestWindows:
    @staticmethod
    def model(add_bos):
        tokenizer = SimpleNamespace(bos_id=7, add_bos=add_bos)
        return SimpleNamespace(context=64, tokenizer=tokenizer)

    def test_each_begins_with_the_bos_the_vocabulary_adds(self):
        for add_bos, first in ((True, [7, 7]), (False, [0, 5])):
            cut = Windows.of(self.model(add_bos), range(14), 5, None)
            assert len(cut) == 2 and cut.rows == 2 and cut.first == 2
            assert [cut.given(n) for n in range(2)] == [[first[0], 1, 2, 3], [first[1], 6, 7, 8]]
            assert cut.ids[:, 0].tolist() == [0, 5], "the base file has the text's own tokens"
            assert cut.wanted(1).tolist() == [8, 9]

    def test_what_cannot_be_cut(self):
        assert len(Windows.of(self.model(True), range(60), 10, 4)) == 4
        with pytest.raises(OptionError, match=r"has 19 tokens, and two windows of 10 take 20"):
            Windows.of(self.model(True), range(19), 10, None)
        for size in (2, 65):
            with pytest.raises(OptionError, match="window="):
                Windows.of(self.model(True), range(200), size, None)


def test_the_second_half_of_each_window_is_scored(model):
    """As `eval` of each by itself has it, whether read together or in parts."""
    for size in (10, 11, 64):
        surprise = []
        for at in range(0, 700 - size + 1, size):
            ids = IDS[at : at + size]
            found = log_probabilities(model.eval(ids))
            surprise += [-found[i, ids[i + 1]] for i in range(size // 2, size - 1)]
        expected = np.array(surprise)
        found = model.perplexity(IDS, window=size)
        assert found[2:5] == (700 // size, size, len(expected)) and found.kl is None
        value = np.exp(expected.mean())
        assert found.value == pytest.approx(value, rel=1e-6)
        error = value * expected.std(ddof=1) / len(expected) ** 0.5
        assert found.error == pytest.approx(error, rel=1e-4)
        model._engine.most_tokens, before = 4, model._engine.most_tokens
        try:
            assert model.perplexity(IDS, window=size) == found
        finally:
            model._engine.most_tokens = before


def test_a_base_file_comes_back(model, tmp_path):
    path, seen = tmp_path / "a.base", []
    first = model.perplexity(IDS, window=32, windows=5, kl_base=path, on_window=seen.append)
    assert [soon.done for soon in seen] == [1, 2, 3, 4, 5] and seen[-1].perplexity == first[:2]
    again = model.perplexity(kl=path)
    assert again[:2] == first[:2] and again.kl.same_top == (1, 0)
    assert abs(again.kl.kld.mean.value) < 1e-5
    assert model.perplexity(IDS, windows=3, kl=path).windows == 3
    assert not list(tmp_path.glob("*.part"))
    assert model.perplexity(windows=-1, kl=path).windows == 5
    assert f"{first}".startswith(f"perplexity {first.value:.4f} ± ")
    assert "(5 windows of 32 tokens, 75 of them scored), KL divergence " in f"{again}"
    assert "(1 window of 32 tokens" in str(model.perplexity(kl=path, windows=1))


def test_a_long_text_is_read_as_far_as_is_needed(monkeypatch):
    """Its tokens are those of the whole."""
    text = bundled_text()
    with runtime.load() as model:
        whole = model.tokenizer.encode(text, parse_special=False)
        lengths, encode = [], model.tokenizer.encode
        monkeypatch.setattr(
            model.tokenizer, "encode",
            lambda part, **given: (lengths.append(len(part)), encode(part, **given))[1],
        )  # fmt: skip
        for most in (3, 100, 1000):
            assert ids_of(model, text, most)[:most] == whole[:most]
        assert max(lengths) < len(text) / 4
        assert ids_of(model, "of one " + "x" * 9000, 9) == encode("of one " + "x" * 9000)


class TestBaseFile:
    @pytest.mark.parametrize("vocabulary", [6, 7])
    def test_bytes(self, tmp_path, vocabulary):
        """Number by number, as the module's text has it."""
        ids = np.arange(10, dtype=np.int32).reshape(2, 5)
        logits = np.random.default_rng(2).normal(0, 6, (4, vocabulary)).astype(np.float32)
        logits[1] = 3  # all alike: no scale
        stored = [b"_logits_", struct.pack("<3i", 5, vocabulary, 2), ids.astype("<i4").tobytes()]
        for row in logits:
            top, total = row.max(), np.log(np.exp(row.astype(float) - row.max()).sum())
            low = max(row.min(), top - np.float32(16))
            scale = (top - low) / np.float32(65535)
            stored.append(struct.pack("<2f", scale, low - top - np.float32(total)))
            codes = [round(max(0, x - low) / scale) if scale else 0 for x in row.tolist()]
            stored.append(struct.pack(f"<{vocabulary}H", *codes) + bytes(vocabulary % 2 * 2))
        with writing(tmp_path / "b", vocabulary, Windows(ids, None)) as add:
            add(logits[:3])
            add(logits[3:])
        found = (tmp_path / "b").read_bytes()
        assert len(found) == len(b"".join(stored))
        head, codes = 8 + 12 + 40, vocabulary + vocabulary % 2 + 4
        assert found[:head] == b"".join(stored[:3])
        mine, hers = (np.frombuffer(x[head:], "<u2").reshape(4, codes)
                      for x in (found, b"".join(stored)))  # fmt: skip
        assert abs(mine[:, 4:].astype(int) - hers[:, 4:]).max() <= 1
        a, b = (np.ascontiguousarray(x[:, :4]).view("<f4") for x in (mine, hers))
        np.testing.assert_allclose(a, b, rtol=1e-6)
        with BaseFile(tmp_path / "b") as base:
            assert (base.size, base.vocabulary, base.ids.tolist()) == (5, vocabulary, ids.tolist())
            back = base.decoded(base.rows(1, 0, 2))
        exact = log_probabilities(logits[2:])
        near = exact > exact.max(1, keepdims=True) - 15.9
        assert abs(back - exact)[near].max() < 16 / 65535

    def test_what_is_no_base(self, tmp_path, model):
        path = tmp_path / "a.base"
        model.perplexity(IDS, window=32, kl_base=path)
        whole = path.read_bytes()
        for content, said in (
            (b"GGUF" + bytes(40), "is no base file"), (b"_logits_", "is no base file"),
            (whole[:-2], "it is not whole"), (whole + b"x", "something else is behind it"),
            (whole[:8] + struct.pack("<i", -5) + whole[12:], "windows of -5 tokens .* is damaged"),
            (whole[:16] + struct.pack("<i", -1) + whole[20:], "head says -1 windows"),
        ):  # fmt: skip
            path.write_bytes(content)
            with pytest.raises(FileError, match=said):
                model.perplexity(kl=path)
        with pytest.raises(FileError, match="No such file"):
            BaseFile(tmp_path / "none")
        rows = 20 + 4 * 21 * 32  # where they begin; each takes 8 + 2 * 80 bytes, 15 a window
        for scale, least in (
            (np.nan, -9), (np.inf, -9), (-1e-4, -9), (1e-4, np.nan), (0, 5), (2e-4, -99), (1, -6e4)
        ):  # fmt: skip
            at = rows + 168 * (15 + 3)
            path.write_bytes(whole[:at] + struct.pack("<2f", scale, least) + whole[at + 8 :])
            with pytest.raises(FileError, match=r"window 2, row 4: a scale .* it is damaged"):
                model.perplexity(kl=path)

    def test_a_base_of_something_else(self, tmp_path, model):
        path = tmp_path / "a.base"
        model.perplexity(IDS, window=32, kl_base=path)
        for given, said in (
            ({"window": 16}, "has windows of 32 tokens, not 16"),
            ({"text": IDS[:100] + IDS}, "token 4 of window 4 is"),
            ({"kl_base": path}, "give one of them"),
            ({"windows": 0}, "windows=0 must be at least 1, or None or -1 for all"),
            ({"kl_base": 5}, "kl_base=5 must be the path of a file"),
            ({"kl_base": ""}, "kl_base='' must be the path of a file"),
        ):  # fmt: skip
            with pytest.raises(OptionError, match=said):
                model.perplexity(**{"text": None, **given}, kl=path)
        whole = path.read_bytes()
        path.write_bytes(whole[:24] + struct.pack("<i", 99) + whole[28:])
        with pytest.raises(FileError, match="a token is outside the vocabulary"):
            model.perplexity(kl=path)
        other = tmp_path / "b.base"
        with writing(other, 50, Windows(np.zeros((1, 5), np.int32), None)) as add:
            add(np.zeros((2, 50), np.float32))
        with pytest.raises(OptionError, match=r"vocabulary has 50 tokens, that of .* 80"):
            model.perplexity(kl=other)
        with pytest.raises(OptionError, match="there is no text"):
            model.perplexity()

    @pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes here")
    def test_a_full_disk_leaves_nothing(self, tmp_path, small_model):
        (tmp_path / "a.base").write_bytes(b"before")
        program = (
            "import resource, sys, runtime\n"
            "model = runtime.load(sys.argv[1])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
            "model.perplexity(list(range(80)) * 3, window=64, kl_base=sys.argv[2])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(small_model), str(tmp_path / "a.base")],
            capture_output=True, text=True,
        )  # fmt: skip
        assert "FileError" in done.stderr and "cannot be written" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["a.base"]
        assert (tmp_path / "a.base").read_bytes() == b"before"

    def test_an_interrupt_leaves_nothing(self, tmp_path, model):
        def stop(_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.perplexity(IDS, window=32, kl_base=tmp_path / "a.base", on_window=stop)
        assert not list(tmp_path.iterdir())


def test_divergence_is_that_of_its_definition():
    random = np.random.default_rng(3)
    base, logits = random.normal(0, 5, (2, 300, 50)).astype(np.float32)
    logits = base + logits / 20
    wanted = random.integers(0, 50, 300)
    p, q = log_probabilities(base), log_probabilities(logits)
    found = rows.scores(logits, wanted, p.astype(np.float32))
    kld = (np.where(p > -16, np.exp(p), 0) * (p - q)).sum(1)
    np.testing.assert_allclose(found.kld, kld, atol=2e-6)
    assert (found.same == (p.argmax(1) == q.argmax(1))).all() and 0 < found.same.mean() < 1
    at = np.arange(300)
    change = np.exp(q[at, wanted]) - np.exp(p[at, wanted])
    d = divergence(found)
    assert d.kld.mean.value == pytest.approx(kld.mean(), rel=1e-4)
    assert d.kld.mean.error == pytest.approx(kld.std(ddof=1) / 300**0.5, rel=1e-4)
    assert d.kld.percentiles[99] == pytest.approx(np.percentile(kld, 99), rel=1e-4)
    assert d.rms.value == pytest.approx((change**2).mean() ** 0.5, rel=1e-4)
    assert d.change.minimum == pytest.approx(change.min(), abs=1e-6)
    assert d.log_ratio.value == pytest.approx((p - q)[at, wanted].mean(), rel=1e-4)
    a, b = -q[at, wanted], -p[at, wanted]
    (var_a, both), (_, var_b) = np.cov(a, b) / 300
    x, y = np.exp(a.mean()), np.exp(b.mean())
    error = (x * x * var_a + y * y * var_b - 2 * x * y * both) ** 0.5
    assert d.difference == pytest.approx((x - y, error), rel=1e-3)
    assert d.correlation == pytest.approx(both / (var_a * var_b) ** 0.5, rel=1e-4)
    assert mean(np.ones(1)) == (1, 0)


def test_a_base_below_its_least_probability():
    """What is more than 16 below the best counts as if it were just that, and not in the KLD."""
    logits = np.array([[0, -40, -3]], np.float32)
    stored = encoded(logits)
    assert stored[0, 5] == 0 and stored[0, 4] == 65535
    base = BaseFile.__new__(BaseFile)
    base.vocabulary = 3
    found = rows.scores(logits + np.float32([0, 30, 0]), np.array([1]), base.decoded(stored))
    assert found.nll_base[0] == pytest.approx(16.0486, abs=1e-3)
    assert found.kld[0] == pytest.approx(4e-5, abs=2e-5)


# b11434, the first 20 windows of 128 tokens, cache and weights f32, no flash attention
PEER = {"qwen3": (62378.3845, 5423.95839), "llama": (10166.5680, 732.07214),
        "qwen35": (11201.7359, 767.93465)}  # fmt: skip


class TestBesideLlamaPerplexity:
    """Models with random weights, whose perplexity is high."""

    @pytest.fixture
    def run(self, golden):
        def perplexity(name, **given):
            path = golden / name / "model-f32.gguf"
            with runtime.load(path, kv_type="f32", context=128) as model:
                return model.perplexity(**given)

        return perplexity

    @pytest.mark.parametrize("name", PEER)
    def test_perplexity(self, run, name, tmp_path):
        text, base = HELD_OUT.read_text(encoding="utf-8"), tmp_path / "a.base"
        found = run(name, text=text, window=128, windows=20, kl_base=base)
        assert found[:2] == pytest.approx(PEER[name], rel=2e-6)
        if name != "llama":
            return
        # row 1 of window 1 as its base file has it
        with BaseFile(base) as stored:
            row = stored.rows(0, 0, 1)[0]
        assert row[:4].view("<f4") == pytest.approx([2.2565816e-04, -1.6666950e01], rel=1e-5)
        codes = (38806, 36015, 42913, 27574, 36137, 41400, 41896, 49313)
        assert abs(row[4:12].astype(int) - codes).max() <= 2

    def test_statistics(self, run, tmp_path):
        """Of llama compared with a base of qwen3: no two alike, all figures far from 0."""
        base = tmp_path / "q.base"
        run(
            "qwen3", text=HELD_OUT.read_text(encoding="utf-8"), window=128, windows=20, kl_base=base
        )
        kl = run("llama", kl=base).kl
        near = {"rel": 2e-5, "abs": 6e-6}
        assert kl.base == pytest.approx((60118.946234, 5087.121608), **near)
        assert kl.correlation == pytest.approx(-0.0175, abs=6e-5)
        assert kl.log_ratio == pytest.approx((-1.777220, 0.112067), **near)
        assert kl.ratio == pytest.approx((0.169108, 0.018951), **near)
        assert kl.difference == pytest.approx((-49952.378282, 5152.218272), **near)
        assert kl.kld.mean == pytest.approx((6.551035, 0.044524), **near)
        assert kl.kld.maximum == pytest.approx(15.345387, **near)
        assert kl.kld.minimum == pytest.approx(3.016123, **near)
        printed = {99.9: 14.091291, 99: 11.580900, 95: 9.437779, 90: 8.557927, 50: 6.262795,
                   10: 4.865759, 5: 4.480032, 1: 3.846325, 0.1: 3.146709}  # fmt: skip
        assert {p: kl.kld.percentiles[p] for p in printed} == pytest.approx(printed, **near)
        assert kl.rms == pytest.approx((0.01378, 0.00221), abs=6e-6)
        assert kl.change.mean == pytest.approx((0.00090, 0.00039), abs=6e-6)
        assert kl.change.percentiles[99.9] == pytest.approx(0.17188, abs=6e-6)
        assert kl.same_top == (0, 0)


@needs_demo
class TestCommand:
    def run(self, *args, **given):
        return CliRunner().invoke(main, ["perplexity", *map(str, args)], **given)

    def test_a_base_and_what_is_compared_with_it(self, tmp_path):
        path = tmp_path / "a.base"
        done = self.run("-c", 64, "--chunks", 4, "--kl-divergence-base", path)
        assert done.exit_code == 0 and done.stdout.startswith("perplexity ")
        assert "(4 windows of 64 tokens, 124 of them scored)" in done.stdout
        assert "[3]" in done.stderr and f"wrote {path}" in done.stderr
        for args in (("--kl", path), ("--kl-divergence-base", path, "--kl-divergence")):
            text = self.run(*args, "-q", "-ctk", "q8_0").stdout
            assert "same top" in text and text.splitlines()[-1].startswith("minimum")
        done = self.run("--kl", path, "--json", "-q", "--chunks", 2)
        data = json.loads(done.stdout)
        assert data["perplexity"]["windows"] == 2 and not done.stderr
        assert set(data["perplexity"]["kl"]["kld"]["percentiles"]) >= {"99.9", "50", "0.1"}

    def test_a_base_that_has_nothing_to_do_with_the_model_is_told(self, tmp_path, monkeypatch):
        path = tmp_path / "a.base"
        self.run("-c", 64, "--chunks", 2, "--kl-base", path, "-q")
        assert "of another model" not in self.run("--kl", path).stderr
        kept = BaseFile.decoded
        monkeypatch.setattr(BaseFile, "decoded", lambda *args: kept(*args)[..., ::-1])
        assert "a.base: its predictions have little to do" in self.run("--kl", path).stderr

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (("--kl-divergence",), "--kl-divergence needs --kl-divergence-base FILE"),
            (("--kl", "a", "--kl-base", "b"), "give one"),
            (("--kl", "none.base"), "none.base: No such file or directory"),
            (("-f", "none.txt"), "none.txt: No such file or directory"),
            (("-f", "-"), "the text has 2 tokens, and two windows of 512 take 1024"),
            (("--kl-base", "none/a"), "there is no folder none"),
            (("--kl-base", "-"), "-: cannot be written (give the name of a file)"),
            (("--kl-base", "."), "cannot be written (this is a folder"),
            (("--kl-base", "a.gguf", "-m", "a.gguf"), "this is a file that is read"),
            (("--kl-base", "bad.txt", "-f", "bad.txt"), "this is a file that is read"),
            (("-f", "bad.txt"), "bad.txt: not UTF-8 at byte 3"),
            (("--chunks", "0"), "--chunks': 0 windows leave nothing to measure"),
            (("-c", "513"), "-c 513: the model was trained for a context of 512 tokens"),
            (("-ctk", "q9"), "-ctk q9 is no type of a cache; there are f32, f16"),
            (("-ctv", ""), "-ctv '' is no type of a cache"),
            (("-ctk", "q8_0,f16"), "-ctk q8_0,f16: give one type; --kv-type takes two"),
            (("--kv-type", "q8_0,"), "--kv-type q8_0, has '', which is no type of a cache"),
        ],
    )  # fmt: skip
    def test_mistakes_are_one_line(self, args, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad.txt").write_bytes(b"abc\xe4bc")
        (tmp_path / "a.gguf").symlink_to(DEMO)
        done = self.run(*args, input=b"abc\n")
        assert done.exit_code != 0 and said in done.stderr and not done.stdout
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "[1]" not in done.stderr and (tmp_path / "a.gguf").is_symlink()

    def test_a_stop_shows_what_is_known(self, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("runtime.quality.perplexity.estimate", once(estimate, stop))
        done = self.run("-c", 64, "--chunks", 4)
        assert done.exit_code == 130
        last = [line for line in done.stderr.splitlines() if line][-1]
        assert last.startswith("stopped after 1 window of 4: perplexity ")

    def test_a_long_file_is_read_as_far_as_is_needed(self, tmp_path):
        """Where the rest is no UTF-8, or where a character is cut."""
        path = tmp_path / "long.txt"
        path.write_bytes(b"a" + ("one two é" * 40000).encode())
        short = self.run("-f", path, "-c", 16, "--chunks", 1, "-q")
        path.write_bytes(path.read_bytes() + b"\xff")
        again = self.run("-f", path, "-c", 16, "--chunks", 1, "-q")
        assert short.exit_code == 0 and again.stdout == short.stdout
        assert f"not UTF-8 at byte {1 + 10 * 40000}" in self.run("-f", path, "-c", 16).stderr

    def test_a_base_is_written_through_a_link(self, tmp_path):
        (tmp_path / "b").symlink_to(tmp_path / "a")
        assert self.run("-c", 64, "--chunks", 1, "--kl-base", tmp_path / "b").exit_code == 0
        assert (tmp_path / "b").is_symlink() and (tmp_path / "a").stat().st_size > 1000


def once(function, after):
    """`function` at the first call, `after` from then on."""
    calls = iter([function])
    return lambda *given: next(calls, after)(*given)
