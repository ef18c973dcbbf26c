"""Importance matrices: what weights are multiplied with, summed up, added up and written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from fake_model import DEMO, needs_demo
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.backends import reference
from runtime.cli import main
from runtime.errors import FileError
from runtime.ops.tensor import stored_name
from runtime.quantise.collect import collect, merged, windows
from runtime.quantise.imatrix_file import Entry, Imatrix, read, write, write_dat
from runtime.quantise.observe import Observer
from runtime.quantise.statistics import SCHEMA, statistics

WINDOWS = [[(7 * i + 3 * n) % 80 for i in range(n)] for n in (40, 33, 50)]
MODELS = {"qwen3moe": Sizes("qwen3moe", experts=6, inner=32), "qwen35moe": NOVEL["qwen35moe"],
          "gpt-oss": NOVEL["gpt-oss"], "llama": Sizes("llama")}  # fmt: skip


def by_hand(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """Squares, sums and counts of each weight's input, row by row, from the plain graph."""
    found: dict[str, list[np.ndarray]] = {}
    plain = reference.compute

    def watched(node, *inputs):
        if node.op in ("matmul", "matmul_id"):
            x, w, *ids = inputs
            used = ids[0] if ids else np.zeros((len(x), 1), int)
            matrices = len(w) if ids else 1
            sums = found.setdefault(
                stored_name(node.inputs[1]),
                [np.zeros((matrices, x.shape[-1])), np.zeros((matrices, x.shape[-1])),
                 np.zeros(matrices)],
            )  # fmt: skip
            for token, experts in enumerate(used):
                for rank, expert in enumerate(experts):
                    row = x[token, rank] if x.ndim == 3 else x[token]
                    sums[0][expert] += row**2
                    sums[1][expert] += row
                    sums[2][expert] += 1
        return plain(node, *inputs)

    monkeypatch.setattr(reference, "compute", watched)
    with runtime.load(path, devices="reference", kv_type="f32") as model:
        for window in WINDOWS:
            model.eval(window)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_sums_of_what_weights_are_multiplied_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "m.gguf", MODELS[name])
    want = by_hand(path, monkeypatch)
    attempts = (
        ("reference", True), ("cpu", True), ("cpu", False), ("layers(cpu:0,cpu:1)", False),
        ("tensor(cpu:0,cpu:1)", True),
    )  # fmt: skip
    for devices, output in attempts:
        with runtime.load(
            path, devices=devices, activations="f32", kv_type="f32", sequences=3
        ) as model:
            before = model.eval(WINDOWS[0])
            with Observer(model._engine, output) as observer:
                observer.add(WINDOWS[:2])
                observer.add(WINDOWS[2:])
                got = observer.sums()
            np.testing.assert_array_equal(model.eval(WINDOWS[0]), before)
        assert [*got] == sorted(n for n in want if output or n.startswith("blk."))
        for weight, sums in got.items():
            squares, plain, counts = want[weight]
            np.testing.assert_array_equal(sums.counts, counts)
            for a, b in ((sums.squares, squares), (sums.sums, plain)):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * abs(b).max())


def test_windows_are_evaluated_together_and_apart_alike(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", MODELS["qwen3moe"])
    ids = [[(5 * i + 11 * n) % 80 for i in range(200)] for n in range(5)]
    with runtime.load(path, context=200, sequences=2) as model:
        found = [(done, so_far()) for done, so_far in collect(model, ids)]
    last = found[-1][1]
    assert [(done, part.chunks) for done, part in found] == [(2, 2), (4, 4), (5, 5)]
    assert last.chunk_tokens == 200
    assert last.entries["blk.0.attn_q.weight"].counts == [1000]
    experts = last.entries["blk.1.ffn_up_exps.weight"].counts
    assert experts.shape == (6,)
    assert experts.sum() == 2 * 1000


def _entry(rng: np.random.Generator, matrices: int = 1, columns: int = 8) -> Entry:
    shape = matrices, columns
    squares, sums = rng.random(shape, np.float32), rng.standard_normal(shape).astype(np.float32)
    return Entry(squares, np.full(matrices, 4, np.float32), sums)


def test_files_add_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        Imatrix({"blk.0.x": _entry(rng), "blk.0.e": _entry(rng, 3)}, [f"{n}.txt"], 2, 64)
        for n in "ab"
    )
    both = merged([("a", a), ("b", b)], 512)
    assert (both.chunks, both.chunk_tokens, both.schema) == (4, 64, SCHEMA)
    assert both.datasets == ["a.txt", "b.txt"]
    for name, entry in both.entries.items():
        for part in ("squares", "sums", "counts"):
            want = getattr(a.entries[name], part) + getattr(b.entries[name], part)
            np.testing.assert_array_equal(getattr(entry, part), want)
    # the older format: means and calls, experts not told apart, no sums
    write_dat(tmp_path / "old.dat", a)
    both = merged([("a", read(tmp_path / "old.dat")), ("b", b)], 64)
    entry = both.entries["blk.0.e"]
    assert entry.sums is None
    np.testing.assert_array_equal(entry.counts, [68] * 3)  # one call of 64, and 4
    squares = a.entries["blk.0.e"].mean_squares * 64 + b.entries["blk.0.e"].squares
    np.testing.assert_allclose(entry.squares, squares, rtol=1e-6)
    wrong = Imatrix({"blk.0.x": _entry(rng, 1, 9)}, [], 1, 64)
    with pytest.raises(FileError, match=r"b: the entry of blk\.0\.x is for another matrix: 8 numb"):
        merged([("a", a), ("b", wrong)], 64)


def test_statistics() -> None:
    rng = np.random.default_rng(1)
    entries = {f"blk.{i}.w.weight": _entry(rng) for i in (0, 2)} | {"output.weight": _entry(rng)}
    found = statistics(entries)
    first = dict(zip(SCHEMA, found["blk.0.w.weight"], strict=True))
    e = entries["blk.0.w.weight"]
    m, energy = e.sums[0] / 4, e.squares[0] / 4
    z, shares = (m - m.mean()) / m.std(), energy / energy.sum()
    want = {
        "sum_sq": energy.sum(), "mean": m.mean(), "elements": 8, "std_deviation": m.std(),
        "skewness": (z**3).mean(), "kurtosis": (z**4).mean() - 3,
        "h_norm": -100 * (shares * np.log(shares)).sum() / np.log(8),
    }  # fmt: skip
    for name, value in first.items():
        np.testing.assert_allclose(value, want.get(name, np.nan), rtol=1e-5)
    other = entries["blk.2.w.weight"]
    n = other.sums[0] / 4
    second = dict(zip(SCHEMA, found["blk.2.w.weight"], strict=True))
    assert second["gain"] == pytest.approx((other.squares.sum() / e.squares.sum()) ** 0.5)
    assert second["l2_dist"] == pytest.approx(((m - n) ** 2).sum() ** 0.5)
    assert second["cossim"] == pytest.approx((m @ n) / ((m @ m) * (n @ n)) ** 0.5)
    assert second["pearson"] == pytest.approx(np.corrcoef(m, n)[0, 1], rel=1e-5)
    assert second["covariance"] == pytest.approx(np.cov(m, n, bias=True)[0, 1], rel=1e-5)
    assert np.isnan(found["output.weight"][SCHEMA.index("gain")])


def test_windows_begin_with_bos_and_the_rest_is_dropped() -> None:
    tokenizer = SimpleNamespace(
        has_text=True, add_bos=True, bos_id=1,
        encode=lambda text, parse_special: [1, *map(int, text.split(" "))],
    )  # fmt: skip
    found = windows(tokenizer, "2 3 4 5 6 7 8\n", 3)  # type: ignore
    assert found == [[1, 2, 3], [1, 5, 6]]


@needs_demo
def test_command(tmp_path: Path) -> None:
    text, out = tmp_path / "t.txt", tmp_path / "i.gguf"
    text.write_text("Once upon a time there was a fox. " * 40)

    def run(*args: object) -> str:
        result = CliRunner().invoke(main, ["imatrix", *map(str, args)])
        assert result.exit_code == 0, result.output
        return result.output

    run(DEMO, "-f", text, "-c", 64, "-o", out, "--chunks", 3)
    found = read(out)
    assert (found.datasets, found.chunks, found.chunk_tokens) == ((str(text),), 3, 64)
    assert all(
        name.startswith("blk.") and e.counts.max() == 192 for name, e in found.entries.items()
    )
    table = run("--in-file", out, "--show-statistics")
    assert len(table.splitlines()) == 2 + len(found.entries)
    names = "both.gguf", "m.gguf", "l.txt", "o.gguf", "more.gguf"
    both, model, latin, other, more = (tmp_path / name for name in names)
    model.write_bytes(DEMO.read_bytes())
    latin.write_bytes(b"caf\xe9 au lait")
    several = dict(found.entries) | {"blk.99.attn_q.weight": _entry(np.random.default_rng(0))}
    write(more, Imatrix(several, [], 1, 64))
    write(other, Imatrix({"blk.0.attn_q.weight": _entry(np.random.default_rng(0))}, [], 1, 64))
    run("--in-file", out, "--in-file", out, "-o", both)
    assert read(both).chunks == 6
    for args, line in (
        ((), "nothing to collect"),
        ((DEMO, "-f", text, "-c", 4096), "t.txt: shorter than a window of 4096 tokens"),
        ((DEMO, "-f", text, "-c", 64, "--from-chunk", 999), "999 leaves none of the 6 windows"),
        ((DEMO, "-f", text, "--chunks", 0), "--chunks 0 leaves no window"),
        (("--in-file", DEMO), "not an importance matrix"),
        ((DEMO, "-f", text, "-o", tmp_path / "no" / "i.gguf"), "there is no folder"),
        ((DEMO, "-f", text, "-o", text), f"{text}: this is a file that is read"),
        ((model, "-f", text, "-c", 64, "-o", model), f"{model}: this is a file that is read"),
        ((DEMO, "-f", model), f"{model}: this is no text (there are zero bytes"),
        ((DEMO, "-f", latin), f"{latin}: not UTF-8 at byte 3"),
        ((DEMO, "-f", text, "-c", 64, "--in-file", other), f"{other}: this importance matrix is"),
        ((DEMO, "-f", text, "-c", 64, "--in-file", more), f"{more}: this importance matrix is"),
    ):  # fmt: skip
        result = CliRunner().invoke(main, ["imatrix", *map(str, args)])
        assert result.exit_code
        assert line in result.output or line in str(result.exception)
    assert model.read_bytes() == DEMO.read_bytes()


@needs_demo
@pytest.mark.parametrize(
    ("steps", "said"), [(1, "was not written"), (2, "has the first 8 windows")]
)
def test_what_an_interrupt_leaves(tmp_path: Path, monkeypatch, steps: int, said: str) -> None:
    text, out, add = tmp_path / "t.txt", tmp_path / "i.gguf", Observer.add

    def interrupted(self, windows) -> None:
        nonlocal steps
        steps -= 1
        if not steps:
            raise KeyboardInterrupt
        add(self, windows)

    monkeypatch.setattr(Observer, "add", interrupted)
    text.write_text("Once upon a time there was a fox. " * 80)
    args = ["imatrix", str(DEMO), "-f", str(text), "-c", "64", "-o", str(out), "-ofreq", "8"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 130
    assert f"stopped: {out} {said}\n" in result.output
    assert not out.exists() or read(out).chunks == 8
