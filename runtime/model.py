"""Model: a loaded file, its backend and its cache; `load` makes one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.arguments import (
    check_function,
    check_has_weights,
    check_load,
    kv_types,
    listed,
    token_ids,
    whole,
    wrong,
)
from runtime.backends.base import Backend, Progress
from runtime.backends.devices import names_mpi, open_backend
from runtime.engine.advance import Piece
from runtime.engine.engine import Engine, OnPrompt
from runtime.engine.scheduler import Scheduler
from runtime.errors import ModelError, OptionError
from runtime.generate import TextModel
from runtime.gguf.reader import GGUFFile, open_gguf
from runtime.memory.budget import Memory
from runtime.models import registry
from runtime.ops import Graph
from runtime.ops.errors import shown
from runtime.session import Session

if TYPE_CHECKING:
    from runtime.quality.perplexity import OnWindow, Perplexity
    from runtime.text.tokenizer import Tokenizer

_ASKED = ("cuda", "mpi")  # where further tokens are predicted only if that is asked
_GRAPH_TOKENS = 1 << 20  # of a graph to look at: far more than a step has


def load(
    path: str | os.PathLike[str] | None = None,
    devices: str | Sequence[str] = "cpu",
    kv_type: str = "f16",
    context: int | None = None,
    threads: int | None = None,
    activations: str = "int8",
    sequences: int = 8,
    progress: bool | Progress | None = None,
    split_mode: str | None = None,
    tensor_split: str | Sequence[float] | None = None,
    main_device: int | None = None,
    cache_rotation: bool = True,
    graphs: bool = True,
    gpu_layers: int | str | None = None,
    cpu_moe: bool | int = False,
    pack_cache: bool | str = False,
    prompt_cache: bool = True,
    cache_bytes: int | None = None,
    spec: str = "auto",
    draft: str | os.PathLike[str] | Model | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_disk: int | None = None,
) -> Model:
    """Load a GGUF model; with no path the bundled demo model.

    devices: "cpu"; "cpu:0,cpu:1" or a list of them, virtual devices that share out the cores;
    "numa", one for each NUMA node; "tensor(...)" and "layers(...)" of these, nested at will, with
    shares as "3*cpu:0"; "cuda", "cuda:1", GPUs, several of them as those of the CPU; "auto", the
    first GPU that can be used, else the CPU; "tensor(mpi)", the processes that mpiexec started;
    "reference" or "null".
    split_mode: of a list of devices, "layer" (the default), "tensor", or "none": the one of number
    `main_device` alone. tensor_split: a share for each, "3,1" or [3, 1].
    kv_type: such as f32, f16, bf16 or q8_0, or two for K and V apart ("q8_0,f16"). context: tokens
    of one sequence (default: what the file was trained for, or what fits). threads: of all devices,
    default one per core. activations: "int8", or "f32" to keep them in float for every weight
    type. sequences: full contexts the cache has room for, memory allowing. cache_rotation: K and V
    of quantised types are rotated before they are rounded, which loses less. graphs: a step of a
    GPU is one graph of kernels; False: one launch after another, the same bits.
    gpu_layers: of devices that are GPUs, or "cpu" beside a GPU: the GPUs have so many of the last
    layers, the output being one, and the CPU the others; "all", or "auto" as many as fit. cpu_moe:
    the experts of all layers are the CPU's, or of the first so many.
    pack_cache: weights of CPUs are kept on disk as they are packed, once, and mapped by every later
    process, which shares them with others: True or "folder", in the cache folder; "beside" the
    model. The files are about as large as the model; `runtime cache` lists and removes them.
    prompt_cache: what was read or written once is not read again by answers whose prompts begin
    with the same tokens; the bits are the same. It keeps what memory has room for and nothing else
    needs, up to a quarter of what is free.
    cache_bytes: most bytes of all sequences and of what is kept of prompts, together with what it
    takes to find it; in place of room for `sequences`.
    spec: who drafts tokens of `generate` and `chat`; several are verified in a step, and the answer
    is the same to the bit: "ngram" (what the text has had before), "draft" (the draft model),
    "mtp" (the block of Qwen3.5's and later files that predicts further tokens, which takes one more
    layer of cache), "auto" (whoever is there and pays; of GPUs the block only if it is asked for)
    or "off". draft: a smaller model of the same vocabulary, as a file or loaded.
    cache_dir: a folder in which prompts are kept on disk, too, for later processes and beside
    others; it is written behind, verified when it is read, and shared by all that use the folder.
    None: nothing is. cache_disk: bytes that prompts of all models may take there; by default 8 GiB,
    and no more than a tenth of what is free. `runtime cache` lists and removes them.
    progress: None tells on stderr when kernels are compiled, and how long it takes, or when
    loading lasts; True shows all that lasts, False nothing; or a function of (done, total, what).

    The file is read once: a loaded model stays as it is when it is deleted, replaced, cut short
    or written over. What changes while it is being read is refused.
    Raises a `runtime.Error` that names the file, tensor or option.
    """
    given: dict[str, Any] = {
        "devices": devices, "kv_type": kv_type, "context": context, "threads": threads,
        "activations": activations, "sequences": sequences, "progress": progress,
        "split_mode": split_mode, "tensor_split": tensor_split, "main_device": main_device,
        "cache_rotation": cache_rotation, "graphs": graphs,
        "gpu_layers": gpu_layers, "cpu_moe": cpu_moe, "pack_cache": pack_cache,
        "prompt_cache": prompt_cache, "cache_bytes": cache_bytes, "spec": spec,
        "cache_dir": cache_dir, "cache_disk": cache_disk,
    }  # fmt: skip
    given = check_load(path, given)
    if names_mpi(given["devices"]):
        from runtime.backends.meta.mpi import take_part

        take_part(open_gguf)
    file = open_gguf(path if path is not None else demo_path())
    check_has_weights(file)
    if draft is None and given["spec"] != "draft":
        return Model(file, **given)
    return _drafted(file, draft, given)


def _drafted(file: GGUFFile, draft: Any, given: dict[str, Any]) -> Model:
    """The model of a file, with a draft model."""
    from runtime.speculation.draft_model import check_vocabulary, draft_arguments

    if draft is None:
        raise OptionError("spec='draft' needs a draft model; give one as draft=FILE")
    if not isinstance(draft, Model | str | os.PathLike):
        raise wrong("draft", draft, "the path of a .gguf file, or a loaded model")
    if isinstance(draft, Model):
        check_vocabulary(draft.file, file)
        return Model(file, **given, draft=draft)
    own = open_gguf(draft)
    check_vocabulary(own, file)
    model = Model(file, **given, owned=True)
    try:
        model.draft = Model(own, **draft_arguments(own, given))
    except BaseException:
        model.close()
        raise
    return model


def demo_path() -> Path:
    """The bundled model's file."""
    return Path(__file__).parent / "data" / "demo.gguf"


def _predicting(model: registry.Architecture, asked: bool) -> registry.Architecture:
    """With the block that predicts further tokens where it can be used; said if that was asked."""
    try:
        return registry.predicting(model)
    except ModelError as error:
        if asked:
            print(f"spec='mtp': {error}; the model runs without its drafts", file=sys.stderr)
        return model


class Model(TextModel):
    """Weights, cache pages and programs of one file. Made by `load`.

    `spec` and `draft`: who drafts where `generate` and `chat` are not told.
    """

    def __init__(
        self, file: GGUFFile, devices: str, kv_type: str, context: int | None,
        threads: int | None, activations: str, sequences: int,
        progress: bool | Progress | None, cache_rotation: bool = True, prompt_cache: bool = True,
        cache_bytes: int | None = None, spec: str = "auto",
        draft: Model | None = None, owned: bool = False, cache_dir: Path | None = None,
        cache_disk: int | None = None, **split: Any,
    ) -> None:  # fmt: skip
        self.spec, self.draft, self._owned = spec, draft, owned
        self.file, self.kv_types = file, kv_types(kv_type)
        self.cache_rotation = cache_rotation
        architecture = registry.build(file)
        self.backend: Backend = open_backend(devices, file, threads, activations, **split)
        others = any(kind in self.backend.name for kind in _ASKED)
        if spec == "mtp" or (spec == "auto" and not others):
            architecture = _predicting(architecture, spec == "mtp")
        self._engine = Engine(
            file, self.backend, architecture, self.kv_types, context, sequences, progress,
            cache_rotation, prompt_cache, cache_bytes, cache_dir, cache_disk,
        )  # fmt: skip
        self._scheduler = Scheduler(self._engine)

    @property
    def context(self) -> int:
        """The most tokens a session can hold."""
        return self._engine.context

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self._engine.vocabulary

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
        return self._engine.graphs.graph(tokens, outputs)

    def session(self) -> Session:
        """An empty sequence."""
        with self._engine.alone():
            return Session(self, self._engine.empty())

    def _alone(self) -> Session:
        """An empty sequence that has nothing to do with the cache of prompts."""
        with self._engine.alone():
            return Session(self, self._engine.empty(), cached=False)

    def eval(self, ids: Iterable[int], logits: str = "all") -> np.ndarray:
        """Logits of a fresh sequence, float32 [len(ids), vocabulary]; no BOS is added."""
        with self._alone() as session:
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
        pieces = self._pieces(batch, logits)
        check_function("on_prompt", on_prompt, "(done, total)")
        return self._engine.run_all(pieces, on_prompt)

    def _pieces(self, batch: Any, logits: str) -> list[Piece]:
        """What a step is given; OptionError for what it cannot be."""
        if not isinstance(logits, str) or logits not in ("all", "last", "none"):
            raise wrong("logits", logits, "'all', 'last' or 'none'")
        if type(batch) is not list:
            batch = listed("batch", batch, "a list of (session, ids) pairs")
        found = []
        for entry in batch:
            try:
                session, ids = entry
            except (TypeError, ValueError):
                raise OptionError(
                    f"a step takes (session, ids) pairs, not {shown(entry)}"
                ) from None
            found.append(Piece(self._own(session)._sequence, token_ids(ids), logits))
        return found

    def _own(self, session: Any) -> Session:
        """A session of this model."""
        if not isinstance(session, Session):
            raise OptionError(
                f"a step takes sessions made by model.session(), not {shown(session)}"
            )
        if session.model is not self:
            raise OptionError("a session can only be evaluated by the model that made it")
        return session

    def perplexity(
        self, text: str | Iterable[int] | None = None, *, window: int | None = None,
        windows: int | None = None, kl_base: str | os.PathLike[str] | None = None,
        kl: str | os.PathLike[str] | None = None, on_window: OnWindow | None = None,
    ) -> Perplexity:  # fmt: skip
        """Perplexity of a text (or of ids) as llama-perplexity defines it, with its error.

        The text is cut into windows of `window` tokens (512), read each by itself, and scored on
        the second half of each; `windows`: the first so many, all by default or for -1. kl_base:
        write the log-probabilities to this file, in llama-perplexity's format. kl: compare with
        such a file of another model, on its text; `.kl` then holds the divergence. on_window:
        called with what is known after each window. `print` the result for a line of it.
        Raises OptionError for a text shorter than two windows and for a base of another
        vocabulary, text or window; FileError for one that is damaged or cannot be written.
        """
        from runtime.quality.perplexity import perplexity

        return perplexity(self, text, window, windows, kl_base, kl, on_window)

    def close(self) -> None:
        """End threads and give memory back; sessions of this model cannot be used afterwards."""
        self._scheduler.close("this model is closed; load it again")
        self._engine.close()
        if self._owned and self.draft is not None:
            self.draft.close()

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

    def memory(self) -> Memory:
        """Bytes of weights, of a page of KV cache and of a sequence's state, on this device."""
        return self._engine.memory

    def warmup(self, progress: bool | Progress = False) -> None:
        """Compile every kernel this model can need, so that no later step waits for one.

        progress: as for `load`. Kernels are kept on disk, for all models of the same types.
        """
        self._engine.programs.warmup(progress)
