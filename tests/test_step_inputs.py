"""Inputs of steps besides ids: vectors, positions; and graphs that are no language model at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime import ops
from runtime.engine.advance import Piece
from runtime.engine.graphs import bucket
from runtime.engine.programs import Programs
from runtime.errors import OptionError
from runtime.model import Model
from runtime.ops.dtypes import F32

IDS = np.random.default_rng(6).integers(0, 80, 200).tolist()
MODELS = {"dense": Sizes(layers=2), "moe": Sizes("qwen3moe", experts=6, inner=32), **NOVEL}


@pytest.fixture(
    scope="module", params=[("dense", "Q4_0"), ("qwen35", "F32"), ("gpt-oss", "Q8_0")], ids="-".join
)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    name, kind = request.param
    path = write_model(tmp_path_factory.mktemp("inputs") / "m.gguf", MODELS[name], kind)
    with runtime.load(path, threads=2, context=256, sequences=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def table(model: Model) -> np.ndarray:
    """The embeddings, as a vision tower would give vectors."""
    return model.file.tensors["token_embd.weight"].to_float32()


@pytest.fixture(scope="module")
def whole(model: Model) -> np.ndarray:
    return model.eval(IDS)


def test_embeddings_may_come_as_vectors(model: Model, table: np.ndarray, whole: np.ndarray):
    """The same bits as their ids give: alone, among ids, in a batch, in several steps."""
    run = model._engine.run
    with model.session() as session, model.session() as other, model.session() as third:
        absent = [-1] * 40
        [rows] = run([Piece(session._sequence, absent, "all", given={"vectors": table[IDS[:40]]})])
        np.testing.assert_array_equal(rows, whole[:40])
        mixed = [*IDS[:3], *[-1 - i for i in range(50)], *IDS[53:60]]
        found = run([
            Piece(third._sequence, IDS[:9], "all"),
            Piece(other._sequence, mixed, "all", given={"vectors": table[IDS[:60]]}),
            Piece(session._sequence, [-7], "all", given={"vectors": table[IDS[40:41]]}),
        ])  # fmt: skip
        for got, want in zip(found, (whole[:9], whole[:60], whole[40:41]), strict=True):
            np.testing.assert_array_equal(got, want)
        assert other.tokens == mixed
        np.testing.assert_array_equal(other.eval(IDS[60:70]), whole[60:70])
        long = Piece(third._sequence, [-1] * 100, "last", given={"vectors": table[IDS[9:109]]})
        most, model._engine.most_tokens = model._engine.most_tokens, 32
        [rows] = model._engine.run_all([long])
        model._engine.most_tokens = most
        np.testing.assert_array_equal(rows, whole[108:109])


def test_vectors_matter(model: Model, table: np.ndarray, whole: np.ndarray):
    with model.session() as session:
        vectors = table[IDS[:40]]
        vectors[20] += 0.5
        [rows] = model._engine.run(
            [Piece(session._sequence, [-1] * 40, "all", given={"vectors": vectors})]
        )
    np.testing.assert_array_equal(rows[:20], whole[:20])
    assert (rows[20:] != whole[20:40]).any(axis=1).all()


def test_positions_of_their_own(model: Model, whole: np.ndarray):
    """Places still say what is seen; how far apart it is, positions."""
    engine, width = model._engine, model._engine.architecture.positions_per_token

    def run(positions: np.ndarray, cut: int) -> np.ndarray:
        shape = (-1, width) if width > 1 else (-1,)
        wide = positions.astype(np.int32).repeat(width).reshape(shape)
        with model.session() as session:
            session.eval(IDS[:10], "none")
            found = []
            for a, b in ((10, cut), (cut, 60)):
                given = {"positions": wide[a - 10 : b - 10]}
                found += engine.run([Piece(session._sequence, IDS[a:b], "all", given=given)])
        return np.concatenate(found)

    places = np.arange(10, 60)
    np.testing.assert_array_equal(run(places, 40), whole[10:60])
    apart = run(places + 7 * (places >= 20), 40)
    np.testing.assert_array_equal(apart[:10], whole[10:20])
    assert (apart[10:] != whole[20:60]).any(axis=1).all()
    np.testing.assert_array_equal(run(places + 7 * (places >= 20), 13), apart)


def test_positions_in_several_steps_and_after_a_rewind(
    model: Model, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    width = model._engine.architecture.positions_per_token
    wide = np.arange(55, 155, dtype=np.int32).repeat(width).reshape((100, width)[: 1 + (width > 1)])
    monkeypatch.setattr(model._engine, "most_tokens", 32)
    with model.session() as session:
        session.eval(IDS[:30], "none")
        session.eval(IDS[30:60], "none")
        session.rewind(5)
        piece = Piece(session._sequence, IDS[55:155], "all", given={"positions": wide})
        [rows] = model._engine.run_all([piece])
    np.testing.assert_array_equal(rows, whole[55:155])


def test_what_came_as_vectors_is_not_evaluated_again(model: Model, table: np.ndarray):
    with model.session() as session:
        session.eval(IDS[:10], "none")
        pieces = [
            Piece(session._sequence, [i], given={"vectors": table[:1]} if i < 0 else {})
            for i in (-1, 5, 6, -1)
        ]
        for piece in pieces:
            assert isinstance(model._engine.run([piece])[0], np.ndarray)
        session.rewind(2)
        again = session.evaluated < len(session)
        [found] = model._engine.run([Piece(session._sequence, [7])])
        if again:
            with pytest.raises(OptionError, match=r"\d tokens that came with vectors or"):
                raise found  # type: ignore[misc]
            session.rewind(2)
            [found] = model._engine.run([Piece(session._sequence, [7])])
        assert isinstance(found, np.ndarray)


def test_wrong_vectors_and_positions(model: Model, table: np.ndarray):
    with model.session() as session:
        for given, says in (
            ({"vectors": table[:2]}, r"vectors of shape \[2, 64\]; needed is \[3, 64\]"),
            ({"vectors": table[:3, :5]}, r"vectors of shape \[3, 5\]"),
            ({"vectors": table[:3], "positions": np.zeros((3, 9), np.int32)}, "positions of shape"),
            ({"vectors": table[:3], "pixels": table}, "come with positions, vectors, not 'pixels'"),
            ({}, "token id -1 is outside the vocabulary"),
        ):
            [found] = model._engine.run([Piece(session._sequence, [4, -1, -1], given=given)])
            with pytest.raises(OptionError, match=says):
                raise found
        with pytest.raises(OptionError, match="token id -1 is outside"):
            session.eval([-1])
        assert not len(session)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_tower_is_just_another_graph(tmp_path: Path, device: str):
    """Patches of pixels through weights of the file: a live size and float inputs of its own."""
    path = write_model(tmp_path / "m.gguf", Sizes(layers=1))

    def tower(patches: int) -> ops.Graph:
        n = ops.Dim("patches", patches)
        pixels = ops.step_input("pixels", (n, 64), F32)
        x = ops.matmul(pixels, ops.weight("blk.0.ffn_up.weight", (96, 64), F32), name="patch")
        x = ops.matmul(ops.silu(x), ops.weight("blk.0.ffn_down.weight", (64, 96), F32))
        rows = ops.step_input("rows", (n,))
        learned = ops.get_rows(ops.weight("token_embd.weight", (80, 64), F32), rows)
        return ops.Graph((ops.add(x, learned, name="image"),), "tower")

    rng = np.random.default_rng(3)
    pixels = rng.normal(size=(21, 64)).astype(np.float32)
    rows = rng.integers(0, 80, 21).astype(np.int32)
    with runtime.load(path, devices=device, threads=2, activations="f32") as model:
        assert model.file.tensors["blk.0.ffn_up.weight"].shape == (96, 64)
        towers = Programs(model.backend, tower, lambda n: (bucket(n),))
        up, down, table = (
            model.file.tensors[f"{name}.weight"].to_float32().astype(np.float64)
            for name in ("blk.0.ffn_up", "blk.0.ffn_down", "token_embd")
        )
        x = pixels @ up.T
        want = (x / (1 + np.exp(-x))) @ down.T + table[rows]
        language = model.eval(IDS[:9])
        found = {
            n: towers.of(n).run({"pixels": pixels[:n], "rows": rows[:n]}, {"patches": n})[0].copy()
            for n in (1, 5, 8, 21, 1)
        }
        np.testing.assert_array_equal(model.eval(IDS[:9]), language)
    np.testing.assert_allclose(found[21], want, rtol=1e-4, atol=1e-4)
    for n, got in found.items():
        assert got.shape == (n, 64)
        if device == "cpu":
            np.testing.assert_array_equal(got, found[21][:n])
    assert len(towers._made) == 3
