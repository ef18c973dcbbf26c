"""Logits that are not finite: an error on every path, and nobody else's trouble."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_models import NOVEL, Sizes, Values, write_model

import runtime
from runtime.engine.advance import Piece
from runtime.errors import BackendError
from runtime.model import Model

BAD = 7  # the token whose embedding is not a number
WRONG = {
    "nan": np.float32(np.nan), "minus nan": -np.float32(np.nan), "inf": np.float32(np.inf),
    "minus inf": np.float32(-np.inf),
}  # fmt: skip
IDS = np.random.default_rng(2).integers(8, 80, 60).tolist()


def _write(path: Path, size: Sizes, wrong: np.float32) -> Path:
    values = Values(3)
    embeddings = values.matrix(size.vocabulary, size.hidden) * 8
    embeddings[BAD] = wrong
    output = values.matrix(size.vocabulary, size.hidden)
    return write_model(
        path, size, replace={"token_embd.weight": embeddings, "output.weight": output}
    )


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    size = Sizes(layers=1) if request.param == "dense" else NOVEL["qwen35"]
    path = _write(tmp_path_factory.mktemp("nan") / "m.gguf", size, WRONG["minus nan"])
    with runtime.load(path, threads=1, context=64, sequences=1) as loaded:
        yield loaded


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("logits", ["all", "last"])
def test_every_kind_is_refused(tmp_path: Path, wrong: str, logits: str):
    path = _write(tmp_path / "m.gguf", Sizes(layers=1), WRONG[wrong])
    for device in ("cpu", "reference"):
        with np.errstate(all="ignore"), runtime.load(path, devices=device, context=64) as model:
            for ids in ([BAD], [1, 2, BAD]):
                with pytest.raises(BackendError, match=r"m\.gguf: .* logits are not finite"):
                    model.eval(ids, logits)


def test_a_session_is_what_it_was(model: Model):
    whole = model.eval(IDS)
    with model.session() as session, model.session() as other:
        session.eval(IDS[:20])
        other.eval(IDS[:30])
        for step in ([(session, [BAD])], [(other, IDS[30:33]), (session, [1, BAD])]):
            with pytest.raises(BackendError, match="not finite"):
                model.step(step)
        assert session.tokens == IDS[:20] and other.tokens == IDS[:30]
        np.testing.assert_array_equal(session.eval(IDS[20:]), whole[20:])
        np.testing.assert_array_equal(other.eval(IDS[30:]), whole[30:])


def test_the_others_of_a_step_go_on(model: Model):
    whole = model.eval(IDS)
    with model.session() as session, model.session() as other, model.session() as third:
        session.eval(IDS[:20])
        pieces = [(other, IDS[:33]), (session, [1, BAD]), (third, IDS[:1])]
        found = model._engine.run([Piece(s._sequence, ids) for s, ids in pieces])
        np.testing.assert_array_equal(found[0], whole[32:33])
        np.testing.assert_array_equal(found[2], whole[:1])
        with pytest.raises(BackendError, match="not finite"):
            raise found[1]
        assert session.tokens == IDS[:20] and other.tokens == IDS[:33]
        for each in (session, other, third):
            at = len(each)
            np.testing.assert_array_equal(each.eval(IDS[at:]), whole[at:])


def test_memory_that_held_no_numbers_is_used_again(model: Model):
    """Pages and slots are not cleared: what lies past the end of a sequence may be anything."""
    whole = model.eval(IDS)
    count = model._engine.pools.pages.count
    sessions = [model.session() for _ in range(count)]
    for session in sessions:
        session.eval([BAD], "none")  # nobody asks for logits, so nobody is told
    assert not model._engine.pools.pages.free
    for session in sessions:
        session.close()
    np.testing.assert_array_equal(model.eval(IDS), whole)
    with model.session() as session:
        for token, row in zip(IDS, whole, strict=True):
            np.testing.assert_array_equal(session.eval([token])[0], row)
