"""The block that predicts further tokens: what it drafts, and that nothing else changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import nextn_by_hand
import numpy as np
import pytest
from choosing_cpu import speaking
from small_models import Sizes, tensors, write_model

import runtime
from runtime.errors import ModelError, OptionError
from runtime.models import registry
from runtime.models.outline import OutlinedTensor
from runtime.ops import DTYPES
from runtime.speculation.lengths import Lengths

SIZES = {
    "qwen35": Sizes("qwen35", layers=3, further=True),
    "qwen35moe": Sizes("qwen35moe", layers=3, experts=6, inner=32, further=True),
}
IDS = np.random.default_rng(3).integers(0, 80, 30).tolist()
SPLITS = ("cpu", "tensor(cpu:0,cpu:1)", "layers(cpu:0,cpu:1)")


@pytest.fixture(scope="module", params=SIZES)
def file(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sizes, Path]:
    size = SIZES[request.param]
    return size, write_model(tmp_path_factory.mktemp("nextn") / "m.gguf", size)


def drafted(session: runtime.Session, token: int, most: int = 4) -> list[int]:
    (found,) = session.model._engine.nextn.of([(session._sequence, token)], most)
    return found


def test_drafts_are_those_of_the_block_in_numpy(file: tuple[Sizes, Path]):
    size, path = file
    with runtime.load(path, kv_type="f32", activations="f32", threads=1, spec="mtp") as model:
        for n in range(1, 25):
            session = model.session()
            session.eval(IDS[:n])
            rows = session._sequence.record.seen.rows
            want = nextn_by_hand.drafts(size, tensors(size), IDS[: n + 1], rows, 4)
            assert drafted(session, IDS[n]) == want


def test_a_table_and_an_output_of_its_own(tmp_path: Path):
    size = SIZES["qwen35"]
    rng = np.random.default_rng(1)
    own = {
        f"blk.3.nextn.{name}.weight": rng.standard_normal((80, 64)).astype(np.float32)
        for name in ("embed_tokens", "shared_head_head")
    }
    gone = ("blk.3.nextn.shared_head_norm.weight",)
    path = write_model(tmp_path / "m.gguf", size, replace=own, without=gone)
    known = {name: values for name, values in tensors(size).items() if name not in gone} | own
    with runtime.load(path, kv_type="f32", activations="f32", threads=1, spec="mtp") as model:
        session = model.session()
        session.eval(IDS[:20])
        rows = session._sequence.record.seen.rows
        want = nextn_by_hand.drafts(size, known, IDS[:21], rows, 4)
        assert drafted(session, IDS[20]) == want


@pytest.mark.parametrize("devices", SPLITS)
@pytest.mark.parametrize("kv_type", ["f16", "q8_0,q4_0"])
def test_logits_are_those_without_it(file: tuple[Sizes, Path], devices: str, kv_type: str):
    _, path = file
    found = []
    for spec in ("off", "mtp"):
        with runtime.load(path, devices=devices, kv_type=kv_type, threads=2, spec=spec) as model:
            session = model.session()
            found.append([session.eval(IDS[:7]), session.eval(IDS[7:8]), session.eval(IDS[8:])])
    for without, with_it in zip(*found, strict=True):
        np.testing.assert_array_equal(without, with_it)


@pytest.mark.parametrize("devices", SPLITS)
def test_drafts_follow_from_the_tokens_alone(file: tuple[Sizes, Path], devices: str):
    """However they were evaluated, and wherever the sequence comes from."""
    _, path = file
    with runtime.load(path, devices=devices, threads=2, spec="mtp") as model:
        whole = model.session()
        whole.eval(IDS)
        want = drafted(whole, 5)
        assert len(want) == 4 and drafted(whole, 5, 2) == want[:2]
        pieces = model.session()
        for token in IDS:
            pieces.eval([token])
        fork = pieces.fork()
        back = model.session()
        back.eval([*IDS[:12], 1, 2, 3])
        back.rewind(3)
        back.eval(IDS[12:])
        for session in (pieces, fork, back):
            assert drafted(session, 5) == want
        fork.eval([6, 7])
        pieces.rewind(2)
        assert drafted(whole, 5) == want
        two = [(whole._sequence, 5), (fork._sequence, 9)]
        together = model._engine.nextn.of(two, 4)
        assert together == [want, drafted(fork, 9)]


def test_sequences_that_draft_together_share_no_pages(file: tuple[Sizes, Path]):
    """Each needs a page for what it drafts past the 32nd place, which it does not have yet."""
    _, path = file
    with runtime.load(path, threads=1, spec="mtp") as model:
        some = [model.session() for _ in range(3)]
        for n, session in enumerate(some):
            session.eval([n, *IDS[1:]])
        alone = [drafted(session, 5, 7) for session in some]
        found = model._engine.nextn.of([(session._sequence, 5) for session in some], 7)
        assert found == alone and len({*map(tuple, alone)}) > 1


def test_drafts_end_where_the_block_is_not_sure(file: tuple[Sizes, Path]):
    """And do not depend on how many are made before it is looked."""
    _, path = file
    with runtime.load(path, threads=1, spec="mtp") as model:
        drafts, session = model._engine.nextn, model.session()
        session.eval(IDS)
        whole = drafted(session, 5, 7)
        for least in (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0):
            found = []
            for drafts._each in (1e-9, 1.0):
                found += drafts.of([(session._sequence, 5)], 7, least)
            assert found[0] == found[1] == whole[: len(found[0])]
            assert least != 1.0 or not found[0]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"]
)
def test_answers_are_those_without_drafts(
    file: tuple[Sizes, Path], options: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Sure or not: what is drafted at random is mostly refused, and the state goes back."""
    monkeypatch.setattr("runtime.speculation.nextn._SURE", 0.0)
    monkeypatch.setattr(Lengths, "best", lambda self, room, *_: (room.drafts, 1.0))
    with runtime.load(speaking(tmp_path, file[0]), threads=2, spec="auto") as model:
        for n in (5, 20):
            both = [
                model.generate(IDS[:n], max_tokens=60, ignore_eos=True, spec=spec, **options)
                for spec in ("off", "mtp")
            ]
            assert both[0].text == both[1].text and both[0].tokens == both[1].tokens
            assert both[0].speculation is None and both[1].speculation.kinds.keys() == {"mtp"}
            assert both[1].speculation.drafted > 20


def test_who_asks_for_it_where_it_is_not_loaded(file: tuple[Sizes, Path], tmp_path: Path):
    path, said = speaking(tmp_path, file[0]), "load the model with spec='mtp'"
    with runtime.load(path, threads=1, spec="off") as model, pytest.raises(OptionError, match=said):
        model.generate(IDS, spec="mtp")


def test_a_saved_session_drafts_as_before(file: tuple[Sizes, Path], tmp_path: Path):
    _, path = file
    with runtime.load(path, threads=1, spec="mtp") as model:
        session = model.session()
        session.eval(IDS)
        session.save(tmp_path / "s.rt")
        session.eval([2])
        want = drafted(session, 5)
    with runtime.load(path, devices=SPLITS[1], threads=2, spec="mtp") as model:
        session = runtime.Session.load(model, tmp_path / "s.rt")
        session.eval([2])
        assert drafted(session, 5) == want
    with runtime.load(path, threads=1, spec="off") as model, pytest.raises(runtime.Error):
        runtime.Session.load(model, tmp_path / "s.rt")


def test_a_sequence_is_not_changed_by_drafts(file: tuple[Sizes, Path]):
    _, path = file
    with runtime.load(path, threads=1, spec="mtp", prompt_cache=False) as model:
        session = model.session()
        session.eval(IDS)
        fork, free = session.fork(), model._engine.pools.pages.free
        before = session._sequence.record
        drafted(fork, 3)
        drafted(session, 3)
        assert session._sequence.record.length == before.length
        assert model._engine.pools.pages.free >= free - 1  # a page of its own in place of a shared
        fresh = model.eval([*IDS, 3, 4])[-1]
        np.testing.assert_array_equal(session.eval([3, 4])[-1], fresh)
        np.testing.assert_array_equal(fork.eval([3, 4])[-1], fresh)


def test_where_nothing_can_be_drafted(file: tuple[Sizes, Path]):
    _, path = file
    with runtime.load(path, threads=1, spec="mtp", context=32, sequences=1) as model:
        session = model.session()
        assert drafted(session, 1) == []  # no row yet
        session.eval(IDS, "none")
        assert drafted(session, 1) == []
        session.rewind(1)
        session.eval([2])
        assert drafted(session, 1) == [] and len(drafted(session, 1, 2)) == 2  # 2 places are left


def test_a_prompt_that_was_read_before_is_drafted_for_as_well(
    file: tuple[Sizes, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("runtime.speculation.nextn._SURE", 0.0)
    monkeypatch.setattr(Lengths, "best", lambda self, room, *_: (room.drafts, 1.0))
    path, found = speaking(tmp_path, file[0]), list[tuple[Any, ...]]()
    for cached in (False, True):
        with runtime.load(path, threads=2, spec="mtp", prompt_cache=cached) as model:
            wanted = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
            assert model.generate(3 * IDS, **wanted).text is not None
            answer = model.generate([*IDS, *IDS, *IDS, *IDS[:5]], **wanted)
            found.append((answer.text, answer.tokens, answer.speculation))
            assert bool(answer.cached_tokens) == cached
    assert found[0] == found[1] and found[0][2].drafted


def test_a_file_without_such_a_block_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = speaking(tmp_path, Sizes("qwen35", layers=3))
    with runtime.load(path, spec="mtp", threads=1) as model:
        assert model._engine.nextn is None
        answer = model.generate(IDS, max_tokens=3, temperature=0)
        assert answer.text is not None and answer.speculation is None
    assert capsys.readouterr().err.count("\n") == 1


UNKNOWN = {
    "a part that is not known": ({"blk.3.nextn.hc_head_up.weight": (64, 64)}, {}, "hc_head_up"),
    "another shape": ({"blk.3.nextn.eh_proj.weight": (64, 64)}, {}, "eh_proj"),
    "two blocks": ({}, {"block_count": 5, "nextn_predict_layers": 2}, "2 blocks"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_block_of_another_form_is_left_unused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shapes, keys, said = UNKNOWN[case]
    made = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    path = write_model(tmp_path / "m.gguf", SIZES["qwen35"], replace=made, extra=keys)
    with runtime.load(path, threads=1, spec="mtp") as model:
        assert model._engine.nextn is None
        found = model.eval(IDS[:5])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    with runtime.load(path, threads=1) as model:
        np.testing.assert_array_equal(model.eval(IDS[:5]), found)
    assert not capsys.readouterr().err


def test_a_quantised_matrix_that_cannot_be_cut_in_half(tmp_path: Path):
    """Rows of 96 are three blocks of Q8_0, and halves of them are none."""
    size = Sizes("qwen35", layers=3, hidden=48, further=True)
    name = "blk.3.nextn.eh_proj.weight"
    path = write_model(tmp_path / "m.gguf", size)
    file = runtime.gguf.open_gguf(path)
    assert registry.predicting(registry.build(file)) is not None
    quantised = {**file.tensors, name: OutlinedTensor(name, (48, 96), DTYPES["q8_0"])}
    with pytest.raises(ModelError, match="blocks of 32 cannot be cut at 48"):
        registry.predicting(registry.build(replace(file, tensors=quantised)))
