"""Logits of some models, to compare two machines bit for bit.

    python scripts/arm_logits.py FOLDER NAME=MODEL.gguf ...        (see scripts/check_arm.sh)

For each model and each kind of activations writes FOLDER/NAME-KIND.npy, float32 [ids, vocabulary].
Before it does, the same ids are evaluated by one thread, in pieces of five and one by one: other
bits are an error. Ends with status 1 if a model could not be evaluated; the others are.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import runtime

_LENGTH = 70  # nine tiles of eight columns: both ways of the wide kernels
_PIECES = (5, 1)


def main(folder: str, *models: str) -> int:
    """Write the logits of all; the exit status."""
    failed = False
    for named in models:
        name, _, path = named.partition("=")
        for kind in ("int8", "f32"):
            start = time.perf_counter()
            try:
                np.save(Path(folder) / f"{name}-{kind}.npy", logits(path, kind))
            except (runtime.Error, ArithmeticError) as error:
                failed = True
                print(f"{name} {kind}: {error}", file=sys.stderr)
            print(f"{name} {kind}: {time.perf_counter() - start:.1f} s", flush=True)
    return int(failed)


def logits(path: str, kind: str) -> np.ndarray:
    """Logits of fixed ids; ArithmeticError where they depend on threads or pieces."""
    found = None
    for threads in (2, 1):
        with runtime.load(path, activations=kind, context=256, threads=threads) as model:
            vocabulary = model.eval([0]).shape[1]
            ids = [(7 * i + 3) % vocabulary for i in range(_LENGTH)]
            whole = model.eval(ids)
            if found is None:
                found = whole
            elif found.tobytes() != whole.tobytes():
                raise ArithmeticError("other bits with one thread than with two")
            for size in _PIECES if threads == 2 else ():
                with model.session() as session:
                    parts = [session.eval(ids[i : i + size]) for i in range(0, _LENGTH, size)]
                if np.concatenate(parts).tobytes() != whole.tobytes():
                    raise ArithmeticError(f"other bits in pieces of {size}")
    assert found is not None
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
