"""Ctrl-C in the middle of a prompt of a large model: an answer at once, and nothing has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LATEST = 0.3  # seconds from the signal to the exception
SCRIPT = """
import os, signal, sys, threading, time
import numpy as np
import runtime

model = runtime.load(sys.argv[1], devices=sys.argv[2])
session, ids = model.session(), np.random.default_rng(0).integers(0, 1000, 500).tolist()
session.eval(ids[:3], "none")
for _ in range(2):
    started = time.perf_counter()
    right = model.eval(ids, "last")
    whole = time.perf_counter() - started
for part in (1, 3, 5, 7):
    sent = []

    def press():
        time.sleep(whole * part / 9)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        session.eval(ids[3:], "last")
        time.sleep(whole)
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        waited = time.perf_counter() - sent[0]
    thread.join()
    assert session.tokens == ids[:3]
    print(whole, waited)
assert np.array_equal(session.eval(ids[3:], "last"), right)
"""


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.parametrize("devices", ["cpu", "layers(cpu:0,cpu:1)", "tensor(cpu:0,cpu:1)"])
@pytest.mark.parametrize("preset", ["qwen3-0.6b", "qwen35-0.8b"])
def test_a_step_is_left_at_once(tmp_path: Path, preset: str, devices: str):
    path = tmp_path / "m.gguf"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    make = [sys.executable, str(ROOT / "scripts" / "make_random_model.py"), preset, "Q4_0"]
    subprocess.run([*make, str(path), "--layers", "8"], check=True, env=environment)
    command = [sys.executable, "-c", SCRIPT, str(path), devices]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in done.stdout.splitlines():
        whole, waited = map(float, line.split())
        assert waited < LATEST, f"{waited:.2f} s of a step of {whole:.2f} s"
