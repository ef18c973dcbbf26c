"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# How weights are run and where: of every command that loads a model.
_PRECISION_OPTIONS = (
    click.option("--kv-type", default="f16", metavar="TYPE", show_default=True,
                 help="Type of the KV cache: f32, f16, bf16, q8_0, or two for K and V apart, "
                 "such as q8_0,f16."),
    click.option("--activations", type=click.Choice(["int8", "f32"]), default="int8",
                 show_default=True, help="Precision of activations against quantised weights."),
    click.option("--devices", default="cpu", metavar="NAME", show_default=True,
                 help="cpu, or reference for the slow and exact numpy backend."),
)  # fmt: skip

_SIZE_OPTIONS = (
    click.option("-c", "--context", type=click.IntRange(1), metavar="N",
                 help="Tokens of context (default: what the model was trained for, or fits)."),
    click.option("-t", "--threads", type=click.IntRange(1), metavar="N",
                 help="Threads (default: one per core)."),
)  # fmt: skip

# Without a default here: what is not given is left to runtime.Sampling.
_SAMPLING_OPTIONS = (
    click.option("--temp", "--temperature", "temperature", type=float, metavar="X",
                 help="0 always takes the best token, higher is more varied (default: 0.8)."),
    click.option("--top-k", type=int, metavar="N", help="Of the N best tokens; 0 all (40)."),
    click.option("--top-p", type=float, metavar="P",
                 help="Of the best tokens that add up to P; 1 all (0.95)."),
    click.option("--min-p", type=float, metavar="P",
                 help="Of tokens at least P as probable as the best; 0 all (0.05)."),
    click.option("--typical", "typical_p", type=float, metavar="P",
                 help="Of tokens of typical information that add up to P; 1 all (1)."),
    click.option("--repeat-penalty", type=float, metavar="X",
                 help="Make repeated tokens less likely; 1 not (1)."),
    click.option("--presence-penalty", type=float, metavar="X",
                 help="Take X from the logit of tokens seen before (0)."),
    click.option("--frequency-penalty", type=float, metavar="X",
                 help="Take X for each time a token was seen (0)."),
    click.option("--repeat-last-n", "penalty_last_n", type=int, metavar="N",
                 help="Penalties look at the last N tokens; -1 all (64)."),
    click.option("--logit-bias", multiple=True, metavar="ID(+/-)BIAS",
                 help="Change a token's logit, such as 15043+1 or 29905-inf. May be repeated."),
    click.option("-s", "--seed", type=int, metavar="N",
                 help="The same seed gives the same text; -1 a new one each time (-1)."),
    click.option("--stop", multiple=True, metavar="TEXT",
                 help="Stop before this text. May be repeated."),
    click.option("--ignore-eos", is_flag=True,
                 help="Never let the model say that it has finished."),
)  # fmt: skip


_SAMPLING_NAMES = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty"),
    *("presence_penalty", "frequency_penalty", "penalty_last_n", "logit_bias", "seed", "stop"),
    "ignore_eos",
)


def model_options(function: F) -> F:
    """-c, -t, --kv-type, --activations and --devices."""
    return _add(function, (*_SIZE_OPTIONS, *_PRECISION_OPTIONS))


def precision_options(function: F) -> F:
    """--kv-type, --activations and --devices."""
    return _add(function, _PRECISION_OPTIONS)


def sampling_options(max_tokens: int) -> Callable[[F], F]:
    """-n (default: `max_tokens`), --temp and everything else that chooses tokens."""
    most = click.option(
        "-n", "--max-tokens", type=click.IntRange(-1), metavar="N", default=max_tokens,
        show_default=True, help="Most tokens to generate; -1 until the context is full.",
    )  # fmt: skip
    return lambda function: _add(function, (most, *_SAMPLING_OPTIONS))


def load_arguments(options: dict[str, Any], quiet: bool = False) -> dict[str, Any]:
    """Keyword arguments of `runtime.load` from the values of `model_options`."""
    names = ("context", "threads", "kv_type", "activations", "devices")
    return {name: options[name] for name in names} | {"progress": not quiet}


def generation_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `model.generate` from the values of `sampling_options`.

    Raises click.BadParameter for a malformed --logit-bias, OptionError for a value out of range:
    both before the model is loaded.
    """
    from runtime.text.sampling import Sampling

    given = {name: options[name] for name in _SAMPLING_NAMES if options[name] not in (None, ())}
    if given.get("seed") == -1:
        del given["seed"]
    if "logit_bias" in given:
        given["logit_bias"] = dict(_bias(text) for text in given["logit_bias"])
    Sampling(**{k: v for k, v in given.items() if k not in ("max_tokens", "ignore_eos")})
    return given


def _bias(text: str) -> tuple[int, float]:
    """(id, bias) of "15043+1" or "15043-inf"."""
    at = max(text.find("+"), text.find("-"))
    try:
        return int(text[:at]), float(text[at:])
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no token id with a bias, such as 15043+1 or 29905-inf",
            param_hint="--logit-bias",
        ) from None


def _add(function: F, options: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(options):
        function = option(function)
    return function
