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
    from runtime.errors import Error as Error
    from runtime.model import Model as Model
    from runtime.model import load as load
    from runtime.session import Session as Session
    from runtime.text.sampling import Sampling as Sampling
    from runtime.text.tokenizer import Tokenizer as Tokenizer

# name -> module that defines it; imported on first use so that `import runtime` stays cheap
_LAZY = {
    "load": "runtime.model",
    "Model": "runtime.model",
    "Session": "runtime.session",
    "Tokenizer": "runtime.text.tokenizer",
    "Sampling": "runtime.text.sampling",
    "Error": "runtime.errors",
}
__all__ = ["Error", "Model", "Sampling", "Session", "Tokenizer", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
