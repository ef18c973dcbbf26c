"""From text to an answer: what `generate` and `chat` take, checked before anything is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from runtime.arguments import check_function, check_spec, flag, listed, token_ids, whole, wrong
from runtime.engine.advance import Piece
from runtime.engine.engine import OnPrompt, check_room
from runtime.errors import OptionError
from runtime.generation import Generation, Options, Prompt
from runtime.session import Session

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.text.sampling import Token
    from runtime.together import Together

# keywords of `generate` and `chat` that are no fields of `Sampling`
_OWN = ("max_tokens", "ignore_eos", "on_token", "on_prompt", "spec")


class TextModel:
    """The part of a Model that speaks: `generate` continues a text, `chat` answers messages.

    Both take every field of `runtime.Sampling` as a keyword and, besides,

    - `session`: continue this one, and leave it holding prompt and answer; default a fresh one.
    - `max_tokens`: most tokens of the answer; None or -1: until the context is full.
    - `ignore_eos`: end tokens are never chosen.
    - `on_token`: called with each chosen `Token` (id, and log-probabilities with `logprobs=N`).
    - `on_prompt`: called with (done, total) tokens of the prompt, before and after each part.
    - `spec`: who drafts tokens that are verified several in a step, which changes nothing but the
      speed: "ngram" (what the text has had before), "draft" (the draft model), "auto" (whoever is
      there and pays) or "off"; default what the model was loaded with.

    What cannot be used is refused when they are called, not while the answer is read:
    OptionError for an option or token, MemoryLimitError for a prompt past the context.
    """

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What the file asks for (`general.sampling.*`), by option of `generate` and `chat`.

        Options that are given come before it. Raises OptionError for a value that cannot be used.
        """
        from runtime.text.defaults import file_defaults

        return file_defaults(cast("Model", self).file.metadata)

    def generate(
        self, prompt: str | Sequence[int], *, session: Session | None = None,
        max_tokens: int | None = None, stop: str | Iterable[str] | None = None,
        seed: int | None = None, temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, typical_p: float | None = None,
        top_n_sigma: float | None = None, xtc_probability: float | None = None,
        xtc_threshold: float | None = None, repeat_penalty: float | None = None,
        presence_penalty: float | None = None, frequency_penalty: float | None = None,
        penalty_last_n: int | None = None, dry_multiplier: float | None = None,
        dry_base: float | None = None, dry_allowed_length: int | None = None,
        dry_penalty_last_n: int | None = None,
        dry_sequence_breakers: str | Iterable[str] | None = None,
        dynatemp_range: float | None = None, dynatemp_exponent: float | None = None,
        mirostat: int | None = None, mirostat_tau: float | None = None,
        mirostat_eta: float | None = None, samplers: str | Iterable[str] | None = None,
        logit_bias: Mapping[int, float] | None = None, logprobs: int | None = None,
        ignore_eos: bool = False, on_token: Callable[[Token], Any] | None = None,
        on_prompt: OnPrompt | None = None, spec: str | None = None,
    ) -> Generation:  # fmt: skip
        """The text that continues `prompt` (raw text, or token ids), to be read piece by piece.

        Keywords: see `TextModel`; those of sampling are fields of `runtime.Sampling`, None being
        what the file asks for (`sampling_defaults`), else the default there.
        """
        given = locals()  # each keyword under its name, and nothing else yet
        return _continuation(cast("Model", given.pop("self")), given.pop("prompt"), given)

    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], *, session: Session | None = None,
        room: int = 0, tools: Sequence[Callable[..., Any] | Mapping[str, Any]] | None = None,
        template: str | None = None, template_options: Mapping[str, Any] | None = None,
        max_tokens: int | None = None, stop: str | Iterable[str] | None = None,
        seed: int | None = None, temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, typical_p: float | None = None,
        top_n_sigma: float | None = None, xtc_probability: float | None = None,
        xtc_threshold: float | None = None, repeat_penalty: float | None = None,
        presence_penalty: float | None = None, frequency_penalty: float | None = None,
        penalty_last_n: int | None = None, dry_multiplier: float | None = None,
        dry_base: float | None = None, dry_allowed_length: int | None = None,
        dry_penalty_last_n: int | None = None,
        dry_sequence_breakers: str | Iterable[str] | None = None,
        dynatemp_range: float | None = None, dynatemp_exponent: float | None = None,
        mirostat: int | None = None, mirostat_tau: float | None = None,
        mirostat_eta: float | None = None, samplers: str | Iterable[str] | None = None,
        logit_bias: Mapping[int, float] | None = None, logprobs: int | None = None,
        ignore_eos: bool = False, on_token: Callable[[Token], Any] | None = None,
        on_prompt: OnPrompt | None = None, spec: str | None = None,
    ) -> Generation:  # fmt: skip
        """The assistant's answer to `messages`, through the model's chat template.

        messages: [{"role": "user", "content": "Hi"}, ...], or the text of one message.
        With `session` only tokens after the longest common start of what the session holds and
        the rendered chat are evaluated; it is rewound to there when reading begins.
        room: tokens of context that have to be left for the answer, else MemoryLimitError.
        tools: functions, or their JSON descriptions as OpenAI's interface has them.
        template: which of the file's templates, by name, or the text of one of your own.
        template_options: what the template takes besides, such as {"enable_thinking": False}.
        Other keywords as `generate` has them. Raises TextError, too, for messages that the
        template refuses.
        """
        given = locals()
        return _reply(cast("Model", given.pop("self")), given.pop("messages"), given)

    def together(self, answers: Iterable[Generation]) -> Together:
        """Answers of this model under way, read together: (number, text) of any, as it comes.

        One step evaluates a token of each of them; each is the answer it would be alone, and ends,
        or is closed, for itself. An error of one is raised when it comes, and ends that one: go on
        with `next` for the others.
        """
        from runtime.together import Together

        return Together(cast("Model", self), answers)


def _continuation(model: Model, prompt: str | Sequence[int], given: dict[str, Any]) -> Generation:
    owned = _session(model, given.pop("session"))
    options = _options(model, given)
    session = model.session() if owned is None else owned
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt, add_special=not len(session))
    else:
        ids = token_ids(prompt)
    if not ids:
        raise OptionError("the prompt is empty and the model adds no start token; give some text")
    model._engine.check(Piece(session._sequence, ids))
    return Generation(model, Prompt(session, owned is None, len(session), ids), options)


def _reply(
    model: Model, messages: str | Sequence[Mapping[str, Any]], given: dict[str, Any]
) -> Generation:
    owned = _session(model, given.pop("session"))
    room = whole("room", given.pop("room"), 0)
    extra = _template_options(given.pop("template_options"))
    extra |= {name: given.pop(name) for name in ("tools", "template")}
    options = _options(model, given)
    ids = model.tokenizer.chat_template.encode(model.tokenizer, _messages(messages), **extra)
    if not ids:
        raise OptionError("the chat template makes an empty prompt of these messages")
    session = model.session() if owned is None else owned
    keep = common_start(session, ids)
    check_room(keep, len(ids) - keep + room, model.context)
    return Generation(model, Prompt(session, owned is None, keep, ids[keep:]), options)


def common_start(session: Session, ids: Sequence[int]) -> int:
    """How many tokens of `session` begin `ids`; at least one of `ids` is left to evaluate."""
    same, tokens = 0, session.tokens
    while same < min(len(tokens), len(ids) - 1) and tokens[same] == ids[same]:
        same += 1
    return same


def _messages(given: Any) -> list[Any]:
    """Messages as a list; what one of them may be the template says."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    example = '[{"role": "user", "content": "Hi"}]'
    return listed("messages", given, f"the text of one message, or a list such as {example}")


def _template_options(given: Any) -> dict[str, Any]:
    """What a template is given besides messages, tools and its own choice."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise wrong("template_options", given, "a mapping of names to values, or None")
    taken = next((n for n in given if n in ("messages", "tools", "template")), None)
    if taken is not None:
        raise OptionError(f"template_options cannot hold {taken!r}: it is a keyword of chat itself")
    return dict(given)


def _session(model: Model, given: Any) -> Session | None:
    """The session to continue, if there is one and this model can."""
    if given is None:
        return None
    if not isinstance(given, Session):
        raise wrong("session", given, "a session made by model.session(), or None")
    if given.model is not model:
        raise OptionError("a session can only be continued by the model that made it")
    given._open()
    return given


def _options(model: Model, given: dict[str, Any]) -> Options:
    """Checked options; OptionError names what cannot be used."""
    from runtime.speculation.choice import drafters
    from runtime.text.defaults import file_defaults
    from runtime.text.samplers.chain import check_used
    from runtime.text.sampling import Sampling

    if not model.tokenizer.has_text:
        raise OptionError(
            f"{model.file.path}: the file has no vocabulary, so there is no text to generate; "
            "model.eval(ids) gives logits"
        )
    own = {name: given.pop(name) for name in _OWN}
    most = own["max_tokens"]
    if most is not None:
        most = whole("max_tokens", most, -1, ", or None or -1 for no limit")
    spec = model.spec if own["spec"] is None else check_spec(own["spec"])
    check_function("on_token", own["on_token"], "one token")
    check_function("on_prompt", own["on_prompt"], "(done, total)")
    chosen = {name: value for name, value in given.items() if value is not None}
    sampling = Sampling(**file_defaults(model.file.metadata, chosen) | chosen)
    check_used(sampling, chosen)
    unwanted = set(model.tokenizer.suppressed)
    if flag("ignore_eos", own["ignore_eos"]):
        unwanted |= model.tokenizer.end_ids
    if unwanted:
        forbidden = dict.fromkeys((i for i in unwanted if i < model.vocab_size), -math.inf)
        sampling = replace(sampling, logit_bias={**sampling.logit_bias, **forbidden})
    limit = None if most in (None, -1) else most
    return Options(sampling, limit, own["on_token"], own["on_prompt"], drafters(model, spec))
