"""`runtime inspect`: what is in a model file, and the memory it needs."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.cli.model_path import model_argument, model_option
from runtime.cli.output import bars, pairs, size, table
from runtime.cli.parsing import Command, option

if TYPE_CHECKING:
    from runtime.memory.budget import Memory

_SHOWN = 70  # characters of a long value


@click.command(
    "inspect",
    cls=Command,
    epilog="""\b
Examples:
  runtime inspect model.gguf
  runtime inspect model.gguf -t                 the table of tensors
  runtime inspect model.gguf -t "blk.0.*"       only these
  runtime inspect model.gguf -c 16384           memory at this context
  runtime inspect model.gguf -o json | jq .memory
""",
)
@click.argument("model", required=False)
@option("-t --tensors", "The table of tensors; with PATTERN those that match, such as 'blk.0.*' or "
        "'attn_q'.", "Options", bare="*", metavar="[PATTERN]")  # fmt: skip
@option("-c --context | --ctx-size", "Context lengths to show memory for. May be repeated.",
        "Options", type=click.IntRange(1), multiple=True, metavar="N")  # fmt: skip
@option("-o --output", "text or json, which has everything.", "Options", default="text",
        type=click.Choice(["text", "json"]), metavar="FORMAT")  # fmt: skip
@option("--json as_json", "As -o json.", "Options", is_flag=True)
@model_option
def command(
    model: str | None, model_option: str | None, tensors: str | None, context: tuple[int, ...],
    output: str, as_json: bool,
) -> None:  # fmt: skip
    """Show what a file is, whether it runs here and how fast, the memory it needs, its metadata.

    Nothing is loaded: also files of architectures that cannot be run are shown.
    """
    from runtime.gguf.reader import open_gguf

    if model is None and model_option is None and tensors and Path(tensors).is_file():
        model, tensors = tensors, "*"  # -t FILE
    path = model_argument(model, model_option)
    if path is None:
        from runtime.model import demo_path

        path = str(demo_path())
    file = open_gguf(path)
    chosen = _matching(file, tensors)
    if as_json or output == "json":
        click.echo(json.dumps(_as_json(file, chosen, context), indent=1, ensure_ascii=False))
    elif tensors is not None:
        click.echo(_tensor_table(chosen))
    else:
        click.echo("\n\n".join(_sections(file, context)))


def _matching(file: Any, pattern: str | None) -> list[Any]:
    found = list(file.tensors.values())
    if pattern is None:
        return found
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = [t for t in found if fnmatch.fnmatchcase(t.name, glob)]
    if not chosen:
        raise click.ClickException(f"no tensor of {file.path} matches {pattern!r}")
    return chosen


def _sections(file: Any, contexts: Sequence[int]) -> list[str]:
    from runtime.cli import facts, summary

    needs, reason = _needs(file)
    parts = [str(file.path), pairs(summary.rows(file, needs, reason))]
    if needs:
        parts.append(_memory_table(file, contexts, needs))
    if file.tensors:
        parts += [
            bars("bytes by type", facts.bytes_by(file, "type")),
            bars("bytes by role", facts.bytes_by(file, "role")),
        ]
    metadata = [(key, _shown(value)) for key, value in file.metadata.items()]
    header = (f"metadata (GGUF version {file.version})", "value")
    return [*parts, table(metadata, header)]


def _tensor_table(tensors: Sequence[Any]) -> str:
    rows = [
        (t.name, t.dtype.name, " x ".join(map(str, t.shape)) or "1", size(t.nbytes), str(t.offset))
        for t in tensors
    ]
    return table(rows, ("tensor", "type", "shape", "size", "offset"), right="size,offset")


def _needs(file: Any) -> tuple[dict[str, Memory], str]:
    """What the model needs by KV type, for those it can be run with, and why not with others."""
    from runtime.arguments import check_has_weights
    from runtime.cli import facts
    from runtime.errors import Error
    from runtime.ops.kv_formats import KV_FORMATS

    found, reason = {}, ""
    for kind in KV_FORMATS:
        try:
            check_has_weights(file)
            found[kind] = facts.memory(file, kind)
        except Error as error:
            reason = str(error)
    return found, reason


def _memory(
    file: Any, contexts: Sequence[int], needs: Mapping[str, Memory]
) -> list[dict[str, int]]:
    """Bytes of weights, KV cache and recurrent state at each context, by KV type."""
    from runtime.cli import summary

    lengths = contexts or summary.contexts(file)
    return [
        {"context": n, **{kind: memory.of(n) for kind, memory in needs.items()}} for n in lengths
    ]


def _memory_table(file: Any, contexts: Sequence[int], needs: Mapping[str, Memory]) -> str:
    header = ("context", *(f"KV {kind}" for kind in needs))
    rows = _memory(file, contexts, needs)
    lines = [(str(row["context"]), *(size(row[kind]) for kind in needs)) for row in rows]
    text = table(lines, header, right=",".join(header))
    state = next(iter(needs.values())).state
    part = f", {size(state)} of it recurrent state" if state else ""
    return f"memory for the weights and one sequence of that length{part}\n{text}"


def _shown(value: Any) -> str:
    """A metadata value on one line."""
    if isinstance(value, str):
        text = value.replace("\n", "\\n")
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(value)} characters)"
    if hasattr(value, "__len__"):
        first = ", ".join(repr(v) for v in _plain(value[:4]))
        return f"[{first}{', …' if len(value) > 4 else ''}] ({len(value)})"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Numbers and lists as JSON knows them."""
    import numpy as np

    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str | int | float | bool):
        return value
    return [_plain(v) for v in value]


def _as_json(file: Any, tensors: Sequence[Any], contexts: Sequence[int]) -> Mapping[str, Any]:
    from runtime.cli import facts, summary

    needs, reason = _needs(file)
    found = summary.fit(file, needs.get("f16"), reason)
    return {
        "path": str(file.path),
        "version": file.version,
        "file_size": file.nbytes,
        "model": facts.model_name(file),
        "model_type": facts.model_type(file),
        "n_params": facts.n_params(file),
        "model_size": file.tensors_nbytes,
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "tensors": [
            {"name": t.name, "type": t.dtype.name, "shape": list(t.shape), "nbytes": t.nbytes,
             "offset": t.offset}
            for t in tensors
        ],
        "bytes_by_type": facts.bytes_by(file, "type"),
        "bytes_by_role": facts.bytes_by(file, "role"),
        "memory": _memory(file, contexts, needs),
        "context_length": summary.trained_context(file),
        "chat_template": facts.has_chat_template(file),
        "tools": summary.has_tools(file),
        "runs": found.context > 0,
        "reason": found.reason,
        "context_that_fits": found.context,
        "memory_available": found.free,
        "token_nbytes": found.token_nbytes,
        "read_bandwidth": found.bandwidth,
        "tokens_per_s": found.tokens_per_s,
    }  # fmt: skip
