"""A picture of one decode step: `runtime bench --timeline FILE`."""

from __future__ import annotations

from typing import Any

from runtime.backends.base import Apart
from runtime.cli.output import note
from runtime.cli.parsing import Refused

_DEPTH = 64  # tokens before the step


def check(model: Any) -> None:
    """Refused: the model runs on no one GPU."""
    if not isinstance(model.backend, Apart):
        raise Refused(
            "--timeline is of a model on one GPU, such as --devices cuda:0, and this one runs on "
            f"{model.backend.name}"
        )


def draw(found: Any, model: Any, path: str) -> None:
    """Write a picture of a `Timeline`."""
    from runtime.outputs import write_text
    from runtime.report.timeline_svg import picture

    name = model.backend.name
    title = f"{model.file.path.name} on {name}: one token after {_depth(model)}"
    write_text(path, picture(found, title))
    note(f"a decode step's timeline: {path}")


def step(model: Any) -> Any:
    """The `Timeline` of a decode step of a model."""
    seen: list[Any] = []
    engine = model._engine
    plain = engine._execute

    def execute(program: Any, inputs: Any, live: Any) -> Any:
        seen.append(program.timeline(inputs, live))
        return plain(program, inputs, live)

    with model.session() as session:
        session.eval([n % model.vocab_size for n in range(_depth(model))], logits="last")
        engine._execute = execute
        try:
            session.eval([0])
        finally:
            del engine._execute
    return seen[0]


def _depth(model: Any) -> int:
    return min(_DEPTH, model.context - 1)
