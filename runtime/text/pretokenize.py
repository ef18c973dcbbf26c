r"""How a text is cut into words before byte pairs are merged, by `tokenizer.ggml.pre`.

Every entry is a list of regular expressions (Oniguruma syntax, as in the models' own
tokenizer.json files): the text is cut by the first one into its matches and the gaps between
them, every piece by the second one, and so on. `\p{L}`, `\p{M}`, `\p{N}`, `\p{P}`, `\p{S}` are
Unicode's letters, marks, numbers, punctuation and symbols.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from runtime.ops.errors import TextError


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting, and what comes with it.

    `whole_words`: a word that is a token is that token, whatever the merges say.
    `add_bos`: put the BOS token first where the file does not say.
    `raw`: the vocabulary is in plain UTF-8 with `▁` for spaces, not in byte letters.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    raw: bool = False


def _any(*choices: str) -> str:
    return "|".join(choices)


def _class(ranges: str) -> str:
    """A character class from hexadecimal code points and ranges, such as "41-5a b5"."""
    parts = ("-".join(f"\\x{{{end}}}" for end in part.split("-")) for part in ranges.split())
    return f"[{''.join(parts)}]"


def _cased(upper: str, lower: str, tail: str, *rest: str) -> str:
    """Words cut where lower case turns into upper case ("camelCase"), then `rest`."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return _any(f"{first}{upper}*{lower}+{tail}", f"{first}{upper}+{lower}*{tail}", *rest)


# Pieces that the expressions share. A contraction in any case: 's 't 'd 'm 're 've 'll.
_SHORT = r"'(?:[sSdDmMtT]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LINES = r"\s*[\r\n]+"
# All spaces but the last, which goes with the word after it.
_SPACES = r"\s+(?!\S)|\s+"
_CJK = _class("4e00-9fa5 3040-30ff") + "+"
_ASCII_SIGN = r"[!-/:-@\[-`{-~]"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_HAN = r"&&[^\p{Han}]]"
_AFTER_CASED = (_SIGNS_OR_SLASH, _LINES, _SPACES)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_LLAMA3 = _any(_SHORT, _WORD, r"\p{N}{1,3}", _SIGNS, _LINES, _SPACES)
_QWEN2 = _any(_SHORT, _WORD, r"\p{N}", _SIGNS, _LINES, _SPACES)
_QWEN35 = _any(_SHORT, _MARKED_WORD, r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _LINES, _SPACES)
_GPT4O = _cased(_UPPER, _LOWER, f"(?:{_SHORT})?", r"\p{N}{1,3}", *_AFTER_CASED)
_TEKKEN = _cased(_UPPER, _LOWER, "", r"\p{N}", *_AFTER_CASED)
_KIMI = _cased(
    f"[{_UPPER}{_NOT_HAN}", f"[{_LOWER}{_NOT_HAN}", f"(?:{_SHORT})?",
    r"\p{N}{1,3}", _SIGNS, _LINES, _SPACES,
)  # fmt: skip
_JAIS2_SPACES = _any(*(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")))
_DEEPSEEK3_WORD = _ASCII_SIGN + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = _any(_DEEPSEEK3_WORD, r" ?[\p{P}\p{S}]+[\r\n]*", _LINES, _SPACES)
_SPARK = _any(_DEEPSEEK3_WORD, r" ?[\p{P}\p{S}]+", r"[\r\n]", _SPACES)
# No word has these in it, the full stops and commas of several scripts among them.
_BLOOM = r" ?[^(\s|.,!?)\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c]+"
_YOUTU = _any(
    _class("ac00-d7a3 3131-318e") + "+",
    _class("ff01 2026 201c 201d 2018 2019 2014 ff1a ff1b ff0c 3001-303f fe30-fe4f") + "+",
    _class("3105-312f") + "+",
    _CJK,
)
# Digits in groups of three counted from the right, as in 1 234 567.
_RIGHT_DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_ASIAN = _class(
    "4e00-9fff 3400-4dbf f900-faff 3040-30ff ff65-ff9f 2f00-2fdf e40-e7f e80-eff 1780-17ff "
    "1000-109f aa60-aa7f a9e0-a9ff ac00-d7af 1100-11ff"
)
# Letters with two cases as DeepSeek's first tokenizer lists them, in hexadecimal code points.
_DEEPSEEK_LETTERS = _class(
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 "
    "388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba "
    "1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 "
    "1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb "
    "1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d "
    "212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 "
    "a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a "
    "ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
_DEEPSEEK_SIGNS = _class("21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002")
_DEEPSEEK_ASIAN = _class("800-9fa5 ac00-d7ff") + "+"

_DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_PLAIN_LLAMA3 = PreTokenizer((_LLAMA3,))
_PLAIN_QWEN2 = PreTokenizer((_QWEN2,))
_PLAIN_GPT4O = PreTokenizer((_GPT4O,))
_BAILING = PreTokenizer((_any(_SHORT, _WORD, r"\p{N}", _SIGNS, r"\s*[\r\n]", _SPACES),))
_GROUPED_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))
_LINES_ONLY = PreTokenizer((r"[^\n]+|\n+",), raw=True)
_TINY_AYA = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))

_FAMILIES: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe "
    "gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling "
    "exaone4": _PLAIN_GPT2,
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": _DIGITS_THEN_GPT2,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": replace(
        _PLAIN_LLAMA3, whole_words=True, add_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": _PLAIN_LLAMA3,
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": _PLAIN_QWEN2,
    "qwen35": PreTokenizer((_QWEN35,)),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _PLAIN_GPT4O,
    "granite-embed-multi-97m": replace(_PLAIN_GPT4O, whole_words=True),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "kimi-k2": PreTokenizer((r"\p{Han}+", _KIMI)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_DEEPSEEK_LETTERS}+",
            rf"\s?{_DEEPSEEK_SIGNS}+",
            r"\s+$",
            _DEEPSEEK_ASIAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}")
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _GROUPED_DEEPSEEK3,
    "spark2_5": PreTokenizer((r"\p{N}{1,3}", _CJK, _SPARK, r"\p{N}")),
    "afmoe": PreTokenizer((_RIGHT_DIGITS, _ASIAN + "+", _DEEPSEEK3)),
    "youtu": PreTokenizer(
        (_YOUTU, _cased(_UPPER, _LOWER, f"(?:{_SHORT})?", r"\p{N}", *_AFTER_CASED)),
        whole_words=True,
    ),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "jais-2": PreTokenizer(
        (_any(_SHORT, _WORD, r"\p{N}{1,3}", _SIGNS, _LINES, _JAIS2_SPACES, r"\s"),)
    ),
    "bailingmoe bailingmoe2 llada-moe": _BAILING,
    "seed-coder": PreTokenizer(
        (_any(_SHORT, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _LINES, _SPACES),)
    ),
    "ufakzeka": PreTokenizer((_any(_WORD, r"\p{N}", _SIGNS, _LINES, _SPACES),)),
    "laguna": PreTokenizer((r"[^\n]+|\n+", _QWEN2)),
    "exaone-moe": PreTokenizer(
        (
            _any(
                _SHORT,
                r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                r"\p{N}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                r"\s*[\r\n]",
                _SPACES,
            ),
        )
    ),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", _any(_SHORT, _WORD, r"\p{N}+", _SIGNS, _LINES, _SPACES)), whole_words=True
    ),
    "chameleon": PreTokenizer(
        (
            r"<sentinel:[0-9]+>",
            r"IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "superbpe": PreTokenizer((r"\p{N}+", _RIGHT_DIGITS)),
    "tiny_aya cohere2moe": _TINY_AYA,
    "gemma4 granite-embed-multi-311m": replace(_LINES_ONLY, add_bos=True),
    "sarvam-moe": _LINES_ONLY,
}
PRE_TOKENIZERS = {name: pre for names, pre in _FAMILIES.items() for name in names.split()}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The entry called `name`, a value of `tokenizer.ggml.pre`.

    An unknown name raises TextError: cutting words another way than in training gives
    plausible but worse text, which nobody would trace back to here.
    """
    if name not in PRE_TOKENIZERS:
        near = difflib.get_close_matches(name, PRE_TOKENIZERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TextError(
            f"unknown pre-tokenizer {name!r:.60} in tokenizer.ggml.pre{hint}: how this model cuts "
            f"words is not among the {len(PRE_TOKENIZERS)} ways known here; convert the model again"
        )
    return PRE_TOKENIZERS[name]
