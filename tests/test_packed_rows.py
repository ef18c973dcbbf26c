"""Rows looked up in the tiles of a matrix: the file's bits, and one copy in memory."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_calls import fenced_twice
from small_models import Sizes, write_model
from tile_calls import ISAS, Array, Guarded, call, loaded, packed, random_rows

import runtime
from runtime.backends.cpu.tile.formats import NAMES, Format, format_of, group_nbytes
from runtime.backends.cpu.tile.get_rows import emit_get_rows
from runtime.backends.cpu.tile.packed_rows import emit_packed_rows
from runtime.backends.meta.choices import chosen
from runtime.ops.errors import OpError
from runtime.planning import Model, Placement

FORMATS = [name for name in NAMES if format_of(name).gives_rows]
# nibbles, a sign and a book, tables, minima of halves, trits, both kinds of 16-bit floats
FEW = ("Q4_K", "IQ2_XS", "IQ4_NL", "NVFP4", "Q2_K", "TQ1_0", "F16", "BF16")
_EMIT: dict[str, Any] = {"file": emit_get_rows, "tiles": emit_packed_rows}


@functools.cache
def kernel(name: str, source: str, isa_name: str) -> Any:
    of = name.lower() if source == "file" else name
    return loaded(_EMIT[source](of, isa_name), isa_name)


def looked_up(
    name: str, source: str, memory: Array, ids: list[int], n: int, isa_name: str, threads: int
) -> Array:
    """uint32 [ids, n], the bits; memory: bytes of tiles or [rows, bytes] of the file."""
    step = group_nbytes(name, n) if source == "tiles" else memory.shape[1]
    matrix, out = Guarded.of(memory), Guarded(4 * len(ids) * (n + 2))
    rows, live = Guarded.of(np.array(ids, np.int32)), np.array([len(ids)], np.int64)
    args = [matrix.address, rows.address, out.address, live.ctypes.data, n, step, n + 2]
    call(kernel(name, source, isa_name), args, threads)
    out.check()
    found = out.bytes.view(np.uint32).reshape(len(ids), n + 2)
    assert (found[:, n:] == 0xFFFFFFFF).all(), "written past a row"
    return found[:, :n].copy()


def stored(name: str, rows: int, n: int) -> Array:
    """Random rows, one of scales of zero and one of negative zeros among them."""
    raw = random_rows(name, rows, n, seed=rows)
    if format_of(name).is_float:
        raw[0] = 0
        raw[-1].reshape(n, -1)[:] = [0] * (raw.shape[1] // n - 1) + [128]
    return raw


def check(name: str, isa_name: str) -> None:
    n = 37 if format_of(name).is_float else 512
    for rows in (1, 16, 37):
        raw = stored(name, rows, n)
        tiles = packed(name, raw, n, isa_name).bytes
        ids = [rows - 1, 0, rows // 2, min(15, rows - 1), min(16, rows - 1), rows - 1]
        want = looked_up(name, "file", raw, ids, n, isa_name, 1)
        looks = functools.partial(looked_up, name, "tiles", tiles, ids, n, isa_name)
        assert np.array_equal(fenced_twice(looks), want), (rows, isa_name)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_tiles_are_those_of_the_file(name: str) -> None:
    check(name, ISAS[0])


@pytest.mark.parametrize("isa_name", ISAS[1:])
@pytest.mark.parametrize("name", FEW)
def test_on_other_instruction_sets(name: str, isa_name: str) -> None:
    check(name, isa_name)


@pytest.mark.sweep
@pytest.mark.parametrize("isa_name", ISAS[1:])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_on_other_instruction_sets(name: str, isa_name: str) -> None:
    check(name, isa_name)


@pytest.mark.parametrize("isa_name", ["arm_dotprod", "arm_i8mm"])
def test_they_can_be_made_for_arm(isa_name: str) -> None:
    from runtime.backends.cpu.compile.objects import compile_ir

    for name in FEW:
        assert compile_ir(emit_packed_rows(name, isa_name), isa_name)


def test_zeros_of_q3_k_keep_their_signs() -> None:
    """Its tiles turn them over, so its rows are read from the file."""
    with pytest.raises(OpError, match="file's blocks"):
        emit_packed_rows("Q3_K", ISAS[0])


WIDE = Sizes(hidden=256, inner=256)


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_tied_matrix_is_in_memory_once(kind: str, tmp_path: Path, monkeypatch) -> None:
    path = tied_model(tmp_path, kind)
    with runtime.load(path, context=64, sequences=1) as model:
        got = model.eval([1, 79, 16, 0])
        weights, need = model.backend.weights, needed(model, "cpu")
    size = model.file.tensors["token_embd.weight"].nbytes
    assert not weights._rows and weights.nbytes() == need == total(model.file)
    monkeypatch.setattr(Format, "gives_rows", False)
    with runtime.load(path, context=64, sequences=1) as model:
        assert got.tobytes() == model.eval([1, 79, 16, 0]).tobytes()
        assert model.backend.weights.nbytes() == needed(model, "cpu") == total(model.file) + size


@pytest.mark.parametrize(
    "devices", ["tensor(cpu:0,cpu:1)", "tensor(99*cpu:0,cpu:1)", "layers(cpu:0,cpu:1)"]
)
def test_another_part_of_it_is_another_matrix(devices: str, tmp_path: Path) -> None:
    """Of an output that is cut, or on another device, rows lie in memory as well."""
    path = tied_model(tmp_path, "Q8_0")
    with runtime.load(path, context=64, sequences=1) as model:
        want = model.eval([1, 79, 16, 0])
    with runtime.load(path, devices, context=64, sequences=1) as model:
        assert np.allclose(model.eval([1, 79, 16, 0]), want, rtol=1e-4, atol=1e-4)
        parts = [device.weights for device in model.backend._devices]
        rows = {id(w._rows): nbytes(w._rows) for w in parts}
        assert sum(rows.values()) == model.file.tensors["token_embd.weight"].nbytes
        taken = sum(nbytes(w._made) for w in parts) + sum(rows.values())
        assert taken == needed(model, devices)


def nbytes(arrays: dict[Any, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())


def tied_model(folder: Path, kind: str) -> Path:
    return write_model(folder / "tied.gguf", WIDE, kind)


def total(file: Any) -> int:
    return sum(tensor.nbytes for tensor in file.tensors.values())


def needed(model: Any, devices: str) -> int:
    return sum(n.weights for n in Placement(Model(model.file), chosen(devices)).needs.values())


ANONYMOUS = """
import sys
import runtime
def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        (line,) = [line for line in file if line.startswith("Anonymous:")]
    return 1024 * int(line.split()[1])
with runtime.load(sys.argv[1], context=64, sequences=1, progress=False) as model:
    model.eval([1, 2, 3], "last")
    print(anonymous())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")
def test_memory_at_the_first_token(tmp_path: Path) -> None:
    """What a process takes for a tied model: 5 % more than the file at most.

    What any process takes, Python and libraries, is that of one with a small model.
    """
    large = Sizes(hidden=256, inner=256, vocabulary=1 << 16)
    path = write_model(tmp_path / "large.gguf", large, "Q8_0")
    small = tied_model(tmp_path, "Q8_0")
    taken = {}
    for each in (small, small, path):  # the first may compile
        command = [sys.executable, "-c", ANONYMOUS, str(each)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        taken[each] = int(done.stdout)
    assert taken[path] - taken[small] <= 1.05 * path.stat().st_size
