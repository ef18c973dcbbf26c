"""What a user wants to know of a model file first: what it is, and whether it will run here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.cli import facts
from runtime.cli.output import count, note, size
from runtime.memory.budget import Memory

CONTEXTS = (4096, 32768)  # tokens that memory is shown for, beside the trained length
_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class Fit:
    """Whether a model runs on this machine, with an f16 cache.

    context: tokens that fit, 0 where it cannot run; reason: why not, or why not with all.
    free: bytes of memory, None where the system does not say. tokens_per_s: what memory
    bandwidth allows with `at` tokens in the cache, None where it is not known; bandwidth: in
    bytes per second.
    """

    context: int
    reason: str = ""
    free: int | None = None
    token_nbytes: float | None = None
    at: int = 0
    bandwidth: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second that reading memory allows."""
        if not self.bandwidth or not self.token_nbytes:
            return None
        return self.bandwidth / self.token_nbytes


def trained_context(file: Any) -> int | None:
    """Tokens of context that the model was trained for, by the file."""
    found = file.get(f"{file.get('general.architecture')}.context_length")
    return found if isinstance(found, int) and found > 0 else None


def contexts(file: Any) -> list[int]:
    """Lengths that memory is shown for: 4k, 32k and what the model was trained for."""
    most = trained_context(file) or CONTEXTS[-1]
    return sorted({*(n for n in CONTEXTS if n < most), most})


def has_tools(file: Any) -> bool:
    """Whether the chat template knows tools."""
    return any(
        key.endswith(".tool_use") or (isinstance(value, str) and _TOOLS.search(value))
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.chat_template")
    )


def fit(file: Any, need: Memory | None, reason: str) -> Fit:
    """Whether the model runs here; `need` is None, for a `reason`, where it runs nowhere."""
    from runtime.errors import MemoryLimitError
    from runtime.memory.budget import available_memory, choose

    if need is None:
        return Fit(0, reason)
    free = available_memory()
    trained = trained_context(file) or CONTEXTS[-1]
    try:
        context = choose(None, trained, 1, need.page, need.weights, need.state).context
    except MemoryLimitError as error:
        return Fit(0, str(error), free)
    reason = "" if context >= trained else f"memory is left for {context} of {trained} tokens"
    at = min(context, CONTEXTS[0])
    nbytes = _token_nbytes(file, at)
    return Fit(context, reason, free, nbytes, at, _bandwidth() if nbytes else None)


def _token_nbytes(file: Any, context: int) -> float | None:
    from runtime import traffic
    from runtime.errors import Error

    try:
        return traffic.of_file(file, ("f16", "f16"), context).nbytes
    except Error:
        return None


def _bandwidth() -> float | None:
    """The remembered bandwidth of memory, else one that is measured now."""
    from runtime.backends.cpu.run.cores import physical_cores
    from runtime.cli.bandwidth import measured, remembered
    from runtime.errors import Error

    threads = physical_cores()
    known = remembered(threads)
    if known is not None:
        return known
    note("measuring memory bandwidth, once a day ...")
    try:
        return measured(threads)
    except Error:
        return None


def rows(file: Any, needs: dict[str, Memory], reason: str) -> list[tuple[str, str]]:
    """The summary, as pairs of a name and what it is."""
    need = needs.get("f16")
    found = fit(file, need, reason)
    trained = trained_context(file)
    return [
        ("model", facts.model_name(file)),
        ("architecture", _architecture(file)),
        ("parameters", count(facts.n_params(file))),
        ("size", f"{size(file.tensors_nbytes)} in {len(file.tensors)} tensors"),
        ("type", f"{facts.type_name(file)}, {_bits(file):.2f} bits a weight"),
        ("context", f"{trained} tokens" if trained else "not known"),
        ("chat", _chat(file)),
        ("runs here", _runs(found)),
        *([("memory", _memory(need, contexts(file)))] if need is not None else []),
        *([("speed", _speed(found))] if found.tokens_per_s else []),
        *([("drafts", drafts)] if (drafts := _drafts(file)) else []),
    ]  # fmt: skip


def _drafts(file: Any) -> str:
    """What the block that predicts further tokens costs, or why it is not used; "": none is."""
    from runtime.errors import Error
    from runtime.models.registry import build, further_blocks, predicting
    from runtime.ops import PAGE

    try:
        model = build(file)
        if not further_blocks(model):
            return ""
        predicting(model)
    except Error as error:
        return f"not used: {error}"
    behind = tuple(
        f"blk.{n}." for n in range(model.p.layers, model.p.layers + further_blocks(model))
    )
    weights = sum(t.nbytes for name, t in file.tensors.items() if name.startswith(behind))
    heads = model.p.attention
    token = 2 * heads.kv_heads * (heads.dim + heads.v_dim)
    return (
        f"of its own (NextN, --spec mtp): {size(weights)} of the weights, and of an f16 cache "
        f"{size(token * PAGE)} in {PAGE} tokens"
    )


def _architecture(file: Any) -> str:
    """The architecture's name and its main sizes."""
    name = file.get("general.architecture", "?")
    known = (("block_count", "layers"), ("embedding_length", "wide"), ("expert_count", "experts"))
    sizes = [(file.get(f"{name}.{key}"), word) for key, word in known]
    return ", ".join([str(name), *(f"{n} {word}" for n, word in sizes if isinstance(n, int) and n)])


def _bits(file: Any) -> float:
    return 8 * file.tensors_nbytes / max(1, facts.n_params(file))


def _chat(file: Any) -> str:
    if not facts.has_chat_template(file):
        return "no template: 'run' continues texts, 'chat' uses ChatML"
    return "template, with tools" if has_tools(file) else "template, without tools"


def _runs(found: Fit) -> str:
    free = "" if found.free is None else f"{size(found.free)} of memory is free"
    if not found.context:
        return f"no: {found.reason}"
    return "yes" + "".join(f"; {text}" for text in (free, found.reason) if text)


def _memory(need: Memory, lengths: Sequence[int]) -> str:
    return ", ".join(f"{size(need.of(n))} at {n} tokens" for n in lengths)


def _speed(found: Fit) -> str:
    speed, nbytes, bandwidth = found.tokens_per_s, found.token_nbytes, found.bandwidth
    assert speed and nbytes and bandwidth, "asked for only where it is known"
    rounded = f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"
    return (
        f"up to {rounded} tokens/s: {size(nbytes)} a token at {found.at} tokens, memory gives "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
