"""What to say about a model's file that is not there: names that other programs download."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path

NO_DOWNLOAD = "models are not downloaded here"

URL = re.compile(r"(https?|hf|ftp):/", re.IGNORECASE)  # a Path keeps one of the slashes
_REPOSITORY = re.compile(r"(?:(?:hf\.co|huggingface\.co)/)?([\w.-]+/[\w.-]+(?::[\w.-]+)?)")

_TAG = re.compile(r"([\w.-]{2,}(?:/[\w.-]+)?):([\w.-]+)")


def fetch(name: str) -> str:
    """How to get a model of Hugging Face's hub, "organisation/name" or "organisation/name:type"."""
    repository, _, kind = name.partition(":")
    only = f" --include '*{kind}*.gguf'" if kind else ""
    return (
        f'{NO_DOWNLOAD}: get the file with "hf download {repository}{only} --local-dir ." '
        "(pip install huggingface_hub), then give its path"
    )


def is_path(text: str) -> bool:
    """Whether a text can be nothing but a path."""
    return text.startswith((".", "~", os.sep)) or text.endswith(".gguf") or "\\" in text


def repository(text: str) -> str | None:
    """The repository of Hugging Face's hub that a name stands for; None for a path."""
    found = None if is_path(text) else _REPOSITORY.fullmatch(text)
    return found[1] if found and not Path(text).parent.is_dir() else None


def tagged(text: str) -> str | None:
    """What to do about a name with a tag, as Ollama has them; None for another text."""
    tag = None if is_path(text) else _TAG.fullmatch(text)
    return of_ollama(*tag.groups()) if tag else None


def of_ollama(name: str, tag: str) -> str:
    """What to do about a name of Ollama's, or one that may be."""
    text = name if tag == "latest" else f"{name}:{tag}"
    held = _held_by_ollama(name, tag)
    if held is not None:
        return f"{text} is a name of Ollama's; its file is here: {held}"
    what = "no file here" if tag == "latest" else "a name of Ollama's"
    return f"{text} is {what}, and {NO_DOWNLOAD}: give the path of a .gguf file"


def _held_by_ollama(name: str, tag: str) -> Path | None:
    """Where Ollama keeps the weights of a model that it has fetched."""
    root = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    name = name if "/" in name else f"library/{name}"
    try:
        manifest = json.loads((root / "manifests" / "registry.ollama.ai" / name / tag).read_text())
        layers = {x["mediaType"].rpartition(".")[2]: x["digest"] for x in manifest["layers"]}
        path = root / "blobs" / layers["model"].replace(":", "-")
        return path if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None


def near_file(path: Path) -> Path | None:
    """A .gguf file beside `path` of nearly its name."""
    try:
        names = [file.name for file in path.parent.glob("*.gguf")]
    except (OSError, ValueError):
        return None
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    found = found or [name for name in names if name == f"{path.name}.gguf"]
    return path.parent / found[0] if found else None


def advice(path: Path) -> str:
    """What to do about a path at which there is no file."""
    text = str(path)
    if URL.match(text):
        return f"{NO_DOWNLOAD}: fetch the file first, then give its path"
    if text.startswith("~"):
        return "'~' is taken as it is: give Path(...).expanduser()"
    hub = repository(text)
    if hub is not None:
        return fetch(hub)
    if (said := tagged(text)) is not None:
        return said
    near = near_file(path)
    return "check the path" if near is None else f"did you mean {near}?"
