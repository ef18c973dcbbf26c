"""What a graph is made of: tensors, dtypes, ops and the walker. Imports numpy only.

Each op is an object: called with Tensors it adds a node, its `reference` computes with numpy. Ops
are found here under the name of their reference, whichever file declares them.
"""

from typing import TYPE_CHECKING

from runtime.ops import delta, elementwise, moe, norm, rotation, rows, views  # noqa: F401  declare ops
from runtime.ops.attention import attention
from runtime.ops.cost import Cost, Seen
from runtime.ops.dtypes import DTYPES, DType
from runtime.ops.errors import OpError
from runtime.ops.graph import Graph, rewrite, walk
from runtime.ops.kv_formats import PAGE
from runtime.ops.matmul import matmul
from runtime.ops.passes import select_early
from runtime.ops.registry import OPS, Arg, Case, Kind, Op, op
from runtime.ops.rope import rope, rope_components
from runtime.ops.tensor import Dim, Layout, Tensor, constant, state, step_input, weight
from runtime.ops.views import merge_heads, split_heads

__all__ = [
    "DTYPES", "OPS", "PAGE", "Arg", "Case", "Cost", "DType", "Dim", "Graph", "Kind", "Layout", "Op",
    "OpError", "Seen", "Tensor", "attention", "constant", "matmul", "merge_heads", "op", "rewrite",
    "rope", "rope_components", "select_early", "split_heads", "state", "step_input", "walk",
    "weight",
]  # fmt: skip

globals().update({each.reference.__name__: each for each in OPS.values()})

if TYPE_CHECKING:  # what the line above adds

    def __getattr__(name: str) -> Op: ...
