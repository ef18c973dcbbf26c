"""When kernels are compiled: with the model, or with a progress bar; never silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime.backends.cpu.compile.library import Library
from runtime.backends.plan.kernel import Kernel


def test_kernels_of_prompts_are_missed_with_the_first_prompt(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """As if compiling had been interrupted after the kernels of a single token."""
    calls: list[tuple[int, int, str]] = []
    gone: list[Kernel] = []
    missing, prepare = Library.missing, Library.prepare

    def prepare_and_note(library, kernels, progress=None):
        kernels = list(kernels)
        found = [k for k in kernels if k in gone]
        for kernel in found:
            gone.remove(kernel)
            assert progress is not None, "compiled without a word"
            progress(1, len(found), str(kernel))
        prepare(library, kernels, progress)

    def missing_too(library, kernels):
        kernels = list(kernels)
        return [*missing(library, kernels), *(k for k in kernels if k in gone)]

    monkeypatch.setattr(Library, "missing", missing_too)
    monkeypatch.setattr(Library, "prepare", prepare_and_note)
    with runtime.load(small_model, progress=lambda *what: calls.append(what)) as model:
        want = model.eval([1, 2, 3, 4, 5, 6, 7, 8, 9])
        model._engine.programs._made.clear()
        model.backend._programs.clear()
        single = model.backend.kernels([model.backend.plan(model.graph(1, 1))])
        wide = model.backend.kernels([model.backend.plan(model.graph(16, 16))])
        gone += [k for k in wide if k not in single]
        assert gone
        names = {str(k) for k in gone}
        calls.clear()
        model.eval([1])
        assert not calls
        np.testing.assert_array_equal(model.eval([1, 2, 3, 4, 5, 6, 7, 8, 9]), want)
        assert {what for _, _, what in calls} >= names and not gone
