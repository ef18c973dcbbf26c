"""Which type each tensor of a quantised file gets: as llama-quantize (b11434) said of such files.

`quantised_types.json` has small shapes of real architectures and, for each mix with and without an
importance matrix, a letter for the type of each tensor whose type changes, in the file's order.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.errors import OptionError
from runtime.ops.dtypes import DTYPES, F32
from runtime.quantise.choose import Choice, Wishes, choose, needs_imatrix
from runtime.quantise.mixes import MIXES, Facts, mix_of

SEEN = json.loads((Path(__file__).parent / "quantised_types.json").read_text())
Shapes = dict[str, Choice]  # which has a shape and a type
KEPT = ("norm", "ffn_gate_inp", "ssm_conv1d", "ssm_a ", ".bias", "attn_sinks")


def shapes_of(name: str) -> Shapes:
    file = SEEN["files"][name]
    found = dict(file["outside"])
    for layers, tensors in file["layers"]:
        found |= {f"blk.{i}.{tensor}": shape for i in layers for tensor, shape in tensors.items()}
    return {name: Choice(name, tuple(shape), F32) for name, shape in found.items()}


def facts_of(name: str) -> Facts:
    return Facts.of(SEEN["files"][name]["metadata"])


def types(shapes: Shapes, mix: str, facts: Facts, **wishes: object) -> dict[str, str]:
    return {c.name: c.dtype.name for c in choose(shapes, mix, facts, Wishes(**wishes))}


@pytest.mark.parametrize("name", SEEN["files"])
def test_types_are_those_of_llama_quantize(name: str) -> None:
    shapes, facts, seen = shapes_of(name), facts_of(name), SEEN["files"][name]["types"]
    for row, letters in seen.items():
        mix, _, imatrix = row.partition(" ")
        assert _letters(shapes, mix, facts, bool(imatrix)) == letters, row
        assert _letters(shapes, mix, facts, True) == seen.get(f"{mix} imatrix", letters), row


def _letters(shapes: Shapes, mix: str, facts: Facts, has_imatrix: bool) -> str:
    found = choose(shapes, mix, facts, has_imatrix=has_imatrix)
    changed = [c for c in found if not any(part in f"{c.name} " for part in KEPT)]
    assert all(c.dtype is F32 for c in found if c not in changed)
    return "".join(SEEN["letters"][c.dtype.name] for c in changed)


def test_every_mix_was_seen_and_has_a_number() -> None:
    for name, file in SEEN["files"].items():
        without = (
            {"Q1_0"} if name in ("qwen3-288", "qwen3-100") else set()
        )  # llama-quantize gives up
        assert {row.partition(" ")[0] for row in file["types"]} == {*MIXES} - {"F32"} - without
    numbers = [mix.file_type for mix in MIXES.values()]
    assert len({*numbers}) == len(numbers) == 35
    assert mix_of("q4_k") is mix_of("15") is MIXES["Q4_K_M"]
    with pytest.raises(OptionError, match=r"'Q9' is not known; there are .*IQ1_M.*Q4_K_M"):
        mix_of("Q9")
    with pytest.raises(OptionError, match="'nvfp4' is not known"):
        mix_of("nvfp4")
    assert mix_of("nvfp4", plain=True).base == "nvfp4"


def test_the_order_is_by_layer_and_name() -> None:
    names = ["blk.10.a.weight", "blk.2.b.weight", "output.weight", "blk.2.a.weight", "a"]
    shapes = {name: Choice(name, (2, 32), F32) for name in names}
    found = [c.name for c in choose(shapes, "Q8_0", facts_of("qwen3"))]
    assert found == ["a", "output.weight", "blk.2.a.weight", "blk.2.b.weight", "blk.10.a.weight"]


def test_layers_of_80_have_better_values() -> None:
    shapes, facts = shapes_of("llama-gqa4"), facts_of("llama-gqa4")
    name = "blk.4.attn_v.weight"
    for large, q4, q3 in ((False, "q4_k", "q3_k"), (True, "q5_k", "q5_k")):
        model = facts._replace(large=large)
        assert types(shapes, "Q4_K_M", model)[name] == q4
        assert types(shapes, "Q3_K_S", model)[name] == q3
    metadata = {"general.architecture": "llama", "llama.block_count": 80}
    heads = {"llama.attention.head_count": 64, "llama.attention.head_count_kv": 8}
    assert Facts.of(metadata | heads) == Facts(80, 8, 0, True)
    assert not Facts.of(metadata | {"llama.attention.head_count": 64}).large


def test_heads_are_those_of_the_first_layer() -> None:
    shapes, name = shapes_of("qwen3"), "blk.0.attn_v.weight"
    for sharing, dtype in ((3, "q3_k"), (4, "q4_k")):
        assert types(shapes, "Q2_K", facts_of("qwen3")._replace(sharing=sharing))[name] == dtype
    metadata = {"general.architecture": "a", "a.attention.head_count": 8, "a.block_count": 2}
    assert Facts.of(metadata | {"a.attention.head_count_kv": [0, 2]}).sharing == 0
    assert Facts.of(metadata | {"a.attention.head_count_kv": [2, 0]}).sharing == 4


def test_what_a_user_wishes_comes_first() -> None:
    shapes, facts = shapes_of("qwen35moe"), facts_of("qwen35moe")
    pure = types(shapes, "Q4_K_M", facts, pure=True)
    assert {*pure.values()} == {"f32", "q4_k"} and pure["output.weight"] == "q4_k"
    assert {*types(shapes, "MXFP4_MOE", facts, pure=True).values()} == {"f32", "mxfp4"}
    assert types(shapes, "Q4_K_M", facts, keep_output=True)["output.weight"] == "f32"
    found = types(shapes, "Q4_K_M", facts, output="f16", embedding="q8_0")
    assert (found["output.weight"], found["token_embd.weight"]) == ("f16", "q8_0")
    wishes = [("ATTN_QKV", "Q8_0"), (r"blk\.[01]\.", "q5_0"), ("output", "q2_k")]
    found = types(shapes, "Q4_K_M", facts, tensors=wishes)
    assert found["blk.0.attn_qkv.weight"] == "q8_0"  # the first that matches
    assert found["blk.1.ffn_up_exps.weight"] == "q5_0" and found["blk.1.attn_norm.weight"] == "f32"
    assert found["output.weight"] == "q2_k" and found["blk.3.attn_output.weight"] == "q2_k"
    assert types(shapes, "F16", facts, tensors=wishes)["blk.0.attn_qkv.weight"] == "q8_0"
    tied, facts = shapes_of("qwen3"), facts_of("qwen3")
    assert types(tied, "Q4_K_M", facts, output="q5_k")["token_embd.weight"] == "q5_k"
    for wish, why in (
        ({"tensors": [("(", "q8_0")]}, "no pattern"), ({"output": "q9"}, "'q9' is not known"),
        ({"tensors": [("a", "i32")]}, "'i32' is not known; there are F32"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=why):
            types(tied, "Q4_K_M", facts, **wish)


def test_a_wish_that_no_block_fits_falls_back_and_says_so() -> None:
    found = choose(shapes_of("qwen3-288"), "Q8_0", facts_of("qwen3-288"), Wishes(embedding="q6_k"))
    by_name = {c.name: c for c in found}
    assert by_name["token_embd.weight"].dtype is DTYPES["q8_0"]
    assert by_name["token_embd.weight"].wanted is DTYPES["q6_k"]
    assert by_name["blk.0.ffn_up.weight"].wanted is None


def test_copy_changes_nothing_and_tiny_types_need_an_imatrix() -> None:
    shapes, facts = shapes_of("qwen3"), facts_of("qwen3")
    assert {*types(shapes, "copy", facts).values()} == {"f32"}

    def needy(mix: str) -> str | None:
        first = needs_imatrix(choose(shapes, mix, facts), mix)
        return first.name if first else None

    assert needy("IQ2_XXS") == needy("q2_k_s") == "blk.0.attn_k.weight"
    assert needy("Q2_K") is needy("IQ3_S") is needy("IQ4_XS") is None
