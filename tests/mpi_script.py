"""Run by several processes: what models on all of them answer, kept in a file.

mpi_script.py OUT.npz '[{"path": ..., "devices": "tensor(mpi)", ...}, ...]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import runtime


def answers(given: dict[str, Any]) -> list[np.ndarray]:
    """Logits of every kind of step, greedy ids, and what states hold when written and copied."""
    with runtime.load(**given) as model:
        sys.path.append(str(Path(__file__).parent))
        from test_tensor_backend import IDS, every_kind_of_step, greedy

        found = [*every_kind_of_step(model), *map(np.array, greedy(model, IDS, 24))]
        session = model.session()
        session.eval(IDS)
        for leaf in model._engine.graphs.graph(1, 1).leaves("state"):
            held = model.backend.read_state(leaf, range(3))
            model.backend.write_state(leaf, [1, 2], (held[:2] * np.float32(0.5)).astype(held.dtype))
            model.backend.copy_pages([leaf], [2], [0])
            found += [held, model.backend.read_state(leaf, range(3))]
        return [*found, session.eval(IDS[:3])]


if __name__ == "__main__":
    every = [answers(given) for given in json.loads(sys.argv[2])]
    named = {f"{m} {n}": x for m, each in enumerate(every) for n, x in enumerate(each)}
    np.savez(sys.argv[1], **named)  # type: ignore[arg-type]
