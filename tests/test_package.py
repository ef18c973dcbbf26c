"""The package as it is installed: one import name, every module in the wheel, cheap to import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

import runtime

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"runtime": "runtime", "ops": "runtime/ops", "backends": "runtime/backends"}


def _python(code: str, cwd: Path, python: str = sys.executable, **extra: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | extra
    done = subprocess.run(
        [python, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _modules() -> set[str]:
    """Where each source file of the checkout belongs inside an installation."""
    found = set()
    for folder, target in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            found.add(f"{target}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout's files elsewhere: building leaves folders behind."""
    skip = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "src", ignore=skip))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, copy: Path) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(copy)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode and "No module named pip" in done.stderr:
        pytest.skip("pip is not here")
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("graph_runtime-*.whl"))


def test_wheel_holds_every_module_and_the_model(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not _modules() - names
    assert {"runtime/data/demo.gguf", "runtime/py.typed"} <= names
    assert not {n for n in names if n.split("/")[0] in ("ops", "backends", "tests", "scripts")}
    assert wheel.stat().st_size < 6 << 20


def test_imports_from_an_unpacked_wheel(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import runtime.ops, runtime.backends.base as b; print(runtime.ops.__file__)"
    where = _python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(where).is_relative_to(tmp_path / "site")


def test_imports_from_an_editable_install(tmp_path: Path, copy: Path):
    """`pip install -e` maps the three folders, from any working directory."""
    venv.create(tmp_path / "v", system_site_packages=True)
    python = tmp_path / "v" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    install = [*pip, "install", "-q", "--no-deps", "-e", str(copy)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    code = "import runtime.ops, runtime.backends.base; print(runtime.ops.__file__)"
    where = _python(code, tmp_path / "v", str(python))
    assert Path(where).is_relative_to(copy)


def test_imports_from_a_checkout_that_is_not_installed(tmp_path: Path):
    code = "import runtime.ops, runtime.backends.base; print(runtime.ops.__file__)"
    assert Path(_python(code, ROOT)).is_relative_to(ROOT)
    assert Path(_python(code, tmp_path, PYTHONPATH=str(ROOT))).is_relative_to(ROOT)


def test_ops_imports_without_the_engine():
    code = (
        "import sys, runtime.ops; "
        "print([m for m in ('runtime.model', 'llvmlite', 'numba', 'gguf') if m in sys.modules])"
    )
    assert _python(code, ROOT) == "[]"


def test_import_is_cheap():
    """Without numpy even; the best of three, because the machine may be busy."""
    best = min(_timed("import runtime") for _ in range(3))
    assert best < 0.3


def test_help_is_cheap():
    best = min(_timed("from runtime.cli import main; main(['--help'])") for _ in range(3))
    assert best < 0.3


def _timed(code: str) -> float:
    start = time.perf_counter()
    _python(code, ROOT)
    return time.perf_counter() - start


def test_public_names():
    assert {"load", "Model", "Session", "Tokenizer", "Error"} <= set(dir(runtime))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = runtime.lod
