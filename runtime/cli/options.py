"""Options that several commands share, from one table each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from runtime.cli.parsing import THREADS, F, Refused, decorated, option

_MODEL, _CHOICE, _MORE = "Model", "Choice of tokens", "More about the choice of tokens"


class Windows(click.IntRange):
    """How many windows of a text, None for all, which is given as -1."""

    name = "windows"

    def __init__(self) -> None:
        super().__init__(-1)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """None for -1; 0 is refused."""
        found = super().convert(value, param, ctx)
        if found == 0:
            self.fail("0 windows leave nothing to measure; -1 is all of them.", param, ctx)
        return None if found < 0 else found


_UNITS = {"": 20, "k": 10, "m": 20, "g": 30, "t": 40}


class Size(click.ParamType):
    """Bytes: "256M", "1.5G", or a number of MiB, as in llama.cpp."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """As an int of at least 1."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(?:i?b)?", str(value).lower())
        nbytes = int(float(found[1]) * (1 << _UNITS[found[2]])) if found else 0
        if nbytes < 1:
            self.fail(f"{value!r} is no size, such as 256M or 4G.", param, ctx)
        return nbytes


class _Context(click.IntRange):
    """Tokens; 0 is the default, as in llama.cpp."""

    name = "context"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return super().convert(value, param, ctx) or None


OFFLOAD_OPTIONS = (
    option("-ngl --gpu-layers | --n-gpu-layers", "How many of the last layers GPUs have, the "
           "output being one, and the CPU the others: a number, all, or auto for what fits.",
           _MODEL, metavar="N"),
    option("-cmoe --cpu-moe", "The experts of all layers are the CPU's.", _MODEL, is_flag=True),
    option("-ncmoe --n-cpu-moe", "The experts of the first N layers are.", _MODEL,
           type=click.IntRange(0), metavar="N"),
)  # fmt: skip

# How weights are run and where: of every command that loads a model.
_PRECISION_OPTIONS = (
    option("--kv-type", "Type of the KV cache, such as f32, f16, bf16 or q8_0, or two for K and V "
           "apart, such as q8_0,f16.", _MODEL, default="f16", metavar="TYPE", show_default=True),
    option("-ctk --cache-type-k", "Type of K alone.", _MODEL, metavar="TYPE"),
    option("-ctv --cache-type-v", "Type of V alone.", _MODEL, metavar="TYPE"),
    option("--no-cache-rotation cache_rotation", "Keep quantised K and V as they are; rotated, as "
           "they are by default, they lose less.", _MODEL, flag_value=False, default=True),
    option("--activations", "Precision of activations against quantised weights.", _MODEL,
           type=click.Choice(["int8", "f32"]), default="int8", show_default=True),
    option("-dev --devices | --device", "cpu; or several, as 'cpu:0,cpu:1' or numa, or with the "
           "way of splitting 'tensor(3*cpu:0,cpu:1)', 'layers(...)', nested too; cuda or "
           "cuda:0, a GPU, several as 'layers(cuda:0,cuda:1)'; auto, a GPU if one "
           "can be used; tensor(mpi), the processes that mpiexec started; or reference, "
           "the slow and exact numpy backend.",
           _MODEL, default="cpu", metavar="EXPRESSION", show_default=True),
    option("-sm --split-mode", "How a list of devices is used: layer (each has some layers), "
           "tensor (each has a part of every tensor) or none (one alone).", _MODEL,
           metavar="MODE"),
    option("-ts --tensor-split", "How much each has, such as 3,1 (equal parts).", _MODEL,
           metavar="N,N,..."),
    option("-mg --main-device | --main-gpu", "Which of the list has everything with -sm none (0).",
           _MODEL, type=click.IntRange(0), metavar="N"),
    option("--no-graph graphs", "Launch the kernels of a GPU one by one, in place of one graph of "
           "them for each step; the same bits.", _MODEL, flag_value=False, default=None),
    *OFFLOAD_OPTIONS,
    option("--pack-cache", "Keep packed weights on disk for the next start, in the cache folder or "
           "(--pack-cache beside) beside the model; see 'runtime cache'.", _MODEL,
           type=click.Choice(["folder", "beside"]), bare="folder", metavar="[beside]"),
)  # fmt: skip
_CACHE_OPTIONS = (
    option("--cache-dir", "Keep what has been read of prompts in DIR for the next start, and for "
           "others; see 'runtime cache'.", _MODEL, metavar="DIR"),
    option("--cache-disk", "Most bytes of it, as 20G (default: 8G, and no more than a tenth of "
           "what is free).", _MODEL, type=Size(), metavar="SIZE"),
    option("-cram --cache-ram cache_bytes", "Most memory of all sequences and what is kept of "
           "prompts together, as 256M or 4G; a plain number is in MiB (default: what sequences "
           "need, and a quarter of what is free).", _MODEL, type=Size(), metavar="SIZE"),
    option("--no-prompt-cache prompt_cache | --no-cache-prompt", "Read prompts anew whose first "
           "tokens were read before.", _MODEL, flag_value=False, default=True),
)  # fmt: skip
_DEVICES = ("devices", "split_mode", "tensor_split", "main_device", "gpu_layers")

_SIZE_OPTIONS = (
    option("-c --context | --ctx-size",
           "Tokens of context (default: what the model was trained for, or fits).", _MODEL,
           type=_Context(0), metavar="N"),
    option("-t --threads", "Threads of all devices together (default: one per core).", _MODEL,
           type=THREADS, metavar="N"),
)  # fmt: skip

_SPECULATION = (
    option("--spec", "Who drafts tokens, several of which are verified in a step; the answer is "
           "the same: ngram (what the text has had before), draft (the model of --draft), mtp "
           "(the file's own block), auto (whoever is there and pays) or off.", _MODEL,
           type=click.Choice(["auto", "off", "ngram", "draft", "mtp"]), default="auto",
           show_default=True),
    option("-md --draft | --model-draft --spec-draft-model", "A smaller model with the same "
           "vocabulary, which drafts.", _MODEL, metavar="FILE"),
)  # fmt: skip

# One row per field of runtime.Sampling that an option sets: names, field, type, what it takes,
# help. Without a default here: what is not given is left to the model's file and to Sampling.
_COMMON = (
    ("--temp | --temperature", "temperature", float, "X",
     "0 always takes the best token, higher is more varied (0.8)."),
    ("--top-k", "top_k", int, "N", "Of the N best tokens; 0 all (40)."),
    ("--top-p", "top_p", float, "P", "Of the best tokens that add up to P; 1 all (0.95)."),
    ("--min-p", "min_p", float, "P",
     "Of tokens at least P as probable as the best; 0 all (0.05)."),
    ("--repeat-penalty", "repeat_penalty", float, "X",
     "Make repeated tokens less likely; 1 not (1)."),
    ("-s --seed", "seed", int, "N",
     "The same seed gives the same text; -1 a new one each time (-1)."),
)  # fmt: skip
_RARE = (
    ("--typical | --typical-p", "typical_p", float, "P",
     "Of tokens of typical information that add up to P; 1 all (1)."),
    ("--presence-penalty", "presence_penalty", float, "X",
     "Take X from the logit of tokens seen before (0)."),
    ("--frequency-penalty", "frequency_penalty", float, "X",
     "Take X for each time a token was seen (0)."),
    ("--repeat-last-n", "penalty_last_n", int, "N",
     "Penalties look at the last N tokens; -1 all (64)."),
    ("--top-nsigma | --top-n-sigma", "top_n_sigma", float, "N",
     "Of logits within N standard deviations of the best; -1 all (-1)."),
    ("--xtc-probability", "xtc_probability", float, "P",
     "How often the most probable tokens are left out; 0 never (0)."),
    ("--xtc-threshold", "xtc_threshold", float, "P",
     "They are those of at least P but the least of them; over 0.5 none (0.1)."),
    ("--dry-multiplier", "dry_multiplier", float, "X",
     "Make repeated passages less likely; 0 not (0)."),
    ("--dry-base", "dry_base", float, "X", "The more by this factor for each token (1.75)."),
    ("--dry-allowed-length", "dry_allowed_length", int, "N",
     "Passages up to N tokens may be repeated (2)."),
    ("--dry-penalty-last-n", "dry_penalty_last_n", int, "N",
     "Look for them in the last N tokens; 0 none, -1 all (64)."),
    ("--dynatemp-range", "dynatemp_range", float, "X",
     "Vary the temperature by X with the entropy; 0 not (0)."),
    ("--dynatemp-exp", "dynatemp_exponent", float, "X", "By this power of the entropy (1)."),
    ("--mirostat", "mirostat", int, "N",
     "2: keep the surprise even, in place of the other samplers; 0 not (0)."),
    ("--mirostat-ent", "mirostat_tau", float, "X", "The surprise to keep, in bits (5)."),
    ("--mirostat-lr", "mirostat_eta", float, "X", "How fast it is corrected (0.1)."),
    ("--samplers", "samplers", str, "A;B;...",
     "Which samplers in which order, such as 'top_k;top_p;temperature'."),
)  # fmt: skip
_REPEATED = (
    ("-l --logit-bias", "logit_bias", "ID(+/-)BIAS",
     "Change a token's logit, such as 15043+1 or 29905-inf. May be repeated."),
    ("--dry-sequence-breaker", "dry_sequence_breakers", "TEXT",
     "Passages end at TEXT, in place of newline : \" and *; none nowhere. May be repeated."),
    ("--stop | -r --reverse-prompt", "stop", "TEXT", "Stop before this text. May be repeated."),
)  # fmt: skip


SAMPLING_FIELDS = tuple(row[1] for row in (*_COMMON, *_RARE, *_REPEATED))

_MAX_TOKENS = option(
    "-n --predict max_tokens | --n-predict -n-predict --max-tokens --num-predict",
    "Most tokens to generate; -1 until the context is full (256 for a text that is continued, "
    "else -1).", _CHOICE, type=click.IntRange(-2), metavar="N",
)  # fmt: skip


def model_options(function: F) -> F:
    """-c, -t, --kv-type and its like, --activations, --devices and its like."""
    return decorated(function, (*_SIZE_OPTIONS, *_PRECISION_OPTIONS))


def speculation_options(function: F) -> F:
    """--spec and --draft."""
    return decorated(function, _SPECULATION)


def cache_options(function: F) -> F:
    """--cache-dir, --cache-ram and their like: of commands that answer."""
    return decorated(function, _CACHE_OPTIONS)


def cache_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `runtime.load` from `cache_options`, those given."""
    names = ("cache_bytes", "cache_dir", "cache_disk")
    found = {name: options[name] for name in names if options[name] is not None}
    return found if options["prompt_cache"] else {**found, "prompt_cache": False}


def precision_options(function: F) -> F:
    """--kv-type and its like, --activations, --devices and its like."""
    return decorated(function, _PRECISION_OPTIONS)


def sampling_options(function: F) -> F:
    """-n, --temp and everything else that chooses tokens, what is used most first."""
    found = [_MAX_TOKENS]
    for rows, section in ((_COMMON, _CHOICE), (_RARE, _MORE)):
        for names, field, kind, metavar, text in rows:
            found.append(option(_named(names, field), text, section, type=kind, metavar=metavar))
    for names, field, metavar, text in _REPEATED:
        found.append(option(_named(names, field), text, _MORE, multiple=True, metavar=metavar))
    end = "Never let the model say that it has finished."
    return decorated(function, (*found, option("--ignore-eos", end, _MORE, is_flag=True)))


def _named(names: str, field: str) -> str:
    """The option's names with the field as its parameter's."""
    shown, bar, aliases = names.partition("|")
    return f"{shown} {field} {bar}{aliases}"


def load_arguments(options: dict[str, Any], quiet: bool = False) -> dict[str, Any]:
    """Keyword arguments of `runtime.load` from the values of `model_options`, and perhaps of
    `prompt_options` and `speculation_options`."""
    found = {name: options[name] for name in ("context", "threads")} | precision_arguments(options)
    given = {name: options.get(name) for name in ("spec", "draft")}
    found |= {name: value for name, value in given.items() if value not in (None, "auto")}
    return found | {"kv_type": kv_type(options), "progress": not quiet}


def precision_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `runtime.load` from `precision_options`, but the types of the cache."""
    found = {name: options[name] for name in ("activations", "cache_rotation")}
    found |= {} if options["graphs"] is None else {"graphs": options["graphs"]}
    found |= {"pack_cache": options["pack_cache"]} if options["pack_cache"] else {}
    return found | device_arguments(options)


def device_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `runtime.load` that say on which devices a model is run, those given."""
    found = {name: options[name] for name in _DEVICES if options[name] is not None}
    moe = options["cpu_moe"] or options["n_cpu_moe"]
    return found | ({"cpu_moe": moe} if moe else {})


def kv_type(options: dict[str, Any]) -> str:
    """`--kv-type`, with K or V replaced by -ctk and -ctv."""
    kinds = [kind for kind, *_ in cache_types(options, 1)]
    return kinds[0] if kinds[0] == kinds[1] else ",".join(kinds)


def cache_types(options: dict[str, Any], most: int | None = None) -> tuple[list[str], list[str]]:
    """Types of K and of V: -ctk and -ctv, which may have `most`, in place of --kv-type's.

    Refused, by the option's name, for what is no type of a cache.
    """
    both = listed_types("--kv-type", options["kv_type"], 2)
    k, v = (
        [kind] if options[field] is None else listed_types(name, options[field], most)
        for kind, field, name in (
            (both[0], "cache_type_k", "-ctk"), (both[-1], "cache_type_v", "-ctv")
        )
    )  # fmt: skip
    return k, v


def listed_types(option: str, text: str, most: int | None = None) -> list[str]:
    """Types of the cache in "q8_0,f16" or "q8_0/f16"; Refused for others and for more."""
    from runtime.ops.kv_formats import KV_FORMATS

    kinds = [kind.strip().lower() for kind in text.replace("/", ",").split(",")]
    wrong = next((kind for kind in kinds if kind not in KV_FORMATS), None)
    given = f"{option} {text or repr(text)}"
    if wrong is not None:
        which = "" if wrong == text else f" has {wrong!r}, which"
        raise Refused(f"{given}{which} is no type of a cache; there are {', '.join(KV_FORMATS)}")
    if most is not None and len(kinds) > most:
        also = ", or two for K and V apart" if most == 2 else "; --kv-type takes two, K and V"
        raise Refused(f"{given}: give one type{also}")
    return kinds


def generation_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `model.generate` from the values of `sampling_options`, those given.

    UsageError for a malformed --logit-bias or a value out of
    range: before the model is loaded.
    """
    from runtime.errors import OptionError
    from runtime.text.sampling import Sampling

    chosen = {name: options[name] for name in SAMPLING_FIELDS}
    given = {name: value for name, value in chosen.items() if value not in (None, ())}
    if given.get("seed") == -1:
        del given["seed"]
    if given.get("dry_sequence_breakers") == ("none",):
        given["dry_sequence_breakers"] = ()
    if "logit_bias" in given:
        given["logit_bias"] = dict(_bias(text) for text in given["logit_bias"])
    try:
        Sampling(**given)
    except OptionError as error:
        raise click.UsageError(str(error)) from None
    if options["max_tokens"] is not None:
        given["max_tokens"] = max(-1, options["max_tokens"])
    return given | ({"ignore_eos": True} if options["ignore_eos"] else {})


def asked_by_file(metadata: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What a model's file asks for (`general.sampling.*`) that is not given, as options; or ""."""
    from runtime.text.defaults import file_defaults

    names = {row[1]: row[0].split()[0] for row in (*_COMMON, *_RARE, *_REPEATED)}
    found = file_defaults(metadata, given).items()
    return " ".join(f"{names[field]} {_shown(value)}" for field, value in found)


def _shown(value: Any) -> str:
    return ";".join(value) if isinstance(value, tuple) else f"{value:g}"


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
