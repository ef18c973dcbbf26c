#!/usr/bin/env bash
# torch 2.13.0 on a CPU, numpy 2.4.6.
#
# IEEE division rounds once, and one expects that of `3 / x` as of `x / 3`: the bits that numpy gives,
# and 1 for a number over itself.
#
# Seen: a Python number over a tensor is the number times the tensor's reciprocal, rounded twice, for
# float tensors of all types. About three values in ten are off by a last bit; 41 / tensor(41.) is less
# than 1, so that its floor is 0; and as the reciprocal of a small subnormal number is infinite,
# 0 / tensor(1e-40) is not a number, and 1e-5 / tensor(1e-40) is infinite instead of 1e35. A tensor over
# a number is divided, and so is a tensor over a tensor, if only one of no dimensions: tensor(3.) / x.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>"$work/pip.log" \
  || { cat "$work/pip.log"; exit 1; }
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import torch

values = np.random.default_rng(0).uniform(0.5, 4.5, 1 << 16).astype(np.float32)
x, tiny, three = torch.from_numpy(values), torch.tensor(1e-40), torch.tensor(3.0)


def share(seen: torch.Tensor, wanted: np.ndarray) -> float:
    return float((seen.numpy() != wanted).mean())


def smallest(kind: torch.dtype) -> int:
    return next(n for n in range(1, 256) if n / torch.tensor(n, dtype=kind) != 1)


off = share(3 / x, np.float32(3) / values)
firsts = {torch.float32: 41, torch.float64: 49, torch.float16: 11, torch.bfloat16: 61}
seen = {  # what: (seen, wanted)
    "tensor(3.) / x differs from numpy": (share(three / x, np.float32(3) / values), 0.0),
    "torch.div(tensor(3.), x) differs": (share(torch.div(three, x), np.float32(3) / values), 0.0),
    "x / 3 differs": (share(x / 3, values / np.float32(3)), 0.0),
    "3 / x is 3 times the reciprocal": (torch.equal(3 / x, x.reciprocal() * 3), True),
    "floor(41 / tensor(41.))": ((41 / torch.tensor(41.0)).floor().item(), 0.0),
    "0 / tensor(1e-40)": (str((0 / tiny).item()), "nan"),
    "tensor(0.) / tensor(1e-40)": (str((torch.tensor(0.0) / tiny).item()), "0.0"),
    "1e-5 / tensor(1e-40)": ((1e-5 / tiny).item(), float("inf")),
} | {f"{kind}: first n with n / tensor(n) not 1": (smallest(kind), n) for kind, n in firsts.items()}
print(f"3 / x differs from numpy: {off:.1%} of {len(values)} float32 values")
changed = not 0.2 < off < 0.4
for what, (found, want) in seen.items():
    print(f"{what}: {found}{'' if found == want else f'   CHANGED, was {want}'}")
    changed |= found != want
sys.exit(changed)
PY
