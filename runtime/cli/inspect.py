"""`runtime inspect`: what is in a model file, and the memory it needs."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

import click
import numpy as np

from runtime.cli import facts
from runtime.cli.output import bars, count, pairs, size, table
from runtime.memory.budget import Memory

_SHOWN = 70  # characters of a long value
_CONTEXTS = (2048, 8192, 32768, 131072)


@click.command(
    "inspect",
    epilog="""\b
Examples:
  runtime inspect model.gguf
  runtime inspect model.gguf -t "blk.0.*"       only these tensors
  runtime inspect model.gguf -c 16384           memory at this context
  runtime inspect model.gguf --json | jq .memory
""",
)
@click.argument("model", required=False, type=click.Path())
@click.option(
    "-t",
    "--tensors",
    metavar="PATTERN",
    help="Only the table of tensors whose name matches, such as 'blk.0.*' or 'attn_q'.",
)
@click.option(
    "-c",
    "--context",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="Context lengths to show memory for. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")  # fmt: skip
def command(
    model: str | None, tensors: str | None, context: tuple[int, ...], as_json: bool
) -> None:
    """Show a file's metadata, tensors, types and sizes, and the memory it needs.

    Nothing is loaded: also files of architectures that cannot be run are shown.
    """
    from runtime.gguf.reader import open_gguf

    if model is None:
        from runtime.model import demo_path

        model = str(demo_path())
    file = open_gguf(model)
    chosen = _matching(file, tensors)
    if as_json:
        click.echo(json.dumps(_as_json(file, chosen, context), indent=1, ensure_ascii=False))
    elif tensors is not None:
        click.echo(_tensor_table(chosen))
    else:
        click.echo("\n\n".join(_sections(file, chosen, context)))


def _matching(file: Any, pattern: str | None) -> list[Any]:
    found = list(file.tensors.values())
    if pattern is None:
        return found
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = [t for t in found if fnmatch.fnmatchcase(t.name, glob)]
    if not chosen:
        raise click.ClickException(f"no tensor of {file.path} matches {pattern!r}")
    return chosen


def _sections(file: Any, tensors: Sequence[Any], contexts: Sequence[int]) -> list[str]:
    summary = [
        ("model", facts.model_name(file)),
        ("type", facts.model_type(file)),
        ("file", f"{size(file.nbytes)}, GGUF version {file.version}"),
        ("weights", f"{count(facts.n_params(file))} in {len(file.tensors)} tensors, "
                    f"{size(file.tensors_nbytes)}, {_bits(file):.2f} bits each"),
    ]  # fmt: skip
    metadata = [(key, _shown(value)) for key, value in file.metadata.items()]
    parts = [
        str(file.path),
        pairs(summary),
        table(metadata, ("metadata", "value")),
    ]
    if file.tensors:
        parts += [
            _tensor_table(tensors),
            bars("bytes by type", facts.bytes_by(file, "type")),
            bars("bytes by role", facts.bytes_by(file, "role")),
        ]
    return [*parts, _memory_table(file, contexts)]


def _bits(file: Any) -> float:
    return 8 * file.tensors_nbytes / max(1, facts.n_params(file))


def _tensor_table(tensors: Sequence[Any]) -> str:
    rows = [
        (t.name, t.dtype.name, " x ".join(map(str, t.shape)) or "1", size(t.nbytes), str(t.offset))
        for t in tensors
    ]
    return table(rows, ("tensor", "type", "shape", "size", "offset"), right="size,offset")


def _needs(file: Any) -> tuple[dict[str, Memory], str]:
    """What the model needs by KV type, for those it can be run with, and why not with others."""
    from runtime.arguments import check_has_weights
    from runtime.errors import Error
    from runtime.ops.rounding import KV_TYPES

    found, reason = {}, ""
    for kind in KV_TYPES:
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
    trained = file.get(f"{file.get('general.architecture')}.context_length")
    if not contexts:
        most = trained if isinstance(trained, int) else _CONTEXTS[-1]
        contexts = sorted({*(n for n in _CONTEXTS if n < most), most})
    return [
        {"context": n, **{kind: memory.of(n) for kind, memory in needs.items()}} for n in contexts
    ]


def _memory_table(file: Any, contexts: Sequence[int]) -> str:
    needs, reason = _needs(file)
    if not needs:
        return f"memory: not known, because this file cannot be run\n{reason}"
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
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str | int | float | bool):
        return value
    return [_plain(v) for v in value]


def _as_json(file: Any, tensors: Sequence[Any], contexts: Sequence[int]) -> Mapping[str, Any]:
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
        "memory": _memory(file, contexts, _needs(file)[0]),
    }  # fmt: skip
