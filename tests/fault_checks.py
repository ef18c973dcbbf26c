"""Checks that faults are put in front of: each raises where something is wrong, on a model's file.

Some are VALIDATE and the order of threads, others the laws that sessions are held to elsewhere,
on short prompts of small models: seeded_faults.py says which must see what.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_edits import Edits
from small_models import NOVEL, Sizes, tensors, write_model
from tensor_models import summed

import runtime
from runtime.backends.cpu import planner
from runtime.backends.cpu.compile.objects import function
from runtime.backends.cpu.run.program import Program
from runtime.backends.passes import prepare
from runtime.backends.reference import ReferenceBackend, ReferenceProgram
from runtime.model import Model
from runtime.ops.graph import Graph

Check = Callable[[Path], None]
PROMPT = np.random.default_rng(3).integers(0, 80, 75).tolist()
# What faults are put into: name -> sizes, type of the matrices.
MODELS = {
    "dense": (Sizes(layers=1), "Q4_0"),
    "windowed": (replace(NOVEL["gpt-oss"], layers=1), "Q8_0"),
    "hybrid": (replace(NOVEL["qwen35moe"], layers=2), "Q8_0"),
    "coded": (Sizes(dim=48), "Q4_0"),
}
CACHES = {"coded": "q6_0,q5_1"}  # of others the default


def write_models(folder: Path) -> dict[str, Path]:
    """The files of MODELS; "tied" has two experts whose scores are always equal."""
    found = {
        name: write_model(folder / f"{name}.gguf", size, kind)
        for name, (size, kind) in MODELS.items()
    }
    size, kind = MODELS["windowed"]
    names = ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_inp.bias")
    tied = {name: tensors(size)[name] for name in names}
    for values in tied.values():
        values[1] = values[0]
    found["tied"] = write_model(folder / "tied.gguf", size, kind, replace=tied)
    return found


def load(path: Path, **options: Any) -> Model:
    given = {"threads": 1, "context": 128, "sequences": 3, "kv_type": CACHES.get(path.stem, "f16")}
    return runtime.load(path, **{**given, **options})


def steps(model: Model) -> list[np.ndarray]:
    """Logits of a prompt over two pages, a fork that parts, and batches with and without more."""
    with model.session() as session:
        found = [session.eval(PROMPT[:36]), session.eval(PROMPT[36:40], "last")]
        child = session.fork()
        found += model.step([(session, [5, 6]), (child, [7])])
        found += model.step([(session, [1]), (child, [2])])
        child.close()
    return found


def validate(path: Path) -> None:
    """VALIDATE=1"""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setenv("VALIDATE", "1")
        with load(path) as model:
            steps(model)


def any_order_of_threads(path: Path) -> None:
    """rows in any order of threads"""

    def in_turn(self: Program, inputs: Any, live: Any) -> list[np.ndarray]:
        self.prepare(inputs, live)
        for first, end in itertools.pairwise(self.table.starts):
            for thread in (2, 1, 0):
                for kernel, arguments, _ in self.table._records[first:end]:
                    function(int(kernel))(int(arguments), thread, 3)
        return self.results(live)

    with load(path, threads=3) as model, pytest.MonkeyPatch.context() as patch:
        want = steps(model)
        patch.setattr(Program, "run", in_turn)
        same(steps(model), want)


def fused_is_plain(path: Path) -> None:
    """fused graph = plain graph"""

    def prepared(self: ReferenceBackend, graph: Graph) -> ReferenceProgram:
        graph = prepare.prepare(graph, planner.options())
        return ReferenceProgram(graph, self.weight, self.state)

    with load(path, devices="reference", kv_type="f32") as model:
        want = steps(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceBackend, "program", prepared)
        with load(path, devices="reference", kv_type="f32") as model:
            for got, plain in zip(steps(model), want, strict=True):
                np.testing.assert_allclose(got, plain, rtol=0, atol=1e-5)


def law_of_cuts(path: Path) -> None:
    """law: however a prompt is cut"""
    with load(path) as model, model.session() as session:
        rows = [session.eval(PROMPT[i : i + 7]) for i in range(0, len(PROMPT), 7)]
        same([np.concatenate(rows)], [model.eval(PROMPT)])


def law_of_batches(path: Path) -> None:
    """law: whatever else is in the batch"""
    with load(path) as model:
        prompts = PROMPT[:9], PROMPT[20:22], PROMPT[30:63]
        sessions = [model.session() for _ in prompts]
        first = model.step([(s, ids[:-1]) for s, ids in zip(sessions, prompts, strict=True)])
        second = model.step([(s, ids[-1:]) for s, ids in zip(sessions, prompts, strict=True)])
        for ids, *rows in zip(prompts, first, second, strict=True):
            same([np.concatenate(rows)], [model.eval(ids)])


def law_of_forks(path: Path) -> None:
    """law: a fork is the sequence itself"""
    with load(path) as model, model.session() as session:
        whole = model.eval(PROMPT)
        session.eval(PROMPT[:44])
        session.eval(PROMPT[44:45])
        child = session.fork()
        session.eval([1])
        session.eval([2, 3])
        same([child.eval(PROMPT[45:])], [whole[45:]])
        same([session.eval([4])], [model.eval([*PROMPT[:45], 1, 2, 3, 4])[-1:]])


def law_of_rewinds(path: Path) -> None:
    """law: a rewind is as if nothing had been"""
    with load(path) as model, model.session() as session:
        session.eval(PROMPT[:40])
        session.eval([9, 8, 7])
        session.rewind(8)
        same([session.eval(PROMPT[35:])], [model.eval(PROMPT)[35:]])


def law_of_prompts(path: Path) -> None:
    """law: what is begun from the cache of prompts is as evaluated anew"""
    with load(path, context=256) as model, load(path, context=256, prompt_cache=False) as cold:
        Edits(model, cold, seed=7, trees=False).run(200)


def law_of_devices(path: Path) -> None:
    """law: several devices are one"""
    exact = {"kv_type": "f32", "activations": "f32"}
    with load(path, **exact) as model:
        want = steps(model)
    with summed(), load(path, devices="tensor(cpu:0,cpu:1,cpu:2)", threads=3, **exact) as model:
        for got, whole in zip(steps(model), want, strict=True):
            error = ((got - whole) ** 2).sum() / (whole**2).sum()
            assert error <= 1e-10, f"logits differ by {error:.1e}"


def law_of_exact_devices(path: Path) -> None:
    """law: several devices that cut no sum change no bits"""
    with load(path) as model:
        want = steps(model)
    with load(path, devices="tensor(cpu:0,cpu:1,cpu:2)", threads=3) as model:
        same(steps(model), want)


def law_of_stages(path: Path) -> None:
    """law: layers on several devices change no bits"""
    with load(path) as model:
        want = steps(model)
    with load(path, devices="layers(cpu:0,cpu:1,cpu:2)", threads=3) as model:
        same(steps(model), want)


def same(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


CHECKS: tuple[Check, ...] = (
    validate, any_order_of_threads, fused_is_plain, law_of_cuts, law_of_batches, law_of_forks,
    law_of_rewinds, law_of_prompts, law_of_devices, law_of_exact_devices, law_of_stages,
)  # fmt: skip


def red(check: Check, path: Path) -> str:
    """What a check says of a fault, in one line; nothing where it is green."""
    try:
        check(path)
    except (AssertionError, runtime.Error) as error:
        return next(line for line in str(error).splitlines() if line.strip())
    return ""


if __name__ == "__main__":
    sys.exit(red(validate, Path(sys.argv[1])))
