"""Reading and writing GGUF files."""

from runtime.ops.codebooks import set_codebooks

from .codebooks import codebook
from .reader import GGUFFile, GGUFTensor, open_gguf
from .strings import StringArray

__all__ = ["GGUFFile", "GGUFTensor", "StringArray", "open_gguf"]

set_codebooks(codebook)
