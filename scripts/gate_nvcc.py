"""Instructions of the matrix-vector loop for each dp4a as nvcc makes them of matvec_loop.cu.

Writes tests/data/matvec_loops.json, which tests/test_cuda_gates.py holds our kernels to:
`python scripts/gate_nvcc.py [formats ...]`, where nvcc is on the PATH.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime.backends.cuda import sass
from runtime.backends.cuda.catalogue import KERNELS

HERE = Path(__file__).resolve().parent
FOUND = HERE.parent / "tests" / "data" / "matvec_loops.json"


def measured(format: str, columns: int, target: str) -> float:
    """Instructions for each dp4a in what nvcc makes of the loop."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "loop.cubin"
        given = f"-DFORMAT={format}", f"-DCOLUMNS={columns}", f"-arch={target}"
        program = ["nvcc", "-cubin", *given, "-o", cubin, HERE / "matvec_loop.cu"]
        subprocess.run(program, check=True)
        code = sass.disassemble(cubin.read_bytes())
    return max(sass.loops(code), key=lambda loop: loop.count("IDP.4A")).per("IDP.4A")


def main(formats: list[str]) -> None:
    """Measure every kernel there is, of some formats or of all."""
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    kernels = [dict(k.constants) for k in KERNELS.every() if k.name == "matvec"]
    for target in ("sm_80", "sm_90a"):
        for k in kernels:
            format, columns = k["format"], k["columns"]
            if not formats or format in formats:
                found[f"{target} {format} {columns}"] = round(measured(format, columns, target), 4)
                FOUND.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
