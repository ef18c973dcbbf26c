"""Laws of the engine on a small model: the same bits whatever the threads, cuts, batch or forks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from row_errors import check_rows
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.engine.batch import largest_step
from runtime.errors import BackendError, MemoryLimitError, OptionError
from runtime.model import Model

FAMILIES = {"dense": Sizes(), "moe": Sizes("qwen3moe", experts=6, inner=32), **NOVEL}
MODELS = [
    ("dense", "F32"), ("dense", "Q4_0"), ("moe", "Q8_0"), ("moe", "BF16"), ("qwen35", "Q4_0"),
    ("qwen35moe", "F32"), ("qwen3next-fused", "Q8_0"), ("gpt-oss", "MXFP4"),
]  # fmt: skip


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, kind = request.param
    folder = tmp_path_factory.mktemp("engine")
    return write_model(folder / f"{family}.{kind}.gguf", FAMILIES[family], kind)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with runtime.load(path, threads=2, kv_type="f16") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return np.random.default_rng(3).integers(0, 80, 150).tolist()


@pytest.fixture(scope="module")
def whole(model: Model, prompt: list[int]) -> np.ndarray:
    return model.eval(prompt)


# The worst row with float activations: float32 against float64; a value near a border of the cache
# type may be stored as its neighbour, which is 2^-11, 2^-8 or 1/127 of one value of a head away.
CACHES = {"f32": 5e-11, "f16": 1e-7, "bf16": 3e-6, "q8_0": 1e-5, "q8_0,f16": 1e-5}
# With int8 activations: the worst row, and how many of 70 may take another expert, or attend to a
# token that does. A delta-net carries what one token's rounding did on to the tokens behind it.
INT8 = {
    "dense": (1e-3, 0), "moe": (1e-3, 4), "gpt-oss": (1e-3, 10), "qwen35": (3e-2, 0),
    "qwen3next-fused": (3e-2, 5),
}  # fmt: skip


@pytest.mark.parametrize("kv", CACHES)
def test_agrees_with_the_reference_backend(path: Path, prompt: list[int], kv: str):
    with runtime.load(path, devices="reference", kv_type=kv) as exact:
        want = exact.eval(prompt[:70])
    with runtime.load(path, threads=2, kv_type=kv, activations="f32") as model:
        check_rows(model.eval(prompt[:70]), want, CACHES[kv])
    family, kind, _ = path.name.split(".")
    if kind in ("F32", "BF16"):  # float weights take float activations whatever is asked for
        return
    with runtime.load(path, threads=2, kv_type=kv) as model:
        limit, flips = INT8[family]
        if "q8_0" in kv and flips:  # scales of the cache have more than one way to be chosen
            flips = 12
        check_rows(model.eval(prompt[:70]), want, limit, flips)


def test_threads_do_not_change_bits(path: Path, prompt: list[int], whole: np.ndarray):
    for threads in (1, 3):
        with runtime.load(path, threads=threads) as other:
            np.testing.assert_array_equal(other.eval(prompt), whole)


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_cuts_do_not_change_bits(model: Model, prompt: list[int], whole: np.ndarray, piece: int):
    with model.session() as session:
        rows = [session.eval(prompt[i : i + piece]) for i in range(0, len(prompt), piece)]
    np.testing.assert_array_equal(np.concatenate(rows), whole)


def test_prompts_longer_than_a_step_do_not_change_bits(tmp_path: Path):
    """1,100 tokens in one call are three steps of their own."""
    path = write_model(tmp_path / "long.gguf", Sizes(layers=1, context=2048), "Q4_0")
    ids = np.random.default_rng(8).integers(0, 80, 1100).tolist()
    with runtime.load(path, threads=2) as model:
        with model.session() as session:
            rows = [session.eval(ids[i : i + 500]) for i in range(0, len(ids), 500)]
            assert len(session._sequence.record.pages.held) == -(-1100 // 32)
        with model.session() as session:
            whole = session.eval(ids)
            assert session.tokens == ids and len(session._sequence.record.pages.held) == -(
                -1100 // 32
            )
        other, short = model.session(), model.session()
        both = model.step([(short, ids[:30]), (other, ids)])
    np.testing.assert_array_equal(whole, np.concatenate(rows))
    np.testing.assert_array_equal(both[1], whole)
    np.testing.assert_array_equal(both[0], whole[:30])


def test_a_long_prompt_says_how_far_it_is(tmp_path: Path):
    path = write_model(tmp_path / "long.gguf", Sizes(layers=1, context=2048))
    told: list[tuple[int, int]] = []
    with runtime.load(path, threads=1) as model, model.session() as session:
        session.eval([1] * 1100, "last", on_prompt=lambda done, total: told.append((done, total)))
        assert told == [(0, 1100), (512, 1100), (1024, 1100), (1100, 1100)]
        session.rewind(1100)

        def refuse(done: int, total: int) -> None:
            if done:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            session.eval([1] * 600, "none", on_prompt=refuse)
        assert len(session) == 0


def test_steps_of_large_models_are_smaller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As nobody should have to wait long for the end of one row of a plan."""
    shapes = {"0.6B": (3072, 1024), "8B": (14336, 4096), "32B": (27648, 5120)}
    found = {name: largest_step([shape, (8, 8), (4,)]) for name, shape in shapes.items()}
    assert found == {"0.6B": 512, "8B": 512, "32B": 128}
    assert largest_step([(64, 8192, 8192)], experts=8) == 64 and largest_step([]) == 512
    monkeypatch.setattr(runtime.engine.batch, "_ROW_MACS", 2 * 64 * 64 * 40)
    told: list[tuple[int, int]] = []
    path = write_model(tmp_path / "m.gguf", Sizes(layers=1, heads=2, inner=64))
    with runtime.load(path, threads=1) as model:
        model.session().eval([1] * 70, "last", on_prompt=lambda *at: told.append(at))
    assert told == [(0, 70), (32, 70), (64, 70), (70, 70)]


def test_python_threads_share_a_model(model: Model, prompt: list[int], whole: np.ndarray):
    with ThreadPoolExecutor(4) as pool:
        lengths = [5, 40, 77, 150] * 4
        results = list(pool.map(lambda n: model.eval(prompt[:n]), lengths))
    for n, rows in zip(lengths, results, strict=True):
        np.testing.assert_array_equal(rows, whole[:n])


def test_a_model_only_takes_its_own_sessions_and_ends(path: Path, model: Model):
    with runtime.load(path) as other, pytest.raises(OptionError, match="model that made it"):
        other.step([(model.session(), [1])])
    with pytest.raises(OptionError, match="this model is closed"):
        other.eval([1])
    with pytest.raises(OptionError, match="this model is closed"):
        other.session()


@pytest.mark.parametrize("ids", ["text", 3, None, [1.5], [[1, 2]]])
def test_ids_must_be_whole_numbers(model: Model, ids: object):
    with pytest.raises(OptionError, match="must be a list of whole numbers"):
        model.eval(ids)  # type: ignore[arg-type]


def test_batch_does_not_change_bits(model: Model, prompt: list[int], whole: np.ndarray):
    rng = np.random.default_rng(5)
    others = [rng.integers(0, 80, n).tolist() for n in (1, 3, 9, 33, 64, 100, 130)]
    sessions = [model.session() for _ in range(8)]
    first = model.step([(s, ids[:1]) for s, ids in zip(sessions, [prompt, *others], strict=True)])
    np.testing.assert_array_equal(first[0], whole[:1])
    tails = [(s, ids[1:]) for s, ids in zip(sessions, [prompt, *others], strict=True) if ids[1:]]
    rest = model.step(tails)
    np.testing.assert_array_equal(rest[0], whole[1:])
    for row, ids in zip(rest[1:], others[1:], strict=True):
        np.testing.assert_array_equal(row, model.eval(ids)[1:])


def test_fork_does_not_change_bits(model: Model, prompt: list[int], whole: np.ndarray):
    with model.session() as session:
        session.eval(prompt[:77])
        child = session.fork()
        other = session.eval([1, 2, 3])
        np.testing.assert_array_equal(child.eval(prompt[77:]), whole[77:])
        session.rewind(3)
        np.testing.assert_array_equal(session.eval([1, 2, 3]), other)
        child.close()


def test_rewind_does_not_change_bits(model: Model, prompt: list[int], whole: np.ndarray):
    with model.session() as session:
        session.eval(prompt[:100])
        session.rewind(60)
        assert len(session) == 40
        np.testing.assert_array_equal(session.eval(prompt[40:]), whole[40:])


def test_logits_of_fewer_rows_are_the_same(model: Model, prompt: list[int], whole: np.ndarray):
    np.testing.assert_array_equal(model.eval(prompt, logits="last"), whole[-1:])
    assert model.eval(prompt, logits="none").shape == (0, 80)


def test_nothing_is_allocated_after_the_first_token(model: Model):
    """Decode steps reuse the program and every buffer of it."""
    with model.session() as session:
        session.eval([1, 2, 3])
        session.eval([4], "last")
        programs = dict(model._engine.programs._made)
        program = model._engine.programs.of(1, 1)
        tables = program.table._records.copy(), program.table._arguments.copy()
        for token in range(20):
            session.eval([token], "last")
        assert model._engine.programs._made == programs
        np.testing.assert_array_equal(program.table._records, tables[0])
        np.testing.assert_array_equal(program.table._arguments, tables[1])


def test_what_a_step_refuses(model: Model):
    with model.session() as session:
        with pytest.raises(OptionError, match="no tokens"):
            session.eval([])
        with pytest.raises(OptionError, match="token id 80 is outside the vocabulary of 80"):
            session.eval([3, 80])
        with pytest.raises(OptionError, match="stands twice"):
            model.step([(session, [1]), (session, [2])])
        with pytest.raises(MemoryLimitError, match=r"do not fit in context=256"):
            session.eval([1] * 257)
        with pytest.raises(OptionError, match="cannot rewind 1"):
            session.rewind(1)
        assert len(session) == 0
    with pytest.raises(OptionError, match="closed"):
        session.eval([1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_type": "q3"}, "kv_type='q3' must be one of f32, f16"),
        ({"devices": "tpu"}, "devices='tpu': 'tpu' is no device"),
        ({"devices": "cpu", "tensor_split": "3,1"}, "tensor_split='3,1': nothing to split"),
        ({"devices": "cpu", "main_device": 1}, "main_device=1: the list has 1 device"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"activations": "int4"}, "activations='int4' must be"),
        ({"context": 0}, "context=0"),
        ({"context": 10**12}, "at most context="),
    ],
)
def test_bad_options_are_one_line(path: Path, options: dict, message: str):
    with pytest.raises(runtime.Error, match=message) as caught:
        runtime.load(path, **options)
    assert "\n" not in str(caught.value)


def test_validate_accepts_a_right_model_and_names_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bad = np.ones(64, np.float32)
    bad[3] = np.nan
    path = write_model(tmp_path / "nan.gguf", replace={"blk.1.ffn_norm.weight": bad})
    monkeypatch.setenv("VALIDATE", "1")
    with runtime.load(write_model(tmp_path / "ok.gguf"), kv_type="f32") as model:
        model.eval([1, 2, 3])
        model.eval([1])
    said = capsys.readouterr().err
    assert "results of 2 steps agree with the reference" in said and said.count("\n") == 1
    with runtime.load(path, kv_type="f32") as model:
        for _ in range(2):
            with pytest.raises(BackendError, match="not finite"):
                model.eval([1])
    said = capsys.readouterr().err
    assert said.count("'blk.1.ffn_norm.weight' holds NaN") == 1 and "agree" not in said
