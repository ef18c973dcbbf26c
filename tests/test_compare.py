"""`runtime compare`: sweeps of cache and weight types, as table and picture."""

from __future__ import annotations

import csv
import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from fake_model import DEMO, needs_demo

import runtime
from runtime.cli import main
from runtime.errors import OptionError
from runtime.quality.divergence import PERCENTILES, Divergence, Estimate, Spread
from runtime.quality.perplexity import Perplexity
from runtime.quality.sweep import Row, Variant, sweep
from runtime.quality.windows import bundled_text
from runtime.report.sweep import Table
from runtime.report.sweep_svg import draw

SVG = "{http://www.w3.org/2000/svg}"
SHORT = ("--chunks", "2", "-c", "64", "-q")
QUICK = (*SHORT, "-p", "8", "-n", "2", "-r", "1")
UNTIMED = (*SHORT, "--no-speed")


def compare(*args):
    return CliRunner().invoke(main, ["compare", *map(str, args)])


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@needs_demo
class TestCaches:
    def test_table_and_picture(self, tmp_path):
        picture = tmp_path / "a.svg"
        done = compare(*QUICK, "--types", "f16,q8_0/f16", "-d", "0,32", "--svg", picture)
        assert done.exit_code == 0, done.stderr
        first, made, empty, header, rule, *rows = done.stdout.splitlines()
        assert made.startswith("model demo.gguf, text demo-heldout.txt, ")
        assert "KLD from f32, 2 windows of 64 tokens, 62 of them scored" in first and not empty
        assert cells(header) == [
            *("cache", "bytes/token", "bits", "perplexity", "mean KLD", "99 % KLD", "same top, %"),
            *("pp8", "tg2", "pp8 @ d32", "tg2 @ d32"),
        ]
        assert len({len(line) for line in (header, rule, *rows)}) == 1
        found = [cells(row) for row in rows]
        assert [row[:3] for row in found] == [
            ["f32", "4.00 KiB", "32.00"], ["f16", "2.00 KiB", "16.00"],
            ["q8_0/f16", "1.53 KiB", "12.25"],
        ]  # fmt: skip
        assert found[0][4] == "base"
        klds = [float(row[4].split()[0]) for row in found[1:]]
        assert abs(klds[0]) < klds[1] / 2 < 1e-3
        texts = [x.text for x in ElementTree.parse(picture).iter(f"{SVG}text")]
        assert {"f16", "q8_0/f16", "f32", "depth 32"} <= set(texts)

    def test_numbers(self):
        done = compare(*UNTIMED, "--types", "q8_0", "-o", "csv", "--rotation", "both")
        base, rotated, plain = csv.DictReader(io.StringIO(done.stdout))
        assert (base["name"], base["kld"], base["bits"]) == ("f32", "", "32.0")
        assert (rotated["name"], plain["name"]) == ("q8_0", "q8_0 plain")
        assert rotated["bits"] == plain["bits"] == "8.5"
        assert (base["model"], base["text"]) == ("demo.gguf", "demo-heldout.txt")
        assert 0 < float(rotated["kld"]) != float(plain["kld"]) > 0
        done = compare(*QUICK, "--types", "q8_0", "-o", "json")
        data = json.loads(done.stdout)
        row = data["rows"][1]
        assert row["perplexity"]["kl"]["kld"]["mean"]["value"] == float(rotated["kld"])
        assert row["speeds"]["tg2"]["value"] > 0 and data["sweep"] == "cache"
        done = compare(*UNTIMED, "--types", "q8_0,Q8_0", "--no-cache-rotation")
        assert [cells(line)[0] for line in done.stdout.splitlines()[5:]] == ["f32", "q8_0 plain"]

    def test_what_was_measured_is_shown(self, monkeypatch):
        """When a later type cannot be, or the user has waited long enough."""

        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("runtime.quality.perplexity.divergence", stop)
        done = compare(*UNTIMED, "-o", "csv")
        assert done.exit_code == 130
        assert [row["name"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["f32"]

    def test_the_bundled_text_has_no_chat_marks(self):
        text = bundled_text()
        assert len(text) > 50_000 and "<|" not in text and "assistant\n" not in text


@needs_demo
class TestWeights:
    def test_made_of_the_model(self):
        done = compare(*UNTIMED, "--sweep", "types", "--types", "Q8_0", "-o", "csv")
        assert done.exit_code == 0, done.stderr
        base, made = csv.DictReader(io.StringIO(done.stdout))
        assert (base["name"], made["name"]) == ("F16", "Q8_0")
        assert 0.5 < float(made["bytes"]) / float(base["bytes"]) < 0.6
        assert 1e-6 < float(made["kld"]) < 0.1

    def test_files_of_other_models_are_refused(self, golden):
        done = compare(DEMO, "--files", golden / "llama" / "model-f32.gguf", *QUICK)
        assert done.exit_code == 2 and "llama, another architecture than" in done.stderr
        done = compare(DEMO, "--files", golden / "qwen3" / "model-f32.gguf", *QUICK)
        assert done.exit_code == 2 and "of other tokens than" in done.stderr

    def test_files(self, golden):
        paths = [golden / "qwen3" / f"model-{kind}.gguf" for kind in ("f32", "Q4_0", "Q8_0")]
        args = (paths[0], "--files", *paths[1:], *UNTIMED, "-o", "csv")
        rows = [*csv.DictReader(io.StringIO(compare(*args).stdout))]
        assert [row["name"] for row in rows] == ["all F32", "Q8_0", "Q4_0"]
        assert float(rows[1]["kld"]) < float(rows[2]["kld"])
        assert [row["file"] for row in rows] == [
            "model-f32.gguf", "model-Q8_0.gguf", "model-Q4_0.gguf"
        ]  # fmt: skip
        args = (*args[:-2], "-ctk", "q8_0", "--no-cache-rotation")
        _, made, _, header, _, *lines = compare(*args, paths[1]).stdout.splitlines()
        assert ", cache q8_0/f16 plain, " in made and cells(header)[-1] == "file"
        assert [cells(line)[-1] for line in lines] == [row["file"] for row in rows]


@needs_demo
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--types", "q9"), "--types q9 is no type of a cache; there are f32"),
        (("--sweep", "types"), "--sweep types needs --files or --types"),
        (("--sweep", "cache", "--files", DEMO), "--sweep cache compares caches of one MODEL"),
        (("--sweep", "types", "--types", "Q9"), "--types: weight type 'Q9' is not known"),
        (("-d", "505"), "-d, with the tokens that are timed 513: the model was trained for"),
        (("-d", "0", "--no-speed"), "--depths has no meaning with --no-speed"),
        (("--kv-type", "f16"), "--kv-type has no meaning with --sweep cache"),
        (("-f", ""), "the name of the text's file is empty"),
        (("--rotation", "both", "--no-cache-rotation"), "no --no-cache-rotation"),
        (("-p", "0", "-n", "0"), "nothing to time"),
        (("--chunks", "0"), "--chunks"),
        (("--sweep", "types", "--files", DEMO), "--sweep types needs --files or --types"),
        (("-f", "none.txt"), "none.txt: No such file"),
        (("-ctk", "q8_0"), "--cache-type-k has no meaning with --sweep cache"),
        (("--svg", "none/a.svg"), "none/a.svg: cannot be written (there is no folder none)"),
        (("-c", "9000", "--types", "f16"), "-c 9000: the model was trained for"),
        (("--svg", ""), "cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(args, said):
    done = compare(*QUICK, *args)
    assert done.exit_code != 0 and not done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1


def test_divergence_is_from_the_first(small_model, tmp_path):
    """As `perplexity` has it with a base file; and another model is refused."""

    def load(kv_type="f32"):
        return runtime.load(small_model, kv_type=kv_type, context=64)

    ids = np.random.default_rng(1).integers(0, 80, 400).tolist()
    with load() as model:
        model.perplexity(ids, window=32, kl_base=tmp_path / "a.base")
    with load(kv_type="q8_0") as model:
        expected = model.perplexity(kl=tmp_path / "a.base")
    seen = []
    variants = [
        Variant("f32", 4, 32, load),
        Variant("q8_0", 1, 8, lambda: load(kv_type="q8_0")),
    ]
    rows = [*sweep(variants, ids, 32, None, progress=lambda *call: seen.append(call))]
    assert rows[0].perplexity.kl is None and rows[1].perplexity[:5] == expected[:5]
    kld = rows[1].perplexity.kl.kld.mean.value
    assert kld == pytest.approx(expected.kl.kld.mean.value, abs=1e-5) and kld > 0
    assert seen[-1] == (12, 12, "q8_0") and len(seen) == 24
    other = Variant("other", 1, 8, lambda: _larger(load()))
    with pytest.raises(OptionError, match="other has another vocabulary"):
        [*sweep([variants[0], other], ids, 32, None)]


def _larger(model):
    """A model as if of another vocabulary."""
    model._engine.vocabulary += 1
    return model


class TestPicture:
    @staticmethod
    def row(name, nbytes, kld):
        spread = Spread(Estimate(kld, kld / 9), kld, dict.fromkeys(PERCENTILES, kld), kld)
        one = Estimate(1.0, 0.1)
        kl = Divergence(spread, spread, one, one, one, one, one, one, 1.0)
        return Row(name, nbytes, 8.0, Perplexity(8.0, 0.1, 2, 64, 62, kl), {})

    def test_labels_do_not_overlap(self):
        """Nor do they leave the chart, however near the points are."""
        near = [self.row(f"type{n}", 1000 + n % 9, 1e-3 * 1.02**n) for n in range(14)]
        base = self.row("f32", 4000, 1)
        base = base._replace(perplexity=base.perplexity._replace(kl=None))
        tree = ElementTree.fromstring(draw(Table("m", "cache", [base, *near], 2)))
        places = [
            (float(x.get("x")), float(x.get("y")), 6.3 * len(x.text))
            for x in tree.iter(f"{SVG}text") if x.text.startswith("type")
        ]  # fmt: skip
        assert len(places) == 14
        for n, (x, y, width) in enumerate(places):
            assert 0 < x < float(tree.get("width")) - width and y > 124
            for a, b, other in places[n + 1 :]:
                assert abs(y - b) >= 12 or x + width <= a or a + other <= x

    def test_what_does_not_diverge_is_at_the_bottom(self):
        """The axis begins below the least that does."""
        rows = [self.row("f16", 10, -1e-9), self.row("q8_0", 5, 1e-3)]
        tree = ElementTree.fromstring(draw(Table("m", "types", rows, 2, "m.gguf", "a.txt")))
        texts = [x.text for x in tree.iter(f"{SVG}text")]
        assert {"f16 (about 0)", "model m.gguf, text a.txt, 2 threads", "0.001"} <= {*texts}
        assert "1e-08" not in texts and "0.0001" not in texts

    def test_all_points_are_labelled_and_bars_within(self):
        rows = [self.row(name, 10 + n, 9.5 * 10**-n) for n, name in enumerate(["a", "a plain"], 1)]
        tree = ElementTree.fromstring(draw(Table("m", "cache", rows, 2)))
        assert {"a", "a plain"} <= {x.text for x in tree.iter(f"{SVG}text")}
        bars = [x.get("d") for x in tree.iter(f"{SVG}path") if x.get("stroke") in ("#e15759",)]
        tops = [float(d.partition("V")[2]) for d in bars if " V" in d]
        assert tops and min(tops) >= 124
