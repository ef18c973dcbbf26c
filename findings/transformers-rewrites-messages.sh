#!/usr/bin/env bash
# transformers 5.24.0, apply_chat_template(tokenize=False).
#
# A chat template is a program over `messages`, and one expects that it is given the messages that
# the caller gave: `content: None` beside tool calls (OpenAI's form) as none, `thinking` as thinking.
#
# Seen: messages are rewritten first. Keys whose value is None are taken out, so that a template
# which asks "is none" sees something undefined instead, and `| length` of it raises. And whichever of
# reasoning_content, thinking and reasoning is given first appears under reasoning_content as
# well as under thinking, so that a template reading either of these two gets it, and one that reads
# `reasoning` only what was given under that name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 jinja2==3.1.6 2>"$work/pip.log" \
  || { cat "$work/pip.log"; exit 1; }
cat >"$work/try.py" <<'PY'
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def rendered(template: str, message: dict) -> str:
    return tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)


NONE = "{% for m in messages %}{{ m.content is none }} {{ m.content is defined }}{% endfor %}"
NAMES = (
    "{% for m in messages %}{% for n in ['reasoning_content', 'thinking', 'reasoning'] %}"
    "{{ n }}={{ m[n] if n in m else '-' }} {% endfor %}{% endfor %}"
)
seen = {"content None, is none / is defined": rendered(NONE, {"role": "assistant", "content": None})}
for name in ("reasoning_content", "thinking", "reasoning"):
    message = {"role": "assistant", "content": "x", name: "R"}
    seen[f"{name} given"] = rendered(NAMES, message).strip()
want = {
    "content None, is none / is defined": "False False",
    "reasoning_content given": "reasoning_content=R thinking=R reasoning=-",
    "thinking given": "reasoning_content=R thinking=R reasoning=-",
    "reasoning given": "reasoning_content=R thinking=R reasoning=R",
}
for what, found in seen.items():
    print(f"{what}: {found}{'' if found == want[what] else f'   CHANGED, was {want[what]}'}")
sys.exit(seen != want)
PY
"$work/venv/bin/python" "$work/try.py" 2>"$work/log" || { tail -3 "$work/log"; exit 1; }
