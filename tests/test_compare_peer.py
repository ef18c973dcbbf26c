"""`scripts/compare_peer.py`: pairing, ratios and failures, with a stand-in for both sides."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from gguf_files import gguf_bytes

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compare_peer.py"
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


def test_failures_are_one_line(script: ModuleType, tmp_path: Path) -> None:
    broken = run(script, tmp_path, 'reply = {"error": "KeyError: a\\nb"}')
    assert broken.exit_code == 1 and "Error: peer: KeyError: a b\n" in broken.output
    dead = run(script, tmp_path, "sys.exit(3)")
    assert "the process ended with status 3 during prompt" in dead.output
    missing = run(script, tmp_path, "pass", "--peer-python", str(tmp_path / "none"))
    assert missing.exit_code == 1 and "cannot start" in missing.output
    nothing = run(script, tmp_path, "pass", "-p", "0", "-n", "0")
    assert nothing.exit_code == 2 and "nothing to measure" in nothing.output
