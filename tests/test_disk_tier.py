"""Prompts kept on disk: read by the next process, with the bits of a cold run."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from small_models import Sizes, write_model

import runtime
from runtime.engine.prompts import Reuse
from runtime.errors import OptionError
from runtime.memory import block_store
from runtime.memory.prefix_edges import block_key
from runtime.ops import PAGE

STEPS = int(os.environ.get("DISK_STEPS", "60"))
KINDS = ("qwen3", "qwen35")
DEVICES = ("cpu", "tensor(cpu:0,cpu:1)", "layers(cpu:0,cpu:1)")
FIRST = [n % 70 + 1 for n in range(150)]
SECOND = [*FIRST, *range(1, 72), 5, 5]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and a hybrid one."""
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: write_model(folder / f"{kind}.gguf", Sizes(kind, layers=3, context=512), "Q4_0")
        for kind in KINDS
    }


@contextmanager
def opened(path: Path, cache: Path | None, **options: object) -> Iterator[runtime.Model]:
    given = {"progress": False, "cache_dir": cache, **options}
    with runtime.load(path, **given) as model:  # type: ignore[arg-type]
        yield model


def ask(model: runtime.Model, tokens: list[int]) -> tuple[np.ndarray, Reuse]:
    """The logits behind a prompt, as an answer would begin."""
    engine = model._engine
    with model.session() as session:
        with engine.alone():
            reuse = engine.prompts.resume(session._sequence, 0, tokens)
        return session.eval(tokens[len(session) :], "last")[0], reuse


def cold(path: Path, prompts: list[list[int]], **options: object) -> list[np.ndarray]:
    with opened(path, None, prompt_cache=False, **options) as model:
        return [model.eval(tokens, "last")[0] for tokens in prompts]


def page_files(cache: Path) -> list[Path]:
    return sorted(p for p in cache.glob("prompts/*/*") if p.suffix == ".page")


@pytest.mark.parametrize("kv", ["f16", "q8_0,q4_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_process_goes_on_from_it(files, kind: str, kv: str, tmp_path: Path):
    want = cold(files[kind], [FIRST, SECOND], kv_type=kv)
    reach = 150 if kind == "qwen35" else 128  # a state lies within a page, pages are whole
    for writer in DEVICES:
        cache = tmp_path / writer
        with opened(files[kind], cache, kv_type=kv, devices=writer) as model:
            got, reuse = ask(model, FIRST)
            assert reuse.source == "" and np.array_equal(got, want[0])
        for reader in DEVICES:
            with opened(files[kind], cache, kv_type=kv, devices=reader) as model:
                got, reuse = ask(model, SECOND)
                assert np.array_equal(got, want[1])
                assert reuse.source == "disk" and reuse.cached_tokens >= reach
                assert reuse.cached_tokens == reach or reader != DEVICES[0]
                again, reuse = ask(model, SECOND)
                assert reuse.source == "cache" and np.array_equal(again, want[1])


def test_what_memory_had_to_give_up_is_on_disk(files, tmp_path: Path):
    prompts = [[n + 1, *FIRST, *FIRST] for n in range(6)]
    want = cold(files["qwen3"], prompts)
    with opened(files["qwen3"], tmp_path, sequences=1) as model:
        for tokens in prompts:
            ask(model, tokens)
            assert model._engine.disk is not None and model._engine.disk.flush(30)
        got, reuse = ask(model, prompts[0])
        assert reuse.source == "disk" and np.array_equal(got, want[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 2])
def test_a_damaged_block_costs_what_is_behind_it(files, kind, which, tmp_path: Path, capfd):
    (want,) = cold(files[kind], [SECOND])
    with opened(files[kind], tmp_path) as model:
        ask(model, FIRST[:100])
        ask(model, FIRST)
        ask(model, SECOND)
    with opened(files[kind], tmp_path) as model:
        disk = model._engine.disk
        assert disk is not None
        key = block_key(disk.key, FIRST[:PAGE])
        for n in range(which):
            key = block_key(key, FIRST[(n + 1) * PAGE : (n + 2) * PAGE])
        path = disk.store.folder / f"{key.hex()}.page"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        got, reuse = ask(model, SECOND)
        assert np.array_equal(got, want) and reuse.cached_tokens <= which * PAGE
        assert capfd.readouterr().err.count("is not used") == 1
        assert disk.flush(30)
        got, reuse = ask(model, SECOND)
        assert np.array_equal(got, want)
    with opened(files[kind], tmp_path) as model:  # what was dropped was written again
        got, reuse = ask(model, SECOND)
        assert np.array_equal(got, want) and reuse.cached_tokens >= 150


def test_of_damaged_states_the_one_before_is_used(files, tmp_path: Path):
    (want,) = cold(files["qwen35"], [SECOND])
    with opened(files["qwen35"], tmp_path) as model:
        ask(model, FIRST[:80])
        ask(model, FIRST)
    ends = sorted(tmp_path.glob("prompts/*/*.end"), key=lambda p: p.stat().st_mtime_ns)
    assert len(ends) == 2
    ends[1].write_bytes(ends[1].read_bytes()[:-1])
    with opened(files["qwen35"], tmp_path) as model:
        got, reuse = ask(model, SECOND)
        assert (reuse.source, reuse.snapshot) == ("disk", 80) and np.array_equal(got, want)


@pytest.mark.parametrize(
    "other", [{"kv_type": "q8_0"}, {"activations": "f32"}, {"path": "another"}, {"code": "older"}]
)
def test_another_model_or_version_finds_nothing(files, other, tmp_path: Path, monkeypatch):
    with opened(files["qwen3"], tmp_path) as model:
        ask(model, FIRST)
    path = files["qwen3"]
    if other.pop("path", None):
        sizes = Sizes("qwen3", layers=3, context=512)
        path = write_model(tmp_path / "o.gguf", sizes, "Q8_0")
    if other.pop("code", None):
        monkeypatch.setattr("runtime.engine.identity.code", lambda: "older")
    (want,) = cold(path, [SECOND], **other)
    with opened(path, tmp_path, **other) as model:
        got, reuse = ask(model, SECOND)
        assert reuse.source == "" and np.array_equal(got, want)
    assert len(list(tmp_path.glob("prompts/*"))) == 2


def test_a_full_disk_leaves_the_cache_in_memory(files, tmp_path: Path, monkeypatch, capfd):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_store, "write_block", full)
    want = cold(files["qwen35"], [FIRST, SECOND])
    with opened(files["qwen35"], tmp_path) as model:
        for tokens, logits in zip((FIRST, SECOND, SECOND), (*want, want[1]), strict=True):
            got, reuse = ask(model, tokens)
            assert np.array_equal(got, logits)
            assert model._engine.disk is not None and model._engine.disk.flush(30)
        assert reuse.source == "cache"
    assert capfd.readouterr().err.count("runtime: ") == 1
    assert not page_files(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_breaks_reading_off_takes_nothing(files, kind: str, tmp_path: Path, monkeypatch):
    (want,) = cold(files[kind], [SECOND])
    with opened(files[kind], tmp_path) as model:
        ask(model, FIRST)
    with opened(files[kind], tmp_path) as model:
        engine = model._engine
        free = engine.pools.pages.free, engine.pools.slots.free
        read = block_store.BlockStore._read
        for left in range(4):
            count = [left]

            def interrupted(*given: object, count: list[int] = count) -> object:
                if not count[0]:
                    raise KeyboardInterrupt
                count[0] -= 1
                return read(*given)  # type: ignore[arg-type]

            monkeypatch.setattr(block_store.BlockStore, "_read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ask(model, SECOND)
            assert (engine.pools.pages.free, engine.pools.slots.free) == free
        monkeypatch.setattr(block_store.BlockStore, "_read", read)
        got, reuse = ask(model, SECOND)
        assert reuse.source == "disk" and np.array_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_where_memory_is_held_by_others_it_is_evaluated(files, kind: str, tmp_path: Path):
    (want,) = cold(files[kind], [FIRST])
    with opened(files[kind], tmp_path) as model:
        ask(model, FIRST)
    with opened(files[kind], tmp_path, sequences=1) as model:
        held = [model.session() for _ in range(3)]
        for n, session in enumerate(held[:2]):
            session.eval([n + 1] * 200, "none")
        engine = model._engine
        before = engine.pools.pages.free
        for session in held:
            session.close()
        got, _ = ask(model, FIRST)
        assert np.array_equal(got, want) and before < engine.pools.pages.count


def test_options_of_the_folder(files, tmp_path: Path):
    with pytest.raises(OptionError, match="cache_dir names"):
        runtime.load(files["qwen3"], cache_disk=5)
    with pytest.raises(OptionError, match="prompt_cache=False"):
        runtime.load(files["qwen3"], cache_dir=tmp_path, prompt_cache=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="this is a file"):
        runtime.load(files["qwen3"], cache_dir=tmp_path / "file")
    for wrong in ("much", 0, -3, 1.5):
        with pytest.raises(OptionError, match="cache_disk"):
            runtime.load(files["qwen3"], cache_dir=tmp_path, cache_disk=wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="reference"):
        runtime.load(files["qwen3"], cache_dir=tmp_path, devices="reference")
    with opened(files["qwen3"], tmp_path, cache_disk=12345) as model:
        assert model._engine.disk is not None and model._engine.disk.store.budget == 12345


@pytest.mark.parametrize("kind", KINDS)
def test_random_edits_and_restarts(files, kind: str, tmp_path: Path):
    """Append, branch, edit, cut, restart, evict; DISK_STEPS of them."""
    rng, prompts, seen = random.Random(3), [FIRST[:40]], 0
    disk = STEPS // 10
    with opened(files[kind], None, prompt_cache=False) as plain:
        for round in range(max(1, disk)):
            options = {"sequences": rng.choice((1, 8)), "devices": rng.choice(DEVICES)}
            with opened(files[kind], tmp_path, cache_disk=1_000_000, **options) as model:
                for _ in range(10):
                    tokens = edited(rng, rng.choice(prompts))
                    prompts = [*prompts[-8:], tokens]
                    got, reuse = ask(model, tokens)
                    seen += reuse.source == "disk"
                    assert np.array_equal(got, plain.eval(tokens, "last")[0]), (round, reuse)
    assert seen >= disk // 2


def edited(rng: random.Random, tokens: list[int]) -> list[int]:
    at, new = (
        rng.randrange(1, len(tokens)),
        [rng.randrange(1, 79) for _ in range(rng.randint(1, 60))],
    )
    kind = rng.randrange(4)
    if kind == 0:
        return [*tokens, *new][-400:]
    if kind == 1:
        return [*tokens[:at], *new]
    if kind == 2:
        return [*tokens[:at], *new[:3], *tokens[at:]][:400]
    return [*tokens[: max(2, at)]]
