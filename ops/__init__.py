"""What a graph is made of: tensors, dtypes, ops and the walker. Imports numpy only.

Each op is an object: called with Tensors it adds a node, its `reference` computes with numpy.
"""

from collections.abc import Mapping

from runtime.ops.attention import PAGE, attention, kv_write
from runtime.ops.cost import Cost, Seen
from runtime.ops.delta import gated_delta, l2_norm, short_conv, softplus
from runtime.ops.dtypes import DTYPES, DType
from runtime.ops.elementwise import add, mul, row_scale, scale, sigmoid, silu, swiglu_oai
from runtime.ops.errors import OpError
from runtime.ops.graph import Graph, rewrite, walk
from runtime.ops.matmul import matmul, matmul_id
from runtime.ops.moe import expert_bias, expert_sum, normalize, softmax, take, top_k
from runtime.ops.norm import rms_norm
from runtime.ops.passes import select_early
from runtime.ops.registry import OPS, Arg, Case, Kind, Op, op
from runtime.ops.rope import rope, rope_angles, rope_components
from runtime.ops.rows import get_rows, select_rows
from runtime.ops.tensor import Dim, Layout, Tensor, constant, state, step_input, weight
from runtime.ops.views import broadcast, merge_heads, permute, reshape, slice_, split_heads

__all__ = [
    "DTYPES", "OPS", "PAGE", "Arg", "Case", "Cost", "DType", "Dim", "Graph", "Kind", "Layout", "Op",
    "Seen", "Tensor", "add", "attention", "broadcast", "constant", "expert_bias", "expert_sum",
    "gated_delta", "get_rows", "kv_write", "l2_norm", "matmul", "matmul_id", "merge_heads",
    "mul", "normalize", "op", "permute", "reshape", "rewrite", "rms_norm", "rope",
    "rope_angles", "rope_components", "row_scale", "scale", "select_early", "select_rows",
    "short_conv", "sigmoid", "silu", "slice_", "softmax", "softplus", "split_heads", "state",
    "step_input", "swiglu_oai", "take", "top_k", "walk", "weight",
]  # fmt: skip


def _check_exports(declared: Mapping[str, Op]) -> None:
    """OpError for an op that a file of this package declares and that cannot be reached here."""
    exported = [value for value in globals().values() if isinstance(value, Op)]
    for name, each in declared.items():
        if each not in exported:
            file = each.reference.__module__.rpartition(".")[2]
            raise OpError(f"op {name!r} of ops/{file}.py must be exported in ops/__init__.py")


_check_exports(OPS)
