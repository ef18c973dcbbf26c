"""What the numbers in a model's memory depend on: states of models that agree are one another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runtime.backends.passes.rotate_cache import rotate_cache
from runtime.backends.plan.fingerprint import code, sampled
from runtime.models.step import Step

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

# How a person is told of each, and what to do about it.
_TOLD = {
    "format": ("layout {}", ""),
    "architecture": ("architecture {}", ""),
    "weights": ("weights {}", "load the model that it was saved with"),
    "kv_type": ("kv_type {}", "load the model with kv_type={!r}"),
    "cache_rotation": ("cache_rotation {}", "load the model with cache_rotation={}"),
    "devices": ("devices that compute as {}", "load the model on such devices"),
    "graph": ("graph {}", "load the model as it was loaded then"),
    "code": ("version {} of this package", "use that version"),
}


def identity(engine: Engine) -> dict[str, str]:
    """By name, what differs first standing first."""
    graphs, a = engine.graphs, engine.architecture
    step = Step.capacity(
        1, 1, 1, 1, 1, a.layers, graphs.kv_types, a.positions_per_token, graphs.size.context
    )  # of any amount of memory
    graph = a.graph(step)
    if graphs.cache_rotation:
        graph = rotate_cache(graph)
    return {
        "format": "1",
        "architecture": engine.file.architecture,
        "weights": f"{sampled(engine.file)[:16]} ({engine.file.tensors_nbytes} bytes)",
        "kv_type": ",".join(dict.fromkeys(graphs.kv_types)),
        "cache_rotation": str(graphs.cache_rotation),
        "devices": engine.backend.bits or engine.backend.name,
        "graph": graph.key()[:16],
        "code": code(),
    }


def fingerprint(found: Mapping[str, object]) -> bytes:
    """16 bytes of what is known by name."""
    text = json.dumps(found, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """The first thing in which they differ, both sides of it and what to do; "": in nothing."""
    for name, (text, advice) in _TOLD.items():
        a, b = theirs.get(name, "unknown"), ours.get(name, "unknown")
        if a != b:
            said = f"it is of {text.format(a)}, the model here of {text.format(b)}"
            return f"{said}; {advice.format(a)}" if advice else said
    return ""
