"""Models on the devices of an expression: the same answers, and sessions that go on as on one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_model import DEMO, needs_demo

import runtime
from runtime.errors import OptionError

pytestmark = needs_demo

IDS = [1, 5, 9, 2, 7, 7, 3]
EXACT = {"kv_type": "f32", "activations": "f32", "context": 96, "sequences": 4}

SAME_BITS = (
    {"devices": "cpu:0,cpu:1"},
    {"devices": "cpu:0,cpu:1,cpu:2", "tensor_split": [3, 0, 1], "split_mode": "layer"},
    {"devices": "layers(cpu:0,cpu:1,cpu:0)", "threads": 3},
    {"devices": "cpu:0,cpu:1", "split_mode": "none", "main_device": 1},
    {"devices": "numa:2"},
)
SPLIT = (
    {"devices": "cpu:0,cpu:1", "split_mode": "tensor"},
    {"devices": "cpu,cpu,cpu", "split_mode": "tensor", "tensor_split": "3:1:2", "threads": 4},
    {"devices": "layers(cpu:0,2*tensor(cpu:1,cpu:2))"},
    {"devices": "tensor(layers(cpu:0,2*cpu:1),layers(2*cpu:2,cpu:3))"},
    {"devices": "tensor(tensor(cpu:0,cpu:1),cpu:2)"},
    {"devices": "tensor(numa:2)"},
)


@pytest.fixture(scope="module")
def one() -> Iterator[runtime.Model]:
    with runtime.load(DEMO, **EXACT) as model:
        yield model


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    wide = want.astype(np.float64)
    return float(((got - wide) ** 2).sum() / (wide**2).sum())


def conversation(model: runtime.Model) -> list[np.ndarray]:
    """Logits of a prompt, a batch, a fork, a rewind and a snapshot that is gone back to."""
    with model.session() as session, model.session() as other:
        found = [session.eval(IDS)]
        found += model.step([(session, [4]), (other, IDS[::-1])])
        with session.fork() as fork:
            found.append(fork.eval([8, 6]))
            fork.rewind(3)
            found.append(fork.eval([2]))
        before = session.snapshot()
        found.append(session.eval([3, 4]))
        session.restore(before)
        found.append(session.eval([3]))
    return found


@pytest.mark.parametrize("given", [*SAME_BITS, *SPLIT], ids=str)
def test_sessions_are_those_of_one_device(one: runtime.Model, given: dict[str, Any]):
    with runtime.load(DEMO, **EXACT, **given) as model:
        for got, want in zip(conversation(model), conversation(one), strict=True):
            if given in SAME_BITS:
                np.testing.assert_array_equal(got, want)
            else:
                assert nmse(got, want) <= 1e-10


@pytest.mark.parametrize("given", [SAME_BITS[0], SPLIT[2]], ids=str)
def test_text_is_that_of_one_device(one: runtime.Model, given: dict[str, Any]):
    ids = one.tokenizer.encode("Once upon a time")
    want = one.generate(ids, max_tokens=24, temperature=0).text
    with runtime.load(DEMO, **EXACT, **given) as model:
        assert model.generate(ids, max_tokens=24, temperature=0).text == want
        assert model.threads >= 2 and model.memory().page == one.memory().page


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"devices": "cpu:0,cpu:1", "split_mode": "row"}, "split_mode='row' is part of 'tensor'"),
        ({"devices": "tensor(cpu:0,cuda:1)"}, "devices='tensor(cpu:0,cuda:1)': tensor(cpu"),
        ({"devices": "cpu:0,cpu:1", "tensor_split": [1, -1]}, r"tensor_split=[1, -1]: a share is"),
        ({"devices": "cpu:0,cpu:1", "threads": 2000}, "threads=2000 must be from 1 to 1024"),
        ({"devices": "tensor(cpu:0,cpu:1)", "context": 10**9}, "context=1000000000 needs"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_line(given: dict[str, Any], says: str):
    with pytest.raises(runtime.Error) as caught:
        runtime.load(DEMO, **given)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert isinstance(caught.value, OptionError) or "context" in given


@pytest.mark.parametrize("stages", [4, 6])
def test_stages_that_begin_inside_a_layer_are_told(
    stages: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DEBUG", "1")
    devices = ",".join(["cpu"] * stages)
    with runtime.load(devices=devices, context=64, sequences=1, threads=1):
        said = f"{stages} stages for 4 layers: some begin inside a layer\n"
        assert capsys.readouterr().err.count(said) == (stages > 4)
