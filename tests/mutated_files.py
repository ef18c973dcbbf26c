"""Model files changed at random, and a pool of processes that load and evaluate them.

Run as a program it is a worker: it reads numbers from stdin, one a line, makes the file of each,
loads it, evaluates some tokens, and prints what became of it as a line of JSON.
"""

from __future__ import annotations

import json
import math
import os
import queue
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_files import ARRAY, STRING, U32, Typed, header, padded, typed
from small_models import Sizes, metadata, tensors
from vocabularies import byte_pairs

IDS = (1, 5, 9, 3, 40, 7)
MODELS = (Sizes("llama", vocabulary=300), Sizes("qwen35", layers=2, vocabulary=300))
EXACT: dict[str, Any] = {"kv_type": "f32", "activations": "f32", "threads": 1}
QUANTISED = ("Q8_0", "Q4_0", "F16", "F32")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
NUMBERS = (0, 1, -1, 2, 3, 7, 31, 32, 64, 255, 1 << 16, (1 << 24) + 1, (1 << 31) - 1, 1 << 31,
           (1 << 32) - 1, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 3.4e38, math.nan, math.inf, -math.inf, 0.5, 1e-6)
_BITS = {0: 8, 1: 8, 2: 16, 3: 16, 4: 32, 5: 32, 10: 64, 11: 64}
_SIGNED = (1, 3, 5, 11)
Rng = np.random.Generator


@dataclass
class Draft:
    """A file about to be written: typed metadata, rows of the tensor table, data."""

    metadata: dict[str, Typed]
    rows: list[tuple[str, tuple[int, ...], int, int]]
    data: bytearray
    notes: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        self.notes.append(what)

    def bytes(self) -> bytes:
        return padded(header(self.metadata, self.rows)) + bytes(self.data)


def draft(size: Sizes) -> Draft:
    """The file of a small model, its matrices of several types; each a new one."""
    made = _draft(size)
    return Draft(dict(made.metadata), list(made.rows), bytearray(made.data))


@lru_cache
def _draft(size: Sizes) -> Draft:
    keys = {f"{size.architecture}.{key}": value for key, value in metadata(size).items()}
    keys = {"general.architecture": size.architecture, "general.alignment": 32, **keys}
    keys |= byte_pairs(**{"tokenizer.chat_template": TEMPLATE})
    rows, data = [], bytearray()
    for number, (name, values) in enumerate(tensors(size).items()):
        small = values.ndim < 2 or "conv1d" in name or values.shape[-1] % 32
        kind = gguf.GGMLQuantizationType[QUANTISED[0 if small else number % 4]]
        kind = gguf.GGMLQuantizationType.F32 if small else kind
        rows.append((name, values.shape, int(kind), len(data)))
        data += padded(gguf.quants.quantize(values, kind).tobytes())
    return Draft({key: typed(value) for key, value in keys.items()}, rows, data)


def pick(rng: Rng, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def number(rng: Rng, kind: int) -> Any:
    """An odd value of a scalar type."""
    if kind in (6, 12):
        return float(np.float32(pick(rng, FLOATS)))
    if kind == 7:
        return bool(rng.integers(2))
    value = pick(rng, NUMBERS) if rng.random() < 0.7 else int(rng.integers(300))
    value &= (1 << _BITS[kind]) - 1
    return value - (1 << _BITS[kind]) if kind in _SIGNED and value >> (_BITS[kind] - 1) else value


def change_value(d: Draft, rng: Rng) -> None:
    """Another value of the same type."""
    key = pick(rng, list(d.metadata))
    old = d.metadata[key]
    if old.kind == STRING:
        text = pick(rng, ["", "x", "llama", "qwen3", "gpt2", "yarn", "\0", "a\nb", "z" * 3000])
        d.metadata[key] = Typed(STRING, text)
    elif old.kind == ARRAY:
        change_array(d, rng, key, old)
    else:
        d.metadata[key] = Typed(old.kind, number(rng, old.kind))
    d.note(f"{key} = {d.metadata[key].value!r:.60}")


def change_array(d: Draft, rng: Rng, key: str, old: Typed) -> None:
    """Shorter, longer, or with another element."""
    values = list(old.value)
    how = int(rng.integers(3))
    if how == 0:
        values = values[: int(rng.integers(len(values) + 1))]
    elif how == 1:
        values = values + values[: int(rng.integers(1, 5))]
    elif values:
        other = "odd" if old.element == STRING else number(rng, old.element or U32)
        values[int(rng.integers(len(values)))] = other
    d.metadata[key] = Typed(ARRAY, values, old.element or typed(values[0]).kind if values else U32)


def change_type(d: Draft, rng: Rng) -> None:
    """A value of another type."""
    key, kind = pick(rng, list(d.metadata)), int(rng.integers(13))
    if kind == STRING:
        d.metadata[key] = Typed(STRING, pick(rng, ["", "1", "x" * 200]))
    elif kind == ARRAY:
        element = int(pick(rng, [0, 4, 5, 6, 7, 10, 12]))
        count = int(rng.integers(5))
        d.metadata[key] = Typed(ARRAY, [number(rng, element) for _ in range(count)], element)
    else:
        d.metadata[key] = Typed(kind, number(rng, kind))
    d.note(f"{key}: type {kind}, {d.metadata[key].value!r:.60}")


def change_key(d: Draft, rng: Rng) -> None:
    """A key that is missing, or has another name, or is new."""
    key = pick(rng, list(d.metadata))
    how = int(rng.integers(3))
    value = d.metadata[key] if how == 2 else d.metadata.pop(key)
    if how:
        letters = list(key)
        letters[int(rng.integers(len(letters)))] = pick(rng, "abz_.0")
        d.metadata["".join(letters)] = value
    d.note(f"{key}: {('gone', 'renamed', 'twice under two names')[how]}")


def change_row(d: Draft, rng: Rng) -> None:
    """A tensor of another shape, type, place or name."""
    at = int(rng.integers(len(d.rows)))
    name, shape, kind, offset = d.rows[at]
    how = int(rng.integers(6))
    if how == 0 and shape:
        axis = int(rng.integers(len(shape)))
        odd = pick(rng, [0, 1, shape[axis] - 1, shape[axis] + 1, shape[axis] * 2, 1 << 40])
        shape = (*shape[:axis], odd, *shape[axis + 1 :])
    elif how == 1:
        shape = pick(rng, [shape[::-1], (1, *shape), (*shape, 1), (math.prod(shape),), ()])
    elif how == 2:
        kind = int(pick(rng, [*range(45), 1 << 31]))
    elif how == 3:
        offset = int(pick(rng, [0, offset + 32, offset + 1, d.rows[at - 1][3], 1 << 40, 1 << 63]))
    elif how == 4:
        others = [name.replace("weight", other) for other in ("bias", "scale", "input_scale")]
        name = pick(
            rng, [name + "x", name.replace("blk.0", "blk.1"), "v." + name, "", "a\nb", *others]
        )
    else:
        name = pick(rng, d.rows)[0]
    d.rows[at] = (name, shape, kind, offset)
    d.note(f"{d.rows[at]}")


def change_rows(d: Draft, rng: Rng) -> None:
    """A tensor that is missing, or one more."""
    at = int(rng.integers(len(d.rows)))
    name, shape, *_ = d.rows[at]
    if rng.random() < 0.5:
        del d.rows[at]
        d.note(f"{name}: gone")
        return
    extra = pick(rng, ["bias", "scale", "norm.weight", "input_scale"])
    new = f"{name.rsplit('.', 1)[0]}.{extra}"
    count = 1 if "scale" in extra else int(shape[0]) if shape else 1
    d.rows.append((new, (count,), 0, len(d.data)))
    d.data += padded(rng.standard_normal(count).astype("<f4").tobytes())
    d.note(f"{new}: new")


def change_data(d: Draft, rng: Rng) -> None:
    """Other bytes in the weights: bits, noise, zeros, ones, not-a-numbers."""
    start = int(rng.integers(len(d.data)))
    length = int(pick(rng, [1, 4, 32, 1000]))
    piece = pick(rng, [rng.bytes(length), bytes(length), b"\xff" * length,
                       struct.pack("<f", math.nan) * (length // 4 + 1)])  # fmt: skip
    d.data[start : start + length] = piece[: len(d.data) - start]
    d.note(f"data at {start}: {length} bytes")


CHANGES: tuple[tuple[Callable[[Draft, Rng], None], float], ...] = (
    (change_value, 0.3), (change_type, 0.15), (change_key, 0.1), (change_row, 0.2),
    (change_rows, 0.1), (change_data, 0.15),
)  # fmt: skip


def mutated(seed: int) -> tuple[bytes, str]:
    """File number `seed`, and what was done to it."""
    rng = np.random.default_rng(seed)
    d = draft(MODELS[seed % len(MODELS)])
    functions, shares = zip(*CHANGES, strict=True)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        rng.choice(np.array(functions, object), p=shares)(d, rng)
    raw = bytearray(d.bytes())
    if rng.random() < 0.15:
        head = len(raw) - len(d.data)
        for _ in range(int(rng.integers(1, 4))):
            raw[int(rng.integers(head))] ^= 1 << int(rng.integers(8))
        d.note("bits of the header")
    if rng.random() < 0.05:
        del raw[int(rng.integers(len(raw))) :]
        d.note("cut")
    return bytes(raw), "; ".join(d.notes)


@dataclass
class Outcome:
    """What became of a file: "refused", "evaluated", or "raised" with what is wrong about it."""

    seed: int
    kind: str
    text: str = ""
    seconds: float = 0.0
    memory: int = 0  # bytes that the worker grew by


def outcome(seed: int, path: Path) -> Outcome:
    """Load and evaluate file number `seed`, which is written to `path`."""
    raw, _ = mutated(seed)
    path.write_bytes(raw)
    compiled: list[str] = []
    before, start = _resident(), time.process_time()
    try:
        kind, text = "evaluated", _evaluate(path, seed, compiled)
    except Exception as error:
        kind, text = _judge(error, path)
    seconds = time.process_time() - start if not compiled else 0.0  # compiling is no hang
    return Outcome(seed, kind, text, seconds, _resident() - before)


def _evaluate(path: Path, seed: int, compiled: list[str]) -> str:
    import runtime

    options = {"context": 64, "sequences": 1} if seed % 4 else {}

    def note(_done: int, _total: int, what: str) -> None:
        if what != "loading weights":
            compiled.append(what)

    with runtime.load(path, progress=note, **EXACT, **options) as model:
        ids = [i % model.vocab_size for i in IDS]
        got = model.eval(ids)
        text = model.tokenizer.encode("hello world 12") if seed % 3 == 0 else ids
    if not (got.shape == (len(ids), model.vocab_size) and len(text)):
        return f"logits {got.shape}"
    return _compare(path, ids, got, options) if seed % 5 == 0 else ""


def _compare(path: Path, ids: list[int], got: np.ndarray, options: dict[str, Any]) -> str:
    """What is wrong with logits beside those of the reference backend; nothing if they agree."""
    import runtime

    with runtime.load(path, devices="reference", kv_type="f32", **options) as model:
        largest = max(float(np.abs(t.to_float32()).max()) for t in model.file.tensors.values())
        want = model.eval(ids)
    if not np.isfinite(want).all() or not largest < 1e6:
        return ""  # too large for float32 on the way, or no numbers in the file
    error = float(((got - want) ** 2).sum() / max(float((want**2).sum()), 1e-30))
    return "" if error < 1e-6 else f"NMSE {error:.1e} against the reference"


def _judge(error: Exception, path: Path) -> tuple[str, str]:
    """An error is right if it is one of ours, one line long, and names the file."""
    import runtime

    text = str(error)
    if isinstance(error, runtime.Error) and "\n" not in text and len(text) < 1000:
        return "refused", text.replace(str(path), "FILE")
    return "raised", "".join(traceback.format_exception(error))[-1500:]


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def worker() -> None:
    """Outcomes of the numbers on stdin."""
    import faulthandler

    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            found = outcome(int(line), Path(folder) / "m.gguf")
            print(json.dumps(found.__dict__), flush=True)


def outcomes(seeds: Sequence[int], workers: int = 2, patience: float = 300.0) -> Iterator[Outcome]:
    """The outcome of each number, from a pool of processes that may crash or hang."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for seed in seeds:
        waiting.put(seed)
    threads = [
        threading.Thread(target=_attend, args=(waiting, done, patience)) for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    for _ in seeds:
        yield done.get()
    for thread in threads:
        thread.join()


def _attend(waiting: queue.SimpleQueue[int], done: queue.SimpleQueue, patience: float) -> None:
    """Feed one worker after another until no numbers are left."""
    process, seed = None, None
    while True:
        try:
            seed = waiting.get_nowait()
        except queue.Empty:
            break
        process = process or _start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{seed}\n")
        process.stdin.flush()
        timer = threading.Timer(patience, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if line:
            done.put(Outcome(**json.loads(line)))
            continue
        code = process.wait()
        done.put(Outcome(seed, "raised", f"the worker ended with {code} (killed: a hang)"))
        process = None
    if process is not None and process.stdin is not None:
        process.stdin.close()
        process.wait()


def _start() -> subprocess.Popen[str]:
    here = Path(__file__).resolve()
    paths = os.pathsep.join([str(here.parents[1]), str(here.parent)])
    return subprocess.Popen(
        [sys.executable, str(here)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


if __name__ == "__main__":
    worker()
