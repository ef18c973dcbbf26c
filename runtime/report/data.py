"""A placement as plain data, for JSON."""

from __future__ import annotations

from typing import Any

from runtime.planning import Placement, Speed
from runtime.report.layers import layers_of
from runtime.report.text import expression, without_part


def as_data(
    placement: Placement, speed: Speed | None, prompt: float | None, answer: str
) -> dict[str, Any]:
    """Everything that a plan says; bytes are plain numbers. fits: None where it is not known."""
    return {
        "answer": answer,
        "without_part": without_part(placement),
        "fits": None if placement.unknown and placement.fits else placement.fits,
        "model": str(placement.model.file.get("general.name") or placement.model.file.path.stem),
        "model_size": placement.model.file.tensors_nbytes,
        "devices": expression(placement.stages),
        "context": placement.context,
        "context_that_fits": placement.most,
        "context_length": placement.trained,
        "sequences": placement.sequences,
        "type_k": placement.kv_types[0],
        "type_v": placement.kv_types[1],
        "tokens_per_s": speed.tokens_per_s if speed else None,
        "prompt_tokens_per_s": prompt,
        "memory": [
            {
                "device": str(u.device), "weights": round(u.weights), "kv_cache": round(u.cache),
                "state": round(u.state), "activations": round(u.activations),
                "other": round(u.overhead), "total": round(u.nbytes), "of": u.device.nbytes,
            }
            for u in map(placement.usage, placement.needs)
        ],
        "stages": [
            {
                "share": float(plan.stage.share),
                "devices": list(map(str, plan.devices)),
                "shares": list(map(float, plan.stage.shares)),
                "reading_s": speed.reading[n] if speed else None,
                "exchanging_s": speed.exchanging[n] if speed else None,
                "exchanges": [
                    {"tensor": x.tensor.name, "kind": "gather" if x.gathered else "sum",
                     "nbytes": x.tensor.nbytes}
                    for x in plan.exchanges
                ],
            }
            for n, plan in enumerate(placement.plans)
        ],
        "layers": [
            {
                "stage": group.stage, "name": group.title, "numbers": list(group.numbers),
                "ops": [
                    {"op": row.op, "name": row.name, "result": row.result._asdict(),
                     "reads": [part._asdict() for part in row.reads],
                     "exchange": row.exchange, "nbytes": row.nbytes}
                    for row in group.rows
                ],
            }
            for group in layers_of(placement)
        ],
    }  # fmt: skip
