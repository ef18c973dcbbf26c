"""Which tokens a grammar allows next, by llguidance, in the vocabulary of one tokenizer."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends import forks
from runtime.ops.errors import OptionError
from runtime.text.grammar.asked import Grammar, refusal
from runtime.text.special_ids import CONTROL, UNKNOWN, UNUSED

if TYPE_CHECKING:
    from runtime.text.tokenizer import Tokenizer

_KEPT = 32  # compiled grammars of a model
_LEXER_STATES = 60_000  # of one grammar, up to 2 kB each
_ITEMS = 20_000  # rules that may go on at one place


class Guide:
    """The grammars of one tokenizer. OptionError without llguidance."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._library = _library()
        table = _Table(tokenizer)
        self._tokens = self._library.LLTokenizer(table, eos_token=table.end_ids)
        self._limits = self._library.LLParserLimits(
            max_lexer_states=_LEXER_STATES, max_items_in_row=_ITEMS, verbose_errors=False
        )
        self.size = tokenizer.vocab_size
        self._lock = forks.lock()
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def constraint(self, grammar: Grammar) -> Constraint:
        """The beginning of a text of this grammar.

        Raises OptionError, which names the option, for one that cannot be enforced or met.
        """
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compile(grammar)
                while len(self._compiled) >= _KEPT:
                    self._compiled.popitem(last=False)
                self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            return Constraint(grammar.option, matcher.deep_copy(), self.size)

    def _compile(self, grammar: Grammar) -> Any:
        source = _source(self._library, grammar)
        matcher = self._library.LLMatcher(self._tokens, source, log_level=0, limits=self._limits)
        if not matcher.is_error():
            first = matcher.deep_copy()
            if any(first.compute_bitmask()) and not first.is_error():
                return matcher
        if matcher.is_error():
            raise refusal(grammar.option, matcher.get_error())
        raise OptionError(f"{grammar.option} cannot be met: no text of this model begins one")


class Constraint:
    """One text of a grammar, as far as it has come. `over`: nothing can follow."""

    def __init__(self, option: str, matcher: Any, size: int) -> None:
        self._option, self._matcher, self._size = option, matcher, size
        self.over = bool(matcher.is_stopped())

    def masked(self, row: np.ndarray) -> np.ndarray:
        """Logits, float32 [vocabulary], with -inf for tokens that cannot come next; a copy."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(mask, count=self._size, bitorder="little").view(bool)[: row.size]
        if not allowed.any():
            raise OptionError(f"{self._option} cannot be met: no token of this model goes on")
        return np.where(allowed, row, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """This token, no end token, came next."""
        self._matcher.consume_token(token)
        self._check()
        self.over = bool(self._matcher.is_stopped())

    def forced(self) -> list[int]:
        """The tokens that have to come next; none where there is a choice."""
        return [] if self.over else list(self._matcher.compute_ff_tokens())

    def fitting(self, tokens: list[int]) -> list[int]:
        """The first of `tokens` that may come next, one after the other."""
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else []

    def _check(self) -> None:
        if self._matcher.is_error():
            raise refusal(self._option, self._matcher.get_error())


class _Table:
    """A vocabulary as llguidance takes it: the bytes of all tokens, and how text becomes tokens."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        self.tokens = [tokenizer.token_bytes(i) for i in range(size)]
        self.end_ids = sorted(tokenizer.end_ids)
        marks = tokenizer.ids_of_kind(CONTROL, UNKNOWN, UNUSED)
        self.special_token_ids = sorted({*marks, *self.end_ids})  # they are no text of a grammar
        if not self.end_ids:  # one beyond the vocabulary stands for the end, and is never chosen
            self.tokens.append(b"<end>")
            self.special_token_ids.append(size)
            self.end_ids = [size]
        self.eos_token_id, self.bos_token_id = self.end_ids[0], tokenizer.bos_id
        self._tokenizer, self._special = tokenizer, frozenset(self.special_token_ids)
        self._ids = {text: i for i, text in reversed(list(enumerate(self.tokens))) if text}
        for i in self.special_token_ids:
            self._ids.pop(self.tokens[i], None)
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of text that continues another; their bytes are its bytes."""
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        wanted = text.encode() if isinstance(text, str) else text
        found = self._tokenizer.encode_continued(plain)
        same = b"".join(self.tokens[i] for i in found) == wanted
        if same and self._special.isdisjoint(found):
            return found
        return self._greedy(wanted)  # rules that change a text before it is cut

    def _greedy(self, text: bytes) -> list[int]:
        found, at = list[int](), 0
        while at < len(text):
            lengths = range(min(self._longest, len(text) - at), 0, -1)
            length = next((n for n in lengths if text[at : at + n] in self._ids), 0)
            if not length:
                break
            found.append(self._ids[text[at : at + length]])
            at += length
        return found


def check(grammar: Grammar) -> None:
    """OptionError for a grammar that no model can be held to."""
    library = _library()
    make = library.LLMatcher
    wrong, messages = make.validate_grammar_with_warnings(_source(library, grammar))
    if wrong:
        raise refusal(grammar.option, messages[0])


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise OptionError(
            "json_schema, grammar, regex and tool_choice need llguidance, which is not installed: "
            "pip install 'graph-runtime[serve]'"
        ) from None
    return llguidance


def _lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    return gbnf_to_lark(_without_comments(text))


def _without_comments(text: str) -> str:
    """GBNF without its comments; "#" in a string or a class is none."""
    found, closing, escaped, comment = [], "", False, False
    for c in text:
        if comment:
            comment = c != "\n"
        elif closing:
            closing = "" if c == closing and not escaped else closing
            escaped = c == "\\" and not escaped
        elif c == "#":
            comment = True
        else:
            closing = {'"': '"', "[": "]"}.get(c, "")
        found.append("" if comment else c)
    return "".join(found)


def _source(library: Any, grammar: Grammar) -> str:
    """As llguidance takes it."""
    make = library.LLMatcher
    option, kind, text, content = grammar
    try:
        if kind == "json":
            return make.grammar_from_json_schema(text)
        if kind == "regex":
            return make.grammar_from_regex(text)
        found = make.grammar_from_lark(_lark(text) if kind == "gbnf" else text)
        return found if content is None else _joined(found, _source(library, content))
    except OptionError:
        raise
    except RecursionError:
        raise OptionError(f"{option} is nested too deeply") from None
    except Exception as error:  # the converter of GBNF has plain ones, too
        raise refusal(option, str(error)) from None


def _joined(main: str, content: str) -> str:
    """A grammar in Lark with what "@content" in it stands for."""
    inner = {"lark_grammar": content}
    if content.startswith("{"):
        (inner,) = json.loads(content)["grammars"]
    inner = {name: value for name, value in inner.items() if value is not None}
    whole = [{"name": "main", "lark_grammar": main}, {**inner, "name": "content"}]
    return json.dumps({"grammars": whole})
