"""`runtime plan`: the first line answers, the rest explains, mistakes are one line."""

from __future__ import annotations

import json
import re
import shlex
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_models import NOVEL, write_model
from tensor_models import load_split

from runtime.backends.meta.idle import tell
from runtime.cli import main
from runtime.models import outline

TWO = "tensor(cuda:24GB,cuda:24GB)"


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("qwen3-0.6b --devices cuda:100MB", r"no: the model does not fit.*no type is small enough"),
        (
            "qwen3-0.6b --devices cuda",
            r"not known, as the memory of cuda is not: write cuda:24GB; 40,960 .* 6\.\d\d GB of it",
        ),
        ("qwen3-0.6b --devices cuda:24", r"not known, .* cuda:24 is not: write cuda:24GB; "),
        ("qwen3-0.6b --devices cuda:1", r"not known, .* cuda:1 is not: write cuda:1:24GB; "),
        (
            "Qwen3.5-27B.gguf --devices tensor(cuda:24GB,cuda:24GB)",
            r"yes: 262,144 tokens of context fit",
        ),
    ],
)
def test_a_question_is_a_command_and_the_first_line_its_answer(arguments: str, answer: str) -> None:
    assert re.match(answer, plan(*arguments.split()).splitlines()[0])


ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_picture_of_its_second_plan(tmp_path: Path) -> None:
    commands = re.findall(r"^\$ runtime plan (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    plan(*shlex.split(commands[1]), "--svg", str(tmp_path / "plan.svg"))
    shown = ROOT / "runtime" / "data" / "plan.svg"
    assert (tmp_path / "plan.svg").read_text() == shown.read_text()


def test_the_readme_tells_true_answers() -> None:
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"^\$ runtime plan (.*)\n(.*)$", text, re.MULTILINE)
    for command, answer in found:
        assert plan(*shlex.split(command)).splitlines()[0] == answer
    assert len(found) == 4


def test_layers_alike_are_one_table() -> None:
    text = plan("qwen3.5-27b", "--devices", TWO)
    titles = [line for line in text.splitlines() if line.startswith(("layer", "before", "output"))]
    assert [title.split(":")[0] for title in titles] == [
        "before the layers", "layers 0-2, 4-6, 8-10 and so on", "layers 3, 7, 11 and so on",
        "output",
    ]  # fmt: skip
    assert "48 alike" in titles[1] and "16 alike" in titles[2]
    assert all(title.endswith("; 2 sums of 20.5 KB a token") for title in titles[1:3])
    assert "1 gather of 993.3 KB" in titles[3]
    assert "rows 8,704 + 8,704" in text and "heads 2 + 2" in text


def test_every_op_is_shown_when_asked_for() -> None:
    brief = plan("qwen3-0.6b", "--devices", "cuda:24GB")
    every = plan("qwen3-0.6b", "--devices", "cuda:24GB", "-v")
    assert " silu " not in brief and "silu" in every
    assert "split" not in brief  # of one device


def test_speed_needs_a_bandwidth() -> None:
    text = plan("qwen3.5-27b", "--devices", "cuda:24GB")
    assert "tokens/s" not in text and "--bandwidth says how many GB/s cuda:24GB reads" in text
    text = plan("qwen3.5-27b", "--devices", "cuda:24GB", "--bandwidth", "936")
    assert re.search(r"up to 5\d\.?\d? tokens/s", text.splitlines()[0])


def test_prompts_have_a_speed_where_products_have_one() -> None:
    two = ("qwen3-0.6b", "--devices", "tensor(cuda:0:2GB,cuda:1:2GB)", "--json")
    data = json.loads(plan(*two, "--gmacs", "44000"))
    alone = json.loads(plan("qwen3-0.6b", "--devices", "cuda:2GB", "--gmacs", "44000", "--json"))
    assert alone["prompt_tokens_per_s"] == pytest.approx(44e12 / 440.4e6, rel=0.001)
    assert data["prompt_tokens_per_s"] == pytest.approx(2 * 44e12 / 440.4e6, rel=0.001)
    slower = json.loads(plan(*two, "--gmacs", "44000,11000"))
    assert slower["prompt_tokens_per_s"] == pytest.approx(11e12 / 220.2e6, rel=0.001)


def test_fit_says_which_options_it_chose() -> None:
    devices = "tensor(cuda:12GB,cuda:8GB)"
    text = plan("llama-3.1-8b", "--fit", "--devices", devices).splitlines()
    assert re.match(
        r'options: -c \d+ --devices "tensor\(\d+\*cuda:0:12GB,\d+\*cuda:1:8GB\)"', text[2]
    )
    text = plan("llama-3.1-8b", "--fit", "-c", "65536", "--devices", "cuda:12GB").splitlines()
    assert text[0].startswith("yes: 65,536") and text[2] == "options: -ctk q8_0 -ctv q8_0"


def test_fit_says_what_would_fit_where_nothing_does() -> None:
    text = plan("llama-3.1-70b", "--fit", "-c", "32768", "--devices", "tensor(cuda:18GB,cuda:18GB)")
    first, _, chosen, *_ = text.splitlines()
    assert first.endswith("there is room for 32,768 tokens with weights of Q2_K and a q4_0 cache")
    assert chosen == "options: none that were left free make it fit"


def test_shares_are_shown_in_numbers_that_can_be_given_again() -> None:
    shares = ("-ts", "23463129088,0.0000001")
    text = plan("qwen3-0.6b", "--devices", "tensor(cuda:2GB,cuda:2GB)", *shares)
    assert "on tensor(1000*cuda:0:2GB,cuda:1:2GB)" in text
    text = plan(
        "qwen3-0.6b", "--devices", "tensor(cuda:2GB,cuda:2GB)", "-ts", "23463129088,7000000000"
    )
    assert "on tensor(77*cuda:0:2GB,23*cuda:1:2GB)" in text


def test_each_device_may_have_a_bandwidth_and_stages_hand_over() -> None:
    two = ("llama-3.1-8b", "--devices", "layers(cuda:24GB,cpu)", "-c", "4096", "--json")
    fast, slow = (json.loads(plan(*two, "--bandwidth", b)) for b in ("500,40", "500,20"))
    assert fast["tokens_per_s"] > 1.5 * slow["tokens_per_s"]
    far = json.loads(plan(*two, "--bandwidth", "500,40", "--link", "0.001"))
    over = [stage["exchanging_s"] for stage in far["stages"]]
    assert over == [0, pytest.approx(4096 * 4 / 1e6 + 10e-6)]


def test_json_has_everything() -> None:
    data = json.loads(plan("qwen3.5-35b-a3b", "--devices", TWO, "-c", "4096", "--json"))
    assert data["fits"] and data["context"] == 4096 and data["tokens_per_s"] is None
    assert [m["device"] for m in data["memory"]] == ["cuda:0:24GB", "cuda:1:24GB"]
    assert data["memory"][0]["total"] == sum(
        data["memory"][0][name] for name in ("weights", "kv_cache", "state", "activations", "other")
    )
    assert sum(len(group["numbers"]) for group in data["layers"]) == 40
    kinds = [x["kind"] for x in data["stages"][0]["exchanges"]]
    assert kinds.count("gather") == 1 and kinds.count("sum") == 80


def test_pictures_are_well_formed_and_mark_each_exchange(tmp_path: Path) -> None:
    path, dot = tmp_path / "plan.svg", tmp_path / "plan.dot"
    plan("qwen3.5-35b-a3b", "--devices", TWO, "--svg", str(path), "--dot", str(dot))
    root = xml.etree.ElementTree.parse(path).getroot()
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert texts.count("Σ") == 1 + 4 and texts.count("↔") == 1 + 1  # legend, two kinds of layers
    assert "30 alike" in texts and "10 alike" in texts
    lines = dot.read_text().splitlines()
    assert lines[0] == "digraph plan {" and lines[-1] == "}"
    assert sum("penwidth" in line for line in lines) == 81


def test_a_real_file_is_planned_as_it_is(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", NOVEL["qwen35moe"])
    text = plan(str(path), "--devices", "tensor(cuda:0:1GB,cuda:1:1GB)")
    assert text.startswith("yes: 256 tokens of context fit")
    assert plan(str(path), "--weights", "Q8_0", "--devices", "cuda:1GB").startswith("yes")


def test_metadata_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(outline.known()["qwen3-0.6b"].read_text())
    assert plan("--hparams", str(path), "--devices", "cuda:2GB").startswith("yes: ")


def test_a_split_that_achieves_nothing_is_said(tmp_path: Path) -> None:
    keys = json.loads(outline.known()["qwen3-0.6b"].read_text())
    one = {"qwen3.attention.head_count": 1, "qwen3.attention.head_count_kv": 1}
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**keys, **one, "qwen3.feed_forward_length": 256}))
    two = ("--hparams", str(path), "--weights", "Q4_K_M", "--devices", TWO)
    said = plan(*two).splitlines()[1]
    assert said == (
        "nothing of qwen3 is split over 2 devices: blk.0.attn_output.weight: it has no parts that "
        "could be told apart"
    )
    data = json.loads(plan(*two, "--json"))
    assert data["without_part"] == [said]
    whole = data["layers"][1]["ops"][1]["reads"][0]
    assert (whole["name"], whole["why"]) == ("attn_q", "its input is not computed in parts")
    assert "mirrored (its input is not" in plan(*two, "-v") and "(its input" not in plan(*two)
    assert re.match(
        "qwen3 has no part for 4 of 16 devices", plan("--devices", "tensor(mpi:16)").splitlines()[1]
    )
    assert plan("--devices", "tensor(cpu:0,cpu:1)").splitlines()[1] == ""


def test_all_ways_in_which_layers_alike_are_split() -> None:
    path = ("qwen3-0.6b", "--devices", "tensor(cuda:0:8GB,cuda:1:8GB,cuda:2:8GB)")
    text, data = plan(*path), json.loads(plan(*path, "--json"))
    assert "columns 896 + 1,280 + 896 or 928 + 1,216 + 928  " in text
    reads = {read["name"]: read for op in data["layers"][1]["ops"] for read in op["reads"]}
    down, cache = reads["ffn_down"], reads["k"]
    assert (down["sizes"], down["others"]) == ([896, 1280, 896], [[928, 1216, 928]])
    assert (cache["sizes"], cache["others"]) == ([3, 2, 3], [])


def test_footnotes_are_of_what_is_there() -> None:
    cpus, cudas = "tensor(cpu:0,cpu:1)", "tensor(cuda:0:8GB,cuda:1:8GB)"
    assert plan("qwen3-0.6b", "--devices", cpus).splitlines()[-1].startswith("mirrored: emb")
    assert "mirrored: " not in plan("qwen3-0.6b", "--devices", cudas)
    many = "tensor(" + ",".join(f"cuda:{n}:8GB" for n in range(16)) + ")"
    (note,) = [x for x in plan("qwen3-0.6b", "--devices", many).splitlines() if x[:4] == "some"]
    assert note.startswith("some on several: ")
    assert "some on several" not in plan("qwen3-0.6b", "--devices", cudas)


@pytest.mark.parametrize("device", ["reference", "null"])
def test_devices_for_tests_have_no_speed(device: str) -> None:
    text = plan("--devices", device)
    assert f"speed: not predicted: {device} computes" in text and "tokens/s" not in text
    assert json.loads(plan("--devices", device, "--json"))["tokens_per_s"] is None


def test_too_full_is_not_full() -> None:
    two = ("llama-3.1-8b", "--devices", "tensor(cuda:0:8GB,cuda:1:3GB)", "-ts", "1,1")
    full, over = plan(*two).splitlines()[6:8]
    assert re.search(r"█ \d+\.\d MB too much$", over) and "too much" not in full
    assert "too much" not in plan("llama-3.1-8b", "--devices", "tensor(cuda:0:8GB,cuda:1:8GB)")


def test_a_split_without_parts_is_said_once_when_loaded(capsys) -> None:
    tell.cache_clear()
    for _ in range(2):
        load_split(None, [1] * 16).close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the model has no part for 4 of 16 devices (number 3, 7, 11 and so on)")


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("m.json", {"qwen3.block_count": None}, "m.json: .* qwen3.block_count is missing; add it$"),
        ("m.json", {"qwen3.vocab_size": None}, "m.json: .* qwen3.vocab_size is missing; add it$"),
        ("m.json", {"general.architecture": None}, "m.json: metadata key .* missing; add"),
        ("config.json", {"general.architecture": None, "model_type": "qwen3"},
         "config.json: a config.json of Hugging Face: .* add GGUF's keys"),
        ("m.json", {"qwen3.attention.head_count_kv": [8] * 3},
         "head_count_kv is a list of 3 for 28 layers"),
        ("m.yaml", {}, "m.yaml: metadata alone is a .json or .toml file"),
    ],
)  # fmt: skip
def test_mistakes_in_metadata_of_ones_own(
    tmp_path: Path, name: str, changed: dict[str, Any], message: str
) -> None:
    values = json.loads(outline.known()["qwen3-0.6b"].read_text()) | changed
    path = tmp_path / name
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))
    assert re.search(message, refused("--hparams", str(path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("qwen3.5-28b", "no such file.*did you mean qwen3.5-27b"),
        ("qwen3-0.6b --devices cudo", "did you mean cuda"),
        ("qwen3-0.6b --devices tensor(cpu:0,cpu:1) -ts 1,2,3", "3 shares for 2 devices"),
        ("qwen3-0.6b --kv-type q9", "--kv-type q9 is no type of a cache; there are f32"),
        ("qwen3-0.6b --weights Q9", "weight type 'Q9' is not known"),
        (
            "qwen3-0.6b --devices cuda:2GB --bandwidth 1,2",
            "--bandwidth 1,2: give one number above 0, or 1",
        ),
        ("qwen3-0.6b --link 0", "--link 0: give a number above 0"),
        ("qwen3-0.6b --hparams x.json", "give a model or --hparams, not both"),
        ("--hparams x.json", "x.json: cannot be read as metadata"),
    ],
)
def test_mistakes_are_one_line(arguments: str, message: str) -> None:
    assert re.search(message, refused(*arguments.split()))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("qwen3-0.6b --devices cuda:24GB -ngl 10",
         ["before the layers on cpu:", "layers 0-18: 19 alike on cpu:", "layers 19-27: 9 alike"]),
        ("qwen3.5-35b-a3b --devices cuda:12GB -ncmoe 2",
         ["layer 1 on cuda:12GB:", "layer 1 on cpu: 522.2 MB", "layers 2, 4-6, 8-10 and so on: 2"]),
    ],
)  # fmt: skip
def test_what_the_cpu_has_beside_a_gpu(given: str, parts: list[str]) -> None:
    shown = plan(*given.split())
    assert all(f"\n{part}" in shown for part in parts)
