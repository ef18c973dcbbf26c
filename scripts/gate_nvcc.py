"""What nvcc makes of the matrix-vector loop: instructions for each dp4a, of matvec_loop.cu.

    python scripts/gate_nvcc.py                 all formats, some minutes
    python scripts/gate_nvcc.py Q4_K Q6_K       these

Written to tests/data/matvec_loops.json, which tests/test_cuda_gates.py holds our kernels to. Needs
nvcc on the PATH (13.0 made what is there), the extra `cuda`, and no GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # a checkout need not be installed

from runtime.backends.cuda import sass  # noqa: E402
from runtime.backends.cuda.catalogue import KERNELS  # noqa: E402
from runtime.errors import BackendError, Error  # noqa: E402
from runtime.progress import reporter  # noqa: E402

FOUND = HERE.parent / "tests" / "data" / "matvec_loops.json"
TARGETS = ("sm_80", "sm_90a")
Loop = tuple[str, str, int]  # target, format, columns


def loops() -> list[Loop]:
    """One for each kernel there is."""
    kernels = [dict(k.constants) for k in KERNELS.every() if k.name == "matvec"]
    return [(target, str(k["format"]), int(k["columns"])) for target in TARGETS for k in kernels]


def measured(target: str, format: str, columns: int) -> float:
    """Instructions for each dp4a in what nvcc makes of the loop. BackendError: it fails."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "loop.cubin"
        given = f"-DFORMAT={format}", f"-DCOLUMNS={columns}", f"-arch={target}"
        program = ["nvcc", "-cubin", *given, "-o", cubin, HERE / "matvec_loop.cu"]
        done = subprocess.run(program, capture_output=True, text=True)
        if done.returncode:
            says = (done.stderr.strip() or "nothing").splitlines()[0]
            raise BackendError(f"nvcc ended with {done.returncode} for {target} {format}: {says}")
        code = sass.disassemble(cubin.read_bytes())
    return max(sass.loops(code), key=lambda loop: loop.count("IDP.4A")).per("IDP.4A")


def measure(wanted: Sequence[Loop]) -> dict[str, float]:
    """ "target format columns" -> see `measured`. BackendError: there is no nvcc, or it fails."""
    if shutil.which("nvcc") is None:
        raise BackendError("no nvcc on the PATH: it is in the CUDA toolkit, 13.0 or later")
    found = {}
    with reporter(True) as report:
        for n, loop in enumerate(wanted):
            if report:
                report(n, len(wanted), "measuring loops")
            found[" ".join(map(str, loop))] = round(measured(*loop), 4)
    return found


@click.command(
    help="\b\n" + __doc__.replace("\n\n", "\n\n\b\n"),  # lines as they stand
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("formats", nargs=-1, metavar="[FORMAT]...",
                type=click.Choice(sorted({f for _, f, _ in loops()})))  # fmt: skip
def main(formats: tuple[str, ...]) -> None:
    found = measure([loop for loop in loops() if not formats or loop[1] in formats])
    before = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    after = dict(sorted((before | found).items()))
    FOUND.write_text(json.dumps(after, indent=1) + "\n", encoding="utf-8")
    changed = sum(before.get(case) != per for case, per in found.items())
    click.echo(f"{len(found)} loops measured, {changed} of them changed: {FOUND}")


if __name__ == "__main__":
    try:
        main()
    except Error as error:
        sys.exit(f"error: {error}")
