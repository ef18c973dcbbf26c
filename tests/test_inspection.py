"""DEBUG's tables and VALIDATE's verdicts."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime import inspection, ops, step_table
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Buffer, Call, Instruction
from runtime.errors import BackendError
from runtime.ops.cost import Seen
from runtime.ops.dtypes import DTYPES, F32
from runtime.step_table import Line


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf", Sizes(layers=3))


@pytest.fixture(autouse=True)
def _known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_bandwidth", lambda threads: 10e9)


def decode(path: Path, ids: list[int]) -> None:
    with runtime.load(path, threads=1, kv_type="f32") as model:
        for token in ids:
            model.eval([token])


def test_debug_2_joins_layers_and_adds_up(small: Path, monkeypatch, capsys):
    monkeypatch.setenv("DEBUG", "2")
    decode(small, [1])
    text = capsys.readouterr().err
    assert "step of 1 token, context 1" in text and "10.0 GB/s measured" in text
    rows = [line for line in text.splitlines() if "attn_q, attn_k, attn_v" in line]
    assert len(rows) == 1 and re.search(r"│ +3 │", rows[0]), "three layers in one line"
    total = next(line for line in text.splitlines() if re.match(r"[│|] all ", line))
    assert "100.0 %" in total and text.count("step of") == 1
    assert max(map(len, text.splitlines()[1:])) <= 120


def test_debug_3_shows_every_row(small: Path, monkeypatch, capsys):
    monkeypatch.setenv("DEBUG", "3")
    decode(small, [1])
    text = capsys.readouterr().err
    for layer in range(3):
        assert re.search(rf"│ blk\.{layer}\.attn_output +│ +1 │", text)


def test_lines_count_what_a_row_moves():
    x, w = ops.step_input("x", (1, 32), F32), ops.weight("blk.4.w.weight", (10, 32), DTYPES["q4_0"])
    node = ops.matmul(x, w, name="blk.4.y")
    weight, result = Buffer("packed", w.name, w.nbytes), Buffer("arena", "r", node.nbytes)
    kernel = Kernel.of("matmul", format="Q4_0", columns=1)
    call = Call(kernel, {}, (weight,), (result,), node)
    plan = SimpleNamespace(instructions=[Instruction((call, call)), Instruction((call,))])
    found = step_table.lines(plan, np.array([20, 10]), Seen())
    nbytes = 32 * 4 + 10 * 18 + 10 * 4
    assert found[0] == Line("2 matmul Q4_0", "blk.4.w", 1, 20, 2 * nbytes)
    assert found[1] == Line("matmul Q4_0", "blk.4.w", 1, 10, nbytes)


def test_merged_lines_add_up_and_the_longest_comes_first():
    found = [
        Line("a", "blk.0.x, blk.0.y", 1, 10, 100.0),
        Line("b", "embedding", 1, 90, 1.0),
        Line("a", "blk.11.x, blk.11.y", 1, 30, 300.0),
    ]
    assert step_table.merged(found) == [
        Line("b", "embedding", 1, 90, 1.0), Line("a", "x, y", 2, 40, 400.0)
    ]  # fmt: skip


def test_the_share_of_bandwidth_is_bytes_over_time(capsys):
    step_table.draw([Line("a", "x", 1, 1000, 5000.0)], "title", 10e9)
    assert re.search(r"│ +5\.0 │ +50 % │", capsys.readouterr().err)
    step_table.draw([Line("a", "x", 1, 1000, 5000.0)], "title", None)
    assert "measured" not in capsys.readouterr().err


def test_validate_says_once_that_all_is_well(small: Path, monkeypatch, capsys):
    monkeypatch.setenv("VALIDATE", "1")
    decode(small, [1, 2])
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"VALIDATE: \d+ results of 2 steps agree with the reference \(largest NMSE .*\)\n", said
    )


@pytest.mark.parametrize("name", NOVEL)
def test_validate_knows_every_fused_result(tmp_path: Path, name: str, monkeypatch, capsys):
    """What a fused kernel leaves under a plain node's name may be more than that node's result."""
    monkeypatch.setenv("VALIDATE", "1")
    path = write_model(tmp_path / "m.gguf", NOVEL[name])
    with runtime.load(path, threads=1, kv_type="f32") as model:
        model.eval([1, 2, 3, 4, 5])
    assert "results of 1 step agree" in capsys.readouterr().err


def test_validate_follows_forks_and_rewinds(small: Path, monkeypatch, capsys):
    """The shadow's cache is copied with the model's when a shared page is written."""
    monkeypatch.setenv("VALIDATE", "1")
    with runtime.load(small, threads=1, kv_type="f32") as model:
        session = model.session()
        session.eval(list(range(40)), "last")
        child = session.fork()
        child.eval([1, 2], "last")
        session.eval([3], "last")
        session.rewind(5)
        session.eval([4], "last")
    assert "results of 4 steps agree" in capsys.readouterr().err


def test_validate_names_the_first_difference_and_nothing_else(small: Path, monkeypatch, capsys):
    monkeypatch.setenv("VALIDATE", "1")
    monkeypatch.setattr(inspection, "_TOLERANCE", {"int8": -1.0, "f32": -1.0})
    with pytest.raises(BackendError, match=r"VALIDATE: .* differs from the reference"):
        decode(small, [1])
    assert "agree" not in capsys.readouterr().err
