"""A model of its metadata alone: what its builder asks for, in the place of an open file.

The values are GGUF's metadata keys with their values (nested tables are joined with dots), and
beside them

    weights   the type of the weights: "Q4_K_M", "Q8_0", ... (see runtime/quantise/mixes.py)
    tensors   patterns of the tensors that such a file may have or not, and has: "output.weight"

`<architecture>.vocab_size` says the rows of the embedding. Which tensors there are, and of what
shapes, is what the model's builder asks for.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.errors import FileError, ModelError
from runtime.gguf.reader import GGUFFile
from runtime.models.keys import Keys
from runtime.models.registry import one_token, reader
from runtime.models.weights import Weights
from runtime.ops.dtypes import F32, DType, nbytes_for
from runtime.quantise.choose import choose
from runtime.quantise.mixes import Facts

FOLDER = Path(__file__).parent.parent / "data" / "hparams"
_VERSION = 3  # of GGUF
_CONFIG = ("architectures", "model_type")  # keys of Hugging Face's config.json


class OutlinedTensor(NamedTuple):
    """A tensor that no file holds."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes it would take in a file."""
        return nbytes_for(self.dtype, self.shape)

    def to_float32(self) -> np.ndarray:
        """Ones, float32 of `shape`: what its numbers are nobody knows."""
        return np.ones(self.shape, np.float32)

    def read(self, *_: Any) -> np.ndarray:
        """FileError: there is nothing to read."""
        raise FileError(f"tensor {self.name!r} has no numbers: the model is its metadata alone")


@dataclass(frozen=True)
class _Asked(Weights):
    """Weights that are there once they are asked for; whether, `names` and `patterns` say."""

    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        known = name in self.tensors or name in self.names
        return known or any(fnmatchcase(name, p) for p in self.patterns)

    def __call__(self, name: str, *shape: int) -> Any:
        assert isinstance(self.tensors, dict), "made below"
        self.tensors.setdefault(name, OutlinedTensor(name, shape, F32))
        return super().__call__(name, *shape)


def known() -> dict[str, Path]:
    """The models whose metadata comes along, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def find(text: str) -> tuple[Path, str | None] | None:
    """The metadata that comes along for "qwen3.5-27b", "Qwen3.5-27B.gguf", "...-Q8_0.gguf".

    With the type of weights where the name has one; None for another name.
    """
    name = Path(text).name.lower().removesuffix(".gguf")
    for stem, path in known().items():
        rest = name.removeprefix(stem)
        if rest != name and rest[:1] in ("", "-", "."):
            return path, rest[1:] or None
    return None


def read(path: Path, weights: str | None = None) -> GGUFFile:
    """The model of a .json or .toml file, of the type of weights given or else its own.

    FileError for a file that cannot be read or has other keys, ModelError for metadata of no model.
    """
    kind = path.suffix.lower()
    if kind not in (".json", ".toml"):
        raise FileError(f"{path}: metadata alone is a .json or .toml file")
    try:
        load = tomllib.loads if kind == ".toml" else json.loads
        values = load(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FileError(f"{path}: cannot be read as metadata: {error}") from None
    if not isinstance(values, dict):
        raise FileError(f"{path}: metadata is a table of keys and values")
    flat = _flat(values.get("metadata", values))
    if "general.architecture" not in flat:
        config = "" if flat.keys().isdisjoint(_CONFIG) else "a config.json of Hugging Face: "
        raise FileError(
            f"{path}: {config}metadata key general.architecture is missing; add GGUF's keys, such "
            "as general.architecture, llama.block_count and llama.vocab_size"
        )
    own, optional = flat.pop("weights", "Q4_K_M"), flat.pop("tensors", [])
    return outline(path, flat, str(weights or own), tuple(map(str, optional)))


def of_file(file: GGUFFile, weights: str | None = None) -> GGUFFile:
    """An open file's model with weights of another type, or the metadata of a file of that alone.

    ModelError where the metadata does not tell the vocabulary.
    """
    metadata, table = dict(file.metadata), file.tensors.get("token_embd.weight")
    if table is not None:
        metadata.setdefault(f"{file.architecture}.vocab_size", int(table.shape[0]))
    return outline(file.path, metadata, weights or "Q4_K_M", tuple(file.tensors))


def outline(
    path: Path, metadata: Mapping[str, Any], weights: str, optional: tuple[str, ...] = ()
) -> GGUFFile:
    """The file that such metadata, and such a type of weights, would be of."""
    name, source = str(metadata.get("general.architecture")), str(path)
    patterns = tuple(text for text in optional if set(text) & set("*?["))
    names = frozenset(optional) - {*patterns}  # a file has hundreds
    keys, asked = Keys(metadata, name, source), _Asked({}, source, names=names, patterns=patterns)
    words = metadata.get("tokenizer.ggml.tokens", ())
    model = reader(name, source)(keys, asked, keys.count("vocab_size", len(words) or None))
    model.graph(one_token(model))
    stored = {n: OutlinedTensor(n, _stored(t.shape), F32) for n, t in asked.tensors.items()}
    chosen = {c.name: c.dtype for c in choose(stored, weights, Facts.of(metadata), plain=True)}
    try:
        tensors = {n: t._replace(dtype=chosen[n]) for n, t in stored.items()}
        nbytes = sum(t.nbytes for t in tensors.values())
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from None
    return GGUFFile(path, _VERSION, {**metadata, "weights": weights}, tensors, nbytes)  # type: ignore[arg-type]


def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix of one row is a vector in files."""
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
