"""What the split rules allow is sound, and what they refuse nobody could do; no device needed.

Soundness: for every op and combinations of input states, cut the inputs, run the op's reference on
what each device has, and compare with parts of the undivided result and of the states it leaves.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from split_parts import Probe, cases, pool

from runtime.ops import axes
from runtime.ops.errors import OpError
from runtime.ops.registry import OPS, Kind
from runtime.ops.splits import MIRRORED, PARTIAL, Split, State, Unsplittable
from runtime.ops.tensor import Shape, Tensor

KINDS = 8  # of ownership
MOST = 1000  # combinations of a case that are tried one by one; beyond that some of them

# Axes of the result along which some combination of inputs gives a split; "+": splits that give a
# partial sum, by input and axis; "~": inputs that may be partial themselves; "&": what one device
# has of the result may need what another has of an input too.
ALLOWED = {
    "add": "0 1 2 ~01", "attention": "1 &", "broadcast": "0 1 2 ~0", "copy": "0 1 2 3 ~0",
    "expert_bias": "0 1 2 ~01", "expert_sum": "0 1 +01 +11 +21 ~0 ~1", "gated_delta": "1 &",
    "get_rows": "0 1", "hadamard": "0 1", "kv_write": "2", "l2_norm": "0 1",
    "matmul": "0 1 2 +01 +02 +11 ~0", "matmul_id": "2 +01 +02 +12 ~0", "mul": "0 1 ~0 ~1",
    "normalize": "0", "permute": "0 1 2 ~0", "renumber": "0 1", "reshape": "0 1 2 3 ~0",
    "rms_norm": "0 1", "rope": "0 1", "rope_angles": "", "row_scale": "0 1 2 ~0 ~1",
    "scale": "0 1 ~0", "select_rows": "0 1 2 ~0", "short_conv": "1", "sigmoid": "0 1",
    "silu": "0 1", "slice": "0 1 2 ~0 &", "softmax": "0", "softplus": "0 1",
    "swiglu_oai": "0 1", "take": "0", "top_k": "0",
}  # fmt: skip


def combinations(probe: Probe) -> Iterator[list[State]]:
    """All combinations of input states where they are few; what rules ask for, and neighbours."""
    inputs, rng = probe.node.inputs, probe.rng
    for kinds in (KINDS, 3, 1):
        pools = [pool(x, kinds) for x in inputs]
        if math.prod(map(len, pools)) <= MOST:
            yield from map(list, itertools.product(*pools))
            break
    else:
        for _ in range(MOST // 8):
            yield [_one(each, rng) for each in pools]
    if kinds < KINDS:
        for states in _asked_for(probe):
            yield states
            number = int(rng.integers(len(inputs)))
            other = _one(pool(inputs[number], KINDS), rng)
            yield [*states[:number], other, *states[number + 1 :]]


def _one(states: list[State], rng: np.random.Generator) -> State:
    return states[rng.integers(len(states))]


def _asked_for(probe: Probe) -> Iterator[list[State]]:
    """What the rules say that inputs should be."""
    node = probe.node
    for split in _splits(node):
        with suppress(Unsplittable):
            yield axes.needs(node, split)
    for number, x in enumerate(node.inputs):
        for split in _splits(x):
            with suppress(Unsplittable):
                yield axes.summands(node, number, split)


def _splits(x: Tensor) -> Iterator[Split]:
    return (state for state in pool(x, KINDS) if isinstance(state, Split))


class Tally:
    """What was tried on an op: combinations, legal ones, and the ways in which they are."""

    def __init__(self) -> None:
        self.tried, self.legal, self.ways = 0, 0, set[str]()

    def add(self, states: list[State], out: State) -> None:
        """One more that is legal."""
        self.legal += 1
        splits = {i: state for i, state in enumerate(states) if isinstance(state, Split)}
        if isinstance(out, Split):
            self.ways.add(str(out.axis))
            if not _is_shared(out) and any(map(_is_shared, splits.values())):
                self.ways.add("&")
        elif out is PARTIAL:
            partial = "".join(str(i) for i, state in enumerate(states) if state is PARTIAL)
            self.ways |= {f"+{i}{split.axis}" for i, split in splits.items()} or {f"~{partial}"}


def _is_shared(split: Split) -> bool:
    return any(len(owners) > 1 for owners, _ in split.runs)


def soundness(name: str) -> Tally:
    """Try an op; Unsound where its rule allows too much, AssertionError where too little."""
    tally, rng = Tally(), np.random.default_rng(0)
    for case in cases(name):
        probe = Probe(OPS[name], case, rng)
        for states in combinations(probe):
            tally.tried += 1
            with suppress(Unsplittable):
                tally.add(states, probe.check(states))
    assert tally.ways == {*ALLOWED[name].split()}
    assert tally.legal >= 4 * len(tally.ways)
    return tally


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> dict[str, Tally]:
    """Counts by op, shown with `pytest -s` at the end."""
    rows: dict[str, Tally] = {}
    request.addfinalizer(lambda: _show(rows))
    return rows


def _show(rows: dict[str, Tally]) -> None:
    print(f"\n{'op':12}{'combinations':>14}{'legal':>8}{'sound':>8}  ways")
    for name, tally in sorted(rows.items()):
        print(_row(name, tally.tried, tally.legal), *sorted(tally.ways))
    print(_row("all", sum(t.tried for t in rows.values()), sum(t.legal for t in rows.values())))


def _row(name: str, tried: int, legal: int) -> str:
    return f"{name:12}{tried:14}{legal:8}{legal:8} "


@pytest.mark.parametrize("name", sorted(OPS))
def test_what_the_rules_allow_is_sound(name: str, table: dict[str, Tally]):
    table[name] = soundness(name)


# Refusals of one split, the other inputs whole: nobody could make use of what devices compute then.

SIMPLE = (Kind.ELEMENTWISE, Kind.ROWWISE, Kind.CONTRACTION, Kind.REDUCTION, Kind.VIEW, Kind.COPY)
# Rules keep heads, tokens and choices of experts whole where nothing is gained: inputs by number.
WHOLE = {("hadamard", 0), ("matmul_id", 2), ("take", 1), *(("rope_angles", i) for i in range(3))}
NONE_REFUSED = ("broadcast", "copy", "permute", "scale", "sigmoid", "silu", "slice", "softplus")


@pytest.mark.parametrize("name", sorted(n for n, op in OPS.items() if op.kind in SIMPLE))
def test_what_the_rules_refuse_nobody_could_do(name: str):
    tried, rng = 0, np.random.default_rng(0)
    for case in cases(name):
        probe = Probe(OPS[name], case, rng)
        for number, x in enumerate(probe.node.inputs):
            for split in _splits(x):
                states: list[State] = [MIRRORED] * len(probe.values)
                states[number] = split
                try:
                    axes.result(probe.node, states)
                except Unsplittable:
                    if _is_proper(split) and (name, number) not in WHOLE:
                        tried += 1
                        assert not _of_use(probe, states), f"{probe.node!r} of {states}"
    assert tried or name in (*NONE_REFUSED, "hadamard", "rope_angles")


def _is_proper(split: Split) -> bool:
    """Whether it divides anything, and without more than one owner."""
    return len({*split.runs}) > 1 and all(len(owners) == 1 for owners, _ in split.runs)


def _of_use(probe: Probe, states: list[State]) -> bool:
    """Whether the parts that devices get are parts of the result along any axis, or sum to it."""
    scattered = [probe.scatter(x, s) for x, s in zip(probe.values, states, strict=True)]
    inputs = [list(each) for each in zip(*scattered, strict=True)]
    for axis in range(probe.node.ndim):
        parts = [_alone(probe, each, axis) for each in inputs]
        if all(p is not None and _is_part(p, probe.whole, axis) for p in parts):
            return True
    parts = [_alone(probe, each, None) for each in inputs]
    if any(part is None or part.shape != probe.whole.shape for part in parts):
        return False
    return np.allclose(sum(parts), probe.whole, 1e-9, 1e-9)  # type: ignore[arg-type]


def _alone(probe: Probe, inputs: list[np.ndarray], axis: int | None) -> np.ndarray | None:
    """What the op makes of these, None where they do not fit; views as long as fits on `axis`."""
    attrs = dict(probe.node.attrs)
    if "shape" in attrs:
        shape = [int(n) for n in attrs["shape"]]
        if axis is not None:
            shape[axis] = inputs[0].size // max(1, math.prod(shape[:axis] + shape[axis + 1 :]))
        attrs["shape"] = tuple(shape)
    leaves = [
        x.with_(shape=value.shape) for x, value in zip(probe.node.inputs, inputs, strict=True)
    ]
    try:
        probe.op(*leaves, **attrs)
        return probe.op.reference(*inputs, **attrs)
    except (OpError, ValueError, IndexError):
        return None


def _is_part(part: np.ndarray, whole: np.ndarray, axis: int) -> bool:
    rows, wanted = (
        np.moveaxis(x, axis, 0).reshape(x.shape[axis], math.prod(x.shape) // max(1, x.shape[axis]))
        for x in (part, whole)
    )
    if not part.size:
        return part.shape[axis] == 0
    if rows.shape[1:] != wanted.shape[1:]:
        return False
    found = np.isclose(rows[:, None], wanted[None], 1e-9, 1e-9).all(-1)
    return bool(found.any(1).all() and (np.diff(found.argmax(1)) > 0).all())


# Wrong rules: each must turn soundness red.

Seed = Callable[[pytest.MonkeyPatch], None]
GATED: Any = OPS["gated_delta"].axes


def _declared(name: str, **fields: Any) -> Seed:
    """An op that declares something else beside its shape rule."""
    return lambda patch: patch.setitem(OPS, name, replace(OPS[name], **fields))


def _rule(name: str, wrong: Callable[..., Any]) -> Seed:
    """A function of ops/axes.py that does something else; `wrong` is given the right one first."""
    right = getattr(axes, name)
    return lambda patch: patch.setattr(axes, name, lambda *args: wrong(right, *args))


def _other_order(node: Tensor) -> str:
    other = {"grouped": "tiled", "tiled": "grouped"}[node.attrs["order"]]
    return str(GATED(node.with_(attrs={**node.attrs, "order": other})))


def _inner_first(right: Any, source: Shape, target: Shape, axis: int, number: int) -> Any:
    return right(source[::-1], target[::-1], len(source) - 1 - axis, len(target) - 1 - number)


def _unshared(right: Callable[..., axes.Link | None], *args: Any) -> axes.Link | None:
    link = right(*args)
    return link and axes.Link(link.places)


def _of_many(right: Any, node: Tensor, number: int, split: Split) -> list[State]:
    return [split if i == number else axes._asked(node, number, split, i) for i in range(2)]


NO_STATE = "T c, c Taps, Slots Taps C, S Span, S, S -> T c"
FAULTS: dict[str, tuple[str, Seed]] = {
    "a wrong letter": ("matmul", _declared("matmul", axes="* n, n k -> * n")),
    "an axis that is kept as one summed over": (
        "get_rows", _declared("get_rows", axes="rows n, i -> i n"),
    ),
    "factors of a sum left whole": (
        "expert_sum", _declared("expert_sum", axes="t u n, t U -> t n"),
    ),
    "a norm split along its row": ("rms_norm", _declared("rms_norm", axes="* n, n -> * n")),
    "a softmax split along its row": ("softmax", _declared("softmax", axes="* n -> * n")),
    "a cache split inside heads": (
        "kv_write", _declared("kv_write", axes="T h d, Pages Place h d, T -> Pages Place h d"),
    ),
    "a state left whole": ("short_conv", _declared("short_conv", axes=NO_STATE)),
    "experts split by number": (
        "expert_bias", _declared("expert_bias", axes="t u N, e N, t u -> t u N"),
    ),
    "grouped and tiled swapped": ("gated_delta", _declared("gated_delta", axes=_other_order)),
    "silu of partial sums": ("silu", _declared("silu", linear=((0,),))),
    "a whole bias on partial sums": ("add", _declared("add", linear=((0, 1), (0,)))),
    "a product of two partial sums": ("mul", _declared("mul", linear=((0, 1),))),
    "a reshape with the inner axis first": ("reshape", _rule("_through_reshape", _inner_first)),
    "any heads on a shared one": ("attention", _rule("_even", lambda *_: True)),
    "shared heads not shared": ("attention", _rule("_by_pattern", _unshared)),
    "summands that several have": ("matmul", _rule("summands", _of_many)),
    "a view of partial sums refused": ("permute", _rule("_is_linear", lambda *_: False)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(axes, "_KNOWN", {})
    op, seed = FAULTS[name]
    seed(monkeypatch)
    with pytest.raises(AssertionError):
        soundness(op)


ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    r"blk\b|attn|ffn|token_embd|ssm_|_exps|shexp|\.weight|\.bias|output_norm|q_proj|qwen|gpt"
    r"|llama(?!\.cpp)"
)


@pytest.mark.parametrize(
    "file", [ROOT / "ops/axes.py", ROOT / "ops/splits.py", *(ROOT / "backends/meta").glob("*.py")],
    ids=lambda file: file.name,
)  # fmt: skip
def test_no_tensor_and_no_architecture_is_known_by_name(file: Path):
    texts = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
    found = [text for text in texts if isinstance(text, str) and re.search(NAMES, text, re.I)]
    assert not found
