"""What a model is asked to say: `generate`, `chat`, `submit`, and several answers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from runtime.asking import continuation, reply
from runtime.engine.engine import OnPrompt
from runtime.generation import Generation
from runtime.session import Session
from runtime.writing import Options, Prompt

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.requests import Request
    from runtime.text.sampling import Token
    from runtime.together import Together


class TextModel:
    """The part of a Model that speaks: `generate` continues a text, `chat` answers messages.

    `submit` does either beside others, without being read. All take every field of
    `runtime.Sampling` as a keyword and, besides,

    - `json_schema`: the answer is JSON of this schema (a mapping or its text; True: any JSON);
      `grammar`: text of this grammar (GBNF, or Lark as llguidance has it); `regex`: text that this
      regular expression matches as a whole. One of them; it ends where it is complete.
    - `session`: continue this one, and leave it holding prompt and answer; default a fresh one.
    - `max_tokens`: most tokens of the answer; None or -1: until the context is full.
    - `ignore_eos`: end tokens are never chosen.
    - `on_token`: called with each chosen `Token` (id, and log-probabilities with `logprobs=N`).
    - `on_prompt`: called with (done, total) tokens of the prompt, before and after each part.
    - `spec`: who drafts tokens that are verified several in a step, which changes nothing but the
      speed: "ngram" (what the text has had before), "draft" (the draft model), "mtp" (the file's
      own block), "auto" (whoever is there and pays) or "off"; default what the model was loaded
      with.

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
        json_schema: Mapping[str, Any] | str | bool | None = None, grammar: str | None = None,
        regex: str | None = None,
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
        model = cast("Model", given.pop("self"))
        return _generation(model, *continuation(model, given.pop("prompt"), given))

    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], *, session: Session | None = None,
        room: int = 0, tools: Sequence[Callable[..., Any] | Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None, template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        json_schema: Mapping[str, Any] | str | bool | None = None, grammar: str | None = None,
        regex: str | None = None,
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
        tool_choice: "auto" (the model may call them), "none", "required" or the name of the one
        to call. What it called: `.message` of the answer, or `.reader()` while it comes.
        template: which of the file's templates, by name, or the text of one of your own.
        template_options: what the template takes besides, such as {"enable_thinking": False}.
        Other keywords as `generate` has them. Raises TextError, too, for messages that the
        template refuses.
        """
        given = locals()
        model = cast("Model", given.pop("self"))
        return _generation(model, *reply(model, given.pop("messages"), given))

    def submit(
        self, prompt: str | Sequence[int] | None = None, *,
        messages: str | Sequence[Mapping[str, Any]] | None = None, priority: float = 0,
        deadline: float | None = None, **options: Any,
    ) -> Request:  # fmt: skip
        """An answer that goes on by itself, together with all others; from any thread or task.

        With `prompt` it is that of `generate`, with `messages` that of `chat`, and takes their
        keywords; `on_token` and `on_prompt` are called by the thread that runs the steps of all.
        What it gives is iterated, `for` or `async for`, awaited, or asked for its `.result()`.
        priority: who waits goes first with the higher one; 1 is worth ten seconds of waiting.
        deadline: seconds after which it ends with what it has, its `reason` being "deadline".
        Its text is what it would be alone, whatever else is under way.
        Raises what `generate` and `chat` raise; MemoryLimitError where there could never be room.
        """
        from runtime.requests import submit

        return submit(cast("Model", self), prompt, messages, priority, deadline, options)

    def together(self, answers: Iterable[Generation]) -> Together:
        """Answers of this model under way, read together: (number, text) of any, as it comes.

        One step evaluates a token of each of them; each is the answer it would be alone, and ends,
        or is closed, for itself. An error of one is raised when it comes, and ends that one: go on
        with `next` for the others.
        """
        from runtime.together import Together

        return Together(cast("Model", self), answers)


def _generation(model: Model, prompt: Prompt, options: Options) -> Generation:
    if prompt.session is None:
        prompt = prompt._replace(session=model.session())
    return Generation(model, prompt, options)
