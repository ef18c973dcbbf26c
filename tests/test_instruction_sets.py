"""A whole model under every instruction set this machine can run, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import Sizes, write_model

import runtime
from runtime.backends.cpu.compile import isa

_PROGRAM = """
import sys, numpy as np, runtime
out, *paths = sys.argv[1:]
found = {}
for path in paths:
    for activations in ("int8", "f32"):
        with runtime.load(path, kv_type="f32", threads=2, activations=activations) as model:
            with model.session() as session:
                rows = [session.eval(list(range(1, 41))), *map(session.eval, ([5], [6, 7, 8]))]
            with model.session() as session:
                whole = session.eval(list(range(1, 41)) + [5, 6, 7, 8])
        found[path + activations], found[path + activations + "one"] = np.concatenate(rows), whole
np.savez(out, **found)
"""
SWEEP = pytest.param(("Q5_1",), marks=pytest.mark.sweep)  # which has minima


@pytest.mark.parametrize("kinds", [("F32", "Q4_0"), SWEEP], ids="-".join)
@pytest.mark.parametrize("name", isa.available())
def test_models_agree_with_the_reference(name: str, kinds: tuple[str, ...], tmp_path: Path):
    paths = [write_model(tmp_path / f"{kind}.gguf", Sizes(layers=1), kind) for kind in kinds]
    out = tmp_path / "logits.npz"
    environment = {**os.environ, "RUNTIME_CPU_ISA": name}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(out), *map(str, paths)], env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(out)
    for path in paths:
        with runtime.load(path, devices="reference", kv_type="f32") as exact:
            want = exact.eval([*range(1, 41), 5, 6, 7, 8])
        for activations, limit in (("f32", 1e-11), ("int8", 2e-3)):
            got = found[f"{path}{activations}"]
            error = float(((got - want) ** 2).sum() / (want**2).sum())
            assert error <= limit, (path.stem, activations)
            np.testing.assert_array_equal(found[f"{path}{activations}one"], got)


def test_unavailable_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    missing = [name for name in isa.NAMES if name not in isa.available()]
    if not missing:
        pytest.skip("this machine has every instruction set")
    monkeypatch.setenv("RUNTIME_CPU_ISA", missing[0])
    with pytest.raises(runtime.Error, match="cannot run on this processor"):
        isa.selected()
