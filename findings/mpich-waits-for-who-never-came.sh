#!/usr/bin/env bash
# mpich 5.0.2 with mpi4py 4.1.2, wheels of PyPI; two processes on Linux.
#
# One expects that mpiexec ends all processes when one of them fails, and that a process that is
# not the first finds its stdin at the end.
#
# Seen: a process that exits with status 1 before it has initialised MPI (a file that is missing on
# its machine, say) goes unnoticed: the other waits in MPI_Init for ever, and mpiexec with it,
# without a word. And the stdin of the second process is a pipe that nobody writes to and nobody
# closes, so that reading it never returns, whatever the first one's is.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q mpi4py==4.1.2 mpich==5.0.2 >"$work/pip.log" 2>&1 ||
    { cat "$work/pip.log"; exit 1; }
cat >"$work/leaves.py" <<'PY'
import os
import sys

if os.environ["PMI_RANK"] == "1":
    sys.exit(1)
from mpi4py import MPI
PY
cat >"$work/reads.py" <<'PY'
import select

from mpi4py import MPI

if MPI.COMM_WORLD.rank == 1:
    ready = select.select([0], [], [], 3)[0]
    print("stdin of the second:", "there is something, or its end" if ready else "silence")
PY
run() { timeout -k 5 15 "$work/venv/bin/mpiexec" -n 2 "$work/venv/bin/python" "$@" 2>"$work/log"; }
code=0
run "$work/leaves.py" </dev/null >"$work/said" || code=$?
echo "one of two exits with 1 before MPI_Init: status of a run cut off after 15 s: $code"
reads=$(echo words | run "$work/reads.py")
echo "$reads"
[[ $code == 124 && $reads == *silence ]] || { echo "CHANGED, or: "; tail -3 "$work/log"; exit 1; }
