"""What to say about a model's file that is not there: names that other programs download."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

NO_DOWNLOAD = "models are not downloaded here"

URL = re.compile(r"(https?|hf|ftp):/", re.IGNORECASE)  # a Path keeps one of the slashes
_REPOSITORY = re.compile(r"(?:(?:hf\.co|huggingface\.co)/)?([\w.-]+/[\w.-]+(?::[\w.-]+)?)")


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
    near = near_file(path)
    return "check the path" if near is None else f"did you mean {near}?"
