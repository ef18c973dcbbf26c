"""Engine: runs one native step at a time, of pieces of any mix of sequences."""

from __future__ import annotations

import sys
import time
import weakref
from collections import abc, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, contextmanager
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import forks
from runtime.backends.base import (
    Apart,
    Backend,
    Choosing,
    Program,
    Progress,
    Rooms,
    Staged,
    Step,
)  # fmt: skip
from runtime.backends.environment import debug, inspected, validate
from runtime.backends.meta.rooms import as_one
from runtime.engine.advance import Advance, Piece, begin, commit
from runtime.engine.batch import Batch, bucket_below, cut, largest_step, size_of, staged_step
from runtime.engine.costs import StepCosts
from runtime.engine.decoder import Decoder
from runtime.engine.disk import DiskTier
from runtime.engine.graphs import StepGraphs, capacity, state_nbytes
from runtime.engine.identity import identity
from runtime.engine.nextn import NextNDrafts
from runtime.engine.plain_state import PlainState
from runtime.engine.pools import Pools
from runtime.engine.programs import Programs
from runtime.engine.prompts import PromptCache
from runtime.engine.sequence import Record, Sequence
from runtime.errors import BackendError, Error, MemoryLimitError, OptionError
from runtime.gguf.reader import GGUFFile
from runtime.memory.budget import CacheSize, Memory, available_memory, choose, usual
from runtime.memory.pages import Pages
from runtime.memory.slots import Recurrent
from runtime.models.registry import Architecture, Predicting
from runtime.ops import PAGE
from runtime.ops.errors import shown

OnPrompt = Callable[[int, int], Any]  # tokens evaluated, tokens to evaluate

_LAST = 60.0  # seconds that the end of a model waits for what is to be on disk
_LOGITS_BYTES = 256 << 20  # the most logits one step computes; longer prompts take more steps


class Engine:
    """Weights, memory and programs of one model on its device.

    `most_tokens` and `most_rows` (of logits) fit into one step; `pools` says what is free; `plain`
    reads and writes pages and slots in the layout of files;
    `staged` is the backend where steps go through several stages of it; `decoder` is there where
    the device chooses tokens; `costs` says what steps of `run` take.
    """

    def __init__(
        self, file: GGUFFile, backend: Backend, architecture: Architecture,
        kv_types: tuple[str, str], context: int | None, sequences: int,
        progress: bool | Progress | None, cache_rotation: bool = True, prompt_cache: bool = False,
        cache_bytes: int | None = None, cache_dir: Path | None = None,
        cache_disk: int | None = None,
    ) -> None:  # fmt: skip
        self.file, self.backend, self.architecture = file, backend, architecture
        self.files: Any = file  # that the device has: one, or several by name
        self.staged = backend if isinstance(backend, Staged) and backend.stages > 1 else None
        # One step at a time: they share buffers and pages. Whatever changes who holds pages and
        # slots waits too, so that nothing a step reads or writes is given away meanwhile.
        self.lock = forks.lock()
        self.decoder: Decoder | None = None
        if isinstance(backend, Choosing) and backend.chooses:
            self.decoder = Decoder(self, backend)
        self.validated: Callable[[], Any] | None = None  # prints what VALIDATE found, once
        self._closed = False
        layers = architecture.p.layers
        if self.staged and self.staged.stages > layers and debug() >= 1:
            said = f"{self.staged.stages} stages for {layers} layers: some begin inside a layer"
            print(said, file=sys.stderr)
        page, slot = state_nbytes(backend, architecture, kv_types)
        trained, self.vocabulary = architecture.p.context, architecture.p.vocabulary
        self.most_tokens, self.most_rows = _limits(file, self.vocabulary)
        weights, free, where = file.tensors_nbytes, None, ""
        if isinstance(backend, Apart) or (isinstance(backend, Rooms) and backend.apart):
            most = CacheSize(min(context or trained, trained), 1, 2)
            graphs = StepGraphs(architecture, kv_types, most, cache_rotation)
            tokens, rows = capacity(self.most_tokens, min(self.most_tokens, self.most_rows))[:2]
            graph, where = graphs.graph(tokens, rows), f" on {backend.name}"
            if isinstance(backend, Apart):
                free, weights = backend.memory(graph)
            else:
                free, weights = as_one(backend.rooms(graph, available_memory()))
        size = choose(context, trained, sequences, page, weights, slot, free, where, cache_bytes)
        self.context = size.context
        self.memory = Memory(weights, page, slot, size.pages, size.slots)
        self.graphs = StepGraphs(architecture, kv_types, size, cache_rotation)
        step = self.graphs.inputs(1, 1)
        self.plain = PlainState(backend, step)
        copy_pages = partial(backend.copy_pages, (*step.k.values(), *step.v.values()))
        self.pools = Pools(size.pages, copy_pages, size.slots)
        kept = None
        if cache_bytes is None and not where:  # what a prompt leaves is in memory of the host
            kept = usual(self.memory, size.context)
        self.prompts = PromptCache(self.pools, size.context, (page, slot), prompt_cache, kept)
        self.disk = None if cache_dir is None else DiskTier(self, cache_dir, cache_disk)
        if self.disk is not None:
            self.prompts.key = self.disk.key
            self.prompts.below = partial(_from_disk, weakref.ref(self))
        self.programs = Programs(
            backend, self.graphs.graph, capacity, self.graphs.warm, progress
        )  # fmt: skip
        self.costs = StepCosts()
        self.programs.load(1, 1)
        self.nextn: NextNDrafts | None = None
        if isinstance(architecture, Predicting) and architecture.predictor is not None:
            self.nextn = NextNDrafts(self, progress)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What the numbers in its memory depend on, by name; see engine/identity.py."""
        return identity(self)

    def alone(self) -> AbstractContextManager[Any]:
        """The lock that whoever changes sequences holds; OptionError where that cannot be."""
        lock = self.going_on()
        return lock if self.decoder is None else self.decoder.stopped()

    def going_on(self) -> Any:
        """The same for `decoder`, whose step ahead goes on."""
        if self.lock._is_owned():
            raise OptionError(
                "a step of this model is under way; on_prompt can stop it by an exception, and "
                "cannot use the model or change its sessions"
            )
        return self.lock

    def sequence(self, record: Record, closed_error: str, cached: bool = True) -> Sequence:
        """A sequence with that record; cached: see Sequence."""
        made = Sequence(record, closed_error, cached)
        self.pools.holders.add(made)
        return made

    def end(self, sequence: Sequence) -> None:
        """Close a sequence; the cache of prompts keeps what it has evaluated."""
        with self.lock:
            record = sequence.record
            sequence.close()
            if sequence.cached:
                self._keep(record, ends=True)

    def empty(self) -> Record:
        """The record of an empty sequence."""
        self.check_open()
        state = Recurrent() if self.memory.slots else None
        return Record([], 0, Pages.room(self.context), [], state)

    def run(self, pieces: abc.Sequence[Piece]) -> list[np.ndarray | Error]:
        """One native step: of each piece float32 [rows wanted, vocabulary], or why it failed.

        A piece that fails (no memory, a closed sequence, logits that are not finite) leaves its
        sequence as it was and the others alone; those go on, all at once. What breaks the step
        off leaves all sequences as they were. OptionError when there are more tokens than
        `most_tokens`, with what is evaluated again after a rewind, or rows than `most_rows`.
        """
        with self.ran(pieces) as found:
            return [rows if isinstance(rows, Error) else rows.copy() for rows in found]

    @contextmanager
    def ran(self, pieces: abc.Sequence[Piece]) -> abc.Iterator[list[np.ndarray | Error]]:
        """The same for a `with` block in which the rows are valid: nothing is copied."""
        with self.alone():
            begun, made = time.perf_counter(), len(self.programs)
            advances = self.admitted(pieces)
            self.check_size(advances)
            self.pools.reserve(advances)
            going = [a for a in advances if a.error is None]
            begin(going)
            # not ahead where a state would be kept after each of the steps
            for batch, results in self._steps(going, ahead=not self.memory.slots):
                self._take(batch, *results, copy=self.staged is not None or not batch.last)
            self._commit([a for a in going if a.error is None])
            self._learn(going, time.perf_counter() - begun, made == len(self.programs))
            yield [a.error or a.rows for a in advances]

    def _learn(self, going: abc.Sequence[Advance], seconds: float, ready: bool) -> None:
        """ready: no program was made for this step."""
        if not ready:
            self.costs.made(seconds)
        elif going:
            self.costs.learn(size_of(going)[0], seconds)

    def run_all(
        self, pieces: abc.Sequence[Piece], on_prompt: OnPrompt | None = None
    ) -> list[np.ndarray]:
        """All or nothing, in as many steps as it takes: of each piece its rows.

        The first error of a piece is raised, and every sequence is as it was. on_prompt: see
        `Model.step`.
        """
        with self.alone():
            advances = self.admitted(pieces)
            _raise(advances)
            self.pools.reserve(advances)
            _raise(advances)
            begin(advances)
            done, total = 0, size_of(advances)[0]
            if on_prompt is not None:
                on_prompt(done, total)
            for batch, results in self._steps(advances):
                self._take(batch, *results)
                _raise(advances)
                done += batch.tokens
                if on_prompt is not None:
                    on_prompt(done, total)
            self._commit(advances)
        return [a.rows for a in advances]

    def settle(self, sequence: Sequence) -> None:
        """Evaluate again what follows the state of its recurrent layers, so that nothing does.

        For what was left behind drafts that did not follow; see `Drafted`.
        """
        with self.alone():
            record = sequence.record
            if record.closed or not record.given <= record.evaluated < record.length:
                return
            advance = Advance(Piece(sequence, [], "none", False, False))
            self.pools.reserve([advance])
            _raise([advance])
            begin([advance])
            for _ in self._steps([advance]):
                pass
            commit([advance])

    def _commit(self, advances: abc.Sequence[Advance]) -> None:
        commit(advances)
        for a in advances:
            self.keep(a.sequence, a.closes)

    def keep(self, sequence: Sequence, message_end: bool = False) -> None:
        """The cache of prompts keeps what it has evaluated, if a page or a message is complete."""
        record = sequence.record
        complete = message_end or len(record.keys) < record.length // PAGE
        if complete and sequence.cached and self.prompts.enabled:
            self._keep(record, message_end)

    def _keep(self, record: Record, message_end: bool = True, ends: bool = False) -> None:
        self.prompts.keep(record, ends)
        # a page that is complete in the middle of an answer waits for its end: steps go first
        if self.disk is not None and message_end:
            self.disk.keep(self, record, ends)

    def close(self) -> None:
        """End threads and give memory back; sequences cannot go on afterwards."""
        if self.disk is not None and not self._closed:
            self._keep_all(self.disk)
        with self.alone():
            self._closed = True
            for holder in self.pools.holders:
                holder.close()
            self.backend.close()
            if self.validated is not None:
                self.validated()

    def _keep_all(self, disk: DiskTier) -> None:
        """What sequences have that are open still is kept on disk as well."""
        with self.alone():
            for holder in self.pools.holders:
                if isinstance(holder, Sequence) and not holder.record.closed:
                    self.end(holder)
        disk.flush(_LAST)

    def check_open(self) -> None:
        """OptionError once it is closed."""
        if self._closed:
            raise OptionError("this model is closed; load it again")

    def check(self, piece: Piece) -> None:
        """OptionError or MemoryLimitError for what cannot be evaluated."""
        ids, record = piece.ids, piece.sequence.record
        if not ids:
            raise OptionError("there are no tokens to evaluate; give at least one id")
        if ("vectors" not in piece.given and min(ids) < 0) or max(ids) >= self.vocabulary:
            outside = next(i for i in ids if not 0 <= i < self.vocabulary)
            raise OptionError(
                f"token id {shown(outside)} is outside the vocabulary of {self.vocabulary}"
            )
        if piece.given:
            self._check_given(piece)
        if not isinstance(piece.rows, str) and not _rise(piece.rows, len(ids)):
            raise OptionError(f"rows={shown(piece.rows)} must be rising places of {len(ids)} ids")
        if record.closed:
            raise OptionError(piece.sequence.closed_error)
        if record.evaluated < record.given:
            raise OptionError(
                f"{record.given - record.evaluated} tokens that came with vectors or positions "
                "would be evaluated again; rewind to before them and give them again"
            )
        check_room(record.length, len(ids), self.context)

    def _check_given(self, piece: Piece) -> None:
        """OptionError unless there is a row of the right width for each id."""
        components, p = self.architecture.positions_per_token, self.architecture.p
        rows = {"positions": () if components == 1 else (components,), "vectors": (p.hidden,)}
        for name, given in piece.given.items():
            if name not in rows:
                raise OptionError(f"tokens come with {', '.join(rows)}, not {name!r}")
            wanted = (len(piece.ids), *rows[name])
            if given.shape != wanted:
                raise OptionError(f"{name} of shape {list(given.shape)}; needed is {list(wanted)}")

    def admitted(self, pieces: abc.Sequence[Piece]) -> list[Advance]:
        """Each piece on its way, with an error where it is not one that can be evaluated."""
        self.check_open()
        if len({piece.sequence for piece in pieces}) != len(pieces):
            raise OptionError("a session stands twice in one step; join its tokens")
        advances = []
        for piece in pieces:
            advances.append(advance := Advance(piece))
            if self._goes_on(piece):
                continue
            try:
                self.check(piece)
            except Error as error:
                advance.error = error.with_traceback(None)  # which would hold the advance
        return advances

    def _goes_on(self, piece: Piece) -> bool:
        """Whether it is a token more of an answer, of which `check` has nothing to say."""
        ids, record = piece.ids, piece.sequence.record
        return (
            len(ids) == 1
            and 0 <= ids[0] < self.vocabulary
            and piece.rows == "last"
            and record.length < self.context
            and not (piece.given or record.given or record.closed)
        )

    def check_size(self, advances: abc.Sequence[Advance]) -> None:
        """OptionError for more than one step takes."""
        tokens, rows = size_of(advances)
        if tokens > self.most_tokens or rows > self.most_rows:
            raise OptionError(
                f"{tokens} tokens and {rows} rows of logits in one step of this model; most is "
                f"{self.most_tokens} and {self.most_rows}"
            )

    def _steps(
        self, advances: abc.Sequence[Advance], ahead: bool = True
    ) -> abc.Generator[tuple[Batch, abc.Sequence[np.ndarray]]]:
        """Steps that take advances to their ends, each with its results, valid until the next.

        ahead: a device of several stages is given more and smaller steps, some before it has done
        those before.
        """

        stream, most = None, self.most_tokens
        if self.staged is not None and ahead and not inspected():
            tokens = size_of(advances)[0]
            each = staged_step(tokens, self.staged.stages, most)
            if tokens > each:
                stream, most = self.staged.stream, each
        batches = cut(advances, most, self.most_rows)
        if stream is None:
            for batch in batches:
                yield batch, self._execute(*self.prepared(batch, advances))
            return
        given = deque[Batch]()

        def steps() -> abc.Iterator[Step]:
            for batch in batches:
                given.append(batch)
                yield self.prepared(batch, advances)

        with closing(stream(steps())) as results:
            for found in results:
                yield given.popleft(), found

    def prepared(self, batch: Batch, advances: abc.Sequence[Advance]) -> Step:
        """What to run for a step of these advances, which its parts count as done."""
        if self.memory.slots:
            self.pools.reserve_slots([part.advance for part in batch.parts], advances)
            _raise(advances)
        kind = (True,) if "vectors" in batch.given else ()
        program = self.programs.of(batch.tokens, batch.outputs, *kind)
        a = self.architecture
        inputs = batch.inputs(a.positions_per_token, a.p.hidden)
        for part in batch.parts:
            part.finish()
        return program, inputs, batch.live

    def _take(
        self,
        batch: Batch,
        logits: np.ndarray,
        hidden: np.ndarray | None = None,
        *,
        copy: bool = True,
    ) -> None:
        """Each part takes its rows of logits, or an error where they are not finite.

        hidden: the rows that they were made of, of models that predict further tokens. copy:
        other steps are run before the rows are read.
        """
        at, finite = 0, _finite(logits)
        for part in batch.parts:
            rows = logits[at : at + len(part.wanted)]
            at += len(part.wanted)
            if finite or _finite(rows):
                part.advance.take(rows, copy)
                if hidden is not None:
                    part.advance.see(hidden[at - len(part.wanted) : at])
            else:
                part.advance.error = self.not_finite()

    def _execute(
        self, program: Program, inputs: abc.Mapping[str, np.ndarray], live: abc.Mapping[str, int]
    ) -> abc.Sequence[np.ndarray]:
        if inspected():
            from runtime.inspection import run_inspected

            return run_inspected(self, program, inputs, live, validate(), debug())
        return program.run(inputs, live)

    def not_finite(self) -> BackendError:
        """What to say of logits that are not."""
        return BackendError(
            f"{self.file.path}: the model's logits are not finite: values are too large for the "
            "KV cache (try f32), a weight of the file is damaged (fetch it again), or a kernel "
            "is broken; VALIDATE=1 names the op"
        )


def _from_disk(whose: weakref.ref[Engine], tokens: abc.Sequence[int], least: int) -> int:
    """See `Below`."""
    engine = whose()
    return 0 if engine is None or engine.disk is None else engine.disk.fetch(engine, tokens, least)


def _limits(file: GGUFFile, vocabulary: int) -> tuple[int, int]:
    """Tokens and rows of logits of the largest step."""
    layers = [t.shape for name, t in file.tensors.items() if name.startswith("blk.")]
    used = file.metadata.get(f"{file.architecture}.expert_used_count", 1)
    return largest_step(layers, used), bucket_below(_LOGITS_BYTES // (4 * vocabulary))


def _rise(places: abc.Sequence[int], end: int) -> bool:
    return all(a < b for a, b in pairwise([-1, *places, end]))


def _finite(logits: np.ndarray) -> bool:
    return bool(np.logical_and.reduce(np.isfinite(logits), axis=None))  # quicker than `all`


def checked(result: np.ndarray | Error) -> np.ndarray:
    """The rows of a piece that was run; its error is raised."""
    if isinstance(result, Error):
        try:
            raise result
        finally:
            del result  # or it and what it remembers of its way would hold one another
    return result


def _raise(advances: abc.Sequence[Advance]) -> None:
    """The first error of any."""
    for advance in advances:
        if advance.error is not None:
            found, advance.error = [advance.error], None
            checked(found.pop())


def check_room(present: int, new: int, context: int) -> None:
    """MemoryLimitError when a sequence of `present` tokens cannot take `new` more."""
    if present + new > context:
        before = f"{present} + {new}" if present else str(new)
        raise MemoryLimitError(
            f"{before} tokens do not fit in context={context}; "
            "shorten the prompt or load the model with a larger context"
        )
