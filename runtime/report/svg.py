"""A placement as a picture: memory of each device, and the layers coloured by who has what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from runtime.backends.meta.planner import StagePlan
from runtime.ops.registry import Kind, kind_of
from runtime.ops.splits import PARTIAL, Split
from runtime.ops.tensor import Tensor
from runtime.planning import Placement
from runtime.report.drawing import LINE, MARGIN, Drawing
from runtime.report.layers import Layers, Row, layers_of
from runtime.report.text import amount, heading

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#d4a017", "#9c755f")
_PARTS = ("weights", "KV cache", "state", "activations", "other")
_FADE = (1.0, 0.66, 0.5, 0.36, 0.22)  # of each part's colour
_MIRRORED, _SUM = "#e4e6ea", "#c4262e"
_BOX_W, _BOX_H, _GAP_X, _GAP_Y = 118, 34, 16, 20
_CHAR, _LABEL = 6.2, 48  # widths of a character of a box, and of what is said beside one


class _Box(NamedTuple):
    """A node of a drawn layer, and where it is."""

    row: Row
    x: float
    y: float


def draw(placement: Placement, answer: str) -> str:
    """The picture, SVG; `answer` is its first line."""
    out = Drawing()
    out.text(MARGIN, 34, heading(placement), 17, 'font-weight="bold"')
    out.text(MARGIN, 56, answer, 13)
    bottom = _legend(out, placement, _bars(out, placement, 76))
    x, top = float(MARGIN), bottom + 26
    colours = _colours(placement)
    for group in layers_of(placement):
        if any(row.reads or row.exchange for row in group.rows):
            plan = placement.plans[group.stage]
            x = _layer(out, group, plan, [colours[d] for d in plan.devices], x, top) + 28
    return out.svg()


def _colours(placement: Placement) -> dict[object, str]:
    return {d: _COLOURS[n % len(_COLOURS)] for n, d in enumerate(placement.needs)}


def _bars(out: Drawing, placement: Placement, y: float) -> float:
    """A bar of memory for each device, as long as its room; where the next thing may begin."""
    usages = [placement.usage(device) for device in placement.needs]
    rooms = {ds[0]: room for ds, room in placement.rooms() if len(ds) == 1}
    longest = max([u.nbytes for u in usages] + [rooms.get(u.device, 0) for u in usages])
    left, length = MARGIN + 110.0, 560.0
    for usage in usages:
        colour, x = _colours(placement)[usage.device], left
        out.text(MARGIN, y + 14, str(usage.device), 12)
        room = rooms.get(usage.device)
        if room:
            more = f'stroke="{LINE}" rx="2"'
            out.rect(left, y, length * room / longest, 20, "#f6f7f9", more)
        for nbytes, fade in zip(usage.parts, _FADE, strict=True):
            w = length * nbytes / longest
            out.rect(x, y, w, 20, colour, f'fill-opacity="{fade}"')
            x += w
        of = f" of {amount(room)}" if room else ""
        out.text(left + length + 12, y + 14, f"{amount(usage.nbytes)}{of}", 12)
        y += 28
    return y


def _legend(out: Drawing, placement: Placement, y: float) -> float:
    """What the shades and the colours mean."""
    x = float(MARGIN + 110)
    for name, fade in zip(_PARTS, _FADE, strict=True):
        out.rect(x, y, 14, 12, "#555b66", f'fill-opacity="{fade}"')
        out.text(x + 19, y + 10, name)
        x += 36 + _CHAR * len(name)
    y, x = y + 26, float(MARGIN)
    entries = [(str(device), colour) for device, colour in _colours(placement).items()]
    for name, colour in [*entries, ("on every device", _MIRRORED)]:
        out.rect(x, y, 14, 12, colour)
        out.text(x + 19, y + 10, name)
        x += 40 + _CHAR * len(name)
    if len(entries) > 1:
        _mark(out, x + 8, y + 6, "Σ")
        out.text(x + 23, y + 10, "partial results are summed over the devices")
        _mark(out, x + 288, y + 6, "↔")
        out.text(x + 303, y + 10, "parts are gathered")
    return y + 12


def _mark(out: Drawing, x: float, y: float, sign: str) -> None:
    out.parts.append(f'<circle cx="{x:.4g}" cy="{y:.4g}" r="9" fill="{_SUM}"/>')
    out.text(x, y + 4, sign, 12, 'fill="#ffffff" text-anchor="middle" font-weight="bold"')


def _layer(
    out: Drawing, group: Layers, plan: StagePlan, colours: Sequence[str], left: float, top: float
) -> float:
    """A column of boxes from top to bottom; the right edge."""
    boxes, edges = _placed(group, left + 12, top + 58)
    right = 12 + max(box.x + _BOX_W + (_LABEL if box.row.exchange else 0) for box in boxes.values())
    title = group.title if len(group.numbers) < 2 else f"{group.title.split(':')[0]}"
    lines = [title, *([f"{len(group.numbers)} alike"] if len(group.numbers) > 1 else [])]
    lines.append(f"{amount(group.weights)} of weights")
    if len(colours) == 1:
        lines[-1] += f" on {plan.devices[0]}"
    right = max(right, left + 24 + 6.6 * max(map(len, lines)))
    bottom = max(box.y for box in boxes.values()) + _BOX_H + 14
    frame = f'stroke="{LINE}" stroke-width="0.8" rx="6"'
    out.rect(left, top, right - left, bottom - top, "#fbfbfc", frame)
    for n, line in enumerate(lines):
        bold = 'font-weight="bold"' if n == 0 else ""
        out.text(left + 12, top + 17 + 14 * n, line, 12 if n == 0 else 11, bold)
    for source, target in edges:
        _edge(out, boxes[source], boxes[target], [*boxes.values()])
    for box in boxes.values():
        if _from_outside(box.row, boxes):
            x, y = box.x + _BOX_W - 14, box.y
            out.path(f"M{x:.1f} {y - 12:.1f} L{x:.1f} {y:.1f}", f'stroke="{LINE}" '
                     'stroke-width="1.1" stroke-dasharray="3 2"')  # fmt: skip
        _box(out, box, plan, colours)
    return right


def _placed(
    group: Layers, left: float, top: float
) -> tuple[dict[Tensor, _Box], list[tuple[Tensor, Tensor]]]:
    """Boxes by node, each below what it follows from, and the edges between them."""
    rows = {row.node: row for row in group.rows}
    parents = {node: _parents(node, rows) for node in rows}
    depth: dict[Tensor, int] = {}
    for node in rows:
        depth[node] = max((depth[p] + 1 for p in parents[node]), default=0)
    columns: dict[Tensor, float] = {}
    levels: dict[int, list[Tensor]] = {}
    for node in rows:
        levels.setdefault(depth[node], []).append(node)
    for level in sorted(levels):
        wanted = {
            node: sum(columns[p] for p in parents[node]) / len(parents[node])
            if parents[node] else 0.0
            for node in levels[level]
        }  # fmt: skip
        order = sorted(levels[level], key=lambda node: wanted[node])
        middle = sum(wanted.values()) / len(order)
        for n, node in enumerate(order):
            columns[node] = middle + n - (len(order) - 1) / 2 if len(order) > 1 else wanted[node]
    least = min(columns.values())
    boxes = {
        node: _Box(
            row, left + (columns[node] - least) * (_BOX_W + _GAP_X),
            top + depth[node] * (_BOX_H + _GAP_Y),
        )
        for node, row in rows.items()
    }  # fmt: skip
    return boxes, [(p, node) for node in rows for p in dict.fromkeys(parents[node])]


def _parents(node: Tensor, rows: Mapping[Tensor, Row]) -> list[Tensor]:
    """What a node follows from in its layer, through views."""
    sources = [x if x in rows else x.base for x in node.inputs]
    return [x for x in sources if x in rows]


def _from_outside(row: Row, inside: Mapping[Tensor, _Box]) -> bool:
    """Whether it follows from what a layer before has computed."""
    sources = [x if x in inside else x.base for x in row.node.inputs]
    return any(x not in inside and kind_of(x) is not Kind.LEAF and x.ndim == 2 for x in sources)


def _edge(out: Drawing, a: _Box, b: _Box, boxes: Sequence[_Box]) -> None:
    """A line from one box down to another, round those between."""
    x1, y1, x2, y2 = a.x + _BOX_W / 2, a.y + _BOX_H, b.x + _BOX_W / 2, b.y
    between = [
        box for box in boxes
        if y1 < box.y < y2 - _BOX_H and min(x1, x2) < box.x + _BOX_W and box.x < max(x1, x2)
    ]  # fmt: skip
    if between:
        between = [box for box in boxes if y1 < box.y < y2 - _BOX_H]
    style = f'stroke="{LINE}" stroke-width="1.1"'
    if not between:
        bend = (y2 - y1) / 2
        out.path(f"M{x1:.4g} {y1:.4g} C{x1:.4g} {y1 + bend:.4g} {x2:.4g} {y2 - bend:.4g} "
                 f"{x2:.4g} {y2:.4g}", style)  # fmt: skip
        return
    side = min(box.x for box in between) - 7
    out.path(
        f"M{x1:.4g} {y1:.4g} C{x1:.4g} {y1 + 14:.4g} {side:.4g} {y1 + 4:.4g} {side:.4g} "
        f"{y1 + 24:.4g} L{side:.4g} {y2 - 24:.4g} C{side:.4g} {y2 - 4:.4g} {x2:.4g} {y2 - 14:.4g} "
        f"{x2:.4g} {y2:.4g}",
        style + ' stroke-dasharray="3 2"',
    )


def _box(out: Drawing, box: _Box, plan: StagePlan, colours: Sequence[str]) -> None:
    """A node: its result in the devices' colours, its name, what it reads and who has that."""
    row, state = box.row, plan.state(box.row.node)
    alone = len(colours) == 1
    pale, strong = 'fill-opacity="0.16"', 'fill-opacity="1"'
    whole = [(colours[0] if alone else _MIRRORED, 1.0)]
    result = [(colours[d], share) for d, share in _stripes(state, len(colours))] or whole
    out.rect(box.x, box.y, _BOX_W, _BOX_H, "#ffffff", 'rx="2"')
    _stripe(out, box, result, (0, _BOX_H), pale)
    _stripe(out, box, result, (0, 6), strong)
    read = next(iter(row.reads), None)
    if read and read.sizes:
        parts = [(c, n / sum(read.sizes)) for c, n in zip(colours, read.sizes, strict=True)]
        _stripe(out, box, parts, (_BOX_H - 4, 4), strong)
    edge = _SUM if state is PARTIAL else LINE
    out.rect(box.x, box.y, _BOX_W, _BOX_H, "none", f'stroke="{edge}" stroke-width="0.9" rx="2"')
    out.text(box.x + 6, box.y + 17, _cut(row.name or row.op), 11)
    cache = " cache" if read and read.what == "page" else ""
    detail = f"{read.name} {read.dtype}{cache}" if read else row.op
    out.text(box.x + 6, box.y + 27, _cut(detail, 1.18), 9, 'fill="#5b626d"')
    if row.exchange:
        _mark(out, box.x + _BOX_W, box.y + _BOX_H - 2, "Σ" if row.exchange == "sum" else "↔")
        out.text(box.x + _BOX_W + 12, box.y + _BOX_H + 9, amount(row.nbytes), 9,
                 f'fill="{_SUM}"')  # fmt: skip


def _stripe(
    out: Drawing, box: _Box, parts: Sequence[tuple[str, float]], at: tuple[float, float], more: str
) -> None:
    """Colours side by side over the width of a box, from a height on."""
    x = box.x
    for colour, share in parts:
        out.rect(x, box.y + at[0], _BOX_W * share, at[1], colour, more)
        x += _BOX_W * share


def _stripes(state: object, devices: int) -> list[tuple[int, float]]:
    """(device, share) along a split axis in order; a long period is shown by its shares alone."""
    if not isinstance(state, Split):
        return []
    runs = [(d, n / len(o)) for o, n in state.runs * state.repeat if o for d in o]
    if len(runs) > 24:
        runs = [(d, state.local(d)) for d in range(devices)]
    total = sum(n for _, n in runs) or 1
    return [(d, n / total) for d, n in runs if n]


def _cut(text: str, more: float = 1.0) -> str:
    most = int((_BOX_W - 10) / _CHAR * more)
    return text if len(text) <= most else text[: most - 1] + "…"
