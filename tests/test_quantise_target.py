"""Types chosen for a size or a divergence: what is measured, and what is made of it."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_model import DEMO, needs_demo
from small_models import Sizes, write_model

import runtime
from runtime.backends.cpu.quantising import Quantiser
from runtime.cli import main
from runtime.errors import OptionError, TextError
from runtime.gguf.reader import open_gguf
from runtime.ops.dtypes import DTYPES
from runtime.ops.quants import dequantize
from runtime.quantise import options
from runtime.quantise.choose import Wishes
from runtime.quantise.errors import errors
from runtime.quantise.options import Option
from runtime.quantise.sensitivity import Swapped
from runtime.quantise.target import Target, _parts, aim

Q4, Q8 = DTYPES["q4_0"], DTYPES["q8_0"]
WINDOWS = [[(i * (n + 3) + i * i) % 80 for i in range(64)] for n in range(2)]
KINDS = ("q4_0", "q8_0")


def _divergence(base: np.ndarray, other: np.ndarray) -> float:
    """Mean over the second half of the rows, in float64."""
    p, q = (x[len(x) // 2 :].astype(np.float64) for x in (base, other))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def test_options_are_chosen_for_bytes_and_for_cost() -> None:
    rng = np.random.default_rng(0)
    given = {
        str(n): [Option(Q4, int(b), float(c)) for b, c in zip(
            np.sort(rng.integers(1, 100, 4)), -np.sort(-rng.random(4)), strict=True)]
        for n in range(5)
    }  # fmt: skip
    every = [(sum(o.nbytes for o in each), sum(o.cost for o in each))
             for each in product(*given.values())]  # fmt: skip
    least, most = min(every)[0], max(every)[0]
    steps = [a.cost - b.cost for found in map(options.worthwhile, given.values())
             for a, b in pairwise(found)]  # fmt: skip
    costs = []
    for nbytes in range(least, most + 20, 7):
        found = options.choose(given, nbytes)
        assert sum(o.nbytes for o in found.values()) <= nbytes
        costs.append(sum(o.cost for o in found.values()))
        best = min(cost for n, cost in every if n <= nbytes)
        assert costs[-1] <= best + max(steps)  # of the one that did not fit
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(min(cost for _, cost in every))
    good = options.choose(given, cost=costs[len(costs) // 2])
    assert sum(o.cost for o in good.values()) <= costs[len(costs) // 2]
    assert sum(o.nbytes for o in good.values()) < most
    assert options.choose(given, 0) == options.choose(given, least)  # the smallest there are


def test_an_option_that_no_price_makes_the_best_is_left_out() -> None:
    line = [Option(Q4, 10, 1.0), Option(Q4, 20, 0.9), Option(Q4, 30, 0.2), Option(Q8, 40, 0.3)]
    assert options.worthwhile(line) == [line[0], line[2]]


def test_errors_weigh_by_columns_of_each_matrix(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", Sizes("qwen3moe", experts=4, inner=32))
    tensor = open_gguf(path).tensors["blk.0.ffn_up_exps.weight"]
    weights = np.random.default_rng(0).random((4, 64), np.float32)
    with Quantiser(1) as quantiser:
        got = errors(tensor, [Q4, Q8], weights, quantiser)
        plain = errors(tensor, [Q4], None, quantiser)
        values = tensor.to_float32()
        for kind, value in zip((Q4, Q8), got, strict=True):
            want = 0.0
            for matrix, w in zip(values, weights, strict=True):
                rounded = dequantize(quantiser(matrix, kind, w), kind, matrix.shape)
                want += ((matrix - rounded) ** 2 * w).sum() / len(matrix) / 4
            assert value == pytest.approx(want, rel=1e-4)
        whole = values.reshape(-1, 64)
        rounded = dequantize(quantiser(whole, Q4), Q4, whole.shape)
        assert plain[0] == pytest.approx(((whole - rounded) ** 2).sum() / len(whole), rel=1e-4)


def test_divergence_of_weights_from_another_file(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "a.gguf", Sizes("qwen35", layers=2))
    other = write_model(tmp_path / "b.gguf", Sizes("qwen35", layers=2), "Q4_0")
    names = ("blk.0.attn_qkv.weight", "blk.1.ffn_down.weight")
    values = {name: open_gguf(other).tensors[name].to_float32() for name in names}
    both = write_model(tmp_path / "c.gguf", Sizes("qwen35", layers=2), replace=values)
    with Swapped(open_gguf(plain), WINDOWS, 1) as model:
        got = model.divergence(open_gguf(other), names)
        assert model.divergence(open_gguf(other), ()) == pytest.approx(0, abs=1e-9)
    logits = []
    for path in (plain, both):
        with runtime.load(path, activations="f32") as loaded:
            logits.append([loaded.eval(window) for window in WINDOWS])
    want = np.mean([_divergence(a, b) for a, b in zip(*logits, strict=True)])
    assert got == pytest.approx(want, rel=0.01)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", Sizes(layers=3, hidden=128))


def test_sizes_are_kept_and_more_of_it_is_better(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = []
    for bits in (6.0, 7.5):
        found = aim(source, Target(bits=bits), WINDOWS, kinds=KINDS)
        assert 8 * found.job.nbytes <= bits * sum(np.prod(c.shape) for c in found.job.choices)
        predicted.append(found.predicted)
    assert predicted == sorted(predicted, reverse=True)
    limit = found.job.nbytes  # without the header
    found = aim(source, Target(nbytes=limit), WINDOWS, kinds=KINDS)
    found.job.write(source.with_name("o.gguf"))
    assert 0.9 * limit < source.with_name("o.gguf").stat().st_size <= limit
    with pytest.raises(OptionError, match="pure has no meaning"):
        aim(source, Target(bits=6), WINDOWS, Wishes(pure=True))
    monkeypatch.setattr(Swapped, "divergence", None)  # said before anything is measured
    with pytest.raises(OptionError, match=r"1,000 bytes are too few: \d.*is the least|are the lea"):
        aim(source, Target(nbytes=1000), WINDOWS, kinds=KINDS)


def test_a_divergence_is_kept_and_predicted(source: Path, tmp_path: Path) -> None:
    limit, out = 0.01, tmp_path / "o.gguf"
    found = aim(source, Target(kld=limit), WINDOWS, kinds=KINDS)
    assert {o.dtype.name for o in found.chosen.values()} == {"q4_0", "q8_0"}
    found.job.write(out)
    with Swapped(open_gguf(source), WINDOWS, 1) as model:
        got = model.divergence(open_gguf(out), found.chosen)
    assert got <= limit
    assert found.predicted == pytest.approx(got, rel=0.5)
    with pytest.raises(OptionError, match="out of reach"):
        aim(source, Target(kld=1e-9), WINDOWS, kinds=KINDS)


@needs_demo
def test_a_target_in_python(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    with pytest.raises(OptionError, match="give a type, such as 'Q8_0', or a target"):
        runtime.quantize(source, out)
    with pytest.raises(TextError, match="has no vocabulary"):
        runtime.quantize(source, out, target=6)
    with pytest.raises(TextError, match="shorter than 256 tokens"):
        runtime.quantize(DEMO, out, target=6, text="short", allow_requantize=True)
    runtime.quantize(DEMO, out, target="1.5MB", allow_requantize=True, progress=False)
    assert 1_400_000 < out.stat().st_size <= 1_500_000


def test_what_a_user_wishes_is_no_choice(source: Path) -> None:
    wishes = Wishes((("attn_v", "Q8_0"),))
    found = aim(source, Target(bits=5), WINDOWS, wishes, kinds=KINDS)
    types = {c.name: c.dtype for c in found.job.choices}
    assert types["blk.1.attn_v.weight"] is Q8
    assert "blk.1.attn_v.weight" not in found.chosen


def test_parts_are_the_same_tensor_of_neighbouring_layers() -> None:
    names = [f"blk.{i}.{role}" for i in range(5) for role in ("a", "b")] + ["c"]
    assert len(_parts(names, 20)) == 11
    assert len(_parts(names, 1)) == 3  # no part has two kinds
    assert _parts(names, 7) == [
        ["c"], ["blk.0.a", "blk.1.a"], ["blk.2.a", "blk.3.a"], ["blk.4.a"],
        ["blk.0.b", "blk.1.b"], ["blk.2.b", "blk.3.b"], ["blk.4.b"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("4.5", Target(bits=4.5)), ("3.2GB", Target(nbytes=3.2e9)), ("2g", Target(nbytes=2e9)),
        ("512MiB", Target(nbytes=512 * 2**20)), ("kld=0.01", Target(kld=0.01)),
        ("600000", Target(nbytes=6e5)), ("33", Target(nbytes=33)), ("600 B", Target(nbytes=600)),
        ("32", Target(bits=32)), ("4.5bpw", Target(bits=4.5)), ("kld=40", Target(kld=40)),
        ("1.5KiB", Target(nbytes=1536)), ("kld=1e-3", Target(kld=0.001)),
    ],
)  # fmt: skip
def test_targets(text: str, want: Target) -> None:
    assert Target.of(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Q4_K",
        "-1",
        "0",
        "kld=x",
        "ppl=1",
        "kld=3GB",
        "nan",
        "40.5",
        "kld=3bpw",
        "1.2.3",
        "GB",
        "inf",
    ],
)
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(OptionError, match="is none: give bits"):
        Target.of(text)


@needs_demo
def test_command(tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    args = [DEMO, out, "--target", "7", "--types", "q4_0,q8_0,", "--chunks", "1",
            "--svg", tmp_path / "o.svg"]  # fmt: skip
    result = CliRunner().invoke(main, ["quantize", *map(str, args), "--allow-requantize"])
    assert result.exit_code == 0, result.output
    assert "expected divergence" in result.output
    assert "divergence with the smallest type" in (tmp_path / "o.svg").read_text()
    file = open_gguf(out)
    assert 8 * file.tensors_nbytes <= 7 * sum(np.prod(t.shape) for t in file.tensors.values())
    svg = tmp_path / "n" / "o.svg"
    for words, line in (
        ((DEMO,), "this is a file that is read"), ((tmp_path / "n" / "o",), "no folder"),
        ((out, "--svg", svg), "no folder"), ((out, "--svg", out), "two files"),
        ((out, "--svg", DEMO), "is read"), ((out, "--pure"), "--pure has no meaning"),
        ((out, "--types", ","), "names none"),
    ):  # fmt: skip
        args = ["quantize", str(DEMO), *map(str, words), "--target", "4", "--allow-requantize"]
        result = CliRunner().invoke(main, args)
        assert result.exit_code and result.output.count("\n") <= 2 and line in result.output
