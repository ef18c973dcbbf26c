"""`runtime.quantize`: what is in the new file, what is refused, and how much memory it takes."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime import outputs
from runtime.cli import main
from runtime.errors import FileError, OptionError
from runtime.gguf.reader import GGUFFile, open_gguf
from runtime.gguf.writer import NewTensor, _header, write_gguf
from runtime.ops.dtypes import F16, F32
from runtime.quantise import write
from runtime.quantise.imatrix_file import Entry, Imatrix
from runtime.quantise.imatrix_file import write as write_imatrix
from runtime.quantise.job import plan
from runtime.quantise.mixes import MIXES

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", NOVEL["qwen35moe"])


def numbers(file: GGUFFile, name: str) -> np.ndarray:
    return file.tensors[name].to_float32()


SAME = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4", "f32")  # without a search for scales


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data beside the checkout")
@pytest.mark.parametrize(
    ("name", "mix"),
    [("qwen3", "Q8_0"), ("qwen3", "Q4_0"), ("qwen3", "Q4_K_M"), ("qwen35moe", "Q8_0"),
     ("qwen35moe", "Q4_0"), ("qwen35moe", "Q4_K_M"), ("qwen35moe", "MXFP4_MOE"),
     ("qwen3next", "Q8_0"), ("qwen3next", "Q4_K_M"), ("qwen3next", "MXFP4_MOE")],
)  # fmt: skip
def test_files_are_those_of_llama_quantize(name: str, mix: str, tmp_path: Path) -> None:
    """Metadata, order, types, and the data of types that leave no choice: the same bytes."""
    path = tmp_path / "q.gguf"
    runtime.quantize(GOLDEN / name / "model-f32.gguf", path, mix, progress=False)
    theirs, ours = open_gguf(GOLDEN / name / f"model-{mix}.gguf"), open_gguf(path)
    start = min(tensor.offset for tensor in ours.tensors.values())
    assert path.read_bytes()[:start] == theirs.path.read_bytes()[:start]
    for n, tensor in ours.tensors.items():
        same = tensor.dtype.name not in SAME or (tensor.data == theirs.tensors[n].data).all()
        assert same and tensor.offset == theirs.tensors[n].offset, n


def test_a_new_file_runs_and_keeps_what_is_not_quantised(model: Path, tmp_path: Path) -> None:
    path, before = tmp_path / "q.gguf", open_gguf(model)
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int, what: str) -> None:
        seen.append((done, total))

    job = runtime.quantize(model, path, "q8_0", threads=2, progress=note)
    after = open_gguf(path)
    assert {*after.tensors} == {*before.tensors}
    assert seen[-1] == (job.nbytes, job.nbytes) == (after.tensors_nbytes, after.tensors_nbytes)
    assert after.get("general.file_type") == 7 and after.get("general.quantization_version") == 2
    for name, tensor in after.tensors.items():
        values = numbers(before, name)
        if tensor.dtype is F32:
            np.testing.assert_array_equal(tensor.to_float32(), values.reshape(tensor.shape))
        else:
            data = tensor.data.reshape(*tensor.shape[:-1], -1)
            np.testing.assert_array_equal(data, gguf.quants.quantize(values, Q8_0))
    with runtime.load(path, progress=False) as loaded:
        assert np.isfinite(loaded.eval([1, 2, 3])).all()


def test_metadata_keeps_every_type(tmp_path: Path) -> None:
    path, out = tmp_path / "m.gguf", tmp_path / "q.gguf"
    metadata = {
        "general.alignment": 32, "a": np.uint64(7), "b": np.int8(-3), "general.file_type": 0,
        "c": np.arange(3, dtype=np.uint16), "d": ["x", ""], "split.no": 0, "e": 1.5,
    }  # fmt: skip
    write_gguf(path, metadata, [NewTensor.of("w.weight", (2, 32), F32, np.ones(64, "<f4"))])
    runtime.quantize(path, out, "Q8_0", progress=False)
    before, after = open_gguf(path).stored_metadata(), open_gguf(out).stored_metadata()
    assert [*after] == [
        "a",
        "b",
        "c",
        "d",
        "e",
        "general.quantization_version",
        "general.file_type",
    ]
    assert all(bytes(after[key].raw) == bytes(before[key].raw) for key in "abcde")
    runtime.quantize(path, out, "COPY", progress=False)
    assert open_gguf(out).get("general.file_type") == 0
    assert open_gguf(out).tensors["w.weight"].dtype is F32


def test_pieces_join_to_the_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = tmp_path / "a.gguf", tmp_path / "b.gguf"
    runtime.quantize(model, whole, "Q8_0", progress=False)
    monkeypatch.setattr(write, "_ELEMENTS", 2000)
    monkeypatch.setattr(write, "_COPIED", 400)
    runtime.quantize(model, pieces, "Q8_0", progress=False)
    assert whole.read_bytes() == pieces.read_bytes()


def test_importance_is_of_each_matrix(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert's rows come with its own columns; the file says where they are from."""
    name, path = "blk.0.ffn_up_exps.weight", tmp_path / "i.gguf"
    file = open_gguf(model)
    experts, rows, columns = file.tensors[name].shape
    squares = np.arange(experts * columns, dtype=np.float32).reshape(experts, columns)
    counts = np.array([2] * (experts - 1) + [0], np.float32)
    write_imatrix(path, Imatrix({name: Entry(squares, counts)}, ["texts/" + "é" * 90], 3, 64))
    given: list[tuple[int, np.ndarray | None]] = []

    class Listener(write.Quantiser):
        def __call__(self, rows: np.ndarray, kind: object, importance: object = None) -> np.ndarray:
            if rows.shape[1] == columns and importance is not None:
                given.append((len(rows), importance))
            return super().__call__(rows, kind, importance)

    monkeypatch.setattr(write, "Quantiser", Listener)
    job = runtime.quantize(model, tmp_path / "q.gguf", "Q8_0", imatrix=path, progress=False)
    assert [n for n, _ in given] == [rows] * experts
    np.testing.assert_array_equal([w for _, w in given], [*squares[:-1] / 2, np.ones(columns)])
    assert "without data in the importance matrix: blk.0." in job.notes[0]
    found = open_gguf(tmp_path / "q.gguf").metadata
    keys = [key for key in found if key.startswith("quantize.imatrix.")]
    assert keys == [
        f"quantize.imatrix.{k}" for k in ("file", "dataset", "entries_count", "chunks_count")
    ]
    assert [found[key] for key in keys[2:]] == [1, 3]
    stored = open_gguf(tmp_path / "q.gguf").stored_metadata()["quantize.imatrix.dataset"]
    assert bytes(stored.raw)[12:] == ("texts/" + "é" * 90).encode()[:127]


def test_an_imatrix_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    path, name = tmp_path / "i.gguf", "blk.0.ffn_up_exps.weight"
    entry = Entry(np.ones((1, 8), np.float32), np.ones(1, np.float32))
    write_imatrix(path, Imatrix({name: entry}))
    with pytest.raises(FileError, match=rf"of another model: {name} has 8 values there, and 6 x"):
        plan(model, "Q8_0", imatrix=path)
    write_imatrix(path, Imatrix({f"blk.{i}.other.weight": entry for i in range(3)}))
    with pytest.raises(FileError, match="of another model: only 0 of its 3 names"):
        plan(model, "Q8_0", imatrix=path)


def test_what_cannot_be_done_is_refused(model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    runtime.quantize(model, first, "Q8_0", progress=False)
    with pytest.raises(
        OptionError, match=r"token_embd.weight is q8_0 already \(\d+ in all\).*; take"
    ):
        runtime.quantize(first, second, "F32")
    job = runtime.quantize(first, second, "F32", allow_requantize=True, progress=False)
    assert job.notes[0].endswith("costs quality")
    np.testing.assert_array_equal(
        numbers(open_gguf(first), "token_embd.weight"),
        numbers(open_gguf(second), "token_embd.weight"),
    )
    with pytest.raises(FileError, match="this is a file that is read"):
        runtime.quantize(model, model, "Q8_0")
    with pytest.raises(OptionError, match="'i32' is not known"):
        runtime.quantize(model, second, "Q8_0", tensor_types={"attn": "i32"})
    weight = NewTensor.of("blk.0.attn_q.weight", (2, 256), F32, np.ones(512, "<f4"))
    write_gguf(first, {}, [weight])
    with pytest.raises(
        OptionError, match=r"IQ2_S, which blk\.0\.attn_q\.weight gets, is of no use"
    ):
        plan(first, "IQ3_XXS")
    assert "is of no use" in plan(first, "IQ3_XXS", is_dry=True).notes[0]
    bad = np.ones((2, 32), "<f4")
    bad[1, 3] = np.nan
    write_gguf(first, {}, [NewTensor.of("w.weight", (2, 32), F32, bad)])
    with pytest.raises(FileError, match=r"tensor w\.weight: row 1, column 3"):
        runtime.quantize(first, tmp_path / "c.gguf", "Q8_0")
    assert not (tmp_path / "c.gguf").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"src": 3}, {"dst": None}, {"imatrix": 1.5}, {"type": 15}, {"threads": 0}, {"pure": "yes"},
        {"output_tensor_type": 8}, {"progress": 3}, {"tensor_types": 3}, {"tensor_types": "a=q8_0"},
        {"tensor_types": [("a", 8)]}, {"allow_requantize": None},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_a_wrong_kind_are_named(tmp_path: Path, options: dict[str, object]) -> None:
    given = {"src": tmp_path / "a", "dst": tmp_path / "b", "type": "Q8_0"} | options
    with pytest.raises(OptionError, match=f"{next(iter(options))}="):
        runtime.quantize(**given)


@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(errno.ENOSPC, "No space left"), FileError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_nothing_is_left_of_a_file_that_was_not_finished(
    model: Path, tmp_path: Path, error: BaseException, seen: type[BaseException]
) -> None:
    def fail(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise error

    (tmp_path / "q.gguf").write_text("old")
    with pytest.raises(seen):
        runtime.quantize(model, tmp_path / "q.gguf", "Q8_0", progress=fail)
    assert [p.name for p in tmp_path.iterdir()] == ["q.gguf"]
    assert (tmp_path / "q.gguf").read_text() == "old"


def test_no_room_is_said_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(FileError, match=r"takes [\d.]+ kB, 10 bytes are free"):
        runtime.quantize(model, tmp_path / "q.gguf", "Q8_0")


def test_parts_become_one_file(tmp_path: Path) -> None:
    for part in (0, 1):
        metadata = {"split.no": part, "split.count": 2, "split.tensors.count": 2}
        values = np.full((2, 32), part + 1, "<f4")
        write_gguf(
            tmp_path / f"m-{part + 1:05d}-of-00002.gguf", metadata | ({} if part else {"k": 1}),
            [NewTensor.of(f"blk.{part}.w.weight", (2, 32), F32, values)],
        )  # fmt: skip
    runtime.quantize(
        tmp_path / "m-00002-of-00002.gguf", tmp_path / "q.gguf", "Q8_0", progress=False
    )
    file = open_gguf(tmp_path / "q.gguf")
    assert [*file.metadata] == ["k", "general.quantization_version", "general.file_type"]
    assert [numbers(file, name)[0, 0] for name in file.tensors] == pytest.approx([1, 2], 1e-3)


_PEAK = """
import resource, sys, runtime
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small, large, out = sys.argv[1:]
runtime.quantize(small, out, "Q8_0", progress=False)
before = peak()
runtime.quantize(large, out, "Q8_0", progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted otherwise elsewhere")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    paths = []
    for rows in (32, 1 << 14):
        paths.append(tmp_path / f"{rows}.gguf")
        tensor = NewTensor("w.weight", (rows, 4096), F16, tuple)
        with paths[-1].open("wb") as file:  # 128 MiB of zeros, which take no room
            head = _header({}, [tensor])
            file.write(head)
            file.truncate(len(head) + tensor.nbytes)
    code = [sys.executable, "-c", _PEAK, *map(str, paths), str(tmp_path / "q.gguf")]
    run = subprocess.run(code, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout) < 64 << 10  # KiB


def test_the_command(model: Path, tmp_path: Path) -> None:
    def say(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["quantize", str(model), *words])
        assert result.exit_code == code, result.output
        return result.output

    out = str(tmp_path / "q.gguf")
    table = say("Q4_K_M", "--dry-run", "--tensor-type", "ffn_up=Q8_0")
    assert re.search(
        r"^blk\.0\.ffn_up_exps\.weight +6 x 32 x 64 +f32 +q8_0 +12\.75 KiB$", table, re.M
    )
    assert re.search(r"^blk\.0\.ffn_gate_exps\.weight .* q5_0 for q4_k ", table, re.M)
    assert re.search(r"\(32\.00 bits per weight\) -> .* KiB \(\d\.\d\d bits per weight\)$", table)
    assert "is of no use without" not in table and not (tmp_path / "q.gguf").exists()
    types = tmp_path / "types"
    types.write_text("attn=q8_0\nffn=F32 token=F32")
    found = say(out, "q8_0", "1", "--tensor-type-file", str(types))
    assert re.search(r"^q8_0 +\d+ ", found, re.M) and "q.gguf: written in" in found
    assert open_gguf(out).tensors["blk.0.ffn_up_exps.weight"].dtype is F32
    for words, line in (
        ((out,), "give IN OUT TYPE"), ((), "give IN OUT TYPE"), ((out, "Q8_0", "2", "3"), "give"),
        ((out, "Q8_0", "--tensor-type", "attn"), "give PATTERN=TYPE"),
        ((out, "Q8_0", "--tensor-type-file", str(model)), "no text file"),
        *(((out, "Q8_0", *more), "no meaning without --target")
          for more in (("-f", "a"), ("--chunks", "4"), ("--types", "q8_0"), ("--svg", "a"))),
    ):  # fmt: skip
        assert line in say(*words, code=2)
    for words, line in (
        ((".", "Q8_0"), "folder"), (("", "Q8_0"), "give the name"), (("-", "Q8_0"), "the name"),
        ((str(model), "Q8_0"), "is read"),
        ((str(types), "Q8_0", "--tensor-type-file", str(types)), "is read"),
        ((out, "Q8_0", "--imatrix", out), "No such file"),
        ((out, "Q8_0", "--tensor-type", "attnq=f16"), "--tensor-type 'attnq' is found in the name"),
        ((out, "COPY", "--pure"), "COPY keeps"), ((out, "Q9"), "COPY, F16"),
        ((out, "Q8_0", "--leave-output-tensor", "--output-tensor-type", "F16"),
         "--leave-output-tensor and --output-tensor-type exclude"),
    ):  # fmt: skip
        before = model.read_bytes()
        Path(out).unlink(missing_ok=True)
        assert line in say(*words, code=1) and model.read_bytes() == before
    result = CliRunner().invoke(main, ["quantize", str(tmp_path / "no" / "m.gguf"), "Q8_0"])
    assert "m.gguf: no such file" in result.output  # not that there is no folder to write in
    assert "/ggml-model-Q8_0.gguf: written in" in say("7")
    (model.with_name("ggml-model-Q8_0.gguf")).unlink()
    text = " ".join(say("-h").split())
    assert all(f"{name}, " in text for name in MIXES) and "COPY" in text


@pytest.mark.parametrize("path", [None, "", 3])
@pytest.mark.parametrize("name", ["src", "dst"])
def test_paths_are_named(name: str, path: Any, model: Path, tmp_path: Path) -> None:
    paths = {"src": model, "dst": tmp_path / "q.gguf"} | {name: path}
    with pytest.raises(runtime.OptionError, match=f"^{name}={path!r} must be the path"):
        runtime.quantize(**paths, type="Q8_0")


def test_what_is_no_model(tmp_path: Path) -> None:
    entry = Entry(np.ones((1, 4), np.float32), np.ones(1, np.float32))
    write_imatrix(tmp_path / "i.gguf", Imatrix({"a": entry}))
    write_gguf(tmp_path / "v.gguf", {"tokenizer.ggml.tokens": ["a"]}, [])
    for name, said in (("i", "this is an importance matrix"), ("v", "a vocabulary alone")):
        with pytest.raises(FileError, match=said):
            runtime.quantize(tmp_path / f"{name}.gguf", tmp_path / "q.gguf", "Q8_0")


def test_arguments_are_named_as_they_are_given(tmp_path: Path) -> None:
    """In Python by their names, on the command line by those of options."""
    model, out = write_model(tmp_path / "m.gguf", Sizes(hidden=256)), tmp_path / "q.gguf"
    runtime.quantize(model, out, "Q8_0")
    for source, type, said in (
        (model, "IQ1_S", "with imatrix="), (out, "Q4_0", "allow_requantize=True")
    ):  # fmt: skip
        words = [str(source), str(tmp_path / "r.gguf"), type]
        with pytest.raises(OptionError, match=said) as raised:
            runtime.quantize(*words)
        assert "--" not in str(raised.value)
        option = "--" + said.removeprefix("with ").partition("=")[0].replace("_", "-")
        assert option in CliRunner().invoke(main, ["quantize", *words]).output
