"""Models whose devices are the processes of an MPI run, all on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_model import needs_demo
from mpi_runs import ROOT, MpiRun, launcher, mpiexec
from mpi_script import answers
from small_models import NOVEL, Sizes, write_model
from tensor_models import summed

import runtime
from runtime.backends.meta import processes
from runtime.backends.meta.messages import packed, unpacked
from runtime.backends.meta.rank import fingerprint
from runtime.errors import OptionError
from runtime.gguf.reader import open_gguf
from runtime.model import demo_path

pytestmark = needs_demo

EXACT = {"kv_type": "f32", "activations": "f32", "context": 256}
RUN = ("-m", "runtime", "run", "--devices", "tensor(mpi)", "-t", "1", "--raw", "-p", "Once")
LONG = (*RUN, "-n", "-1", "--ignore-eos", "-c", "8192", "--temp", "0")
SOON = 10.0  # seconds in which all must end


def compared(folder: Path, ranks: int, every: list[dict[str, Any]]) -> None:
    """The same bits by so many processes as by so many devices of this one."""
    out = folder / "found.npz"
    over_mpi = [{**given, "devices": "tensor(mpi)", "threads": 1} for given in every]
    script = str(ROOT / "tests" / "mpi_script.py")
    devices = f"tensor({','.join(f'cpu:{n}' for n in range(ranks))})"
    # first, so that kernels are compiled by one process
    with summed():
        here = [answers({**given, "devices": devices, "threads": ranks}) for given in every]
    code, said, errors = mpiexec(ranks, script, str(out), json.dumps(over_mpi), timeout=240)
    assert (code, said, errors) == (0, "", "")
    with np.load(out) as found:
        for number, (given, wanted) in enumerate(zip(every, here, strict=True)):
            for n, want in enumerate(wanted):
                np.testing.assert_array_equal(found[f"{number} {n}"], want, f"{given}, {n}")
            assert f"{number} {len(wanted)}" not in found


def models(folder: Path, *wanted: tuple[Sizes, str, dict[str, Any]]) -> list[dict[str, Any]]:
    paths = [folder / f"{n}.gguf" for n in range(len(wanted))]
    for path, (sizes, kind, _) in zip(paths, wanted, strict=True):
        write_model(path, sizes, kind)
    return [
        {"path": str(path), "progress": False, **given}
        for path, (_, _, given) in zip(paths, wanted, strict=True)
    ]


def test_two_processes_compute_what_two_devices_do(tmp_path: Path):
    cached = {"kv_type": "q8_0,f16", "context": 256}
    compared(tmp_path, 2, models(
        tmp_path, (Sizes("qwen3"), "F32", EXACT), (NOVEL["qwen35moe"], "F32", EXACT),
        (NOVEL["gpt-oss"], "Q4_0", cached),
        (Sizes("qwen3"), "Q8_0", {**cached, "tensor_split": "3,1"}),
    ))  # fmt: skip


def test_three_processes_compute_what_three_devices_do(tmp_path: Path):
    compared(tmp_path, 3, models(
        tmp_path, (Sizes("llama", heads=6, kv_heads=3), "F32", EXACT),
        (NOVEL["qwen3next"], "Q8_0", {**EXACT, "tensor_split": [1, 3, 2]}),
    ))  # fmt: skip


def test_more_processes_than_there_is_to_split(tmp_path: Path):
    compared(tmp_path, 5, models(tmp_path, (Sizes("qwen3", heads=2, kv_heads=1), "F32", EXACT)))


@pytest.mark.slow
def test_golden_models(golden: Path, tmp_path: Path):
    for ranks, names in ((2, ("llama", "qwen35", "gptoss")), (3, ("qwen3moe", "qwen3next"))):
        paths = [str(golden / name / "model-f32.gguf") for name in names]
        compared(tmp_path, ranks, [{"path": path, "progress": False, **EXACT} for path in paths])


def test_the_first_process_alone_talks():
    with runtime.load() as model:
        options = {"max_tokens": 8, "temperature": 0}
        want = model.generate(model.tokenizer.encode("Once"), **options).text
    code, out, err = mpiexec(2, *RUN, "-n", "8", "--temp", "0", "-ts", "3,1", "--echo")
    assert (code, out) == (0, f"Once{want}\n")
    lines = [line for line in err.splitlines() if not line.startswith("compiling")]
    assert [line.split()[0] for line in lines] == ["loaded", "continuing", "prompt"]


def test_the_first_process_alone_reads_and_idle_ones_rest():
    chat = ("-m", "runtime", "chat", "-dev", "tensor(mpi)", "-t", "1", "-q", "--temp", "0")
    with MpiRun(2, *chat, "-n", "8") as run:
        assert run.process.stdin is not None
        run.process.stdin.write(b"Who is Pip?\n")
        run.process.stdin.flush()
        first = run.read_some()
        while not first.endswith(b"\n"):
            first += run.read_some()
        stat = Path(f"/proc/{run.pids()[1]}/stat")
        time.sleep(0.3)
        before, started = ticks(stat), time.monotonic()
        time.sleep(1)
        share = (ticks(stat) - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - started)
        code, second, err = run.end("And where?\n")
    assert code == 0 and err == "" and first.strip() and second.strip()
    assert share < 0.25


def ticks(stat: Path) -> int:
    """Processor time of a process."""
    return sum(map(int, stat.read_text("ascii").rpartition(")")[2].split()[11:13]))


def test_bench_loads_several_models_one_after_the_other():
    tests = ("-p", "4", "-n", "0", "-r", "1", "-t", "1", "-ctk", "f16,q8_0", "-o", "json")
    code, out, _ = mpiexec(2, "-m", "runtime", "bench", "-dev", "tensor(mpi)", *tests)
    rows = json.loads(out)
    assert code == 0 and [row["type_k"] for row in rows] == ["f16", "q8_0"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("-n", "x"), "Invalid value for '-n'"),
        (("-m", "/nowhere.gguf"), "/nowhere.gguf: no such file; check the path"),
        (("-ts", "1,1,1"), "tensor_split='1,1,1' has 3 shares for 2 devices"),
        (("-dev", "tensor(mpi:3)"), "these are 3 processes with a share, and mpiexec started 2"),
        (("-dev", "layers(mpi)"), "mpi is all processes of this run, each with a part"),
        (("-dev", "tensor(mpi,cpu)"), "mpi is all processes of this run, each with a part"),
    ],
)
def test_a_mistake_is_said_once(args: tuple[str, ...], says: str):
    code, out, err = mpiexec(2, *RUN, *args)
    assert code in (1, 2) and out == ""
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_other_weights_are_another_file(tmp_path: Path):
    path, begins = tmp_path / "model.gguf", open_gguf(demo_path()).tensors.values()
    shutil.copyfile(demo_path(), path)
    want = fingerprint(open_gguf(path))
    assert want == fingerprint(open_gguf(demo_path()))
    places = [tensor.offset + at for tensor in begins for at in (0, tensor.nbytes - 1)]
    for place in (*places[:4], *places[-4:], places[-1] // 2):
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        assert fingerprint(open_gguf(path))["file"] != want["file"]
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
    assert fingerprint(open_gguf(path)) == want


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("file", r"BackendError: MPI process 2: its file \(.*\) is not that of process 0 \(.*\)"),
        ("version", r"BackendError: MPI process 2: its version \(0.0.9, .*\) is not that of"),
        ("memory", "BackendError: MPI process 2: there is no memory for the weights"),
        ("step", "BackendError: MPI process 2: there is no memory for the weights"),
    ],
)
def test_what_one_process_alone_has(small_model: Path, fault: str, says: str):
    script = str(ROOT / "tests" / "mpi_faults.py")
    code, _, err = mpiexec(3, script, fault, str(small_model), timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith("compiling")]
    assert code != 0 and re.match(says, lines[0])
    assert len(lines) == 1


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("noticed_by", ["the launcher", "the others"])
def test_a_killed_process_ends_all(tmp_path: Path, noticed_by: str, killed: int):
    before: tuple[str, ...] = ()
    if noticed_by == "the others":  # to the launcher nothing has happened: the shell is there
        shell = tmp_path / "shell.sh"
        shell.write_text('#!/bin/sh\n"$@"\nwhile kill -0 $PPID; do sleep 1; done\n')
        shell.chmod(0o755)
        before = (str(shell),)
    with MpiRun(3, *LONG, before=before) as run:
        while not run.read_some():
            pass
        pids = run.pids()
        os.kill(pids[killed], signal.SIGKILL)
        killed_at = time.monotonic()
        while set(run.pids()) and time.monotonic() - killed_at < SOON:
            time.sleep(0.05)
        assert run.pids() == {}
        if noticed_by == "the launcher":
            code, out, _ = run.end()
            assert code != 0 and "Killed" in out
            return
        run.process.terminate()
        _, _, err = run.end()
    line = f"MPI process {killed} has ended, and with it this run"
    assert err.count(line) == 1


def test_ctrl_c_ends_all():
    with MpiRun(2, *LONG) as run:
        while not run.read_some():
            pass
        run.process.send_signal(signal.SIGINT)
        code, _, err = run.end(timeout=SOON)
        assert code == 130 and "Traceback" not in err
        assert run.pids() == {}


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np
import runtime

model = runtime.load(sys.argv[1], devices="tensor(mpi)", threads=1, context=8192)
ids = [n % 80 for n in range(6000)]
session = model.session()
session.eval(ids[:3], "none")
model.eval(ids[:500], "last")
started = time.perf_counter()
right = model.eval(ids[:500], "last")
took, interrupted = time.perf_counter() - started, 0
for n in range(40):
    try:  # the first of them may come before its thread counts as started
        threading.Timer(took * (n % 5 + 1) / 8, os.kill, (os.getpid(), signal.SIGINT)).start()
        session.eval(ids[3:], "last")
        time.sleep(10)  # the signal came too late
    except KeyboardInterrupt:
        if len(session.tokens) == 3:
            interrupted += 1
        else:
            session.rewind(len(session.tokens) - 3)
    assert session.tokens == ids[:3]
    if interrupted == 3:
        break
else:
    raise SystemExit("not interrupted")
assert np.array_equal(session.eval(ids[3:500], "last"), right)
print("as it was")
"""


def test_an_interrupted_step_leaves_all_processes_as_they_were(small_model: Path):
    code, out, err = mpiexec(2, "-c", INTERRUPTED, str(small_model))
    assert (code, out) == (0, "as it was\n"), err


@pytest.mark.slow
def test_hosts_that_are_network_namespaces():
    launcher()
    name = f"runtime-test-{os.getpid()}"
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("there can be no network namespaces here")
    subprocess.run(["ip", "netns", "del", name], check=True)
    script = ["bash", str(ROOT / "scripts" / "check_mpi.sh")]
    # the launcher and Python of this environment, whether it is activated or not
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bits" in done.stdout and done.stdout.count("killed: all ended") == 2


EXCHANGED = """
import numpy as np
from runtime.backends.meta.processes import processes

beside = processes()
mine, found = np.full(4, beside.rank, np.float32), np.zeros(12, np.float32)
sizes, starts = [16, 0, 16], [0, 16, 32]
given = mine.view(np.uint8)[: sizes[beside.rank]], sizes, found.view(np.uint8), starts
beside.stop = beside.rank == 0
assert not beside.exchange(*given), beside.rank
beside.stop = False
assert beside.exchange(*given), beside.rank
assert found.tolist() == [0] * 8 + [2] * 4, beside.rank
if beside.rank:
    beside.answer(beside.rank, "")
else:
    assert beside.answers() == [[1, ""], [2, ""]]
"""


def test_all_processes_end_a_step_where_the_first_wishes_it():
    assert mpiexec(3, "-c", EXCHANGED) == (0, "", "")


def test_without_mpi_and_without_other_processes(monkeypatch: pytest.MonkeyPatch):
    for name in ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    alone = SimpleNamespace(
        COMM_WORLD=SimpleNamespace(size=1), Get_library_version=lambda: "Some MPI 5\nbuilt so"
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=alone))
    with pytest.raises(OptionError, match=r"^devices: mpi is for several processes; start them"):
        runtime.load(devices="tensor(mpi)")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(OptionError, match=r"one of 2 processes, .* that library \(Some MPI 5\)"):
        runtime.load(devices="tensor(mpi)")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(OptionError, match=r"^devices: mpi needs mpi4py and an MPI library .*: pip"):
        runtime.load(devices="tensor(mpi)")
    monkeypatch.setenv("PMI_RANK", "1")  # the first process says it
    with pytest.raises(SystemExit):
        runtime.load(devices="tensor(mpi)")
    assert processes.follows()


def test_graphs_are_the_same_in_another_process(small_model: Path):
    with runtime.load(small_model) as model:
        graph = model._engine.graphs.graph(4, 2)
    leaf = graph.leaves("state")[0]
    name, graphs, found, number = unpacked(packed(["load", [graph], leaf, 3]))
    assert (name, number) == ("load", 3)
    assert [one.key() for one in graphs] == [graph.key()]
    assert (found.name, found.shape, found.dtype) == (leaf.name, leaf.shape, leaf.dtype)
