"""Model: a loaded file, its backend and its cache; `load` makes one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.advance import Advance, Sequences, begin, commit
from runtime.arguments import check_function, check_has_weights, check_load, whole
from runtime.backends import forks
from runtime.backends.base import Backend, Program, Progress
from runtime.backends.devices import open_backend
from runtime.backends.environment import debug, inspected, validate
from runtime.batch import UBATCH, Ubatch, bucket_below, check, cut, largest_step, pairs
from runtime.errors import BackendError, OptionError
from runtime.generate import TextModel
from runtime.gguf.reader import GGUFFile, open_gguf
from runtime.memory.budget import CacheSize, Memory, choose
from runtime.memory.pages import Pages
from runtime.memory.slots import Recurrent
from runtime.models import registry
from runtime.models.step import Step
from runtime.ops import PAGE, Graph
from runtime.ops.rounding import KV_TYPES
from runtime.session import OnPrompt, Record, Session

if TYPE_CHECKING:
    from runtime.text.tokenizer import Tokenizer

_LOGITS_BYTES = 256 << 20  # the most logits one step computes; longer prompts take more steps

_GRAPH_TOKENS = 1 << 20  # of a graph to look at: far more than a step has


def load(
    path: str | os.PathLike[str] | None = None,
    devices: str = "cpu",
    kv_type: str = "f16",
    context: int | None = None,
    threads: int | None = None,
    activations: str = "int8",
    sequences: int = 8,
    progress: bool | Progress | None = None,
) -> Model:
    """Load a GGUF model; with no path the bundled demo model.

    devices: "cpu", "reference" or "null". kv_type: f32, f16, bf16 or q8_0, or two for K and V
    apart ("q8_0,f16"). context: tokens of one sequence (default: what the file was trained for,
    or what fits). threads: default one per core. activations: "int8", or "f32" to keep them in
    float for every weight type. sequences: full contexts the cache has room for, memory allowing.
    progress: None tells on stderr when kernels are compiled, and how long it takes, or when
    loading lasts; True shows all that lasts, False nothing; or a function of (done, total, what).

    The file is read once: a loaded model stays as it is when it is deleted, replaced, cut short
    or written over. What changes while it is being read is refused.
    Raises a `runtime.Error` that names the file, tensor or option.
    """
    given: dict[str, Any] = {
        "devices": devices, "kv_type": kv_type, "context": context, "threads": threads,
        "activations": activations, "sequences": sequences, "progress": progress,
    }  # fmt: skip
    given = check_load(path, given)
    file = open_gguf(path if path is not None else demo_path())
    check_has_weights(file)
    return Model(file, **given)


def demo_path() -> Path:
    """The bundled model's file."""
    return Path(__file__).parent / "data" / "demo.gguf"


class Model(TextModel):
    """Weights, cache pages and programs of one file. Made by `load`."""

    def __init__(
        self, file: GGUFFile, devices: str, kv_type: str, context: int | None,
        threads: int | None, activations: str, sequences: int,
        progress: bool | Progress | None,
    ) -> None:  # fmt: skip
        self.file = file
        # One step at a time: they share buffers and pages. Whatever changes who holds pages and
        # slots waits too, so that nothing a step reads or writes is given away meanwhile.
        self._lock = forks.lock()
        self._closed = False
        self._validated: Callable[[], Any] | None = None  # prints what VALIDATE found, once
        self.kv_types = parse_kv_type(kv_type)
        self._architecture = registry.build(file)
        self.backend: Backend = open_backend(devices, file, threads, activations)
        self._size = self._choose_size(context, sequences)
        layers = [t.shape for name, t in file.tensors.items() if name.startswith("blk.")]
        used = file.metadata.get(f"{file.architecture}.expert_used_count", 1)
        self._most_tokens = largest_step(layers, used)
        self._most_rows = bucket_below(_LOGITS_BYTES // (4 * self.vocab_size))
        step = self._step_inputs(1, 1)
        pages = [self.backend.state(leaf) for leaf in (*step.k.values(), *step.v.values())]
        self._sequences = Sequences(self._size.pages, pages, self._size.slots)
        self._progress = progress
        self._load_weights()

    @property
    def context(self) -> int:
        """The most tokens a session can hold."""
        return self._size.context

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self._architecture.p.vocabulary

    @property
    def architecture(self) -> str:
        """The architecture's name in the file."""
        return self.file.architecture

    @property
    def threads(self) -> int:
        """Threads of the backend."""
        return self.backend.threads

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's Tokenizer, built on first use."""
        if not hasattr(self, "_tokenizer"):
            from runtime.text.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.from_gguf(self.file)
        return self._tokenizer

    def graph(self, tokens: int = 1, outputs: int | None = None) -> Graph:
        """The plain graph of a step of that capacity; `print` it to read it.

        tokens: how many the step has room for; outputs: rows of logits, as many by default.
        """
        tokens = whole("tokens", tokens, 1)
        outputs = tokens if outputs is None else whole("outputs", outputs, 1)
        if max(tokens, outputs) > _GRAPH_TOKENS:
            raise OptionError(f"a graph of {max(tokens, outputs)} tokens; most is {_GRAPH_TOKENS}")
        return self._architecture.graph(self._step_inputs(tokens, outputs))

    def _step_inputs(self, tokens: int, outputs: int) -> Step:
        return Step.capacity(
            tokens, outputs, -(-self.context // PAGE), self._size.pages, self._size.slots,
            self._architecture.layers, self.kv_types, self._architecture.positions_per_token,
            self.context,
        )  # fmt: skip

    def session(self) -> Session:
        """An empty sequence."""
        with self._alone():
            self._check_open()
            state = Recurrent() if self._size.slots else None
            return Session(self, Record([], 0, Pages.room(self.context), state))

    def eval(self, ids: Iterable[int], logits: str = "all") -> np.ndarray:
        """Logits of a fresh sequence, float32 [len(ids), vocabulary]; no BOS is added."""
        with self.session() as session:
            return session.eval(ids, logits)

    def step(
        self, batch: Iterable[tuple[Session, Iterable[int]]], logits: str = "all",
        on_prompt: OnPrompt | None = None,
    ) -> list[np.ndarray]:  # fmt: skip
        """Evaluate new tokens of several sessions together, as one ragged batch.

        One float32 [n, vocabulary] per session, in order: all its new tokens ("all"), the last
        one ("last") or none ("none"). The bits do not depend on what else is in the batch. An
        error, of whatever kind, leaves every session as it was.

        on_prompt: called with (done, total) tokens of the whole batch: (0, total) before the
        first part of it is evaluated, and after each part. What it raises ends the step.
        """
        new = pairs(batch, self)
        check_function("on_prompt", on_prompt, "(done, total)")
        with self._alone():
            self._check_open()
            check(new, logits, self.vocab_size, self.context)
            advances = self._sequences.prepare(new)
            begin(advances)
            results = self._advance(advances, logits, on_prompt)
            commit(advances)
        return results

    def _advance(
        self, advances: list[Advance], logits: str, on_prompt: OnPrompt | None
    ) -> list[np.ndarray]:
        counts = [{"all": a.new, "last": 1, "none": 0}[logits] for a in advances]
        results = [np.empty((n, self.vocab_size), np.float32) for n in counts]
        filled = [0] * len(advances)
        steps = cut(advances, logits, self._most_tokens, self._most_rows)
        for ubatch in steps if on_prompt is None else _told(list(steps), on_prompt):
            self._sequences.reserve([piece.advance for piece in ubatch.pieces], advances)
            rows = self._run(ubatch)
            for piece in ubatch.pieces:
                n = len(piece.wanted)
                at = filled[piece.index]
                results[piece.index][at : at + n], rows = rows[:n], rows[n:]
                filled[piece.index] += n
        return results

    def close(self) -> None:
        """End threads and give memory back; sessions of this model cannot be used afterwards."""
        with self._alone():
            self._closed = True
            for member in self._sequences.members():
                member.close()
            self.backend.close()
            if self._validated is not None:
                self._validated()

    def _alone(self) -> AbstractContextManager[Any]:
        """The lock that whoever changes sessions holds; OptionError where that cannot be."""
        if self._lock._is_owned():
            raise OptionError(
                "a step of this model is under way; on_prompt can stop it by an exception, and "
                "cannot use the model or change its sessions"
            )
        return self._lock

    def _check_open(self) -> None:
        if self._closed:
            raise OptionError("this model is closed; load it again")

    def __reduce_ex__(self, _: object) -> Any:
        raise OptionError(
            "a model holds threads and memory and cannot be copied or pickled; another process "
            f"loads it itself: runtime.load({str(self.file.path)!r})"
        )

    def __repr__(self) -> str:
        name = self.file.path.name
        return f"<Model {name} {self.architecture}, context {self.context}, {self.backend.name}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, ubatch: Ubatch) -> np.ndarray:
        program = self._program(ubatch.tokens, ubatch.outputs)
        inputs = ubatch.inputs(self._architecture.positions_per_token)
        rows = self._execute(program, inputs, ubatch.live)
        if not np.logical_and.reduce(np.isfinite(rows), axis=None):  # quicker than `all`
            raise BackendError(
                f"{self.file.path}: the model's logits are not finite: a weight of the file is "
                "damaged, or a kernel is broken; fetch the file again; VALIDATE=1 names the op"
            )
        for piece in ubatch.pieces:
            piece.finish()
        return rows

    def _execute(
        self, program: Program, inputs: dict[str, np.ndarray], live: dict[str, int]
    ) -> np.ndarray:
        if inspected() and (validate() or debug() >= 2):
            from runtime.inspection import run_inspected

            return run_inspected(self, program, inputs, live, validate(), debug())
        return program.run(inputs, live)[0]

    def _program(self, tokens: int, outputs: int) -> Program:
        """The program of the smallest bucket that holds a step of that size."""
        if (tokens, outputs) in self._programs:
            return self._programs[tokens, outputs]
        t, r = capacity(tokens, outputs)
        if (t, r) not in self._programs:
            graph = self.graph(t, r)
            self._prepare([graph])
            self._programs[t, r] = self.backend.program(graph)
            self._show_plan(t, self._programs[t, r])
        return self._programs[t, r]

    def _show_plan(self, tokens: int, program: Any) -> None:
        """DEBUG=1: a line per program."""
        if debug() >= 1 and hasattr(program, "plan"):
            print(f"{tokens} tokens: {str(program.plan).splitlines()[0]}", file=sys.stderr)

    def memory(self) -> Memory:
        """Bytes of weights, of a page of KV cache and of a sequence's state, on this device."""
        page, state = self._state_nbytes()
        size = self._size
        return Memory(self.file.tensors_nbytes, page, state, size.pages, size.slots)

    def warmup(self, progress: bool | Progress = False) -> None:
        """Compile every kernel this model can need, so that no later step waits for one.

        progress: as for `load`. Kernels are kept on disk, for all models of the same types.
        """
        from runtime.progress import reporter

        with reporter(progress) as report:
            self.backend.load(self._warm_graphs(), report)

    def _state_nbytes(self) -> tuple[int, int]:
        """Bytes of a page and of a slot, all layers together."""
        step = Step.capacity(1, 1, 1, 1, 1, self._architecture.layers, self.kv_types)
        pages, slots = (step.k, step.v), (step.conv, step.delta)
        page, slot = (
            sum(self.backend.page_nbytes(leaf) for group in groups for leaf in group.values())
            for groups in (pages, slots)
        )
        return page, slot

    def _choose_size(self, context: int | None, sequences: int) -> CacheSize:
        page, slot = self._state_nbytes()
        weights, trained = self.file.tensors_nbytes, self._architecture.p.context
        return choose(context, trained, sequences, page, weights, slot)

    def _load_weights(self) -> None:
        self._programs: dict[tuple[int, int], Program] = {}
        graphs = [self.graph(1, 1)]
        if not self._prepare(graphs):
            with self._reporter() as report:
                self.backend.load(graphs, report)

    def _prepare(self, graphs: list[Graph]) -> bool:
        """Where kernels of these graphs have to be compiled, compile all there are in one go.

        The kernels of a token alone are looked for when a model is loaded, which is quick; those
        of a prompt with the first prompt, and are not found only where compiling was interrupted
        or another model left its own. False: nothing was missing.
        """
        if not self.backend.missing(graphs):
            return False
        with self._reporter() as report:
            self.backend.load([*self._warm_graphs(), *graphs], report)
        return True

    def _reporter(self) -> AbstractContextManager[Progress | None]:
        from runtime.progress import reporter

        return reporter(self._progress)

    def _warm_graphs(self) -> list[Graph]:
        """Graphs that between them use every kernel this model can need."""
        buckets = [1 << n for n in range(UBATCH.bit_length())]
        sizes = self.backend.distinct_sizes(self.graph(1, 1), buckets)
        return [self.graph(t, r) for t in sizes for r in output_buckets(t)]


def _told(steps: list[Ubatch], on_prompt: OnPrompt) -> Iterator[Ubatch]:
    """The same steps; how far they have come is told before the first and after each."""
    done, total = 0, sum(step.tokens for step in steps)
    on_prompt(done, total)
    for step in steps:
        yield step
        done += step.tokens
        on_prompt(done, total)


def parse_kv_type(text: str) -> tuple[str, str]:
    """K and V types of "f16" or "q8_0,f16"; OptionError lists what there is."""
    text = text if isinstance(text, str) else ",".join(map(str, text))
    parts = [p.strip().lower() for p in text.split(",")]
    kinds = parts * 2 if len(parts) == 1 else parts
    wrong = next((k for k in kinds if k not in KV_TYPES), None)
    if len(kinds) != 2 or wrong is not None:
        raise OptionError(
            f"kv_type={text!r} must be one of {', '.join(KV_TYPES)}, or two of them for K and V "
            "apart, such as 'q8_0,f16'"
        )
    return kinds[0], kinds[1]


def bucket(n: int) -> int:
    """The smallest power of two that holds n."""
    return 1 << max(0, n - 1).bit_length()


def output_buckets(tokens: int) -> list[int]:
    """The numbers of output rows that a step of `tokens` tokens (a bucket) is made for."""
    return sorted({1, min(8, tokens), tokens})


def capacity(tokens: int, outputs: int) -> tuple[int, int]:
    """Tokens and output rows of the smallest program that holds a step of that size."""
    t = bucket(tokens)
    return t, next(r for r in output_buckets(t) if r >= outputs)
