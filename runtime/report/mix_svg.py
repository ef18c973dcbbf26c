"""A mix that was measured as a picture: bits of each tensor, and what rounding it to few costs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from runtime.quantise.mixes import layer_of
from runtime.quantise.options import Option
from runtime.quantise.target import Aimed, bits
from runtime.report.drawing import MARGIN, Drawing

_W, _H, _LABEL = 34, 22, 150  # of a cell; of the names
_FEW, _MANY = (233, 240, 248), (23, 78, 134)  # colours of the least and the most


def draw(found: Aimed) -> str:
    """The picture, SVG: a row for each kind of tensor, a column for each layer."""
    out = Drawing()
    out.width = 640.0  # of the title
    nbytes, weights = found.job.nbytes, found.job.weights
    out.text(MARGIN, 34, f"{found.job.file.path.name}: {8 * nbytes / weights:.2f} bits per weight, "
             f"divergence {found.predicted:.3g} nats", 17, 'font-weight="bold"')  # fmt: skip
    kept = {name: bits(option.dtype) for name, option in found.chosen.items()}
    y = _grid(out, 62, "bits of a weight", kept, lambda b: f"{b:.3g}")
    costs = {name: math.log10(max(1e-12, _coarsest(found.options[name]).cost)) for name in kept}
    _grid(out, y + 30, "divergence with the smallest type, its logarithm to the base 10", costs,
          lambda cost: f"{cost:.1f}")  # fmt: skip
    return out.svg()


def _coarsest(options: Sequence[Option]) -> Option:
    return min(options, key=lambda option: option.nbytes)


def _grid(
    out: Drawing, y: float, title: str, values: Mapping[str, float], shown: Callable[[float], str]
) -> float:  # fmt: skip
    """A cell for each tensor, the darker the larger its value; where the next thing may begin."""
    out.text(MARGIN, y, title, 13)
    least, most = min(values.values()), max(values.values())
    roles: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        role = re.sub(r"^blk\.\d+\.|\.weight$", "", name)
        roles.setdefault(role, {})[layer_of(name)] = value
    columns = sorted({layer for cells in roles.values() for layer in cells})
    for n, layer in enumerate(columns):
        label = "" if layer < 0 else str(layer)
        out.text(MARGIN + _LABEL + n * _W + 9, y + 20, label, 10)
    top = y + 26
    for role, cells in roles.items():
        out.text(MARGIN, top + 15, role)
        for layer, value in cells.items():
            x = MARGIN + _LABEL + columns.index(layer) * _W
            share = (value - least) / (most - least) if most > least else 0.0
            out.rect(x, top, _W - 2, _H - 2, _colour(share))
            ink = ' fill="#ffffff"' if share > 0.55 else ""
            out.text(x + 4, top + 14, shown(value), 10, ink)
        top += _H
    return top


def _colour(share: float) -> str:
    mixed = (round(a + (b - a) * share) for a, b in zip(_FEW, _MANY, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)
