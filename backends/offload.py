"""Which layers of a model GPUs have, and which experts stay on the CPU: llama.cpp's options."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from runtime.backends.layer_names import layer_of
from runtime.backends.meta.expression import Device
from runtime.backends.meta.graph_stages import OnHost
from runtime.backends.meta.stages import Stage
from runtime.ops.errors import OptionError, shown

AUTO, ALL = "auto", "all"
_SHARE = 0.8  # of what is free on GPUs, for weights: the rest is for the cache and activations
_FIXED = 256 << 20  # bytes that a GPU takes for kernels and graphs
_EVERY = 1 << 30

Free = Callable[[Device], int]  # bytes of a GPU


def offloaded(
    expression: str, stages: tuple[Stage, ...], file: Any, gpu_layers: int | str | None,
    cpu_moe: bool | int | None, usable: Callable[[], Device | None], free: Free,
) -> tuple[tuple[Stage, ...], OnHost | None]:  # fmt: skip
    """The stages of GPUs, and what the CPU has before them; None: there is no such CPU.

    gpu_layers: the last so many layers are the GPUs', of which what follows the layers is one;
    "all", -2; "auto", -1: as many as fit. cpu_moe: the experts of the first so many layers are the
    CPU's; True: of all. usable: a GPU for devices that are the CPU alone, if there is one.
    OptionError: devices that are neither.
    """
    layers = _layers(gpu_layers)
    experts = _EVERY if cpu_moe is True else int(cpu_moe or 0)
    kinds = {device.kind for stage in stages for device in stage.devices}
    if kinds != {"cuda"}:
        if len(stages) > 1 or len(stages[0].devices) > 1 or kinds != {"cpu"}:
            name = "cpu_moe" if gpu_layers is None else "gpu_layers"
            raise OptionError(
                f"{name} is for devices that are GPUs alone, beside which the CPU has the rest; "
                f"devices={shown(expression)} says itself who has what"
            )
        gpu = usable() if layers != 0 and gpu_layers is not None else None
        if gpu is None:
            if gpu_layers is not None and layers and layers != AUTO:
                said = f"gpu_layers={gpu_layers}: no GPU can be used here: the CPU has all layers"
                print(said, file=sys.stderr)
            return stages, None
        stages = (Stage(Fraction(1), (gpu,), (Fraction(1),)),)
    found = _fitting(stages, file, experts, free) if layers == AUTO else layers
    if found == 0:
        return (Stage(Fraction(1), (Device("cpu"),), (Fraction(1),)),), None
    rest = None if isinstance(found, str) or found >= _count(file) + 1 else found
    return stages, (OnHost(rest, experts) if rest is not None or experts else None)


def _layers(gpu_layers: int | str | None) -> int | str:
    if gpu_layers is None or gpu_layers == -2:
        return ALL
    if gpu_layers == -1:
        return AUTO
    if isinstance(gpu_layers, int) and gpu_layers >= 0:
        return gpu_layers
    if isinstance(gpu_layers, str):
        word = gpu_layers.strip().lower()
        if word in (AUTO, ALL):
            return word
        if re.fullmatch(r"-[12]|\d{1,9}", word):
            return _layers(int(word))
    raise OptionError(f"gpu_layers={gpu_layers!r} must be a number of layers, 'auto' or 'all'")


def _count(file: Any) -> int:
    last = layer_of(file.tensors)
    return 0 if last is None else last + 1


def _fitting(stages: Sequence[Stage], file: Any, experts: int, free: Free) -> int | str:
    """How many of the last layers, as `OnHost.rest` counts them, GPUs have room for."""
    cards = {device.number or 0: device for stage in stages for device in stage.devices}
    room = sum(_SHARE * free(card) - _FIXED for card in cards.values())
    count, sizes, others = _count(file), dict[int, int](), 0
    for name, tensor in file.tensors.items():
        layer = layer_of([name])
        if layer is None:
            others += tensor.nbytes
        elif len(tensor.shape) < 3 or layer >= experts:
            sizes[layer] = sizes.get(layer, 0) + tensor.nbytes
    room -= others
    found = int(room >= 0)
    for layer in reversed(range(count)):
        room -= sizes.get(layer, 0)
        if room < 0:
            return found
        found += 1
    return ALL
