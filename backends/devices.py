"""The backend that a device expression names."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from runtime.backends.base import Backend
from runtime.backends.environment import debug
from runtime.backends.meta.choices import Shares, chosen
from runtime.backends.meta.expression import Device
from runtime.backends.meta.graph_stages import OnHost
from runtime.backends.meta.stages import Stage
from runtime.backends.offload import offloaded
from runtime.ops.errors import OptionError, shown

AUTO = "auto"


def open_backend(
    devices: str, file: Any, threads: int | None, activations: str, split_mode: str | None = None,
    tensor_split: Shares | None = None, main_device: int | None = None, graphs: bool = True,
    gpu_layers: int | str | None = None, cpu_moe: bool | int | None = None, pack_cache: str = "",
) -> Backend:  # fmt: skip
    """The backend of a device expression and what `meta.choices.chosen` takes beside it.

    file: an open GGUF file. threads: of all devices together, by default one per core; of a NUMA
    node its own. graphs: of GPUs, see CudaBackend. gpu_layers, cpu_moe: see `offloaded`.
    pack_cache: where CPUs keep packed weights, see PackCache; "": nowhere.
    OptionError names what cannot be used, and what is known.
    """
    if devices.strip().lower() == AUTO:
        devices = automatic()
    stages = chosen(devices, split_mode, tensor_split, main_device, count)
    host = None
    if gpu_layers is not None or cpu_moe:
        stages, host = offloaded(
            devices, stages, file, gpu_layers, cpu_moe, usable_gpu, free_of_gpu
        )  # fmt: skip
    every = list(dict.fromkeys(device for stage in stages for device in stage.devices))
    kinds = sorted({device.kind for device in every})
    if pack_cache and host is None and not set(kinds) & {"cpu", "numa", "mpi"}:
        raise OptionError(
            f"pack_cache keeps the packed weights of CPUs, and devices={shown(devices)} has none: "
            "leave it out"
        )
    if kinds == ["null"]:
        from runtime.backends.cpu.planner import Planner, options
        from runtime.backends.null import NullBackend

        return NullBackend(Planner(options(activations)), len(every))
    if kinds == ["reference"]:
        from runtime.backends.reference import ReferenceBackend

        return ReferenceBackend(file)
    if kinds == ["mpi"] and len(stages) == 1:
        from runtime.backends.meta.mpi import open_mpi

        shares = _shares_of_all(devices, stages[0])
        return open_mpi(file, threads, activations, shares, pack_cache)
    _check(devices, stages, every, kinds)
    return _behind(stages, _Opened(file, activations, stages, threads, graphs, pack_cache), host)


def names_mpi(expression: str) -> bool:
    """Whether devices of other processes are among those of an expression."""
    return re.search(r"\bmpi\b", expression, re.IGNORECASE) is not None


def count(kind: str) -> int:
    """How many devices of a kind this machine has; of MPI, how many processes this run has.

    Of GPUs those whose driver is there, usable or not.
    """
    if kind == "cuda":
        from runtime.backends.cuda.found import count as gpus

        return gpus()
    if kind == "mpi":
        from runtime.backends.meta.processes import processes

        return processes().size
    from runtime.backends.cpu.run.cores import numa_nodes

    return len(numa_nodes()) or 1 if kind == "numa" else 1


def automatic() -> str:
    """What "auto" stands for: the first GPU that kernels run on, or the CPU where there is none."""
    gpu = usable_gpu()
    if debug() >= 1:
        print(f"devices='auto': {gpu or 'cpu'}", file=sys.stderr)
    return str(gpu or "cpu")


def usable_gpu() -> Device | None:
    """The first GPU that kernels run on."""
    from runtime.backends.cuda.found import gpus

    return next((Device("cuda", gpu.index) for gpu in gpus() if not gpu.problem), None)


def free_of_gpu(device: Device) -> int:
    """Bytes that are free on a GPU; 0 where there is no such GPU."""
    from runtime.backends.cuda.found import gpus

    number = device.number or 0
    return next((gpu.free_nbytes or 0 for gpu in gpus() if gpu.index == number), 0)


def _shares_of_all(expression: str, stage: Stage) -> list[float]:
    """Of all processes of this run, in order."""
    shares = {d.number: float(s) for d, s in zip(stage.devices, stage.shares, strict=True)}
    size = count("mpi")
    if sorted(shares, key=str) != sorted(range(size), key=str):
        raise OptionError(
            f"devices={shown(expression)}: these are {len(shares)} processes with a share, and "
            f"mpiexec started {size}: tensor(mpi) is all of them, and each must have a share"
        )
    return [shares[n] for n in range(size)]


def _check(
    expression: str, stages: Sequence[Stage], every: Sequence[Device], kinds: Sequence[str]
) -> None:
    """OptionError for devices that can be named and not be used."""
    what = ""
    if any(device.nbytes is not None for device in every):
        what = "sizes of memory are for 'runtime plan'; leave them out"
    elif "mpi" in kinds:
        what = "mpi is all processes of this run, each with a part of every tensor: tensor(mpi)"
    elif set(kinds) & {"null", "reference"}:
        what = f"null and reference stand alone, and not beside {', '.join(kinds)}"
    if what:
        raise OptionError(f"devices={shown(expression)}: {what}")
    for stage in stages:
        if len({device.kind == "cuda" for device in stage.devices}) > 1:
            raise OptionError(
                f"devices={shown(expression)}: {stage} would split tensors over a GPU and the CPU, "
                f"which have no memory in common: split by layers, as "
                f"layers({','.join(map(str, stage.devices))})"
            )


def _behind(stages: Sequence[Stage], opened: _Opened, host: OnHost | None) -> Backend:
    """The stages, one behind the other, and behind what the CPU has of them as their host."""
    found = [_beside(stage, opened) for stage in stages]
    if len(found) == 1 and host is None:
        return found[0]
    from runtime.backends.meta.layers import LayersBackend

    shares = [float(stage.share) for stage in stages]
    if host is None:
        return LayersBackend(found, shares)
    return LayersBackend([opened.device(Device("cpu")), *found], shares, host)


def _beside(stage: Stage, opened: _Opened) -> Backend:
    """The devices of a stage, which work together."""
    found = [opened.device(device) for device in stage.devices]
    if len(found) == 1:
        return found[0]
    from runtime.backends.meta.tensor import TensorBackend

    return TensorBackend(found, [float(share) for share in stage.shares])


class _Opened:
    """Opens the devices of stages, those of the CPU with their part of the threads and the cores.

    A device of several stages is opened for each of them, with as many threads.
    """

    def __init__(
        self, file: Any, activations: str, stages: Sequence[Stage], threads: int | None,
        graphs: bool = True, pack_cache: str = "",
    ) -> None:  # fmt: skip
        from runtime.backends.cpu import check_threads
        from runtime.backends.cpu.run.cores import physical_cores

        check_threads(threads)
        self._given = threads
        self._file, self._activations = file, activations
        self._driver: Any = None
        self._graphs, self._pack_cache = graphs, pack_cache
        self._packs: Any = None
        weights: dict[Device, Fraction] = {}
        for stage in stages:
            for device, share in zip(stage.devices, stage.shares, strict=True):
                if device.kind != "cuda" and (threads is not None or device.kind == "cpu"):
                    part = stage.share * share
                    weights[device] = weights.get(device, Fraction(0)) + part
        total = threads or physical_cores()
        self._threads = dict(zip(weights, allotted(total, [*weights.values()]), strict=True))
        if len(weights) > total and debug() >= 1:
            print(f"{len(weights)} devices for {total} threads: each has one", file=sys.stderr)

    def device(self, device: Device) -> Any:
        if device.kind == "cuda":
            from runtime.backends.cuda.backend import CudaBackend
            from runtime.backends.cuda.opening import open_driver

            self._driver = self._driver or open_driver()
            number = device.number or 0
            return CudaBackend(
                self._file, number, self._activations, self._driver, graphs=self._graphs
            )
        from runtime.backends.cpu import CpuBackend
        from runtime.backends.cpu.run.cores import shared_out

        cores = None
        if device.kind == "numa":
            assert device.number is not None and device.of is not None, "it is one of several"
            cores = shared_out(device.of)[device.number]
        from runtime.backends.cpu.run.pack_cache import PackCache

        if self._pack_cache and self._packs is None:
            self._packs = PackCache(self._file, self._pack_cache)
        threads = self._threads.get(device, self._given)
        return CpuBackend(
            self._file, threads, self._activations, cores=cores, packs=self._packs
        )  # fmt: skip


def allotted(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Threads for devices with these weights of work, so that the last is done soonest.

    At least 1 each, so perhaps more than `total`; of equals the first has more.
    """
    found = [1] * len(weights)
    for _ in range((total - len(weights)) * bool(weights)):
        times = [weight / n for weight, n in zip(weights, found, strict=True)]
        found[times.index(max(times))] += 1
    return found
