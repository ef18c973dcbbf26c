"""Drafts from a smaller model with the same vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.devices import names_mpi
from runtime.errors import Error, OptionError
from runtime.gguf.reader import GGUFFile
from runtime.ops.errors import shown
from runtime.speculation.drafter import MOST

if TYPE_CHECKING:
    from runtime.model import Model

_SURE = 0.5  # least probability of a draft
_COMMON = 0.95  # least share of a vocabulary that the other has, which may have more


class DraftModel:
    """A Drafter: what the model would say, as long as it is sure of it."""

    kind, free, certainty, most = "draft", False, 3, MOST

    def __init__(self, model: Model) -> None:
        self._session = model.session()
        self._same = 0  # tokens of the session that are known to be those of the text

    def begin(self, tokens: Sequence[int]) -> None:
        """See Drafter; what other answers of this model have read is not read again."""
        engine = self._session.model._engine
        if len(tokens) < self._session.model.context:
            ids = list(tokens)
            with engine.alone():
                engine.prompts.resume(self._session._sequence, 0, ids)
            self._same = len(self._session)
            self._row(ids[self._same : -1])
            self._same = len(self._session)

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See Drafter."""
        found = list[int]()
        row = self._row(self._new(tokens))
        while row is not None:
            best = int(row.argmax())
            if _SURE * float(np.exp(row - row[best]).sum()) > 1:
                break
            found.append(best)
            if len(found) == most:
                break
            row = self._row([best])
        return found

    def close(self) -> None:
        """See Drafter."""
        self._session.close()

    def _new(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that the session has not, once it has nothing but a start of them."""
        own = self._session.tokens[self._same :]
        same, end = self._same, min(len(tokens) - 1, self._same + len(own))
        while same < end and own[same - self._same] == tokens[same]:
            same += 1
        self._session.rewind(len(self._session) - same)
        self._same = same
        return list(tokens[same:])

    def _row(self, ids: list[int]) -> np.ndarray | None:
        """The logits behind these tokens; None where the model cannot go on."""
        try:
            return self._session.eval(ids, "last")[0] if ids else None
        except Error:
            return None


def draft_arguments(draft: GGUFFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a draft model whose model has those that are given."""
    same = ("threads", "context", "activations", "kv_type", "sequences", "cache_rotation")
    found = {name: given[name] for name in (*same, "progress", "prompt_cache", "pack_cache")}
    trained = draft.metadata.get(f"{draft.architecture}.context_length")
    if found["context"] is not None and isinstance(trained, int):
        found["context"] = min(found["context"], trained)
    devices = "cpu" if names_mpi(given["devices"]) else given["devices"]
    return found | {"devices": devices, "spec": "off"}


def check_vocabulary(draft: GGUFFile, model: GGUFFile) -> None:
    """OptionError unless the tokens of a draft model are those of the model."""
    ours, theirs = _tokens(model), _tokens(draft)
    common = min(len(ours), len(theirs))
    other = next((i for i in range(common) if ours[i] != theirs[i]), None)
    if other is None and common >= _COMMON * max(len(ours), len(theirs), 1):
        return
    where = (
        f"has {len(theirs)} tokens and the model {len(ours)}" if other is None
        else f"has {shown(theirs[other])} as token {other} and the model {shown(ours[other])}"
    )  # fmt: skip
    name = model.metadata.get("tokenizer.ggml.pre") or model.metadata.get("tokenizer.ggml.model")
    raise OptionError(
        f"draft={str(draft.path)!r} {where}; a smaller model with the vocabulary of "
        f"{model.path.name} fits (tokenizer {name}, {len(ours)} tokens), usually of the same family"
    )


def _tokens(file: GGUFFile) -> Sequence[str]:
    return list(file.metadata.get("tokenizer.ggml.tokens") or ())
