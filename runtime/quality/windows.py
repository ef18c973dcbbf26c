"""Windows of a text, cut as llama-perplexity cuts it.

They have equal sizes and do not overlap; what is left of the text is dropped. A model reads each
by itself and is scored on its second half alone, so that every prediction has context. Where the
vocabulary wants a BOS, it stands in place of the first token of each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.arguments import token_ids, whole, wrong
from runtime.errors import OptionError, TextError
from runtime.ops.errors import shown

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.text.tokenizer import Tokenizer

SIZE = 512  # tokens of a window
BUNDLED = "demo-heldout.txt"
_CHARACTERS, _MARGIN = 8, 16  # of a token, more than most have; tokens that what follows may change


class Windows:
    """ids: int32 [windows, size], tokens of the text. bos: of the vocabulary, or None."""

    def __init__(self, ids: np.ndarray, bos: int | None) -> None:
        self.ids, self._bos = ids, bos
        self.size = ids.shape[1]
        self.first = self.size // 2
        """Place in a window whose logits are scored first; the last is the one before its end."""

    @classmethod
    def of_text(cls, model: Model, text: Any, size: int, count: int | None) -> Windows:
        """The first `count` windows of a text, or of ids; no more of it is looked at."""
        size = whole("window", size, 3, high=model.context)
        most = None if count is None else size * max(2, count)
        return cls.of(model, ids_of(model, text, most), size, count)

    @classmethod
    def of(cls, model: Model, ids: Sequence[int], size: int, count: int | None) -> Windows:
        """The first `count` windows of a text's tokens, all by default.

        OptionError for a text shorter than two windows, and for options out of range.
        """
        size = whole("window", size, 3, high=model.context)
        if len(ids) < 2 * size:
            raise OptionError(
                f"the text has {len(ids)} tokens, and two windows of {size} take {2 * size}: give "
                "a longer text or a smaller window"
            )
        count = min(len(ids) // size, len(ids) if count is None else count)
        cut = np.array(ids[: count * size], np.int32).reshape(count, size)
        return cls(cut, bos_of(model.tokenizer))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> int:
        """Predictions of a window that are scored."""
        return self.size - 1 - self.first

    def given(self, window: int) -> list[int]:
        """What a model reads of a window: all but the last token, which predicts nothing."""
        ids: list[int] = self.ids[window, :-1].tolist()
        return ids if self._bos is None else [self._bos, *ids[1:]]

    def wanted(self, window: int) -> np.ndarray:
        """int32 [rows]: the tokens that are to be predicted."""
        return self.ids[window, self.first + 1 :]


def bos_of(tokenizer: Tokenizer) -> int | None:
    """The token that every window begins with; None: the text's own."""
    return tokenizer.bos_id if tokenizer.add_bos else None


def counted(windows: Any) -> int | None:
    """How many windows are asked for, None for all, which -1 is too; OptionError for no number."""
    if windows is None:
        return None
    legal = ", or None or -1 for all"
    found = whole("windows", windows, -1, legal)
    if found == 0:
        raise wrong("windows", windows, f"at least 1{legal}")
    return None if found < 0 else found


def ids_of(model: Model, text: Any, most: int | None = None) -> list[int]:
    """Tokens of a text, special ones taken as plain text; or ids, as they are.

    One newline at the end of a text, which files have, does not count. most: how many are needed,
    so that of a long text no more is read than they take; there may be more.
    """
    if not isinstance(text, str):
        ids = token_ids(text)
        outside = next((i for i in ids if not 0 <= i < model.vocab_size), None)
        if outside is not None:
            raise OptionError(
                f"token id {shown(outside)} is outside the vocabulary of {model.vocab_size}"
            )
        return ids
    if not model.tokenizer.has_text:
        raise TextError(f"{model.file.path}: the file has no vocabulary: give token ids")
    text, length = text.removesuffix("\n"), _CHARACTERS * (most or 0)
    while most is not None and length < len(text):
        # no token reaches over the space before a word
        start = text[: max(0, text.rfind(" ", 0, length))]
        ids = model.tokenizer.encode(start, parse_special=False)
        if len(ids) >= most + _MARGIN:
            return ids[:-_MARGIN]
        length *= 2
    return model.tokenizer.encode(text, parse_special=False)


def bundled_text() -> str:
    """Stories and questions that the bundled model was not trained on, without its chat marks."""
    path = Path(__file__).parent.parent / "data" / BUNDLED
    marks = r"<\|im_\w+\|>(user\n|assistant\n|)|<\|endoftext\|>"
    return re.sub(marks, "", path.read_text(encoding="utf-8"))
