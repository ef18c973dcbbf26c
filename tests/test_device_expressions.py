"""Device expressions: their text, the stages they come to, and the options of a list of devices."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.backends.meta.choices import chosen
from runtime.backends.meta.expression import MOST_DEPTH, Device, Group, Node, Several, parse
from runtime.backends.meta.stages import MOST_DEVICES, Stage, stages, text
from runtime.ops.errors import OptionError

NUMBERED = st.builds(Device, st.just("cpu"), st.integers(0, 5))
DEVICES = (
    NUMBERED
    | st.builds(Device, st.sampled_from(["cuda", "cpu"]), st.none() | st.integers(0, 9999),
                nbytes=st.none() | st.integers(1, 10**15))
    | st.builds(Device, st.sampled_from(["numa", "mpi", "null"]), st.integers(0, 3), st.just(4))
    | st.builds(Several, st.sampled_from(["numa", "mpi"]), st.none() | st.integers(1, 4))
    | st.builds(Several, st.just("null"), st.integers(1, 4))
    | st.sampled_from([Device("null"), Device("reference")])
)  # fmt: skip
SHARES = st.integers(0, 4).map(Fraction) | st.decimals(0, 9, places=3).map(Fraction)


def groups(leaves: st.SearchStrategy[Node], shares=SHARES) -> st.SearchStrategy[Node]:
    def group(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
        members = st.lists(st.tuples(shares, inner), min_size=1, max_size=4).map(tuple)
        return st.builds(Group, st.sampled_from(["tensor", "layers"]), members)

    return st.recursive(leaves, group, max_leaves=10)


TREES = groups(NUMBERED)


@given(groups(DEVICES))
def test_a_printed_expression_is_the_same(tree: Node):
    assert parse(str(tree)) == tree and str(parse(str(tree))) == str(tree)


def at(node: Node, place: Fraction) -> dict[Device, Fraction] | None:
    """The definition: shares of a tensor in the layer at `place` of 0..1; None: nobody has any."""
    if isinstance(node, Device):
        return {node: Fraction(1)}
    assert isinstance(node, Group)
    members = [(share, m) for share, m in node.members if share and at(m, Fraction(0)) is not None]
    total = sum(share for share, _ in members)
    if not members:
        return None
    if node.kind == "layers":
        start = Fraction(0)
        for share, member in members:
            end = start + share / total
            if place < end:
                return at(member, (place - start) / (end - start))
            start = end
    found: dict[Device, Fraction] = {}
    for share, member in members:
        for device, part in (at(member, place) or {}).items():
            found[device] = found.get(device, Fraction(0)) + share / total * part
    return found


@given(TREES, st.fractions(0, 1).filter(lambda x: x < 1))
def test_stages_are_what_the_tree_says_at_every_layer(tree: Node, place: Fraction):
    assume(at(tree, Fraction(0)) is not None)
    found = stages(tree)
    assert sum(stage.share for stage in found) == 1
    assert all(sum(stage.shares) == 1 and min(stage.shares) > 0 for stage in found)
    ends, end = [Fraction(0)], Fraction(0)
    for stage in found:
        end += stage.share
        ends.append(end)
    for x in (place, *ends[:-1]):
        n = next(i for i, end in enumerate(ends[1:]) if x < end)
        assert dict(zip(found[n].devices, found[n].shares, strict=True)) == at(tree, x)


@given(TREES)
def test_stages_as_an_expression_have_the_same_stages(tree: Node):
    assume(at(tree, Fraction(0)) is not None)
    found = stages(tree)
    assert stages(parse(text(found))) == found and text(stages(parse(text(found)))) == text(found)
    mixes = [dict(zip(s.devices, s.shares, strict=True)) for s in found]
    assert all(a != b for a, b in pairwise(mixes))


@pytest.mark.parametrize("kind", ["tensor", "layers"])
@given(st.lists(SHARES, min_size=2, max_size=4), st.lists(SHARES, min_size=2, max_size=4))
def test_groups_of_one_kind_flatten(kind: str, outer: list[Fraction], inner: list[Fraction]):
    """Shares multiply: 3*(1*a,2*b),c has a third of three quarters for a."""
    assume(outer[0] and sum(inner))
    names = [Device("cpu", i) for i in range(len(outer) + len(inner))]
    nested = Group(kind, tuple(zip(inner, names, strict=False)))
    rest = list(zip(outer[1:], names[len(inner) :], strict=False))
    tree = Group(kind, ((outer[0], nested), *rest))
    flat = [(outer[0] * share / sum(inner), name) for share, name in nested.members] + rest
    assert stages(tree) == stages(Group(kind, tuple(flat)))


@given(TREES)
def test_what_has_no_share_may_be_left_out(tree: Node):
    assume(at(tree, Fraction(0)) is not None)
    other = Group("tensor", ((Fraction(1), tree), (Fraction(0), Device("cpu", 9))))
    assert stages(other) == stages(tree)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("cpu", "cpu"),
        (" CPU:0 ", "cpu:0"),
        ("cpu,cpu", "layers(cpu:0,cpu:1)"),
        ("cpu,cpu:0", "layers(cpu:1,cpu:0)"),
        ("tensor(cpu:0)", "cpu:0"),
        ("tensor(cpu:0,cpu:0)", "cpu:0"),
        ("layers(cpu:0,cpu:0,cpu:1)", "layers(2*cpu:0,cpu:1)"),
        ("tensor(2*tensor(cpu:0,cpu:1),cpu:2)", "tensor(cpu:0,cpu:1,cpu:2)"),
        ("layers( 0.5 * cpu:0 , .25*cpu:1 )", "layers(2*cpu:0,cpu:1)"),
        ("0*cpu:0,cpu:1", "cpu:1"),
        ("tensor(layers(cpu:0,cpu:1),layers(cpu:2,cpu:3))",
         "layers(tensor(cpu:0,cpu:2),tensor(cpu:1,cpu:3))"),
        ("tensor(layers(cpu:0,3*cpu:1),layers(3*cpu:2,cpu:3))",
         "layers(tensor(cpu:0,cpu:2),2*tensor(cpu:1,cpu:2),tensor(cpu:1,cpu:3))"),
        ("tensor(layers(cpu:0,cpu:1),layers(cpu:1,cpu:0))", "tensor(cpu:0,cpu:1)"),
        ("tensor(cuda:24GB,cuda:24GB)", "tensor(cuda:0:24GB,cuda:1:24GB)"),
        ("layers(cuda:1.5gib,cpu:64GiB)", "layers(cuda:1536MiB,cpu:64GiB)"),
        ("numa", "layers(numa:0/3,numa:1/3,numa:2/3)"),
        ("tensor(numa:2,2*cpu)", "tensor(numa:0/2,numa:1/2,2*cpu)"),
        ("tensor(mpi)", "tensor(mpi:0/3,mpi:1/3,mpi:2/3)"),
        ("tensor(null,null)", "tensor(null:0/2,null:1/2)"),
        ("null:2", "layers(null:0/2,null:1/2)"),
        ("layers(reference,reference)", "reference"),
    ],
)  # fmt: skip
def test_stages_of_some(given: str, want: str):
    assert text(stages(parse(given), lambda kind: 3)) == want


DEEP = "tensor(" * MOST_DEPTH + "cpu" + ")" * MOST_DEPTH


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "it is empty; give a device, such as cpu"),
        (" ", "it is empty"),
        ("cpu:0,", "a device is missing at the end"),
        ("cpu:0,,cpu:1", "a device is missing before ','"),
        ("tensor()", r"a device is missing before '\)'"),
        ("tensor", r"tensor needs devices, such as tensor\(cpu:0,cpu:1\)"),
        ("tensor(cpu", r"there is no \) where tensor\( ends"),
        ("tensor(cpu))", r"nothing opens what the last \) closes"),
        ("cpu:0 cpu:1", "a comma is missing before 'cpu:1'"),
        ("tensor(cpu:0 cpu:1)", r"there is no \) where tensor\( ends"),
        ("(cpu:0,cpu:1)", r"a device is missing before '\('"),
        ("both(cpu:0,cpu:1)", "'both' is no group of devices: those are tensor and layers"),
        ("3*", "a device is missing at the end"),
        ("*cpu", r"a device is missing before '\*'"),
        ("2*3*cpu", "'3' is no device"),
        ("-1*cpu", "a share is a number of 0 and more, such as 3 or 0.5, not '-1'"),
        ("nan*cpu", "a share is a number of 0 and more.* not 'nan'"),
        ("inf*cpu", "a share is a number of 0 and more.* not 'inf'"),
        ("1e9*cpu", "a share is a number of 0 and more.* not '1e9'"),
        ("0*cpu", "every share is 0, and one must not be"),
        ("tensor(0*cpu:0,0*cpu:1)", "every share is 0"),
        ("tpu", "'tpu' is no device.*; there are cpu, cpu:0"),
        ("cpus", r"'cpus' is no device \(did you mean cpu\?\)"),
        ("CUDA0", r"'CUDA0' is no device \(did you mean cuda\?\)"),
        ("cpu:-1", "'cpu:-1': after cpu: comes a number below 10000 or a size"),
        ("cpu:12345", "after cpu: comes a number below 10000"),
        ("cuda:24", None),
        ("cuda:sm_90a", "'cuda:sm_90a' is what kernels are compiled for, and no GPU: it is for "),
        ("layers(CUDA:sm_90a,cpu)", "for 'runtime warmup', alone or in a list of such targets"),
        ("cuda:0GB", "after cuda: comes a number below 10000 or a size"),
        ("cuda:24GBs", "after cuda: comes a number below 10000 or a size"),
        ("numa:2/2", "after numa: comes a number"),
        ("numa:0", "numa:N is N devices, 1 and more"),
        ("null:1GB", "null:N is N devices, 1 and more, and takes no size"),
        ("reference:0", "reference takes no number and no size"),
        (DEEP, None),
        (f"tensor({DEEP})", f"groups lie more than {MOST_DEPTH} deep"),
        (f"null:{MOST_DEVICES}", None),
        (f"null:{MOST_DEVICES},cpu", f"{MOST_DEVICES + 1} devices, and {MOST_DEVICES} is the most"),
    ],
    ids=lambda text: str(text)[:20],
)  # fmt: skip
def test_what_is_no_expression_is_said_in_a_line(given: str, says: str | None):
    if says is None:
        stages(parse(given))
        return
    with pytest.raises(OptionError, match=f"^devices=.*: .*{says}") as caught:
        stages(parse(given))
    assert len(str(caught.value)) < 240


@given(st.text(alphabet="cpu:0123*(),./ tensorlayGB-", max_size=40))
def test_any_text_is_an_expression_or_one_line(expression: str):
    try:
        tree = parse(expression)
    except OptionError as error:
        assert str(error).startswith("devices=")
    else:
        assert parse(str(tree)) == tree


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, "layers(cpu:0,cpu:1,cpu:2)"),
        ({"split_mode": "layer"}, "layers(cpu:0,cpu:1,cpu:2)"),
        ({"split_mode": "tensor"}, "tensor(cpu:0,cpu:1,cpu:2)"),
        ({"split_mode": "none"}, "cpu:0"),
        ({"split_mode": "none", "main_device": 2}, "cpu:2"),
        ({"tensor_split": "3,0,1"}, "layers(3*cpu:0,cpu:2)"),
        ({"tensor_split": "3:2:1"}, "layers(3*cpu:0,2*cpu:1,cpu:2)"),
        ({"tensor_split": " 3 / 2/.5", "split_mode": "tensor"}, "tensor(6*cpu:0,4*cpu:1,cpu:2)"),
        ({"tensor_split": [0.3, 0.2, 1]}, "layers(3*cpu:0,2*cpu:1,10*cpu:2)"),
        ({"tensor_split": (1e-300, 0, 1e-300)}, "layers(cpu:0,cpu:2)"),
    ],
    ids=str,
)
def test_a_list_is_split_as_the_options_say(options: dict, want: str):
    assert text(chosen("cpu:0,cpu:1,cpu:2", **options)) == want


@pytest.mark.parametrize(
    ("devices", "options", "want"),
    [
        ("cpu", {"split_mode": "layer"}, "cpu"),
        ("layers(cpu:0,cpu:1,cpu:0)", {}, "layers(cpu:0,cpu:1,cpu:0)"),
        ("tensor(layers(cpu:0,cpu:1),layers(cpu:1,cpu:0))", {}, "tensor(cpu:0,cpu:1)"),
        ("tensor(cuda,cuda)", {}, "tensor(cuda:0,cuda:1)"),
        ("tensor(cuda:0,3*cuda:0)", {}, "tensor(cuda:0,3*cuda:0)"),
        ("cuda:1,cuda:1,cpu", {}, "layers(cuda:1,cuda:1,cpu)"),
        ("tensor(layers(cuda:0,cuda:0),cuda:1)", {},
         "layers(tensor(cuda:0,cuda:1),tensor(cuda:0,cuda:1))"),
        ("cpu:1", {"split_mode": "none", "main_device": 0}, "cpu:1"),
        ("cpu", {"main_device": 0}, "cpu"),
        ("tensor(cpu:0,cpu:1)", {"tensor_split": "3,1"}, "tensor(3*cpu:0,cpu:1)"),
        ("tensor(cpu:0,cpu:1),cpu:2", {"tensor_split": "3,1"},
         "layers(3*tensor(cpu:0,cpu:1),cpu:2)"),
        ("tensor(cpu:0,cpu:1),cpu:2", {"split_mode": "none"}, "tensor(cpu:0,cpu:1)"),
        ("numa", {"split_mode": "tensor", "tensor_split": "2,1"}, "tensor(2*numa:0/2,numa:1/2)"),
        ("3*cpu:0,cpu:1", {"split_mode": "tensor"}, "tensor(3*cpu:0,cpu:1)"),
        ("tensor(numa)", {"tensor_split": "3,1"}, "tensor(3*numa:0/2,numa:1/2)"),
    ],
    ids=str,
)  # fmt: skip
def test_options_beside_other_expressions(devices: str, options: dict, want: str):
    assert text(chosen(devices, **options, counts=lambda kind: 2)) == want


@pytest.mark.parametrize(
    ("devices", "options", "says"),
    [
        ("cpu:0,cpu:1", {"split_mode": "row"}, "split_mode='row' is part of 'tensor' here"),
        ("cpu", {"split_mode": "rows"}, "split_mode='rows' must be one of none, layer, tensor"),
        ("tensor(cpu:0,cpu:1)", {"split_mode": "tensor"}, "split_mode='tensor' is for a list of"),
        ("layers(cpu:0,cpu:1)", {"split_mode": "none"}, "split_mode='none' is for a list of"),
        ("cpu", {"tensor_split": "3,1"}, "tensor_split='3,1': nothing to split over one device"),
        ("numa:1", {"tensor_split": "3,1"}, "tensor_split='3,1': nothing to split over one"),
        ("cpu:0,cpu:1", {"tensor_split": "3,1,1"}, "tensor_split='3,1,1' has 3 shares for 2"),
        ("cpu:0,cpu:1", {"tensor_split": [3]}, r"tensor_split=\[3\] has 1 shares for 2 devices"),
        ("cpu:0,cpu:1", {"tensor_split": ""}, "tensor_split='': a share is a number of 0 and"),
        ("cpu:0,cpu:1", {"tensor_split": "3,x"}, "tensor_split='3,x': a share is .* not 'x'"),
        ("cpu:0,cpu:1", {"tensor_split": "3,-1"}, "tensor_split='3,-1': a share is .* not '-1'"),
        ("cpu:0,cpu:1", {"tensor_split": [1, float("nan")]}, "tensor_split=.* not nan"),
        ("cpu:0,cpu:1", {"tensor_split": [1, float("inf")]}, "tensor_split=.* not inf"),
        ("cpu:0,cpu:1", {"tensor_split": [1, -0.5]}, "tensor_split=.* not -0.5"),
        ("cpu:0,cpu:1", {"tensor_split": [1, True]}, "tensor_split=.* not True"),
        ("cpu:0,cpu:1", {"tensor_split": [1, None]}, "tensor_split=.* not None"),
        ("cpu:0,cpu:1", {"tensor_split": "0,0"}, "tensor_split='0,0': every share is 0"),
        ("2*cpu:0,cpu:1", {"tensor_split": "3,1"}, "tensor_split='3,1': .* shares of its own"),
        ("cpu:0,cpu:1", {"tensor_split": "3,1", "split_mode": "none"}, "tensor_split: with split_"),
        ("cpu:0,cpu:1", {"main_device": 1}, "main_device=1 is for split_mode='none'"),
        ("cpu:0,cpu:1", {"main_device": 2, "split_mode": "none"}, "main_device=2: the list has 2 "),
        ("cpu:0,cpu:1", {"tensor_split": [10**400, 1]}, r"tensor_split=.*: a share is at most"),
        ("cpu", {"split_mode": "tensor"}, "split_mode='tensor': nothing to split over one device"),
        ("8*cuda:24GB", {}, r"devices=.*: 8\* is a share of the work, and there is one device: "
         r"write cuda:24GB 8 times, as tensor\(cuda:24GB,cuda:24GB,...\)"),
        ("tensor(8*cuda:0:24GB)", {}, "devices=.* write cuda:24GB 8 times"),
        ("layers(cpu:0,tensor(2*cpu))", {}, r"devices=.* write cpu 2 times, as tensor\(cpu,cpu\)$"),
        ("0.5*cpu", {}, r"devices=.*: 0.5\* is a share of the work, .*: leave it out"),
        ("tensor(2*numa)", {}, "devices=.*: numa:N is N devices"),
        ("tensor(cpu:0,cpu:1,3*cpu:0)", {}, "devices=.*: cpu:0 stands twice in one group: for two "
         "devices write cpu,cpu"),
        ("cuda:0:24GB,cuda:0:24GB", {}, "devices=.*: cuda:0:24GB stands twice .* cuda:24GB,cuda:"),
        ("cpu:0,cpu:1,cpu:0", {"split_mode": "tensor"}, "devices=.*: cpu:0 stands twice"),
        ("layers(cpu:1,tensor(numa:2,numa:2))", {}, "devices=.*: numa:0/2 stands twice .*: leave"),
        ("reference,reference", {}, "devices=.*: reference stands twice"),
        ("cpu", {"main_device": 1}, "main_device=1: the list has 1 device, the first of which is"),
    ],
    ids=lambda given: str(given)[:40],
)  # fmt: skip
def test_options_that_do_not_go_together(devices: str, options: dict, says: str):
    with pytest.raises(OptionError, match=f"^{says}") as caught:
        chosen(devices, **options)
    assert len(str(caught.value)) < 240


def test_shares_are_of_stages_and_of_their_devices():
    found = stages(parse("layers(3*tensor(2*cpu:0,cpu:1),cpu:2)"))
    a, b, c = (Device("cpu", i) for i in range(3))
    assert found == (
        Stage(Fraction(3, 4), (a, b), (Fraction(2, 3), Fraction(1, 3))),
        Stage(Fraction(1, 4), (c,), (Fraction(1),)),
    )
