"""Devices that a split leaves without work, in words."""

from __future__ import annotations

import sys
from functools import cache

from runtime.backends.meta.infer import FOLLOWS, Layout
from runtime.ops.registry import Kind, kind_of
from runtime.ops.splits import MIRRORED, Split


def idle(layout: Layout, name: str) -> str:
    """Why nothing of the layers is split, or which devices have no part; "": all have one.

    What makes the outputs of the graph is of no layer.
    """
    busy, reasons = set[int](), list[tuple[bool, str]]()
    for node in layout.graph.nodes:
        if kind_of(node) is not Kind.CONTRACTION or node in layout.graph.outputs:
            continue
        for x, use in zip(node.inputs, layout.uses[node], strict=True):
            if x.op == "weight" and isinstance(use, Split):
                busy |= {device for device in range(layout.devices) if use.local(device)}
            elif x.op == "weight" and use is MIRRORED:
                reasons.append((layout.why[x] == FOLLOWS, f"{x.name}: {layout.why[x]}"))
    if not busy and reasons:
        return f"nothing of {name} is split over {layout.devices} devices: {min(reasons)[1]}"
    idlers = [str(device) for device in range(layout.devices) if device not in busy]
    if not busy or not idlers:
        return ""
    shown = ", ".join(idlers[:3]) + " and so on" * (len(idlers) > 3)
    return (
        f"{name} has no part for {len(idlers)} of {layout.devices} devices (number {shown}): its "
        f"layers have fewer parts than there are devices, or small ones"
    )


@cache
def tell(text: str) -> None:
    """On stderr, once."""
    if text and sys.stderr is not None:
        print(text, file=sys.stderr)
