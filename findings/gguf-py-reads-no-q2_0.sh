#!/usr/bin/env bash
# gguf 0.19.0, the Python package of llama.cpp, newest on the index in November 2026.
#
# llama.cpp b11434 writes tensors of type 42 (Q2_0: blocks of 64 values, a float16 scale and sixteen
# bytes of four 2-bit codes for -1, 0, 1 and 2) and of type 41 (Q1_0). One expects its Python package
# to open every file it writes.
#
# Seen: a file with a tensor of type 42 cannot be opened at all, not even to list its metadata
# (ValueError: 42 is not a valid GGMLQuantizationType). Type 41 is in the enumeration, so such a file
# opens, but there is neither a quantiser nor a dequantiser for it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q gguf==0.19.0 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }
cat >"$work/try.py" <<'PY'
import struct
import sys

import gguf
import numpy as np


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def file_of(kind: int, nbytes: int) -> str:
    """A GGUF file of version 3 with one key and one tensor [64, 2] of this type."""
    path = f"{sys.argv[1]}/{kind}.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    head += string("general.architecture") + struct.pack("<I", 8) + string("llama")
    head += string("w") + struct.pack("<IQQIQ", 2, 64, 2, kind, 0)
    with open(path, "wb") as out:
        out.write(head + b"\0" * (-len(head) % 32) + b"\0" * nbytes)
    return path


def opened(kind: int, nbytes: int) -> str:
    try:
        return f"opens, tensor type {gguf.GGUFReader(file_of(kind, nbytes)).tensors[0].tensor_type}"
    except ValueError as error:
        return f"ValueError: {error}"


seen = {"Q8_0": opened(8, 2 * 68), "Q2_0": opened(42, 2 * 18)}
try:
    gguf.quants.dequantize(np.zeros((1, 18), np.uint8), gguf.GGMLQuantizationType(41))
    seen["Q1_0 dequantised"] = "yes"
except NotImplementedError as error:
    seen["Q1_0 dequantised"] = f"NotImplementedError: {error}"
for what, found in seen.items():
    print(f"{what}: {found}")
good = seen["Q8_0"].startswith("opens") and "not a valid GGMLQuantizationType" in seen["Q2_0"]
sys.exit(not (good and seen["Q1_0 dequantised"].startswith("NotImplementedError")))
PY
"$work/venv/bin/python" "$work/try.py" "$work"
