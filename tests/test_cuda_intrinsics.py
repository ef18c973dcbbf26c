"""Each intrinsic: the machine instruction it becomes, and what it means, on chosen values."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")

from runtime.backends.cuda import intrinsics as i
from runtime.backends.cuda import sass
from runtime.backends.cuda.intrinsic import Declared, Intrinsic
from runtime.backends.cuda.simulator import launch

ALL = {name: value for name, value in vars(i).items() if isinstance(value, Intrinsic)}
_ARGUMENTS = {
    "u32": "load(words, u32(thread_x() + {n}))",
    "u16": "load(words, u32(thread_x() + {n}))",
    "i32": "i32(load(words, u32(thread_x() + {n})))",
    "f32": "load(numbers, u32(thread_x() + {n}))",
}
_RESULTS = {"f32": "f32_to_bits({r})", "u16": "u32({r})", "u32": "{r}", "i32": "u32({r})"}

# operation -> the opcode it becomes for sm_90a
OPCODES = {
    "int_to_f32": "I2F", "round_i32": "F2I", "f16_to_f32": "HADD2.F32", "f16_low": "HADD2.F32",
    "f16_high": "HADD2.F32", "f32_to_f16": "F2F.F16.F32", "pack_f16": "F2FP.F16",
    "pack_bf16": "F2FP.BF16", "fma": "FFMA", "multiply": "FMUL", "fma_bf16x2": "HFMA2.MMA.BF16",
    "fmax": "FMNMX", "fmin": "FMNMX", "exp2": "MUFU.EX2", "rcp": "MUFU.RCP", "rsqrt": "MUFU.RSQ",
    "divide": "MUFU.RCP", "floor": "FRND.FLOOR", "shift_right": "SHF.R.S32", "prmt": "PRMT",
    "dp4a": "IDP.4A.S8.S8", "dp4a_us": "IDP.4A.U8.S8", "dp2a": "IDP.2A.LO.S16.S8",
    "mma_s8": "IMMA.16832.S8.S8", "mma_s8_half": "IMMA.16816.S8.S8",
    "mma_f16": "HMMA.16816.F32 ", "mma_bf16": "HMMA.16816.F32.BF16",
    "shuffle_xor": "SHFL.BFLY", "shuffle_xor_u32": "SHFL.BFLY", "shuffle_index": "SHFL.IDX",
    "shuffle_index_u32": "SHFL.IDX", "shuffle_down": "SHFL.DOWN", "shuffle_up": "SHFL.UP",
    "vote_any": "VOTE", "vote_all": "VOTE", "ballot": "VOTE", "warp_sum_i32": "REDUX.SUM",
    "warp_max_i32": "REDUX.MAX", "warp_min_u32": "REDUX.MIN", "launch_wait": "ACQBULK",
    "launch_next": "PREEXIT",
}  # fmt: skip
# told by other tests of what kernels compile to, or no instruction of their own
ELSEWHERE = {
    *("thread_x", "block_x", "block_y", "block_z", "grid_x", "grid_y", "u32", "i32", "f32"),
    *("bits_to_f32", "f32_to_bits", "fabs", "copy_commit", "copy_wait0", "copy_wait1"),
    *("copy_wait2", "syncwarp", "syncthreads"),
}
_TWO, _FOUR = "store2(out, {at}, s[0], s[1])", "store4(out, {at}, s[0], s[1], s[2], s[3])"
_FIRST_TWO, _FIRST_FOUR = (f"s = {{op}}(words, 1); {x.format(at=0)}" for x in (_TWO, _FOUR))
_PAIR = f"s = {{op}}(words, 1); {_FOUR.format(at=0)}; s = s[4:]; {_FOUR.format(at=1)}"
_MY_TWO, _MY_FOUR = (x.format(at="thread_x()") for x in (_TWO, _FOUR))
_FILLED = "a = tile(); shared_store4(a, thread_x(), 1, 2, 3, thread_x()); syncthreads(); "
_COPIED = (
    "a = tile(); copy_async16(a, thread_x(), words, thread_x(), 16); copy_commit(); copy_wait0(); "
    "syncthreads(); store(out, thread_x(), a[thread_x()])"
)
# operations on memory: the body of a kernel, and the opcode
BODIES = {
    "ahead": ("{op}(words, 1); store(out, 0, 1)", "CCTL.E.PF2"),
    "atomic_add": ("store(out, 0, {op}(out, 1, 1))", "ATOMG.E.ADD"),
    "load": ("store(out, 0, {op}(words, 1))", "LDG.E "),
    "load2": (_FIRST_TWO, "LDG.E.64 "),
    "load4": (_FIRST_FOUR, "LDG.E.128 "),
    "load_pair": (_PAIR, "LDG.E.128 "),
    "constant_pair": (_PAIR, "LDG.E.128.CONSTANT"),
    "constant": ("store(out, 0, {op}(words, 1))", "LDG.E.CONSTANT"),
    "constant2": (_FIRST_TWO, "LDG.E.64.CONSTANT"),
    "constant4": (_FIRST_FOUR, "LDG.E.128.CONSTANT"),
    "stream2": (_FIRST_TWO, "LDG.E.NA.64"),
    "stream4": (_FIRST_FOUR, "LDG.E.NA.128"),
    "pick": (
        "p = {op}(u32(thread_x() & 3), words, out, words, words); "
        "store(out, thread_x(), load(p, 40))",
        "ISETP",
    ),
    "store": ("{op}(out, 0, 1)", "STG.E "),
    "store2": ("{op}(out, 0, 1, 2)", "STG.E.64"),
    "store4": ("{op}(out, 0, 1, 2, 3, 4)", "STG.E.128"),
    "shared_load2": (_FILLED + "s = {op}(a, thread_x()); " + _MY_TWO, "LDS.64"),
    "shared_load4": (_FILLED + "s = {op}(a, u32(31 - thread_x())); " + _MY_FOUR, "LDS.128"),
    "shared_store4": (_FILLED + "store(out, thread_x(), a[u32(127 - thread_x())])", "STS.128"),
    "copy_async16": (_COPIED, "LDGSTS.E.BYPASS.128"),
    "ldmatrix_x2": (_FILLED + "s = {op}(a, thread_x()); " + _MY_TWO, "LDSM.16.M88.2"),
    "ldmatrix_x4": (_FILLED + "s = {op}(a, thread_x()); " + _MY_FOUR, "LDSM.16.M88.4"),
    "ldmatrix_x4_trans": (_FILLED + "s = {op}(a, thread_x()); " + _MY_FOUR, "LDSM.16.MT88.4"),
}


def _probe(name: str) -> Declared:
    """A kernel that calls one intrinsic on words and numbers from memory."""
    operation = ALL[name]
    if name in BODIES:
        body = BODIES[name][0].format(op=name)
    else:
        given = [_ARGUMENTS[kind].format(n=n) for n, kind in enumerate(operation.arguments)]
        results = operation.results
        body = f"r = {name}({', '.join(given)})" if results else f"{name}()"
        names = [f"r[{n}]" for n in range(len(results))] if len(results) > 1 else ["r"]
        for n, kind in enumerate(results):
            value = _RESULTS[kind].format(r=names[n])
            body += f"; store(out, u32({len(results)} * thread_x() + {n}), {value})"
    scope = {**vars(i), "tile": i.shared("u32", 128)}
    exec(f"def probe(words, numbers, out):\n    {body}\n", scope)
    return i.entry("words:u32* numbers:f32* out:u32*", threads=32)(scope["probe"])


def test_every_intrinsic_is_probed():
    assert set(ALL) == set(OPCODES) | set(BODIES) | ELSEWHERE


@pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or sass.find_disassembler() is None,
    reason="the extra 'cuda' is not installed",
)
@pytest.mark.parametrize("name", sorted({*OPCODES, *BODIES}))
def test_intrinsic_becomes_its_instruction(name: str):
    from runtime.backends.cuda.compile import compile_declared

    wanted = OPCODES[name] if name in OPCODES else BODIES[name][1]
    code = sass.disassemble(compile_declared(_probe(name), "sm_90a").code)
    assert any(f"{sass.opcode(line)} ".startswith(wanted) for line in code), "\n".join(code)


@pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or sass.find_disassembler() is None,
    reason="the extra 'cuda' is not installed",
)
@pytest.mark.parametrize("name", ["launch_wait", "launch_next"])
def test_programmatic_launch_is_nothing_before_hopper(name: str):
    from runtime.backends.cuda.compile import compile_declared

    code = sass.disassemble(compile_declared(_probe(name), "sm_80").code)
    assert not sass.count(code, "ACQBULK", "PREEXIT")


@pytest.mark.parametrize("name", sorted({*OPCODES, *BODIES}))
def test_probe_runs_in_the_simulator(name: str):
    words, out = np.arange(256, dtype=np.uint32), np.full(512, 0xCDCDCDCD, np.uint32)
    launch(_probe(name), 1, words, np.linspace(0.5, 2, 48).astype(np.float32), out)
    if ALL[name].results or name in BODIES:
        assert (out != 0xCDCDCDCD).any()


MEANINGS = [
    ("u32", (-1,), 0xFFFFFFFF),
    ("i32", (0xFFFFFFFE,), -2),
    ("round_i32", (2.5,), 2),
    ("round_i32", (-3.5,), -4),
    ("f32_to_bits", (1.0,), 0x3F800000),
    ("bits_to_f32", (0xC0000000,), -2.0),
    ("f16_low", (0x4000_3C00,), 1.0),
    ("f16_high", (0x4000_3C00,), 2.0),
    ("pack_f16", (1.0, 2.0), 0x4000_3C00),
    ("pack_bf16", (1.0, 1.00390625), 0x3F80_3F80),  # halfway, to even
    ("pack_bf16", (1.01171875, float("nan")), 0x7FFF_3F82),
    ("shift_right", (0x80000000, 31), -1),
    ("prmt", (0x33221180, 0x77665544, 0x7180), 0x7711FF80),
    ("dp4a", (0x01FF0280, 0x7F80FF01, 5), 5 - 128 - 2 + 128 + 127),
    ("dp4a_us", (0x01FF0280, 0x7F80FF01, 5), 5 + 128 - 2 - 255 * 128 + 127),
    ("dp2a", (0x8000_7FFF, 0x02FF, 1), 1 - 32767 - 65536),
    ("fmax", (float("nan"), 1.0), 1.0),
    ("floor", (-1.5,), -2.0),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), MEANINGS)
def test_meaning(name: str, arguments: tuple, expected: float):
    assert ALL[name](*arguments) == expected


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_matrices_multiply_through_ldmatrix(rng, kind: str):
    """D = A B of A [16, 16] and B [16, 8] row by row, B's fragments by transposing."""
    mma = i.mma_f16 if kind == "f16" else i.mma_bf16
    tile_a, tile_b = i.shared("u32", 128), i.shared("u32", 64)
    load, store2, f32, u32, thread_x = i.load, i.store2, i.f32, i.u32, i.thread_x
    syncthreads, ldmatrix_x4, trans = i.syncthreads, i.ldmatrix_x4, i.ldmatrix_x4_trans

    @i.entry("a:u32* b:u32* d:f32*", threads=32)
    def product(a, b, d):
        left, right, lane = tile_a(), tile_b(), thread_x()
        for n in range(4):
            left[u32(32 * n + lane)] = load(a, u32(32 * n + lane))
        for n in range(2):
            right[u32(32 * n + lane)] = load(b, u32(32 * n + lane))
        syncthreads()
        x = ldmatrix_x4(left, u32(2 * (lane & 15) + (lane >> 4)))
        y = trans(right, u32(lane & 15))
        zero = f32(0)
        r = mma(x[0], x[1], x[2], x[3], y[0], y[1], zero, zero, zero, zero)
        store2(d, lane, r[0], r[1])
        store2(d, u32(32 + lane), r[2], r[3])

    a, b = rng.integers(-8, 8, (16, 16)), rng.integers(-8, 8, (16, 8))
    d = np.zeros((16, 8), np.float32)
    launch(product, 1, _halves(a, kind), _halves(b, kind), d, order="random")
    np.testing.assert_array_equal(d, a @ b)


def _halves(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return values.astype(np.float16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
