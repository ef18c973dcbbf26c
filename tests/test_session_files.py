"""Saved sessions: the bits of the session that was saved, or one line that says why not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_models import Sizes, write_model

import runtime
from runtime import session_file
from runtime.errors import Error, FileError, MemoryLimitError, OptionError
from runtime.memory.block_file import HEAD, parsed
from runtime.ops.kv_formats import KV_FORMATS

FIRST, SECOND, NEXT = [*range(1, 72)], [7, 3, 9, 40], [5, 6, 8]
DEVICES = ("cpu", "tensor(cpu:0,cpu:1)", "layers(cpu:0,cpu:1)")
KINDS = ("qwen3", "qwen35")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and a hybrid one."""
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: write_model(folder / f"{kind}.gguf", Sizes(kind, layers=3), "Q4_0") for kind in KINDS
    }


def load(path: Path, **options: object) -> runtime.Model:
    return runtime.load(path, progress=False, **options)  # type: ignore[arg-type]


def saved(model: runtime.Model, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Save a session; what comes next, and what after going back to the first message."""
    with model.session() as session:
        session.eval(FIRST, "none")
        session.eval(SECOND, "none")
        session.save(path)
        ahead = session.eval(NEXT)
        session.rewind(len(NEXT) + len(SECOND))
        return ahead, session.eval(NEXT)


def check(model: runtime.Model, path: Path, wanted: tuple[np.ndarray, np.ndarray]) -> None:
    session = runtime.Session.load(model, path)
    assert session.tokens == FIRST + SECOND and session.evaluated == len(session)
    np.testing.assert_array_equal(session.eval(NEXT), wanted[0])
    session.rewind(len(NEXT) + len(SECOND))
    assert session.evaluated == len(FIRST)  # of a hybrid model the state there was kept
    np.testing.assert_array_equal(session.eval(NEXT), wanted[1])


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_every_cache_type(files, kind: str, kv: str, tmp_path: Path):
    with load(files[kind], kv_type=kv) as model:
        wanted = saved(model, tmp_path / "s.rt")
    with load(files[kind], kv_type=kv, context=128) as model:
        check(model, tmp_path / "s.rt", wanted)


@pytest.mark.parametrize("kv", ["f16", "q8_0,q4_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_one_arrangement_of_devices_saved_others_load(files, kind: str, kv: str, tmp_path):
    found = set()
    for writer in DEVICES:
        with load(files[kind], kv_type=kv, devices=writer) as model:
            wanted = saved(model, tmp_path / "s.rt")
            pages = 3 * (HEAD + model._engine.plain.page_nbytes)
        content = (tmp_path / "s.rt").read_bytes()
        start = HEAD + parsed(content[:HEAD]).nbytes
        found.add(content[start : start + pages])
        for reader in DEVICES:
            with load(files[kind], kv_type=kv, devices=reader) as model:
                check(model, tmp_path / "s.rt", wanted)
    assert len(found) == 1


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_sessions_of_every_length(files, kind: str, length: int, tmp_path: Path):
    with load(files[kind]) as model, model.session() as session:
        if length:
            session.eval(FIRST[:length], "none")
        session.save(tmp_path / "s.rt")
        other = runtime.Session.load(model, tmp_path / "s.rt")
        assert other.tokens == FIRST[:length]
        np.testing.assert_array_equal(other.eval(NEXT), session.eval(NEXT))


def test_a_session_that_was_rewound(files, tmp_path: Path):
    with load(files["qwen35"]) as model, model.session() as session:
        session.eval(FIRST, "none")
        session.rewind(5)  # no state is there: some tokens will be evaluated again
        session.save(tmp_path / "s.rt")
        other = runtime.Session.load(model, tmp_path / "s.rt")
        assert other.tokens == FIRST[:-5] and other.evaluated == session.evaluated
        np.testing.assert_array_equal(other.eval(NEXT), session.eval(NEXT))


def test_nothing_of_others_is_in_a_file(files, tmp_path: Path):
    """Behind the last token of a page there may be what somebody else had there."""
    with load(files["qwen3"], sequences=1) as model:
        for ids in ([3] * 200, [4] * 200):
            with model.session() as session:
                session.eval(ids, "none")
        with model.session() as session:
            session.eval(FIRST[:5], "none")
            session.save(tmp_path / "a.rt")
    with load(files["qwen3"]) as model, model.session() as session:
        session.eval(FIRST[:5], "none")
        session.save(tmp_path / "b.rt")
    assert (tmp_path / "a.rt").read_bytes() == (tmp_path / "b.rt").read_bytes()


def refused(model: runtime.Model, path: Path, kind: type[Error] = FileError) -> str:
    """What is said; nothing was taken and nothing has changed."""
    pools = model._engine.pools
    before = pools.pages.free, pools.slots.free
    with pytest.raises(kind) as caught:
        runtime.Session.load(model, path)
    assert (pools.pages.free, pools.slots.free) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_both_sides_of_the_first_difference_are_named(files, tmp_path: Path):
    path = tmp_path / "s.rt"
    with load(files["qwen3"]) as model:
        saved(model, path)
    other = write_model(tmp_path / "other.gguf", Sizes("qwen3", layers=3, vocabulary=81), "Q4_0")
    for source, options, sides in (
        (files["qwen35"], {}, ("architecture qwen3,", "architecture qwen35")),
        (other, {}, ("weights ", "weights ")),
        (files["qwen3"], {"kv_type": "q8_0"}, ("kv_type f16", "kv_type q8_0")),
        (files["qwen3"], {"cache_rotation": False}, ("rotation True", "rotation False")),
        (files["qwen3"], {"activations": "f32"}, ("activations int8", "activations f32")),
    ):
        with load(source, **options) as model:
            said = refused(model, path)
            assert str(path) in said and all(side in said for side in sides)
    with load(files["qwen3"], context=64) as model:
        assert "75 tokens do not fit" in refused(model, path, MemoryLimitError)


def test_another_version_is_named(files, tmp_path: Path, monkeypatch):
    with load(files["qwen3"]) as model:
        saved(model, tmp_path / "s.rt")
    monkeypatch.setattr("runtime.engine.identity.code", lambda: "an older one")
    with load(files["qwen3"]) as model:
        assert "an older one of this package" in refused(model, tmp_path / "s.rt")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_at_every_kind_of_place(files, kind: str, tmp_path: Path):
    path, damaged = tmp_path / "s.rt", tmp_path / "d.rt"
    with load(files[kind]) as model:
        saved(model, path)
        content = path.read_bytes()
        about = parsed(content[:HEAD]).nbytes
        first = HEAD + about  # the first page
        size = HEAD + model._engine.plain.page_nbytes
        places = [0, 9, 20, 70, HEAD - 1, HEAD, HEAD + about // 2, first - 1]
        for n in range(3):
            at = first + n * size
            places += [at, at + 9, at + 20, at + 70, at + 90, at + HEAD, at + size - 1]
        for place in (*places, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            damaged.write_bytes(flipped)
            assert "no saved session" in refused(model, damaged)
        for end in (0, 1, HEAD - 1, HEAD, first - 1, first, first + 5, len(content) - 1):
            damaged.write_bytes(content[:end])
            refused(model, damaged)
        damaged.write_bytes(content + b"0")
        assert "cut short, or longer" in refused(model, damaged)
        a, b = content[first : first + size], content[first + size : first + 2 * size]
        damaged.write_bytes(content[:first] + b + a + content[first + 2 * size :])
        assert "put together" in refused(model, damaged)
        damaged.write_bytes(b"GGUF" + bytes(5000))
        assert "no such file" in refused(model, damaged)
        assert "No such file" in refused(model, tmp_path / "absent.rt")
        assert "directory" in refused(model, tmp_path)


def test_a_write_that_fails_leaves_the_file_that_was_there(files, tmp_path: Path, monkeypatch):
    path = tmp_path / "s.rt"
    with load(files["qwen35"]) as model:
        wanted = saved(model, path)
        write = session_file.write_block

        def after(blocks: int, error: BaseException) -> Callable:
            left = [None] * blocks

            def failing(*given: object) -> None:
                if not left:
                    raise error
                left.pop()
                write(*given)  # type: ignore[arg-type]

            return failing

        with model.session() as session:
            session.eval(NEXT)
            for blocks in range(3):
                full = OSError(errno.ENOSPC, "No space left on device")
                for error, kind in ((full, FileError), (KeyboardInterrupt(), KeyboardInterrupt)):
                    monkeypatch.setattr(session_file, "write_block", after(blocks, error))
                    with pytest.raises(kind):
                        session.save(path)
            assert session.tokens == NEXT
        assert [p.name for p in tmp_path.iterdir()] == ["s.rt"]
        check(model, path, wanted)


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(files, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "s.rt", tmp_path / "link.rt"
    try:
        link.symlink_to(Path("elsewhere") / "s.rt")
    except OSError:
        pytest.skip("links cannot be made here")
    with load(files["qwen3"]) as model:
        for _ in range(2):  # first it leads to nothing
            wanted = saved(model, link)
            assert link.is_symlink() and not target.is_symlink()
            assert [p.name for p in target.parent.iterdir()] == ["s.rt"]
        check(model, target, wanted)
        check(model, link, wanted)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_refused_and_stays(files, tmp_path: Path):
    pipe = tmp_path / "s.rt"
    os.mkfifo(pipe)
    with load(files["qwen3"]) as model, model.session() as session:
        session.eval(NEXT)
        for use in (lambda: session.save(pipe), lambda: runtime.Session.load(model, pipe)):
            with pytest.raises(FileError, match=r"s\.rt: .*no regular file"):
                use()
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


def test_what_cannot_be_saved_or_loaded_is_said(files, tmp_path: Path):
    with load(files["qwen3"]) as model:
        session = model.session()
        session.eval(NEXT)
        with pytest.raises(FileError, match="No such file"):
            session.save(tmp_path / "absent" / "s.rt")
        with pytest.raises(OptionError, match="path of a file"):
            session.save("")
        with pytest.raises(OptionError, match="model=3"):
            runtime.Session.load(3, tmp_path / "s.rt")  # type: ignore[arg-type]
        session.save(tmp_path / "s.rt")
        if os.name == "posix":
            assert (tmp_path / "s.rt").stat().st_mode & 0o777 == 0o600
        session.close()
        with pytest.raises(OptionError, match="session is closed"):
            session.save(tmp_path / "s.rt")
    with pytest.raises(OptionError, match="model is closed"):
        runtime.Session.load(model, tmp_path / "s.rt")
    with load(files["qwen3"], devices="reference") as model:
        session = model.session()
        with pytest.raises(OptionError, match="reference"):
            session.save(tmp_path / "s.rt")
        with pytest.raises(FileError, match="the model here of devices that compute as reference"):
            runtime.Session.load(model, tmp_path / "s.rt")


def test_there_is_room_for_one_state_at_least(files, tmp_path: Path):
    path = tmp_path / "s.rt"
    with load(files["qwen35"]) as model:
        ahead, _ = saved(model, path)
    with load(files["qwen35"], sequences=1) as model:
        slots = model._engine.pools.slots
        held = [model.session() for _ in range(slots.count)]
        for n, session in enumerate(held):
            session.eval([n + 1])
        assert slots.free == 0  # checkpoints give way, states do not
        refused(model, path, MemoryLimitError)
        held.pop().close()
        session = runtime.Session.load(model, path)
        np.testing.assert_array_equal(session.eval(NEXT), ahead)
