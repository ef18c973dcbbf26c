"""DEBUG's tables and VALIDATE's verdicts."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime import inspection, ops, step_table, validation
from runtime.backends import cpu
from runtime.backends.cpu import planner as cpu_planner
from runtime.backends.passes.meanings import MEANINGS
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Buffer, Call, Instruction
from runtime.errors import BackendError
from runtime.model import Model
from runtime.ops.cost import Seen
from runtime.ops.dtypes import DTYPES, F32
from runtime.ops.registry import FUSED, Kind
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


@pytest.mark.parametrize("devices", ["null:2", "reference"])
def test_devices_without_kernels_can_be_inspected(
    devices: str, small_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """There is nothing to compare, and of the null device plans without times."""
    with runtime.load(small_model, devices) as model:
        want = model.eval([1, 2, 3])
        monkeypatch.setenv("VALIDATE", "1")
        np.testing.assert_array_equal(model.eval([1, 2, 3]), want)
        monkeypatch.setenv("VALIDATE", "0")
        monkeypatch.setenv("DEBUG", "4")
        np.testing.assert_array_equal(model.eval([1, 2, 3]), want)


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
    weight, result = Buffer("repacked", w.name, w.nbytes), Buffer("arena", "r", node.nbytes)
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


SIZES = {"llama": Sizes("llama"), "qwen3moe": Sizes("qwen3moe", experts=6, inner=32), **NOVEL}
KINDS = (("F32", "int8", "f32,q8_0"), ("Q4_0", "int8", "f16"), ("Q8_0", "f32", "bf16"))


def every_kind_of_step(model: Model) -> None:
    """A prompt, tokens, a fork that parts, a rewind, a batch of both kinds: six steps."""
    with model.session() as session:
        session.eval(list(range(2, 42)), "last")
        child = session.fork()
        child.eval([1, 2], "last")
        session.eval([3])
        session.rewind(2)
        session.eval([4])
        model.step([(session, [5]), (child, [6, 7, 8])])
        model.step([(session, [5]), (child, [6])], "none")


@pytest.mark.parametrize("kind, activations, kv_type", KINDS)
@pytest.mark.parametrize("name", SIZES)
def test_validate_knows_every_op(
    tmp_path: Path, name: str, kind: str, activations: str, kv_type: str, monkeypatch, capsys
):
    monkeypatch.setenv("VALIDATE", "1")
    path = write_model(tmp_path / "m.gguf", SIZES[name], kind)
    with runtime.load(path, threads=2, kv_type=kv_type, activations=activations) as model:
        every_kind_of_step(model)
    said = capsys.readouterr().err
    found = re.search(r"results of 6 steps agree .*largest NMSE (\S+),", said)
    assert found and float(found[1]) < (1e-7 if "q8_0" in kv_type else 1e-11)


@pytest.mark.parametrize("name", SIZES)
def test_validate_knows_plain_ops(tmp_path: Path, name: str, monkeypatch, capsys):
    """Without fusion, which a step can do without."""
    monkeypatch.setenv("VALIDATE", "1")
    plain = cpu_planner.options
    monkeypatch.setattr(cpu, "options", lambda *a, **k: plain(*a, **k)._replace(fuse=False))
    with runtime.load(write_model(tmp_path / "m.gguf", SIZES[name], "Q8_0"), threads=2) as model:
        every_kind_of_step(model)
    assert "results of 6 steps agree" in capsys.readouterr().err


def test_validate_names_the_first_difference_and_nothing_else(small: Path, monkeypatch, capsys):
    monkeypatch.setenv("VALIDATE", "1")
    limit = validation._limit
    monkeypatch.setattr(
        validation, "_limit", lambda x, c: -1.0 if x.op == "attention" else limit(x, c)
    )
    message = (
        r"VALIDATE: blk\.0\.attention \(instruction \d+, attention-.*\) differs .* in row \[0, 0\]"
    )
    with pytest.raises(BackendError, match=message):
        decode(small, [1])
    assert "agree" not in capsys.readouterr().err


def test_every_fused_op_has_a_meaning():
    one_device = {name for name, op in FUSED.items() if op.kind is not Kind.COLLECTIVE}
    assert one_device <= set(MEANINGS)
