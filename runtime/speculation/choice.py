"""Who drafts: what `spec` says, and what there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from runtime.engine.sequence import Sequence as Evaluated
from runtime.errors import OptionError
from runtime.speculation.drafter import Drafter

if TYPE_CHECKING:
    from runtime.model import Model


def drafters(model: Model, spec: str) -> Callable[[Evaluated], Sequence[Drafter]] | None:
    """Makes the drafters of an answer in a sequence; None: nobody drafts.

    OptionError: who should is not there.
    """
    from runtime.speculation.draft_model import DraftModel
    from runtime.speculation.nextn import NextNDrafter
    from runtime.speculation.ngram import Ngrams

    if spec == "off":
        return None
    if spec == "draft" and model.draft is None:
        raise OptionError("spec='draft' needs a draft model; load the model with draft=FILE")
    further = model._engine.nextn
    if spec == "mtp" and further is None and model.spec != "mtp":  # else it was said at once
        raise OptionError(
            "spec='mtp' needs the block of a file that predicts further tokens in use; load the "
            "model with spec='mtp' or 'auto'"
        )
    found = list[Callable[[Evaluated], Drafter]]()
    if further is not None and spec in ("auto", "mtp"):
        drafts = further
        found.append(lambda sequence: NextNDrafter(drafts, sequence))
    if spec in ("auto", "ngram"):
        found.append(lambda _: Ngrams())
    if model.draft is not None and spec in ("auto", "draft"):
        draft = model.draft
        found.append(lambda _: DraftModel(draft))
    return (lambda sequence: [make(sequence) for make in found]) if found else None
