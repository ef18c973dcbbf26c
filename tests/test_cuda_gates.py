"""What every CUDA kernel must compile to, for the oldest target and for Hopper; needs no GPU.

Double precision is refused when a kernel is compiled; here: no spills, registers within the
family's budget, the instructions that the kernel exists for, and short inner loops.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.backends.cuda import report, sass
from runtime.backends.cuda.catalogue import KERNELS as CATALOGUE
from runtime.backends.cuda.catalogue import Compiled, head
from runtime.backends.cuda.library import Library
from runtime.backends.cuda.targets import TARGETS
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

if not (sys.platform == "linux" and platform.machine() == "x86_64"):
    pytest.skip("CUDA kernels are compiled on Linux x86-64", allow_module_level=True)
if importlib.util.find_spec("numba_cuda") is None or sass.find_disassembler() is None:
    pytest.skip("the extra 'cuda' is not installed", allow_module_level=True)

GATED = ("sm_80", "sm_90a")
ROOT = Path(__file__).resolve().parents[1]
# "target format columns" -> instructions of the inner loop for each dp4a, as nvcc 13.0 makes them
# of the same loop in CUDA C (scripts/gate_nvcc.py): ours are no more
LOOPS = report.nvcc_loops()
FAST = ("Q8_0", "Q4_0", "Q4_K", "Q6_K")
SOME = {
    "tile": ("format=Q8_0-width=32", "format=Q4_K-width=128", "format=Q2_K-width=128"),
    "expert_pair": ("format=Q4_K",),
    "expert_total": ("format=Q6_K",),
    "tile_half": ("format=F16-width=128", "format=BF16-width=128"),
    "tile_float": ("width=128",),
    "matvec_half": ("format=F16-gated=False", "format=BF16-gated=True"),
    "expert_rows_half": ("format=F16",),
}
# format -> instructions of the inner loop for each mma of 32 products, at most (128 columns)
PER_MMA = {"Q4_K": 24, "Q2_K": 55}
PER_HALF_MMA = {"F16": 6, "BF16": 4.2}  # all there is of a stage, splitting of columns too
EVERY = os.environ.get("CUDA_GATES") == "all"


def _gated(kernel: Kernel) -> bool:
    """Products differ by format in their inner loop alone: of the rarer ones, one width.

    Of tiles and of products with experts some formats.
    """
    constants = dict(kernel.constants)
    if kernel.name in SOME:
        return EVERY or str(kernel).removeprefix(f"{kernel.name}-") in SOME[kernel.name]
    widths = (1, 2, 4, 8) if constants.get("format") in FAST else (1,)
    product = kernel.name in ("matvec", "matvec_float")
    return EVERY or not product or constants["columns"] in widths


KERNELS = [kernel for kernel in CATALOGUE.every() if _gated(kernel)]
# kernel -> (registers at most, opcodes that must be there, opcodes that must not)
EXPECTED: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "attention": (232, ("LDG.E.128", "HMMA.16816.F32", "MUFU.EX2", "LDS.128", "ATOMG"), ()),
    "binary": (24, ("LDG.E",), ()),
    "copy": (24, ("LDG.E",), ()),
    "copy_rows": (24, ("LDG.E",), ()),
    "delta_layer": (144, ("LDS.128", "LDGSTS", "FFMA", "MUFU.RSQ", "SHFL", "ATOMG"), ()),
    "expert_bias": (24, ("LDG.E",), ()),
    "expert_group": (48, ("LDG.E", "REDUX", "STG.E.128"), ()),
    "expert_pair": (128, ("LDG.E.128.CONSTANT", "IDP.4A", "MUFU.EX2", "SHFL"), ()),
    "expert_rows_float": (96, ("LDG.E.128.CONSTANT", "FFMA"), ()),
    "expert_rows_half": (112, ("LDG.E.128.CONSTANT", "HMMA.16816.F32", "STS.128"), ()),
    "expert_sum": (88, ("LDG.E", "FFMA", "MUFU.EX2"), ()),
    "expert_total": (128, ("LDG.E.128.CONSTANT", "IDP.4A", "FFMA"), ()),
    "gather_rows": (24, ("LDG.E",), ()),
    "gated_delta": (232, ("LDS.128", "FFMA", "MUFU.EX2", "SHFL"), ()),
    "get_rows": (40, ("LDG.E",), ()),
    "hadamard": (40, ("LDG.E", "SHFL.BFLY"), ()),
    "kv_write": (80, ("STG.E.U16", "STG.E.U8", "SHFL.BFLY", "VOTE"), ()),
    "norm": (88, ("LDG.E", "MUFU.RSQ", "SHFL"), ()),
    "norm_gate": (88, ("LDG.E.128", "MUFU.EX2", "MUFU.RCP", "MUFU.RSQ"), ()),
    "normalize": (40, ("LDG.E", "SHFL"), ()),
    "matvec": (255, ("LDG.E.128.CONSTANT", "LDG.E.128", "IDP.4A", "LDS.128"), ()),
    "matvec_float": (152, ("LDG.E.128.CONSTANT", "LDG.E.128", "FFMA", "LDS.128"), ()),
    "matvec_half": (128, ("LDG.E.128.CONSTANT", "LDG.E.128", "HMMA.16816.F32", "STS.128"), ()),
    "put_stretch": (24, ("LDG.E", "STG.E"), ()),
    "qkv_post": (112, ("LDG.E", "MUFU.RSQ", "STG.E.U16", "STG.E.U8", "VOTE"), ()),
    "quantize": (32, ("LDG.E.128", "F2I", "SHFL"), ()),
    "renumber": (24, ("LDG.E",), ()),
    "peak_copy": (40, ("LDG.E.128", "STG.E.128"), ()),
    "peak_mma": (64, (), ("LDL",)),
    "repack": (128, ("LDG.E.128.CONSTANT", "LDG.E", "STG.E"), ()),
    "rms_norm_packed": (88, ("LDG.E.128", "MUFU.RSQ", "SHFL"), ()),
    "router": (160, ("REDUX.MAX", "REDUX.MIN", "MUFU.EX2"), ()),
    "router_linear": (160, ("CCTL.E.PF2", "LDG.E.128.CONSTANT", "REDUX.MAX", "ATOMG", "FFMA"), ()),
    "rope": (40, ("LDG.E.64", "FFMA"), ("MUFU",)),
    "rope_angles": (32, ("LDG.E.64", "FFMA"), ("MUFU",)),
    "sample_merge": (64, ("REDUX.MAX", "REDUX.MIN", "LDS", "MUFU.EX2"), ()),
    "sample_parts": (160, ("LDG.E", "REDUX.MAX", "REDUX.MIN"), ()),
    "short_conv": (144, ("LDG.E", "FFMA", "MUFU.RSQ"), ()),
    "sigmoid_gate": (48, ("LDG.E.128", "MUFU.EX2", "MUFU.RCP"), ()),
    "softmax": (40, ("LDG.E", "SHFL", "MUFU.EX2"), ()),
    "take": (24, ("LDG.E",), ()),
    "tile": (255, ("LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "IMMA.168", "LDG.E"), ()),
    "tile_float": (255, ("LDGSTS.E.BYPASS.128", "LDS.128", "FFMA"), ("HMMA",)),
    "tile_half": (255, ("LDGSTS.E.BYPASS.128", "LDS.128", "HMMA.16816.F32", "STS.128"), ()),
    "sum_parts": (48, ("LDG.E.128", "STG.E.128", "FADD"), ("FFMA",)),
    "swiglu": (40, ("LDG.E.128", "MUFU.EX2", "MUFU.RCP"), ()),
    "top_k": (40, ("LDG.E", "REDUX"), ("SHFL",)),
    "unary": (40, ("LDG.E",), ()),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def compiled(cache: Path) -> dict[str, Library]:
    """Every kernel for every gated target."""
    libraries = {}
    for target in GATED:
        start = time.perf_counter()
        libraries[target] = Library(target, cache)
        libraries[target].prepare(KERNELS)
        print(f"{len(KERNELS)} kernels for {target}: {time.perf_counter() - start:.1f} s")
    return libraries


@pytest.mark.parametrize("target", GATED)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernel_compiles_well(compiled: dict[str, Library], kernel: Kernel, target: str):
    found = compiled[target].get(kernel)
    registers, wanted, unwanted = EXPECTED[kernel.name]
    assert found.spilled == 0 and found.stack == 0
    assert found.registers <= registers
    assert found.registers * found.entry.threads * max(found.entry.min_blocks, 1) <= 65536
    instructions = sass.disassemble(found.code)
    missing = [name for name in wanted if not sass.count(instructions, name)]
    assert not missing, f"no {missing}"
    assert not sass.count(instructions, "LDL", "STL", "DADD", "DMUL", "DFMA", "F2F.F64", *unwanted)


@pytest.mark.parametrize("target", GATED)
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.name == "matvec"], ids=str)
def test_inner_loop_is_no_longer_than_nvccs(compiled, kernel: Kernel, target: str):
    constants = dict(kernel.constants)
    case = f"{target} {constants['format']} {constants['columns']}"
    assert _inner_loop(compiled[target].get(kernel)).per("IDP.4A") <= LOOPS[case]


@pytest.mark.parametrize("target", GATED)
@pytest.mark.parametrize(("name", "format"), [("expert_pair", "Q4_K"), ("expert_total", "Q6_K")])
def test_inner_loop_of_experts_is_short(compiled, name: str, format: str, target: str):
    found = compiled[target].get(Kernel.of(name, format=format))
    assert _inner_loop(found).per("IDP.4A") <= LOOPS[f"{target} {format} 1"]


@pytest.mark.parametrize("target", GATED)
@pytest.mark.parametrize("format", PER_MMA)
def test_tile_keeps_the_tensor_cores_busy(compiled, format: str, target: str):
    """Scales cost 8 fma of each mma's results, minima 4 more; little may come on top."""
    found = compiled[target].get(Kernel.of("tile", format=format, width=128))
    loops = [x for x in sass.loops(sass.disassemble(found.code)) if x.count("IMMA")]
    inner = min(loops, key=lambda x: x.per("IMMA"))
    halves = inner.count("IMMA.16816")
    assert inner.per("IMMA") * (2 if halves else 1) <= PER_MMA[format]


@pytest.mark.parametrize("target", GATED)
@pytest.mark.parametrize("format", PER_HALF_MMA)
def test_tile_of_halves_keeps_the_tensor_cores_busy(compiled, format: str, target: str):
    found = compiled[target].get(Kernel.of("tile_half", format=format, width=128))
    (stage,) = (x for x in sass.loops(sass.disassemble(found.code)) if x.count("HMMA"))
    assert stage.per("HMMA") <= PER_HALF_MMA[format]


def _inner_loop(found: Compiled) -> sass.Loop:
    loops = [loop for loop in sass.loops(sass.disassemble(found.code)) if loop.count("IDP.4A")]
    assert loops, "no loop with dp4a"
    return max(loops, key=lambda loop: loop.count("IDP.4A"))


def test_the_report_has_a_line_for_each_kernel(compiled):
    lines = report.table(compiled["sm_90a"], KERNELS)[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [str(k) for k in KERNELS]
    assert all(line.count("|") == 12 for line in lines)


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in GATED])
def test_other_targets_compile(target: str):
    from runtime.backends.cuda.compile import compile_kernel

    found = compile_kernel(Kernel.of("matvec", format="Q4_0", columns=1), target)
    assert found.spilled == 0 and found.code[:4] == b"\x7fELF"


def test_the_cache_is_read_without_the_toolchain(compiled: dict[str, Library], cache: Path):
    """Everything for a target in well under a second, importing neither numba nor numba_cuda."""
    code = (
        "import sys, time; from pathlib import Path; "
        "from runtime.backends.cuda.library import Library; "
        "from runtime.backends.cuda.catalogue import KERNELS; start = time.perf_counter(); "
        f"library = Library('sm_90a', Path({str(cache)!r})); "
        f"assert len(library.missing(KERNELS.every())) == {len(CATALOGUE.every()) - len(KERNELS)}; "
        "print(time.perf_counter() - start, "
        "[m for m in ('numba', 'numba_cuda', 'llvmlite', 'cuda') if m in sys.modules])"
    )
    runs = [
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) for _ in range(3)
    ]
    assert all(run.split(" ", 1)[1].strip() == "[]" for run in runs)
    assert min(float(run.split()[0]) for run in runs) < 0.3


def test_any_toolchains_entries_serve_where_there_is_none(
    compiled: dict[str, Library], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("runtime.backends.cuda.library.toolchain_digest", lambda: "")
    assert Library("sm_90a", cache).get(KERNELS[0]).code == compiled["sm_90a"].get(KERNELS[0]).code


def test_without_the_toolchain_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"graph-runtime\[cuda\]"):
        Library("sm_90a", None).get(KERNELS[0])


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_entry_is_compiled_again(
    compiled, tmp_path: Path, damage: bytes | None, monkeypatch: pytest.MonkeyPatch
):
    kernel = Kernel.of("swiglu", packed=False, clamp=False)
    found = compiled["sm_90a"].get(kernel)
    again = [(kernel, head(found), found.code)]
    monkeypatch.setattr(
        "runtime.backends.cuda.compilers.compile_all", lambda *a: (found for found in again)
    )
    Library("sm_90a", tmp_path).get(kernel)
    entry = next(tmp_path.rglob("*.cubin"))
    good = entry.read_bytes()
    entry.write_bytes(good[: len(good) // 2] if damage is None else damage)
    assert Library("sm_90a", tmp_path).missing([kernel]) == [kernel]
    assert Library("sm_90a", tmp_path).get(kernel).code
    assert entry.read_bytes() == good


def test_double_precision_is_refused():
    from runtime.backends.cuda import intrinsics as i
    from runtime.backends.cuda.compile import compile_declared

    load, store = i.load, i.store

    @i.entry("x:f32* out:f32*", threads=32)
    def widened(x, out):
        store(out, 0, load(x, 0) * 0.1)

    with pytest.raises(BackendError, match=r"widened computes in double precision: .*f64"):
        compile_declared(widened, "sm_80")


def test_a_double_constant_is_named():
    from runtime.backends.cuda import intrinsics as i
    from runtime.backends.cuda.compile import compile_declared

    factor, store = 0.1, i.store

    @i.entry("out:f32*", threads=32)
    def scaled(out):
        store(out, 0, factor)

    with pytest.raises(BackendError, match=r"factor = 0.1 is double: write f32\(0.1\)"):
        compile_declared(scaled, "sm_80")


def test_unknown_targets_and_kernels_are_named():
    with pytest.raises(BackendError, match="no CUDA target 'sm_75': there are sm_80"):
        Library("sm_75", None)
    with pytest.raises(BackendError, match=r"no CUDA kernel is called 'matvek': .*; there are"):
        Library("sm_80", None).get(Kernel.of("matvek"))
    with pytest.raises(BackendError, match="columns is one of"):
        Library("sm_80", None).get(Kernel.of("matvec", format="Q8_0", columns=3))
