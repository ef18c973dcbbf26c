"""Run GGUF language models from Python: `runtime.load(path)` gives a model that generates text."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout `ops` and `backends` stand beside this folder; installed, they are inside it.
if not (Path(__file__).parent / "ops").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from runtime.conversion.convert import convert as convert
    from runtime.errors import BackendError as BackendError
    from runtime.errors import Error as Error
    from runtime.errors import FileError as FileError
    from runtime.errors import MemoryLimitError as MemoryLimitError
    from runtime.errors import ModelError as ModelError
    from runtime.errors import OpError as OpError
    from runtime.errors import OptionError as OptionError
    from runtime.errors import TextError as TextError
    from runtime.generation import Generation as Generation
    from runtime.model import Model as Model
    from runtime.model import load as load
    from runtime.quantise.quantize import quantize as quantize
    from runtime.requests import Request as Request
    from runtime.session import Session as Session
    from runtime.session import Snapshot as Snapshot
    from runtime.text.sampling import Sampling as Sampling
    from runtime.text.sampling import Token as Token
    from runtime.text.tokenizer import Tokenizer as Tokenizer

# module -> names of it that users need; imported on first use so that `import runtime` stays cheap
_NAMES = {
    "runtime.conversion.convert": ("convert",),
    "runtime.errors": (
        *("BackendError", "Error", "FileError", "MemoryLimitError", "ModelError", "OpError"),
        *("OptionError", "TextError"),
    ),
    "runtime.generation": ("Generation",),
    "runtime.model": ("Model", "load"),
    "runtime.quantise.quantize": ("quantize",),
    "runtime.requests": ("Request",),
    "runtime.session": ("Session", "Snapshot"),
    "runtime.text.sampling": ("Sampling", "Token"),
    "runtime.text.tokenizer": ("Tokenizer",),
}
_LAZY = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [
    *("BackendError", "Error", "FileError", "Generation", "MemoryLimitError", "Model"),
    *("ModelError", "OpError", "OptionError", "Request", "Sampling", "Session", "Snapshot"),
    *("TextError", "Token", "Tokenizer", "__version__", "convert", "load", "quantize"),
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
