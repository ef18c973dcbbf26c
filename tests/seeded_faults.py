"""Small faults, each put into the running code, and the check that must see it.

`python tests/seeded_faults.py` prints the table of what catches what; test_seeded_faults.py holds
it to that. A fault changes one argument, rule, pass or step of memory management in this process;
most faults of kernels are what these would leave in memory, so that nothing has to be compiled.
Some are in the source of a kernel, of a copy of the package in a process of its own; what is
compiled of it is kept on disk as all kernels are, and found there by nobody else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fault_checks import (
    Check,
    any_order_of_threads,
    fused_is_plain,
    law_of_batches,
    law_of_cuts,
    law_of_devices,
    law_of_exact_devices,
    law_of_forks,
    law_of_prompts,
    law_of_rewinds,
    law_of_stages,
    red,
    validate,
    write_models,
)
from fault_seeds import (
    Patch,
    Seed,
    argument,
    constant,
    device_input,
    floats,
    leaves,
    number,
    plus,
    put,
    shifted,
    taken,
    times,
)

from runtime import ops
from runtime.backends.cpu.rules.moe import HEADER
from runtime.backends.cpu.run import exchange, forms
from runtime.backends.cpu.run import program as programs
from runtime.backends.cpu.run.program import Program
from runtime.backends.cpu.run.weights import WeightStore
from runtime.backends.meta.layers import LayersBackend
from runtime.backends.meta.shard import _Shard
from runtime.backends.meta.tensor import TensorBackend
from runtime.backends.passes import fuse_attention, fuse_delta, fuse_ffn, fuse_sums
from runtime.backends.plan import lowering
from runtime.backends.plan.lowering import Lowering
from runtime.backends.plan.plan import Call, Instruction, Plan, Ref
from runtime.engine import prompts
from runtime.engine.batch import Batch
from runtime.engine.prompts import PromptCache
from runtime.engine.sequence import Record
from runtime.memory import pages
from runtime.memory.pages import PagePool, Pages
from runtime.memory.prefix_edges import Edge, State
from runtime.memory.slots import Recurrent
from runtime.ops import PAGE
from runtime.ops.kv_formats import KV_FORMATS


@dataclass(frozen=True)
class Fault:
    """`model` of MODELS it is put into, and the check that must turn red."""

    name: str
    where: str
    model: str
    caught_by: Check
    seed: Seed


@dataclass(frozen=True)
class SourceFault:
    """Texts of a file of backends/cpu/kernels and what stands in their place; VALIDATE sees it.

    sweep: pytest takes it with `-m sweep`, as its kernels take long to compile.
    """

    name: str
    model: str
    file: str
    changes: dict[str, str]
    sweep: bool = False
    where = "source"
    caught_by: ClassVar[Check] = staticmethod(validate)


def faults(where: str, model: str, caught_by: Check, seeds: dict[str, Seed]) -> list[Fault]:
    """Those of one place, model and check."""
    return [Fault(name, where, model, caught_by, seed) for name, seed in seeds.items()]


def _nibbles_swapped(pack: Any) -> Any:
    def faulty(self: WeightStore, format: str, raw: np.ndarray, *rest: Any) -> None:
        blocks = raw.reshape(-1, 18).copy()  # of Q4_0: a float16 scale, 16 bytes of codes
        blocks[:, 2:] = blocks[:, 2:] << 4 | blocks[:, 2:] >> 4
        pack(self, format, blocks.reshape(raw.shape), *rest)

    return faulty


def _scales_off(pack: Any) -> Any:
    def faulty(self: WeightStore, format: str, raw: np.ndarray, *rest: Any) -> None:
        blocks = raw.reshape(-1, 18).copy()
        scale = blocks[:, :2].copy().view(np.float16) * np.float16(1.01)
        blocks[:, :2] = scale.astype(np.float16).view(np.uint8)
        pack(self, format, blocks.reshape(raw.shape), *rest)

    return faulty


def _taps_reversed(patch: Patch) -> None:
    vector = forms.vector

    def faulty(w: Any, *rest: Any) -> np.ndarray:
        found = vector(w, *rest)
        return np.ascontiguousarray(found[:, ::-1]) if "conv1d" in w.name else found

    patch.setattr(forms, "vector", faulty)


def _short_lives(uses: Any) -> Any:
    return lambda plan: ((buffer, first, first) for buffer, first, _ in uses(plan))


def _first_left_out(parts: Any) -> Any:
    return lambda self, leaf: list(parts(self, leaf))[1:]


def _first_not_copied(copy_pages: Any) -> Any:
    return lambda self, leaves, *rows: copy_pages(self, leaves[1:], *rows)


def _own_reversed(own: Any) -> Any:
    def faulty(self: Any, way: Any) -> Any:
        made = own(self, way)
        ids, numbers = made.inputs
        value = numbers.attrs["value"]
        value = np.where(value >= 0, value.max() - value, -1).astype(np.int32)
        return made.with_(inputs=(ids, ops.constant(numbers.name, value)))

    return faulty


def _rows_merged(schedule: Any) -> Any:
    def faulty(calls: Any) -> list[Instruction]:
        first, second, third, *rest = schedule(calls)
        return [first, Instruction((*second.calls, *third.calls)), *rest]

    return faulty


def _live_buffer_reused(place_buffers: Any) -> Any:
    """The residual's memory is given to a result that is written before it is last read."""

    def faulty(plan: Plan, guarded: bool = False) -> None:
        place_buffers(plan, guarded)
        rows = plan.instructions
        last = {b: n for n, row in enumerate(rows) for b in row.reads}
        residual = max(rows[0].writes, key=lambda b: last.get(b, 0))
        between = [b for row in rows[1 : last[residual]] for b in row.writes if b.memory == "arena"]
        between[-1].offset = residual.offset

    return faulty


def _one_live_row_less(make: Any) -> Any:
    def faulty(self: Program, inputs: Any, live: Any) -> None:
        make(self, inputs, live)
        self._counts[self.plan.counts["tokens", 1]] -= 1

    return faulty


def _table_kept(make: Any) -> Any:
    """The block table of the step before."""

    def faulty(self: Program, inputs: Any, live: Any) -> None:
        old = self._inputs["block_table"].copy() if "block_table" in self._inputs else None
        make(self, inputs, live)
        if old is not None:
            self._inputs["block_table"][:] = old

    return faulty


def _tiles_of_one_sequence(tiles: Any) -> Any:
    def faulty(sequences: np.ndarray, tokens: int, out: np.ndarray) -> int:
        count = tiles(sequences, tokens, out)
        out[:count, 2] = sequences[0]
        return count

    return faulty


def _without(name: str) -> Callable[[Any], Any]:
    def made(head: Any) -> Any:
        return lambda x: head(x)._replace(**{name: None})

    return made


def _output_rows_shifted(inputs: Any) -> Any:
    def faulty(self: Batch, *given: Any) -> Any:
        found = inputs(self, *given)
        rows = found["output_rows"]
        found["output_rows"] = np.maximum(rows - 1, 0)
        return found

    return faulty


def _half_offsets(place: Any) -> Any:
    def faulty(self: Lowering, *given: Any) -> Ref:
        ref = place(self, *given)
        return Ref(ref.buffer, ref.offset // 2)

    return faulty


def _table_reversed(table: Any) -> Any:
    return lambda self: table(self)[::-1]


def _slots_rolled(inputs: Any) -> Any:
    """Each sequence of a batch reads the recurrent state of the one before it."""

    def faulty(self: Batch, *given: Any) -> Any:
        found = inputs(self, *given)
        return {**found, "slot_in": np.roll(found["slot_in"], 1)}

    return faulty


def _pages_wrap(slots: Any) -> Any:
    """A prompt past its first page goes on at the start of that."""
    return lambda self, start, stop: slots(self, start, stop) % PAGE + self.row[0] * PAGE


def _no_holders(holders: Any) -> Any:
    return lambda self, pinned=False: np.zeros_like(holders(self, pinned))


def _swapped(swiglu: Any) -> Any:
    def faulty(product: Any) -> Any:
        found = swiglu(product)
        return found and (found[0][::-1], found[1])

    return faulty


def scale_off(raw: np.ndarray, call: Call) -> None:
    """The first scale of a pack of int8 blocks."""
    floats(raw)[int(call.node.shape[-1]) * call.node.attrs["C"] // 4] *= np.float32(1.01)


def sum_off(raw: np.ndarray, call: Call) -> None:
    """-8 times the sum of the first column's first block."""
    columns = call.node.attrs["C"]
    raw.view(np.int32)[int(call.node.shape[-1]) * columns // 4 + 2 * columns] += 8


def code_off(raw: np.ndarray, call: Call) -> None:
    raw.view(np.int8)[0] -= 1


def first_number(change: Callable[[np.float32], Any]) -> Callable[[np.ndarray, Call], None]:
    def spoil(raw: np.ndarray, call: Call) -> None:
        floats(raw)[0] = change(floats(raw)[0])

    return spoil


def other_of_a_tie(raw: np.ndarray, call: Call) -> None:
    """Experts 0 and 1, which have the same score, in the other order."""
    ids = raw.view(np.int32)
    ids[:] = np.where(ids < 2, 1 - ids, ids)


def other_expert(raw: np.ndarray, call: Call) -> None:
    """The first tile goes to the expert after its own."""
    raw[HEADER:].view(np.int32)[0] += 1


def elsewhere(raw: np.ndarray, call: Call) -> None:
    """A bit of memory that the call has no business with; raw: all pages."""
    raw[-1, -1] ^= 1


def code_of_k_off(raw: np.ndarray, call: Call) -> None:
    """Of the prompt's first token, in pages [pages, bytes] of q6_0: nibbles come first."""
    raw[np.flatnonzero(raw.any(1))[0], 0] ^= 1


def scale_of_k_off(raw: np.ndarray, call: Call) -> None:
    page = raw[np.flatnonzero(raw.any(1))[0]]
    planes = KV_FORMATS["q6_0"].planes
    at = PAGE * sum(plane.width(48) * plane.dtype.nbytes for plane in planes[:-1])
    page[at : at + 2].view(np.float16)[:] *= np.float16(1.1)


def half_of_a_page(which: str) -> Callable[[dict[str, Any]], Any]:
    """The second of two KV heads where the first is meant."""
    return lambda a: shifted(f"{which}_pages", a[f"{which}_page_bytes"] // 2)(a)


def _not_normalized(choice: Any) -> Any:
    def faulty(*given: Any) -> Any:
        found = choice(*given)
        return found and found._replace(normalize=False)

    return faulty


def _dt_lost(raw_gates: Any) -> Any:
    def faulty(*given: Any) -> Any:
        found = raw_gates(*given)
        return found and found[:3]

    return faulty


def _first_come(way: Any) -> Any:
    return lambda steps, length: way(steps[::-1], length)


def _rewritten(cut: Any) -> Any:
    return lambda self, n: cut(self, n)._replace(pages=self.pages.cut(n))


def _too_soon(with_state: Any) -> Any:
    def faulty(self: Edge, state: State) -> Edge:
        place = max(state.place - 1, self.start + 1)
        return with_state(self, State(place, state.slot, state.message_end, state.used))

    return faulty


def _going_on(keep: Any) -> Any:
    return lambda self, record, ends=False: keep(self, record, True)


def _state_kept(cut: Any) -> Any:
    return lambda self, length: self._replace(place=min(self.place, length))


FAULTS = [
    *faults("rule", "dense", validate, {
        "scale of scores 10 % off": argument("attention", scale=times("scale", 1.1)),
        "keys of the next KV head": argument("attention", k_pages=half_of_a_page("k")),
        "values of the next KV head": argument("attention", v_pages=half_of_a_page("v")),
        "softcap where there is none": argument("attention", softcap=number(0x41F00000)),
        "K and V written to the next place": argument("qkv_post", kv_slots=shifted("kv_slots", 4)),
        "pages of K and V swapped":
            argument("qkv_post", k_pages=taken("v_pages"), v_pages=taken("k_pages")),
        "norms of q and k swapped":
            argument("qkv_post", q_norm=taken("k_norm"), k_norm=taken("q_norm")),
        "rope in the other style": constant("qkv_post", style="normal"),
        "rope of one dim less": argument("qkv_post", half=plus("half", -1)),
        "embedding of the next token": argument("get_packed_rows", ids=shifted("ids", 4)),
        "logits of the next row": argument("gather_rows", x=shifted("x", 256)),
        "eps of the norms 1e-4": argument("rms_norm_pack", eps=times("eps", 100)),
        "residual dropped": argument("matmul", add=number(0)),
        "gate and up swapped": argument("swiglu_pack", gate=taken("up"), up=taken("gate")),
    }),
    *faults("rule", "windowed", validate, {
        "window one place too wide": argument("attention", window=plus("window", 1)),
        "window one place too narrow": argument("attention", window=plus("window", -1)),
        "window forgotten": argument("attention", window=number(0)),
        "sinks forgotten": argument("attention", sinks=number(0)),
        "angles of another magnitude": argument("rope_angles", mscale=times("mscale", 1.001)),
        "bias dropped": argument("matmul", bias=number(0)),
        "the last expert never chosen": argument("router", n_experts=plus("n_experts", -1)),
        "weights of experts 10 % off": argument("router", scale=times("scale", 1.1)),
        "tokens in the group of another expert": leaves("expert_group", other_expert),
        "all experts are the first": argument("matmul_id", expert_stride=number(0)),
        "biases of the first expert": argument("matmul_id", bias_stride=number(0)),
        "rows of other tokens gathered": argument("pack_rows", divisor=lambda a: 2 * a["divisor"]),
        "slope of the clamped SwiGLU": argument("swiglu_pack_rows", alpha=times("alpha", 1.01)),
        "weights of the next choice": argument("expert_sum", weights=shifted("weights", 4)),
    }),
    *faults("rule", "coded", validate, {
        "results of attention not rotated back": argument("attention", rotation=number(0)),
        "V not rotated": argument("qkv_post", v_rotation=number(0)),
        "q and k rotated in other blocks": argument("qkv_post", k_rotation=number(16)),
    }),
    *faults("kernel", "coded", validate, {
        "a code of K off by one": leaves("qkv_post", code_of_k_off, state=True),
        "a scale of K 10 % off": leaves("qkv_post", scale_of_k_off, state=True),
    }),
    *faults("program", "dense", validate, {
        "mask one place too wide": device_input("places", lambda x: x + 1),
        "mask one place too narrow": device_input("places", lambda x: np.maximum(x - 1, 0)),
        "block table of the step before": put(Program, "prepare", _table_kept),
        "tiles of one sequence alone": put(programs, "attention_tiles", _tiles_of_one_sequence),
        "positions one too far": device_input("positions", lambda x: x + 1),
        "one live row too few": put(Program, "prepare", _one_live_row_less),
    }),
    *faults("rule", "hybrid", validate, {
        "stride between heads ignored": argument("qkv_post", q_head_stride=taken("head_dim")),
        "shared expert always open": argument("expert_sum", gate=number(0)),
        "shared expert opened by the first token": argument("expert_sum", gate_stride=number(0)),
        "state read from where it is written": argument("gated_delta", slot_in=taken("slot_out")),
        "the convolution's too": argument("conv_post", slot_in=taken("slot_out")),
        "decay and beta swapped": argument("gated_delta", decay=taken("beta"), beta=taken("decay")),
        "a and dt swapped": argument("gated_delta", a=taken("dt"), dt=taken("a")),
        "value heads in the other order": argument("gated_delta", tiled=lambda a: 1 - a["tiled"]),
        "one key head not normed": argument("conv_post", norm_end=plus("norm_end", -16)),
        "gates of heads one after another":
            argument("sigmoid_gate_pack", gate_head_stride=taken("head_dim")),
    }),
    *faults("kernel", "dense", validate, {
        "a bit of another page changed": leaves("qkv_post", elsewhere, state=True),
        "scale of packed activations 1 % off": leaves("rms_norm_pack", scale_off),
        "a packed activation off by one": leaves("rms_norm_pack", code_off),
        "a sum of packed activations off by one": leaves("rms_norm_pack", sum_off),
        "one number 1 % off": leaves("matmul", first_number(lambda x: x * np.float32(1.01))),
        "one number not finite": leaves("matmul", first_number(lambda x: np.nan)),
    }),
    *faults("lowering", "hybrid", validate, {
        "offsets of views in half words": put(Lowering, "place", _half_offsets),
    }),
    *faults("weights", "dense", validate, {
        "nibbles of weights swapped": put(WeightStore, "_repack", _nibbles_swapped),
        "scales of weights 1 % off": put(WeightStore, "_repack", _scales_off),
    }),
    *faults("kernel", "tied", validate, {
        "ties in the other order": leaves("router", other_of_a_tie),
    }),
    *faults("weights", "hybrid", validate, {
        "taps of the convolution reversed": _taps_reversed,
    }),
    *faults("rows", "dense", any_order_of_threads, {
        "no barrier anywhere in a layer": put(Call, "aligned", lambda _: lambda *_: True),
        "two rows without a barrier between": put(lowering, "schedule", _rows_merged),
    }),
    *faults("memory", "dense", validate, {
        "memory given away while it is needed": put(lowering, "place_buffers", _live_buffer_reused),
    }),
    *faults("pass", "dense", fused_is_plain, {
        "norms of q and k lost": put(fuse_attention, "_head", _without("norm")),
        "rope lost": put(fuse_attention, "_head", _without("angles")),
        "gate for up": put(fuse_ffn, "_swiglu", _swapped),
    }),
    *faults("pass", "hybrid", fused_is_plain, {
        "experts' weights not made to sum to 1": put(fuse_ffn, "_choice", _not_normalized),
        "residual behind experts lost":
            put(fuse_sums, "_one_more_term", lambda _: lambda node, total, term: total),
        "dt of the decay lost": put(fuse_delta, "_raw_gates", _dt_lost),
    }),
    *faults("pages", "dense", law_of_forks, {
        "a shared page written without a copy":
            put(pages, "_shared", lambda f: lambda *a: f(*a)[:0]),
        "the copy of a page is empty":
            put(PagePool, "_copy", lambda _: lambda self, page, copy: copy),
    }),
    *faults("pages", "dense", law_of_batches, {
        "pages in use taken for free": put(PagePool, "holders", _no_holders),
    }),
    *faults("pages", "dense", law_of_cuts, {
        "the second page is the first": put(Pages, "kv_slots", _pages_wrap),
    }),
    *faults("batch", "dense", law_of_batches, {
        "block tables of other sequences": put(Batch, "_block_table", _table_reversed),
    }),
    *faults("batch", "dense", law_of_cuts, {
        "logits of the row before": put(Batch, "inputs", _output_rows_shifted),
    }),
    *faults("batch", "hybrid", law_of_batches, {
        "state of the sequence before": put(Batch, "inputs", _slots_rolled),
    }),
    *faults("slots", "hybrid", law_of_rewinds, {
        "a rewind keeps the state": put(Recurrent, "cut", _state_kept),
    }),
    *faults("slots", "hybrid", law_of_forks, {
        "a fork goes on in its parent's slot":
            put(Recurrent, "shared", lambda _: lambda self: self),
    }),
    *faults("prompts", "dense", law_of_prompts, {
        "a page of the branch that came first": put(prompts, "pages_of", _first_come),
        "a token more than is the same": put(Edge, "common", lambda f: lambda *a: f(*a) + 1),
        "what is cached written over after a rewind": put(Record, "cut", _rewritten),
    }),
    *faults("prompts", "hybrid", law_of_prompts, {
        "a state a token before its place": put(Edge, "with_state", _too_soon),
        "a state that is written over": put(PromptCache, "keep", _going_on),
    }),
    *faults("devices", "dense", law_of_devices, {
        "a part left out of a sum": argument("all_sum", n_parts=plus("n_parts", -1)),
        "a residual not added": argument("all_sum", more=number(0)),
        "parts written over while they are read": put(exchange, "_uses", _short_lives),
    }),
    *faults("devices", "dense", law_of_exact_devices, {
        "a device's last activations not gathered": argument("put_stretch", n=plus("n", -8)),
    }),
    *faults("devices", "windowed", law_of_devices, {
        "pages of a device not copied": put(TensorBackend, "_parts", _first_left_out),
        "rows of other devices' experts added": argument("expert_sum", ids=number(0)),
        "experts of a device in another order": put(_Shard, "_own", _own_reversed),
    }),
    *faults("devices", "hybrid", law_of_stages, {
        "pages of a stage not copied": put(LayersBackend, "copy_pages", _first_not_copied),
    }),
]  # fmt: skip


SOURCE_FAULTS = [
    SourceFault("the later of two equal experts first", "tied", "moe.py", {
        "low = b.sub(e.ints(2**31 - 1, e.i64), b.sext(index, wide))": "low = b.sext(index, wide)",
        "return (2**31 - 1) - (place & 0xFFFFFFFF)": "return place & 0xFFFFFFFF",
        "(index > last_index)": "(index < last_index)",
    }),
    SourceFault("the last expert's part forgotten", "windowed", "moe.py", {
        "for rank in range(1, k):": "for rank in range(1, k - 1):",
    }),
    SourceFault("what products leave out of codes forgotten", "coded", "kv_dots.py", {
        "self.b.add(total, correction)": "total",
    }),
    SourceFault("q not rotated", "coded", "kv_cache.py", {
        "rotate_k(target, head_dim, k_rotation)": "rotate_k(target, head_dim, k_rotation * is_k)",
    }),
    SourceFault("bits of K's codes taken from another place", "coded", "kv_planes.py", {
        "e.ints(mask))": "e.ints(mask >> 1))",
    }, sweep=True),
    SourceFault("the first way to round codes", "coded", "kv_rounding.py", {
        'b.fcmp_ordered("<", error, least)': 'b.fcmp_ordered("<", error, _float(-1.0))',
    }, sweep=True),
    SourceFault("state that does not decay", "hybrid", "delta_passes.py", {
        "value = b.fmul(columns.load(b, at, j), factor)": "value = columns.load(b, at, j)",
    }),
]  # fmt: skip


def caught(fault: Fault | SourceFault, files: dict[str, Path]) -> str:
    """What the check that should see a fault says of it."""
    if isinstance(fault, SourceFault):
        return _caught_in_a_copy(fault, files[fault.model])
    with pytest.MonkeyPatch.context() as patch:
        fault.seed(patch)
        return red(fault.caught_by, files[fault.model])


def _caught_in_a_copy(fault: SourceFault, model: Path) -> str:
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("ops", "backends", "runtime"):
            shutil.copytree(root / part, Path(folder, part))
        path = Path(folder, "backends/cpu/kernels", fault.file)
        text = path.read_text(encoding="utf-8")
        for right, wrong in fault.changes.items():
            assert text.count(right) == 1, f"{fault.file} has changed: where is {right!r}?"
            text = text.replace(right, wrong)
        path.write_text(text, encoding="utf-8")
        found = subprocess.run(
            [sys.executable, root / "tests/fault_checks.py", model], cwd=folder, text=True,
            env={**os.environ, "PYTHONPATH": folder}, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    return next((row for row in found.stderr.splitlines() if row.startswith("VALIDATE")), "")


def line(fault: Fault | SourceFault, said: str) -> str:
    """A row of the table."""
    check = (fault.caught_by.__doc__ or "").strip() if said else "NOTHING"
    return f"{fault.name:42} {fault.where:9} {fault.model:9} {check:31} {said[:110]}"


def main() -> int:
    """Print the table; 1 where a fault is not caught."""
    with tempfile.TemporaryDirectory() as folder:
        files, missed = write_models(Path(folder)), 0
        for fault in (*FAULTS, *SOURCE_FAULTS):
            said = caught(fault, files)
            missed += not said
            print(line(fault, said), flush=True)
    total = len(FAULTS) + len(SOURCE_FAULTS)
    print(f"{total - missed} of {total} faults are caught")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
