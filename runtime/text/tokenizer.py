"""Text to token ids and back, from the metadata of a GGUF file alone."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import flag, token_ids, whole, wrong
from runtime.ops.cached import cached_property
from runtime.ops.errors import TextError, shown
from runtime.text import bytepair, sentencepiece
from runtime.text.charsmap import CharsMap
from runtime.text.detokenizer import TextStream
from runtime.text.pretokenize import PreTokenizer, pre_tokenizer
from runtime.text.special import SpecialTokens, swallowing
from runtime.text.special_ids import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from runtime.text.vocabulary import (
    ESCAPED_SPACE,
    Defaults,
    Vocabulary,
    byte_of,
    normal_forms,
    strings,
    switch,
    word,
)

if TYPE_CHECKING:
    from runtime.text.chat import ChatTemplate
    from runtime.text.grammar.guide import Guide

_SURROGATE = re.compile("[\ud800-\udfff]")

# What each `tokenizer.ggml.model` assumes where the file says nothing.
_DEFAULTS = {
    "gpt2": Defaults(),
    "gemma4": Defaults(),
    "llama": Defaults(bos=1, eos=2, unknown=0, add_bos=True),
    "t5": Defaults(eos=1, unknown=2, add_eos=True),
}
_NO_TEXT = ("none", "no_vocab")


class Tokenizer:
    """The tokenizer of one model.

    `Tokenizer.from_gguf(path)` or `Tokenizer(metadata)`. Attributes: `kind` (the value of
    `tokenizer.ggml.model`), `vocab_size`, `bos_id`, `eos_id` (None where there is none), `end_ids`
    (all ids that end an answer; `eot` for short), `add_bos`, `add_eos`, `suppressed` (ids that
    the file wants never to be chosen).

    A model without text ("none") has a tokenizer that only knows `vocab_size`; encoding and
    decoding raise TextError.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        """`metadata` holds the `tokenizer.*` keys. Raises TextError naming what is wrong."""
        if not isinstance(metadata, Mapping):
            raise wrong("metadata", metadata, "a mapping; Tokenizer.from_gguf takes a path")
        self._metadata = metadata
        self._normal_forms: list[Any] = normal_forms(metadata)
        kind = word(metadata, "tokenizer.ggml.model") or "none"
        self.kind: str = "none" if kind in _NO_TEXT else kind
        self._vocabulary: Vocabulary | None = None
        if self.kind != "none":
            self._vocabulary = Vocabulary.read(metadata, self._defaults())
            self._check_rules()
        self.vocab_size = _bare_size(metadata) if self._vocabulary is None else len(self._known)
        self._bytes: dict[int, bytes] = {}  # of tokens that were shown already
        found = self._vocabulary
        self.bos_id = found.bos_id if found else None
        self.eos_id = found.eos_id if found else None
        self.end_ids: frozenset[int] = found.end_ids if found else frozenset()
        self.add_bos = found.add_bos if found else False
        self.add_eos = found.add_eos if found else False
        self.suppressed: frozenset[int] = found.suppressed if found else frozenset()

    @classmethod
    def from_gguf(cls, source: str | os.PathLike[str] | Any) -> Tokenizer:
        """The tokenizer of a GGUF file, given its path or the open file.

        Raises FileError for a damaged file, TextError naming file and key for an unusable
        vocabulary, OptionError for what is neither path nor file.
        """
        from runtime.gguf.reader import open_gguf

        if isinstance(source, str | os.PathLike):
            source = open_gguf(Path(source))
        metadata = getattr(source, "metadata", None)
        if not isinstance(metadata, Mapping):
            raise wrong("source", source, "the path of a .gguf file, or the open file")
        try:
            return cls(metadata)
        except TextError as error:
            path = getattr(source, "path", None)
            raise TextError(f"{path}: {error}" if path else str(error)) from None

    def __call__(
        self, text: str, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """As `encode`."""
        return self.encode(text, add_special, parse_special)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"<Tokenizer {self.kind}, {self.vocab_size} tokens>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as what it was made of."""
        return type(self), (dict(self._metadata),)

    def __bool__(self) -> bool:
        return True  # one that only knows its size is a tokenizer all the same

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of `text`.

        `add_special` puts BOS first and EOS last where the model wants them. `parse_special`
        reads control tokens written in the text ("<|im_end|>") as such; without it they are
        plain text, which is right for text from strangers. Tokens that the vocabulary's author
        defined for ordinary use are always matched. Lone surrogates become U+FFFD.
        """
        known = self._known
        add_special = flag("add_special", add_special)
        marked = flag("parse_special", parse_special)
        special = self._all_special if marked else self._user_defined
        ids: list[int] = []
        if add_special and known.add_bos and known.bos_id is not None:
            ids.append(known.bos_id)
        for piece in special.find(_valid(text)):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                for form in self._normal_forms:
                    piece = unicodedata.normalize(form, piece)
                ids += self._encode(piece)
        if add_special and known.add_eos and known.eos_id is not None:
            ids.append(known.eos_id)
        return ids

    def encode_continued(self, text: str) -> list[int]:
        """The ids of `text` where it continues other text: nothing is put before or after it, and
        control tokens written in it are plain text."""
        ids: list[int] = []
        for piece in self._user_defined.find(_valid(text)):
            ids += [piece] if isinstance(piece, int) else self._encode_inside(piece)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        `skip_special` leaves control tokens out. The space that SentencePiece puts before the
        first word is taken away again. Raises TextError for an id outside the vocabulary and
        OptionError for what is no list of whole numbers.
        """
        shows = self._shown(flag("skip_special", skip_special))
        text = b"".join(map(shows, token_ids(ids))).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._space_prefix else text

    def stream(
        self, skip_special: bool = True, strip_space: bool = False, shown: Sequence[str] = ()
    ) -> TextStream:
        """An incremental detokenizer for text that continues a prompt.

        `strip_space` takes one leading space away, as `decode` does for SentencePiece. `shown`:
        control tokens, as they are written, that `skip_special` does not skip.
        """
        hidden = self._known.hidden if flag("skip_special", skip_special) else frozenset()
        hidden -= {self._known.ids.get(text, -1) for text in shown}
        strip_space = flag("strip_space", strip_space)
        return TextStream(self.token_bytes, strip_space, hidden)

    def _shown(self, skip_special: bool) -> Callable[[int], bytes]:
        if not skip_special:
            return self.token_bytes
        hidden = self._known.hidden
        return lambda token: b"" if token in hidden else self.token_bytes(token)

    def token_text(self, token: int) -> str:
        """The token as the file writes it ("Ġthe", "▁the"). Raises TextError for a wrong id."""
        return self._known.texts[self._checked(token)]

    def _checked(self, token: int) -> int:
        if type(token) is not int:  # numpy's are taken, booleans are not
            token = whole("token", token, 0)
        if not 0 <= token < len(self._known.texts):
            n = len(self._known.texts)
            raise TextError(f"token id {shown(token)} is outside the vocabulary of {n}")
        return token

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that a token stands for. Raises TextError for a wrong id."""
        found = self._bytes.get(token) if type(token) is int else None
        if found is None:
            found = self._bytes_of(token)
            self._bytes[int(token)] = found
        return found

    def _bytes_of(self, token: int) -> bytes:
        text = self.token_text(token)
        kind = self._known.kinds[token]
        if kind == BYTE:
            return byte_of(text) or text.encode()
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return text.encode("utf-8", "replace")
        if kind != NORMAL:
            return b""
        if self._in_byte_letters:
            return bytepair.letters_to_bytes(text)
        return text.replace(ESCAPED_SPACE, " ").encode("utf-8", "replace")

    @property
    def special_texts(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and their like, as they are written, where the file has them."""
        if self._vocabulary is None:
            return {}
        short = {"unknown": "unk", "padding": "pad", "seperator": "sep"}
        named = self._vocabulary.named.items()
        return {f"{short.get(name, name)}_token": self.token_text(i) for name, i in named}

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's chat templates. Raises TextError when their keys hold no text."""
        from runtime.text.chat import ChatTemplate

        return ChatTemplate.of(self, self._metadata)

    @cached_property
    def guide(self) -> Guide:
        """What grammars need of this vocabulary. OptionError without llguidance."""
        from runtime.text.grammar.guide import Guide

        return Guide(self)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int] | str:
        """The prompt for a chat, as ids or (tokenize=False) as text; see `ChatTemplate.render`."""
        options |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        if flag("tokenize", tokenize):
            return self.chat_template.encode(self, messages, **options)
        return self.chat_template.render(messages, **options)

    @property
    def eot(self) -> frozenset[int]:
        """All ids that end an answer."""
        return self.end_ids

    @property
    def has_text(self) -> bool:
        """Whether the file has a vocabulary, so that text can be encoded and decoded."""
        return self._vocabulary is not None

    def is_control(self, token: int) -> bool:
        """Whether a token steers the model instead of standing for text."""
        return bool(self._known.kinds[self._checked(token)] == CONTROL)

    def control_id(self, text: str) -> int | None:
        """The id of the control token that is written so; None where there is none."""
        token = self._known.ids.get(text)
        return token if token is not None and self.is_control(token) else None

    def ids_of_kind(self, *kinds: int) -> list[int]:
        """Ids whose kind, of `runtime.text.special_ids`, is one of these, ascending."""
        return self._known.of_kind(*kinds)

    @property
    def _known(self) -> Vocabulary:
        if self._vocabulary is None:
            raise TextError(
                "this file has no vocabulary (tokenizer.ggml.model is 'none'): give token ids"
            )
        return self._vocabulary

    @property
    def _in_byte_letters(self) -> bool:
        return self._pre is not None and not self._pre.raw

    @cached_property
    def _pre(self) -> PreTokenizer | None:
        if self.kind not in ("gpt2", "gemma4"):
            return None
        name = "gemma4" if self.kind == "gemma4" else word(self._metadata, "tokenizer.ggml.pre")
        if not name:
            warnings.warn(
                "the file has no tokenizer.ggml.pre: words are cut by the 'default' rules, which "
                "may differ from the model's own; convert the model again",
                stacklevel=4,
            )
            name = "default"
        return pre_tokenizer(name)

    def _defaults(self) -> Defaults:
        if self.kind not in _DEFAULTS:
            known = ", ".join([*_DEFAULTS, "none"])
            raise TextError(
                f"tokenizer.ggml.model {self.kind!r:.60} is not supported: supported are {known}"
            )
        if self._pre is None:
            return _DEFAULTS[self.kind]
        return Defaults(add_bos=self._pre.add_bos)

    def _check_rules(self) -> None:
        if self._pre is not None:
            self._merges()
        else:
            self._scores()

    def _merges(self) -> Any:
        return strings(
            self._metadata, "tokenizer.ggml.merges", "a byte-pair vocabulary cannot do without"
        )

    def _scores(self) -> Any:
        return sentencepiece.scores(self._metadata, len(self._known))

    @cached_property
    def _space_prefix(self) -> bool:
        asked = switch(self._metadata, "tokenizer.ggml.add_space_prefix")
        return self._pre is None and (self.kind == "llama" if asked is None else asked)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        known, metadata = self._known, self._metadata
        if self._pre is not None:
            return bytepair.encoder(known, self._merges(), self._pre)
        if self.kind == "llama":
            return sentencepiece.MergeEncoder(known, self._scores(), self._space_prefix)
        packed = metadata.get("tokenizer.ggml.precompiled_charsmap")
        return sentencepiece.unigram_encoder(
            known,
            self._scores(),
            sentencepiece.UnigramOptions(
                add_space_prefix=self._space_prefix,
                remove_extra_whitespaces=bool(
                    switch(metadata, "tokenizer.ggml.remove_extra_whitespaces")
                ),
                charsmap=str if packed is None else CharsMap.from_numbers(packed),
            ),
        )

    @cached_property
    def _encode_inside(self) -> Callable[[str], list[int]]:
        """As `_encode`, without the space that goes before a text."""
        if self.kind != "llama":
            return self._encode
        return sentencepiece.MergeEncoder(self._known, self._scores(), False)

    @cached_property
    def _all_special(self) -> SpecialTokens:
        return self._special(CONTROL, UNKNOWN, USER_DEFINED)

    @cached_property
    def _user_defined(self) -> SpecialTokens:
        return self._special(USER_DEFINED)

    def _special(self, *kinds: int) -> SpecialTokens:
        known = self._known
        texts = [known.texts[i] for i in known.of_kind(*kinds)]
        return SpecialTokens(
            {text: known.ids[text] for text in texts}, *swallowing(self._metadata, known)
        )


def _bare_size(metadata: Mapping[str, Any]) -> int:
    """The vocabulary size of a file without texts, from `<architecture>.vocab_size`."""
    size = metadata.get(f"{metadata.get('general.architecture')}.vocab_size", 0)
    return size if isinstance(size, int) else 0


def _valid(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced."""
    if not isinstance(text, str):
        raise TextError(f"encode takes text, not {type(text).__name__}")
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
