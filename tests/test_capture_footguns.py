"""What a captured graph freezes, one test each: after a change its replay gives the eager bits.

A graph is built once for a bucket. Whatever differs from step to step has to be read from memory
when it is replayed; here each such thing is changed, with the launches one by one beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choosing_cpu import chosen
from cuda_models import on_fake_cuda
from small_models import Sizes, write_model

from runtime.backends.base import Choice
from runtime.engine.advance import Advance, Piece
from runtime.engine.batch import Batch
from runtime.errors import BackendError
from runtime.model import Model

SIZE = Sizes(layers=1, hidden=32, inner=32, heads=2, kv_heads=1, dim=32, vocabulary=24)
GREEDY = Choice(SIZE.vocabulary)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("footguns") / "m.gguf", SIZE)


@pytest.fixture
def models(file: Path) -> Iterator[list[Model]]:
    """Replayed, and launch by launch."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(on_fake_cuda(file, sequences=4, backend={"graphs": graphs}))
            for graphs in (True, False)
        ]


def same(models: list[Model], use: Callable[[Model], Any]) -> Any:
    """What both give, bit for bit."""
    replayed, eager = (np.asarray(use(model)) for model in models)
    np.testing.assert_array_equal(replayed, eager)
    return replayed


def calls(model: Model, what: str) -> int:
    """How often the driver was asked for something."""
    return sum(call[0] == what for call in model.backend.device.driver.calls)


def program(model: Model, tokens: int = 1) -> Any:
    return model._engine.programs.of(tokens, 1)


def given(model: Model, session: Any, ids: list[int]) -> tuple[dict[str, np.ndarray], Any]:
    """Inputs and live counts of a step of a session, whose memory is taken."""
    advance = Advance(Piece(session._sequence, ids))
    model._engine.pools.reserve([advance])
    session._sequence.record = session._sequence.record._replace(pages=advance.pages)
    batch = Batch([advance])
    return batch.inputs(1, SIZE.hidden), batch.live


def test_positions_and_lengths(models: list[Model]):
    """One graph for all places, over the end of a page; and results are the caller's."""
    sessions = {model: model.session() for model in models}
    same(models, lambda model: sessions[model].eval(list(range(2, 23)) + [1] * 9, "last"))
    before = calls(models[0], "instantiate")
    kept = []
    for token in (3, 9, 4, 7):
        kept.append(same(models, lambda model, t=token: sessions[model].eval([t])))
    assert calls(models[0], "instantiate") == before + 1
    assert len({row.tobytes() for row in kept}) == 4
    again = same(models, lambda model: model.eval([*range(2, 23), *[1] * 9, 3, 9], "last"))
    np.testing.assert_array_equal(again, kept[1])


def test_arguments_and_grids_stay(models: list[Model]):
    """Bytes that the driver finds at a launch's address: nothing of a step is among them."""
    session = models[0].session()
    session.eval([1])

    def frozen() -> list[Any]:
        launches = program(models[0]).launches
        return [(launch.shape, bytes(launch._arguments._block)) for launch in launches]

    before = frozen()
    session.eval([5])
    session.rewind(1)
    session.fork().eval([6])
    assert frozen() == before


def test_arguments_that_are_not_there(models: list[Model]):
    """What stands in for them ties no launches together: it has no bytes."""
    nothing = models[0].backend._nothing.address
    found = [b for x in program(models[0]).launches for b in x.buffers.values()]
    assert {b.nbytes for b in found if b.address == nothing} <= {0}


def test_live_counts(models: list[Model]):
    """A step of four rows of which three live: the dead one, still as it was given to an earlier
    step, does not write over the place that it had then."""
    sessions = {model: model.session() for model in models}
    for ids, back in (([1, 2, 3, 4], 2), ([9], 0), ([10], 0), ([5, 6, 7], 0), ([8, 9, 10], 0)):
        found = same(models, lambda model, ids=ids: sessions[model].eval(ids))
        for session in sessions.values():
            session.rewind(back)
    alone = models[0].eval([1, 2, 9, 10, 5, 6, 7, 8, 9, 10])
    np.testing.assert_array_equal(found, alone[-3:])
    last = same(models, lambda model: sessions[model].eval([12]))
    again = models[0].eval([1, 2, 9, 10, 5, 6, 7, 8, 9, 10, 12], "last")
    np.testing.assert_array_equal(last, again)


def test_tiles_and_sequences(models: list[Model]):
    """Four rows of four sequences, then of one: attention is cut into fewer tiles."""

    def steps(model: Model) -> np.ndarray:
        a, b, c, d = (model.session() for _ in range(4))
        for first in (1, 5):
            model.step([(a, [first]), (b, [first + 1]), (c, [first + 2]), (d, [first + 3])])
        return np.concatenate([a.eval([9, 10, 11, 12]), *model.step([(c, [1, 2]), (d, [3, 4])])])

    found = same(models, steps)
    np.testing.assert_array_equal(found[:4], models[0].eval([1, 5, 9, 10, 11, 12])[2:])
    np.testing.assert_array_equal(found[4:6], models[0].eval([3, 7, 1, 2])[2:])


def test_page_tables(models: list[Model]):
    """A rewind, a fork whose page is copied, and pages that are another sequence's by now."""

    def steps(model: Model) -> list[np.ndarray]:
        session = model.session()
        found = [session.eval([1, 2, 3, 4], "last")]
        fork = session.fork()
        found += [session.eval([5]), fork.eval([6])]
        session.rewind(2)
        found.append(session.eval([7]))
        fork.close()
        other = model.session()
        found += [other.eval([5]), session.eval([8])]
        return np.concatenate(found)

    same(models, steps)


def test_memory_that_a_larger_bucket_needs(models: list[Model]):
    """Programs made before keep the memory their graphs point to."""
    sessions = {model: model.session() for model in models}
    same(models, lambda model: sessions[model].eval([1]))
    work = models[0].backend._work.nbytes
    same(models, lambda model: sessions[model].eval(list(range(1, 9)), "last"))
    assert models[0].backend._work.nbytes > work
    same(models, lambda model: sessions[model].eval([2]))


def test_state_from_elsewhere(models: list[Model]):
    """Pages that the host writes between replays."""
    sessions = {model: model.session() for model in models}
    leaf = models[0]._engine.graphs.inputs(1, 1).k[0]
    first = same(models, lambda model: sessions[model].eval([1, 2], "last"))
    page = int(sessions[models[0]]._sequence.record.pages.held[0])
    values = models[0].backend.read_state(leaf, [page])
    for model in models:
        model.backend.write_state(leaf, [page], -2 * values)
    changed = same(models, lambda model: sessions[model].eval([3]))
    for model in models:
        model.backend.write_state(leaf, [page], values)
        sessions[model].rewind(1)
    back = same(models, lambda model: sessions[model].eval([3]))
    assert (back != changed).any() and first.size


def test_weights_that_are_loaded_again(models: list[Model]):
    sessions = {model: model.session() for model in models}
    before = same(models, lambda model: sessions[model].eval([4]))
    for model in models:
        model.warmup()
        model.backend.load([model.graph(1)])
        sessions[model].rewind(1)
    np.testing.assert_array_equal(same(models, lambda model: sessions[model].eval([4])), before)


def test_a_graph_of_its_own_only_for_a_new_bucket(models: list[Model]):
    model = models[0]
    for n in (1, 2, 1, 2, 3, 4):
        model.eval([1] * n, "last")
    assert calls(model, "instantiate") == 3
    assert model.backend.program(model.graph(1)) is program(model), "by what it computes"


def test_how_tokens_are_chosen(models: list[Model]):
    """Temperature, filters and chance are a step's, not the graph's."""
    choices = [
        GREEDY, Choice(24, 1.5, 8, 1.0, 0.0, 0.9), Choice(24, 1.5, 8, 1.0, 0.0, 0.1),
        Choice(24, 0.5, 24, 0.6, 0.0, 0.99), Choice(5, 3.0, 24, 1.0, 0.3, 0.5), GREEDY,
    ]  # fmt: skip
    for model in models:
        session = model.session()
        step = given(model, session, [7])
        row = program(model).run(*step)[0][0].copy()
        found = [int(model.backend.choose(program(model), *step, [c])()[0]) for c in choices]
        assert found == [chosen(row, choice) for choice in choices]
    assert calls(models[0], "instantiate") == 2


def test_a_token_reaches_the_next_step_without_the_host(models: list[Model]):
    """Two steps are with the device before the first token is read; then a token of the host's."""

    def tokens(model: Model) -> list[int]:
        session, found = model.session(), []
        for token in (7, None, None):
            inputs, live = given(model, session, [token or 0])
            if token is None:
                del inputs["tokens"]
            found.append(model.backend.choose(program(model), inputs, live, [GREEDY]))
            record = session._sequence.record
            session._sequence.record = record._replace(length=record.length + 1)
            if len(found) == 2:
                found[0] = found[0]()
        return [int(found[0][0]), int(found[1]()[0]), int(found[2]()[0])]

    first, second, third = same(models, tokens).tolist()
    with models[0].session() as session:
        for token, expected in ((7, first), (first, second), (second, third)):
            assert session.eval([token])[0].argmax() == expected


def test_rows_of_several_sequences(models: list[Model]):
    """Each row's token goes to its own place, and dead rows choose nothing."""

    def tokens(model: Model) -> list[list[int]]:
        sessions = [model.session() for _ in range(3)]
        program = model._engine.programs.of(3, 3)
        advances = [Advance(Piece(s._sequence, [n])) for n, s in enumerate(sessions, 4)]
        model._engine.pools.reserve(advances)
        batch = Batch(advances)
        inputs, found = batch.inputs(1, SIZE.hidden), []
        for place in range(2):
            inputs["places"] = inputs["positions"] = np.full(3, place, np.int32)
            inputs["kv_slots"] = inputs["block_table"][:, 0] * 32 + place
            found.append(model.backend.choose(program, inputs, batch.live, [GREEDY] * 3)().tolist())
            inputs.pop("tokens", None)
        return found

    first, second = same(models, tokens).tolist()
    for n in range(3):
        rows = models[0].eval([4 + n, first[n]])
        assert [int(row.argmax()) for row in rows] == [first[n], second[n]]


def test_host_memory_that_a_copy_still_reads(models: list[Model]):
    """What a step is given lies in one of two blocks; the third step waits for the first's copy."""
    one, (inputs, live) = program(models[0]), given(models[0], models[0].session(), [7])

    def give() -> None:
        for token in (1, 2, 3):
            one.give(inputs | {"tokens": np.array([token], np.int32)}, live)
        models[0].backend.stream.synchronize()

    give()
    for copy in one._inputs._copies:
        copy.sent.synchronize = lambda: None
    with pytest.raises(BackendError, match="pinned memory was changed"):
        give()


def test_results_that_the_next_step_overwrites(models: list[Model]):
    """Views of the program's memory; what a session gives is a copy."""
    session = models[0].session()
    first = session.eval([1])
    kept = first.copy()
    session.eval([2])
    np.testing.assert_array_equal(first, kept)


def test_a_closed_program(file: Path):
    with on_fake_cuda(file) as model:
        step = given(model, model.session(), [7])
        one = program(model)
        one.run(*step)
    with pytest.raises(BackendError, match="was closed"):
        one.run(*step)
    with pytest.raises(BackendError, match="was closed"):
        one.choose(*step, [GREEDY])
    assert not model.backend.device.driver.leaks()


def test_outputs_are_fetched_as_far_as_they_are_live(models: list[Model], monkeypatch):
    fetched = []
    copy = models[0].backend.device.driver.copy_to_host
    monkeypatch.setattr(
        models[0].backend.device.driver, "copy_to_host",
        lambda host, address, nbytes, stream: (
            fetched.append(nbytes), copy(host, address, nbytes, stream)
        ),
    )  # fmt: skip
    assert len(models[0].eval([1, 2, 3])) == 3
    assert fetched == [4 * 3 * SIZE.vocabulary]


def test_replays_equal_launches_over_many_steps(models: list[Model]):
    """Tokens of either are the next step's, so that no difference could hide."""
    sessions = {model: model.session() for model in models}
    row = same(models, lambda model: sessions[model].eval([3, 1]))[-1]
    for n in range(32):
        token = int(row.argmax()) if n % 3 else n % SIZE.vocabulary
        row = same(models, lambda model, t=token: sessions[model].eval([t]))[-1]
