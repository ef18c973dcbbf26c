"""What the parts of `gpu_check.py` run on: a GPU, or a driver without one; what is carried."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpu_check_scratch import scratch

import runtime
from runtime.backends.cuda.backend import CudaBackend
from runtime.backends.cuda.driver import Driver
from runtime.backends.cuda.launcher import Device
from runtime.backends.cuda.opening import open_driver
from runtime.backends.cuda.targets import capability
from runtime.errors import BackendError, OptionError

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]  # "name", and "right" where it can be wrong
MICROSECONDS = 5.0  # that launches are said to take without a GPU


@dataclass(frozen=True)
class Check:
    """dry: no GPU is behind it, so all is small and no time is real. carried: see `prepare`.

    folder: for files of this run; by default one in memory, where there is such a place.
    OptionError: nothing was carried there.
    """

    dry: bool
    index: int = 0
    carried: Path | str | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.carried is not None:  # kernels compiled elsewhere, by another toolchain
            cache = Path(self.carried, "cache")
            if not cache.is_dir():
                none = "no kernels are in it" if cache.parent.is_dir() else "no such folder"
                raise OptionError(f"{self.carried}: {none}, see --prepare")
            os.environ["RUNTIME_CACHE_DIR"] = str(cache.resolve())
            carried = patch("runtime.backends.cuda.library.toolchain_digest", lambda: "")
            carried.start()

    @functools.cached_property
    def scratch(self) -> Path:
        """The folder for files of this run."""
        return self.folder or scratch(in_memory=not self.dry)

    def begin(self) -> None:
        """BackendError: there is no such GPU."""
        count = self.driver(execute=False).device_count()
        if self.index not in range(count):
            raise BackendError(f"no GPU cuda:{self.index}: the driver sees {count}")

    @property
    def golden(self) -> Path | None:
        """The folder of golden models."""
        near = [ROOT.parent / "shared" / "golden"]
        folders = [Path(self.carried, "golden"), *near] if self.carried is not None else near
        return next((folder for folder in folders if folder.is_dir()), None)

    def driver(self, execute: bool = True) -> Driver:
        """A driver; execute: one without a GPU computes."""
        if not self.dry:
            return open_driver()
        from fake_driver import FakeDriver

        return FakeDriver(quick=execute, microseconds=MICROSECONDS)

    def kernels(self) -> Any:
        """Of the GPU, None for the user's."""
        if not self.dry:
            return None
        from fake_nodes import FakeLibrary

        return FakeLibrary()

    def device(self) -> Device:
        """The GPU."""
        return Device(self.driver(execute=False), self.index, self.kernels())

    def backend(self, file: Any, **options: Any) -> CudaBackend:
        """A backend for graphs."""
        return CudaBackend(
            file, self.index, driver=self.driver(), kernels=self.kernels(), **options
        )

    @contextmanager
    def model(
        self, path: Path, devices: str = "", execute: bool = True, graphs: bool = True,
        **options: Any,
    ) -> Iterator[runtime.Model]:  # fmt: skip
        """A model on the GPU, or on devices of an expression; graphs False: launch by launch."""
        given = {"context": 1024, "sequences": 1, "progress": False, "graphs": graphs} | options
        with ExitStack() as stack:
            if self.dry:
                driver, kernels = self.driver(execute), self.kernels()
                opened = "runtime.backends.cuda.opening.open_driver"
                stack.enter_context(patch(opened, lambda: driver))
                stack.enter_context(
                    patch("runtime.backends.cuda.launcher.library", lambda target: kernels)
                )
            model = runtime.load(path, devices=devices or f"cuda:{self.index}", **given)
            stack.callback(model.close)
            yield model


def prepare(folder: Path, target: str) -> str:
    """Fill a folder with what is carried: all kernels for a target, golden models; what it has.

    Golden models in float32 stay here: float16 says as much in half the bytes. BackendError: no
    such target, or no toolchain.
    """
    capability(target)
    from runtime import warming
    from runtime.progress import reporter

    folder.mkdir(parents=True, exist_ok=True)
    os.environ["RUNTIME_CACHE_DIR"] = str((folder / "cache").resolve())
    kernels = warming.every_kernel()
    with reporter(True) as progress:
        compiled = warming.fill(target, kernels, progress)
    golden = Check(True).golden
    for file in sorted(golden.glob("*/*")) if golden else ():
        if file.name == "golden.npz" or (file.match("model-*.gguf") and "f32" not in file.stem):
            copy = folder / "golden" / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return (
        f"{folder}: {len(kernels)} kernels for {target}, {compiled} of them compiled now; "
        f"{nbytes / 1e6:.0f} MB in all"
    )
