"""Large sums over GPUs by NCCL: every call as the library wants it, the bits of our own sums."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_models import fake_gpus, on_fake_gpus
from fake_driver import FakeDriver
from fake_nccl import FakeNccl
from small_models import Sizes, write_model
from test_cuda_golden import check_near

import runtime
from runtime.backends.cuda import nccl as module
from runtime.backends.cuda.found import described
from runtime.backends.cuda.launcher import Device
from runtime.backends.cuda.nccl import Nccl, check_version, loaded
from runtime.backends.environment import nccl_from
from runtime.engine.advance import Advance, Piece
from runtime.engine.batch import Batch
from runtime.ops.errors import BackendError, OptionError

SIZE = {"hidden": 32, "inner": 64, "vocabulary": 32}
MODELS = {
    "short": Sizes("qwen3", layers=1, **SIZE),
    "three heads": Sizes("llama", layers=1, heads=6, kv_heads=3, **SIZE),
}
PROMPT, NEXT = [3, 9, 14, 7, 1], 5


@pytest.mark.parametrize(
    ("version", "want"), [(22705, (2, 27, 5)), (23204, (2, 32, 4)), (30000, (3, 0, 0))]
)
def test_versions_that_are_taken(version: int, want: tuple[int, ...]):
    assert check_version(FakeNccl(fake_gpus(), version)) == want


@pytest.mark.parametrize(
    ("version", "said"), [(22704, "2.27.4"), (22603, "2.26.3"), (2708, "2.7.8"), (21903, "2.19.3")]
)
def test_versions_that_write_out_of_bounds_are_refused(version: int, said: str):
    with pytest.raises(BackendError, match=rf"NCCL {said} writes out of bounds: install 2\.27\.5"):
        Nccl([0, 1], FakeNccl(fake_gpus(2), version))


def test_a_gpu_is_taken_once():
    with pytest.raises(BackendError, match="NCCL takes a GPU once"):
        Nccl([0, 1, 0], FakeNccl(fake_gpus(2)))


@contextmanager
def on_gpus(numbers: list[int], gpus: int) -> Iterator[tuple[Any, FakeNccl, list, list]]:
    """NCCL, its library, and of each GPU a stream and 8 numbers: those of rank n are n + 1."""
    driver = fake_gpus(gpus)
    library = driver.library = FakeNccl(driver)
    with ExitStack() as owned:
        devices = [Device(driver, n, kernels=()) for n in numbers]
        streams = [owned.enter_context(device.stream()) for device in devices]
        arenas = [owned.enter_context(device.arena(64)) for device in devices]
        buffers = [arena.take(64) for arena in arenas]
        for n, (device, buffer) in enumerate(zip(devices, buffers, strict=True)):
            device.activate()
            buffer.write(np.full(8, n + 1, np.float32), streams[n])
        nccl = Nccl(numbers, library)
        yield nccl, library, streams, buffers
        for device in devices:
            device.activate()
        nccl.close()


def test_sums_are_one_group_of_calls():
    with on_gpus([0, 2], 3) as (nccl, library, streams, buffers):
        addresses = [buffer.address for buffer in buffers]
        nccl.sum(addresses, [a + 32 for a in addresses], 8, [s.handle for s in streams])
        for buffer, stream, device in zip(buffers, streams, (0, 2), strict=True):
            library.driver.use_context(library.driver.retain_context(device))
            found = buffer.view(32).read(np.zeros(8, np.float32), stream)
            np.testing.assert_array_equal(found, np.full(8, 3, np.float32))
    assert library.calls == [
        "ncclGetVersion", "ncclCommInitAll", "ncclGroupStart", "ncclAllReduce", "ncclAllReduce",
        "ncclGroupEnd", "ncclCommDestroy", "ncclCommDestroy",
    ]  # fmt: skip
    assert library.sums == [(2, 8)] and library.alive() == 0


Call = Callable[[Nccl, list[int], list[Any]], None]
WRONG: dict[str, tuple[str, Call]] = {
    "another GPU's stream": ("is of GPU 1", lambda n, a, s: n.sum(a, a, 8, s[::-1])),
    "another GPU's memory": ("is not allocated", lambda n, a, s: n.sum(a[::-1], a, 8, s)),
    "behind the end": ("is not allocated", lambda n, a, s: n.sum(a, a, 17, s)),
    "nothing": ("0 elements", lambda n, a, s: n.sum(a, a, 0, s)),
    "destroyed": ("was destroyed", lambda n, a, s: _destroyed(n).sum(a, a, 8, s)),
    "no group": ("outside of a group", lambda n, a, s: _ungrouped(n, a[0], s[0])),
}


def _destroyed(nccl: Nccl) -> Nccl:
    kept = nccl._communicators
    nccl.close()
    nccl._communicators = kept
    return nccl


def _ungrouped(nccl: Nccl, address: int, stream: Any) -> None:
    nccl._call(
        "ncclAllReduce", ctypes.c_void_p(address), ctypes.c_void_p(address), ctypes.c_size_t(8), 7,
        0, ctypes.c_void_p(nccl._communicators[0]), ctypes.c_void_p(int(stream)),
    )  # fmt: skip


@pytest.mark.parametrize(("said", "call"), WRONG.values(), ids=WRONG)
def test_what_the_fake_library_refuses(said: str, call: Call):
    with pytest.raises(BackendError, match=said), on_gpus([0, 1], 2) as (nccl, _, streams, b):
        call(nccl, [buffer.address for buffer in b], [stream.handle for stream in streams])


@pytest.mark.parametrize("fails", ["ncclCommInitAll", "ncclAllReduce", "ncclGroupEnd"])
def test_what_fails_is_named(fails: str):
    driver = fake_gpus(2)
    library = FakeNccl(driver, fails=fails)
    said = rf"{fails} failed with code 1 \(as the test wants\)"
    with pytest.raises(BackendError, match=said):
        Nccl([0, 1], library).sum([1 << 44] * 2, [1 << 44] * 2, 8, [1, 2])
    assert library.depth == (fails == "ncclGroupEnd")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("nccl")

    def found(name: str) -> Path:
        file = folder / f"{name}.gguf"
        return file if file.exists() else write_model(file, MODELS[name])

    return found


def rows(path: Path, devices: str, gpus: int, **library: Any) -> tuple[np.ndarray, FakeNccl | None]:
    """Logits of a prompt and of a token behind it; the library, if there is one."""
    driver = fake_gpus(gpus)
    options = {"graphs": library.pop("graphs", True)}
    if library.pop("there", True):
        driver.library = FakeNccl(driver, **library)
    with on_fake_gpus(path, devices, driver=driver, **options) as model:
        with model.session() as session:
            found = np.concatenate([session.eval(PROMPT), session.eval([NEXT])])
        if driver.library is not None and len(model.backend._devices) == gpus:
            program, inputs, live = _step(model)
            assert len(program.profile(inputs, live)[1]) == len(program.plan.instructions)
    assert driver.library is None or driver.library.alive() == 0
    return found, driver.library


def _step(model: runtime.Model) -> Any:
    """Of one token, as `Engine.run` would run it."""
    with model.session() as session:
        advance = Advance(Piece(session._sequence, [NEXT]))
        model._engine.pools.reserve([advance])
        return model._engine.prepared(Batch([advance]), [advance])


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_sums_of_two_have_the_bits_of_our_own(
    path: Callable[[str], Path], graphs: bool, monkeypatch: pytest.MonkeyPatch
):
    """All of them, or those of prompts alone; of rows that are live."""
    devices = "tensor(cuda:0,cuda:1)"
    wanted, _ = rows(path("short"), devices, 2, there=False)
    row = 4 * SIZE["hidden"]
    for least, counts in ((1, {5, 1}), (2 * row, {5})):
        monkeypatch.setenv("RUNTIME_NCCL", str(least))
        found, library = rows(path("short"), devices, 2, graphs=graphs)
        np.testing.assert_array_equal(found, wanted)
        assert library is not None
        assert {n * 4 // row for _, n in library.sums[1:]} == counts


def test_sums_of_three_gpus(path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    """The library adds in orders of its own."""
    devices = "tensor(cuda:0,2*cuda:2,cuda:1)"
    wanted, _ = rows(path("three heads"), devices, 3, there=False)
    monkeypatch.setenv("RUNTIME_NCCL", "1")
    found, library = rows(path("three heads"), devices, 3)
    assert library is not None and len(library.sums) > 2
    assert ((found - wanted) ** 2).sum() <= 1e-10 * (wanted**2).sum()


OWN = {
    "virtual devices": ("tensor(cuda:0,cuda:0)", 1, "1", {}, ""),
    "off": ("tensor(cuda:0,cuda:1)", 2, "off", {}, ""),
    "small sums": ("tensor(cuda:0,cuda:1)", 2, "", {}, ""),
    "missing": ("tensor(cuda:0,cuda:1)", 2, "1", {"there": False}, "NCCL is not installed: pip"),
    "old": ("tensor(cuda:0,cuda:1)", 2, "1", {"version": 22703}, "NCCL 2.27.3 writes out of"),
    "broken": ("tensor(cuda:0,cuda:1)", 2, "1", {"fails": "ncclAllReduce"}, "ncclAllReduce fail"),
}


@pytest.mark.parametrize(("devices", "gpus", "least", "library", "said"), OWN.values(), ids=OWN)
def test_sums_are_our_own_otherwise(
    path: Callable[[str], Path], devices: str, gpus: int, least: str, library: dict[str, Any],
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """And one line says why, where they could have been NCCL's."""
    module.tell.cache_clear()
    monkeypatch.setenv("RUNTIME_NCCL", least)
    found, used = rows(path("short"), devices, gpus, **library)
    assert found.shape == (6, SIZE["vocabulary"])
    assert used is None or used.sums[1:] == []
    prefix = "sums of prompts are the GPUs' own: "
    lines = [line for line in capsys.readouterr().err.splitlines() if "sums" in line]
    assert [line.startswith(prefix + said) for line in lines] == [True] * bool(said)


@pytest.mark.parametrize("factor", [2.0, np.nan])
def test_a_library_that_sums_wrong_is_left(
    path: Callable[[str], Path], factor: float, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    summed = FakeDriver.summed

    def wrong(self: FakeDriver, parts: Sequence[Any], nbytes: int) -> None:
        summed(self, parts, nbytes)
        for gpu, _, _, target in parts:
            self._memory[gpu].contents(target, nbytes).view(np.float32)[:] *= factor

    module.tell.cache_clear()
    monkeypatch.setenv("RUNTIME_NCCL", "1")
    monkeypatch.setattr(FakeDriver, "summed", wrong)
    _, library = rows(path("short"), "tensor(cuda:0,cuda:1)", 2)
    assert library is not None and len(library.sums) == 1
    assert "sums of prompts are the GPUs' own: NCCL's sum of 2 x 0.18" in capsys.readouterr().err


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    for value, want in (("", 7), ("off", None), ("OFF", None), ("4096", 4096)):
        monkeypatch.setenv("RUNTIME_NCCL", value)
        assert nccl_from(7) == want
    for value in ("0", "-1", "1M", "on"):
        monkeypatch.setenv("RUNTIME_NCCL", value)
        with pytest.raises(OptionError, match=r"RUNTIME_NCCL=.*1 or more, or off"):
            nccl_from(7)


def test_devices_show_which_library_there_is():
    driver = fake_gpus(2)
    assert described(lambda: driver)["nccl"] == {
        "version": None, "problem": "NCCL is not installed: pip install nvidia-nccl-cu13"
    }  # fmt: skip
    driver.library = FakeNccl(driver)
    assert described(lambda: driver)["nccl"] == {"version": "2.32.3", "problem": ""}
    assert described(lambda: fake_gpus(1))["nccl"] is None


def test_the_installed_library_says_its_version():
    """Where there is one; it needs no GPU for that."""
    try:
        library = loaded()
    except BackendError:
        pytest.skip("NCCL is not installed")
    assert check_version(library) >= (2, 27, 5)


def test_a_golden_model_on_two_gpus(golden: Path, monkeypatch: pytest.MonkeyPatch):
    """The prompt's sums are NCCL's, those of single tokens our own."""
    ids = np.load(golden / "qwen3" / "golden.npz")["p48_ids"][:7].tolist()
    path, found = golden / "qwen3" / "model-f32.gguf", []
    for least in ("off", "4096"):
        monkeypatch.setenv("RUNTIME_NCCL", least)
        driver = fake_gpus(2)
        library = driver.library = FakeNccl(driver)
        with (
            on_fake_gpus(path, "tensor(cuda:0,cuda:1)", driver=driver) as model,
            model.session() as session,
        ):
            found.append(np.concatenate([session.eval(ids[:6]), session.eval(ids[6:])]))
    check_near(golden, "qwen3", "f32", ids, found[1])
    np.testing.assert_array_equal(found[1], found[0])
    assert len({count for _, count in library.sums[1:]}) == 1 and len(library.sums) > 2
