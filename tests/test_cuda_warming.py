"""`runtime warmup --devices cuda:TARGET`: kernels of GPUs that are not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from cuda_models import on_fake_cuda

from runtime import warming
from runtime.backends.cuda.catalogue import KERNELS, declared
from runtime.backends.cuda.library import Library
from runtime.backends.plan.kernel import Kernel
from runtime.cli import main
from runtime.gguf.reader import open_gguf
from runtime.ops.errors import BackendError

MODEL = "qwen3", "model-Q4_0.gguf"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Kernel]]:
    """What would be compiled, in place of compiling it."""
    asked: list[tuple[str, Kernel]] = []

    def compile_all(library: Library, kernels: list[Kernel], progress: object):
        for kernel in kernels:
            asked.append((library.target, kernel))
            entry = declared(kernel).entry.__dict__
            head = {"name": str(kernel), "entry": entry, "registers": 1, "spilled": 0, "stack": 0}
            yield kernel, head | {"shared_nbytes": 0}, b"code"

    monkeypatch.setattr(Library, "compile_all", compile_all)
    monkeypatch.setattr("runtime.backends.cuda.library.library", lambda t: Library(t, None))
    return asked


@pytest.mark.parametrize(
    ("devices", "targets"),
    [
        ("cuda:sm_90a", ["sm_90a"]),
        ("CUDA:SM_80 , cuda:sm_90a", ["sm_80", "sm_90a"]),
        ("cuda:0", []),
        ("cpu", []),
        ("cuda:sm_80,cpu", []),
    ],
)
def test_targets_are_told_from_devices(devices: str, targets: list[str]):
    assert warming.targets_of(devices) == targets


def test_a_model_asks_for_what_its_steps_launch(golden: Path):
    path = golden.joinpath(*MODEL)
    found = set(warming.kernels_of(open_gguf(path), ("f16", "f16")))
    assert found < set(KERNELS.every())
    with on_fake_cuda(path, backend={"execute": False}) as model:
        session = model.session()
        for n in (1, 9):
            session.eval(range(n))
        used = {k for p in model.backend._programs.values() for k in p.plan.kernels()}
    assert used and used <= found


@pytest.mark.parametrize("model", [True, False])
def test_the_command_compiles_for_each_target(compiled, golden: Path, model: bool):
    given = [str(golden.joinpath(*MODEL))] * model
    result = CliRunner().invoke(main, ["warmup", *given, "--devices", "cuda:sm_80,cuda:sm_90a"])
    assert result.exit_code == 0, result.output
    kernels = KERNELS.every()
    if model:
        kernels = warming.kernels_of(open_gguf(given[0]), ("f16", "f16"))
    assert compiled == [(target, k) for target in ("sm_80", "sm_90a") for k in kernels]
    assert result.stdout.count(f"{len(kernels)} kernels ready in") == 2


def test_an_unknown_target_is_one_line():
    result = CliRunner().invoke(main, ["warmup", "--devices", "cuda:sm_75"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "no CUDA target 'sm_75': there are sm_80" in result.stderr


def test_a_filled_cache_runs_without_the_toolchain(compiled, tmp_path: Path):
    """A process in which it cannot be imported finds every kernel that another one compiled."""
    kernel = Kernel.of("normalize")
    Library("sm_90a", tmp_path).prepare([kernel])
    hidden = "numba", "numba_cuda", "llvmlite", "cuda.core", "nvidia"
    program = (
        f"import sys, importlib.metadata as m; sys.modules.update(dict.fromkeys({hidden}));"
        "from pathlib import Path; from runtime.backends.cuda.library import Library;"
        "from runtime.backends.plan.kernel import Kernel\n"
        "def absent(name): raise m.PackageNotFoundError(name)\n"
        f"m.version = absent; library = Library('sm_90a', Path({str(tmp_path)!r}));"
        "print(library.get(Kernel.of('normalize')).code)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "b'code'", found.stderr


def test_without_a_toolchain_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("runtime.backends.cuda.library.library", lambda t: Library(t, None))
    with pytest.raises(BackendError, match=r"graph-runtime\[cuda\]"):
        warming.fill("sm_90a", [Kernel.of("normalize")])
