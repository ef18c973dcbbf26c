"""Which of the known ways of cutting words a tokenizer.json has, found by watching it cut.

Its expression may be written in many ways; what counts is where it cuts a text made to tell the
known ways apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runtime.ops.errors import TextError
from runtime.text.pretokenize import PRE_TOKENIZERS, PreTokenizer

# Names that are taken before others for the same way, those of the models that are converted here.
_FIRST = ("llama-bpe", "qwen2", "qwen35", "gpt-4o", "tekken", "smollm", "gpt-2", "deepseek-v3")

PROBE = (
    "it'llama 'Tom  1  22  +  3\n  4 a\n\n\nb "
    "Hello, World! I'm you're We'Ve it'LL don't 'Tis  x  y   z\n\n \n\t\ttab \r\n a"
    "\r\nb \n  end.\n/"
    " 1 22 333 4444 55555 1234567 3.14 12,345 x1y22z ½²③ ٣٤٥ ७८९ "
    "camelCase HTTPServer iPhone XMLHttp ǅungla ʰa ªº mixedUP "
    "日本語のテキスト中文汉字한국어 조선말 ไทยภาษา ភាសា မြန်မာ ㄅㄆ ㄱㄴ ﾃｽﾄ 々〆 "
    "русский Ελληνικά עברית العربية हिन्दी தமிழ் é n\u0303 a\u0301b क्षि "
    "#$%^&*()_+-=[]{}|;':\",./<>?`~ ... --- !!?? ''' //// \\n @user <|x|> <sentinel:3> IMGIMGABZ "
    "“quoted” \u2018it\u2019 — … 。\uff0c、\uff01\uff1f\uff1b\uff1a\uff08\uff09 ·•€£¥©®™ "
    "+=<>$^~| a+b=c x<y "
    "🚀🦙 👩\u200d🚀 ✅️ \u00a0nbsp \u3000wide \u2028 \u200bzero "
    + " ".join(" " * n + "w" for n in (4, 5, 8, 9, 16, 33, 70)) + "  "
)  # fmt: skip


def names_of(tokenizer: Mapping[str, Any], label: str) -> list[str]:
    """Values of `tokenizer.ggml.pre`, best first. TextError: none cuts as `tokenizer` does.

    tokenizer: what tokenizer.json holds. label: its path, for messages.
    """
    wanted = _cuts_of_json(tokenizer.get("pre_tokenizer"), label)
    ways: dict[PreTokenizer, str] = {}
    for name in (*_FIRST, *PRE_TOKENIZERS):
        ways.setdefault(PRE_TOKENIZERS[name], name)
    found = [name for way, name in ways.items() if not way.raw and cuts(way) == wanted]
    if not found:
        raise TextError(
            f"{label}: its pre_tokenizer cuts words in none of the {len(ways)} ways known here, "
            "so the converted model would read texts differently"
        )
    return found


def cuts(way: PreTokenizer) -> list[str]:
    """The words of the probe, in byte letters."""
    from tokenizers import Regex, pre_tokenizers

    steps: list = [pre_tokenizers.Split(Regex(p), "isolated") for p in way.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return [word for word, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(PROBE)]


def _cuts_of_json(spec: Any, label: str) -> list[str]:
    from tokenizers import Tokenizer

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    whole = {"version": "1.0", "added_tokens": [], "model": empty, "pre_tokenizer": spec}
    try:
        way = Tokenizer.from_str(json.dumps(whole)).pre_tokenizer
        return [] if way is None else [word for word, _ in way.pre_tokenize_str(PROBE)]
    except Exception as error:  # the library has no type of its own
        raise TextError(f"{label}: its pre_tokenizer cannot be used ({error})") from None
