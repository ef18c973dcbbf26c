"""`scripts/compare_peer.py`: pairing, ratios and failures, with a stand-in for both sides."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner
from fake_model import FakeModel
from gguf_files import gguf_bytes

import runtime

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compare_peer.py"
WORKER = "compare_worker.py"
STAND_IN = """
import json, sys
sys.stdin.readline()
print(json.dumps({"name": sys.argv[1], "seconds": 0, "details": []}), flush=True)
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    seconds = {"peer": 2.0, "ours": 1.0}[sys.argv[1]] * len(request["ids"]) / 8
    reply = {"seconds": seconds * (1 + number // 2 % 2)}
    FAIL
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_peer", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_worker", SCRIPT.parent / WORKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeLibrary:
    """The calls of llama.cpp that a run makes, by name."""

    __version__, llama_token = "0", ctypes.c_int32

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str):
        def call(*arguments):
            self.called.append(name)
            known = {"llama_log_callback": arguments[:1], "llama_print_system_info": (b"",)}
            given = {"llama_decode": 0, "llama_batch_get_one": arguments}
            return known[name][0] if name in known else given.get(name, SimpleNamespace())

        return call


def test_the_peer_forgets_before_every_run(worker: ModuleType, monkeypatch) -> None:
    """Recurrent state would otherwise go on from the last run."""
    library = FakeLibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    peer = worker.Peer("m.gguf", 2, 64)
    library.called.clear()
    peer.prompt([1, 2, 3])
    peer.decode([1, 2])
    steps = [name for name in library.called if name in ("llama_memory_clear", "llama_decode")]
    assert (
        steps
        == ["llama_memory_clear", "llama_decode"] + ["llama_memory_clear"] + ["llama_decode"] * 2
    )


def test_ours_gives_its_session_back_after_every_run(worker: ModuleType, monkeypatch) -> None:
    model = FakeModel()
    monkeypatch.setattr(runtime, "load", lambda *_, **options: model, raising=False)
    ours = worker.Ours("m.gguf", 2, 64)
    ours.prompt([1, 2, 3])
    ours.decode([1, 2])
    assert model.evals == [3, "closed", 1, 1, "closed"]


def run(script: ModuleType, folder: Path, fail: str, *options: str):
    worker, model = folder / "worker.py", folder / "m.gguf"
    worker.write_text(STAND_IN.replace("FAIL", fail))
    model.write_bytes(gguf_bytes({}, {"token_embd.weight": ((4, 4), 0, bytes(64))}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "WORKER", worker)
        arguments = [str(model), "-p", "16", "-n", "8", "-r", "2", *options]
        return CliRunner().invoke(script.main, arguments)


def test_ratios_are_taken_pair_by_pair(script: ModuleType, tmp_path: Path) -> None:
    result = run(script, tmp_path, "pass", "--json")
    assert result.exit_code == 0, result.output
    prompt, decode = json.loads(result.stdout)["tests"]
    assert (prompt["tokens"], decode["tokens"]) == (16, 8)
    assert sorted(prompt["peer"]["all"]) == [2, 4] and sorted(prompt["ours"]["all"]) == [4, 8]
    assert decode["ratio"] == {"median": 2, "min": 2, "max": 2}


def test_the_table_shows_both_sides(script: ModuleType, tmp_path: Path) -> None:
    result = run(script, tmp_path, "pass")
    assert "ours / peer" in result.stdout and "2.00 (2.00 .. 2.00)" in result.stdout
    alone = run(script, tmp_path, "pass", "--only", "ours").stdout
    assert "prompt 16" in alone and "peer" not in alone


def test_a_busy_machine_is_told(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    for load, told in ((3.0, True), (0.2, False)):
        monkeypatch.setattr(script.os, "getloadavg", lambda load=load: (load, 0, 0), raising=False)
        assert ("the machine is busy (load 3.0)" in run(script, tmp_path, "pass").stderr) is told


def test_failures_are_one_line(script: ModuleType, tmp_path: Path) -> None:
    broken = run(script, tmp_path, 'reply = {"error": "KeyError: a\\nb"}')
    assert broken.exit_code == 1 and "Error: peer: KeyError: a b\n" in broken.output
    dead = run(script, tmp_path, "sys.exit(3)")
    assert "the process ended with status 3 during prompt" in dead.output
    missing = run(script, tmp_path, "pass", "--peer-python", str(tmp_path / "none"))
    assert missing.exit_code == 1 and "cannot start" in missing.output
    nothing = run(script, tmp_path, "pass", "-p", "0", "-n", "0")
    assert nothing.exit_code == 2 and "nothing to measure" in nothing.output
