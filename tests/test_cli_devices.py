"""--devices and the options beside it, in all commands that run a model."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from fake_model import CommandLine, FakeModel, needs_demo

from runtime.cli import main

pytestmark = needs_demo

COMMANDS = ("run -p x", "chat", "warmup", "bench -p 1 -n 0 -r 1")
FIELDS = ("devices", "split_mode", "tensor_split", "main_device", "gpu_layers", "cpu_moe")


@pytest.fixture
def invoke(monkeypatch):
    return CommandLine(monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("args", "want"),
    [
        ("", {"devices": "cpu"}),
        ("--devices layers(cpu:0,cpu:1)", {"devices": "layers(cpu:0,cpu:1)"}),
        ("-dev cpu:0,cpu:1 -sm tensor -ts 3,1",
         {"devices": "cpu:0,cpu:1", "split_mode": "tensor", "tensor_split": "3,1"}),
        ("--device cpu:0,cpu:1 --split-mode none --main-gpu 1",
         {"devices": "cpu:0,cpu:1", "split_mode": "none", "main_device": 1}),
        ("-dev numa -mg 0 --tensor-split=3/1",
         {"devices": "numa", "main_device": 0, "tensor_split": "3/1"}),
        ("-dev cuda -ngl 20 -ncmoe 3", {"devices": "cuda", "gpu_layers": "20", "cpu_moe": 3}),
        ("--n-gpu-layers auto --cpu-moe", {"devices": "cpu", "gpu_layers": "auto",
                                           "cpu_moe": True}),
    ],
)  # fmt: skip
def test_what_is_given_reaches_the_model(invoke, command: str, args: str, want: dict):
    result = invoke(*command.split(), "-m", "m.gguf", *args.split(), model=FakeModel(), stdin="hi")
    assert result.exit_code == 0, result.stderr
    _, given = result.loaded[0]
    assert {name: given[name] for name in FIELDS if name in given} == want


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("-dev tpu", "devices='tpu': 'tpu' is no device (did you mean cpu?); there are"),
        ("-dev tensor(cpu:0", "devices='tensor(cpu:0': there is no ) where tensor( ends"),
        ("-dev=", "devices='': it is empty; give a device, such as cpu"),
        ("-dev tensor(cuda:0,cpu)", "would split tensors over a GPU and the CPU, which have no"),
        ("-ngl some", "gpu_layers='some' must be a number of layers, 'auto' or 'all'"),
        ("-ngl -3", "gpu_layers='-3' must be a number of layers, 'auto' or 'all'"),
        ("-ngl 3 -dev cpu:0,cpu:1", "gpu_layers is for devices that are GPUs alone, beside which"),
        ("-cmoe -dev layers(cuda:0,cpu)", "cpu_moe is for devices that are GPUs alone, beside"),
        ("-ncmoe -1", "Invalid value for '-ncmoe' / '--n-cpu-moe': -1 is not in the range x>=0"),
        ("-dev cpu:8GB", "devices='cpu:8GB': sizes of memory are for 'runtime plan'"),
        ("-dev -1*cpu", "devices='-1*cpu': a share is a number of 0 and more"),
        ("-dev 0*cpu", "devices='0*cpu': every share is 0"),
        ("-dev cpu:0,cpu:1 -sm row", "split_mode='row' is part of 'tensor' here"),
        ("-dev cpu:0,cpu:1 -sm rows", "split_mode='rows' must be one of none, layer, tensor"),
        ("-dev tensor(cpu:0,cpu:1) -sm layer", "split_mode='layer' is for a list of devices"),
        ("-ts 3,1", "tensor_split='3,1': nothing to split over one device"),
        ("-dev cpu:0,cpu:1 -ts 3,1,1", "tensor_split='3,1,1' has 3 shares for 2 devices"),
        ("-dev cpu:0,cpu:1 -ts 3,-1", "tensor_split='3,-1': a share is a number of 0 and more"),
        ("-dev cpu:0,cpu:1 -ts nan,1", "tensor_split='nan,1': a share is a number of 0 and more"),
        ("-dev cpu:0,cpu:1 -ts 0,0", "tensor_split='0,0': every share is 0"),
        ("-dev cpu:0,cpu:1 -mg 1", "main_device=1 is for split_mode='none'"),
        ("-mg 1", "main_device=1: the list has 1 device, the first of which is 0"),
        ("-mg -1", "Invalid value for '-mg' / '--main-device': -1 is not in the range x>=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(command: str, args: str, says: str):
    result = CliRunner().invoke(main, [*command.split(), *args.split()], input="hi")
    assert result.exit_code == 2 and result.stdout == ""
    assert says in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "option", ["-sm none", "-ts 3,1", "-mg 0", "-dev cpu", "--main-gpu 0", "-ngl 9", "-cmoe"]
)
def test_inspect_says_where_these_options_are_of_use(invoke, option: str):
    result = invoke("inspect", *option.split())
    assert result.exit_code == 0 and "runs here" in result.stdout
    assert result.stderr == (
        f"{option.split()[0]} has no effect here: it is an option of the commands that run a "
        "model, and of plan\n"
    )


def test_bench_shows_devices_that_are_not_the_default(invoke):
    args = ("bench", "-p", "1", "-n", "0", "-r", "1", "-dev", "cpu:0,cpu:1", "-sm", "tensor")
    args = (*args, "-ts", "3,1")
    lines = invoke(*args, model=FakeModel()).stdout.splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[:3]]
    shown = dict(zip(cells[0], cells[2], strict=True))
    assert shown["devices"] == "cpu:0,cpu:1" and shown["tensor_split"] == "3,1"
    (row,) = json.loads(invoke(*args, "-o", "json", model=FakeModel()).stdout)
    assert [row[name] for name in ("devices", "split_mode", "tensor_split", "main_gpu")] == [
        "cpu:0,cpu:1", "tensor", "3,1", 0,
    ]  # fmt: skip
    lines = invoke(*args[:7], model=FakeModel()).stdout.splitlines()
    assert "devices" not in lines[0]


SPLITS = (
    "-dev tensor(cpu:0,cpu:1)",
    "-dev layers(cpu:0,cpu:1)",
    "-dev cpu:0,cpu:1 -sm tensor",
    "-dev cpu:0,cpu:1,cpu:2 -sm tensor -ts 3,0,1",
    "-dev cpu:0,cpu:1 -sm none -mg 1",
    "-dev layers(tensor(3*cpu:0,cpu:1),cpu:2)",
    "-dev tensor(layers(cpu:0,3*cpu:1),layers(3*cpu:2,cpu:3))",
    "-dev layers(cpu:0,cpu:1,cpu:0)",
    "-dev numa:2 -sm tensor",
    "-dev numa",
)


@pytest.fixture(scope="module")
def told() -> str:
    """What the demo continues with on one device."""
    return _printed("run", "-p", "Once upon", "--raw", *EXACT)


EXACT = ("--temp", "0", "-n", "16", "--activations", "f32", "--kv-type", "f32", "-q")


def _printed(*args: str, stdin: str = "") -> str:
    result = CliRunner().invoke(main, [*args], input=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("split", SPLITS)
def test_run_tells_the_same_on_any_devices(told: str, split: str):
    assert _printed("run", "-p", "Once upon", "--raw", *EXACT, *split.split()) == told != ""


@pytest.mark.parametrize("split", SPLITS[::3])
def test_chat_answers_on_several_devices(split: str):
    questions = "Who is Pip?\nWhere does Pip live?\n"
    want = _printed("chat", *EXACT, stdin=questions)
    assert _printed("chat", *EXACT, *split.split(), stdin=questions) == want != ""


@pytest.mark.parametrize("split", SPLITS[::3])
def test_bench_and_warmup_run_on_several_devices(split: str):
    args = ("bench", "-p", "9", "-n", "2", "-d", "5", "-r", "1", "-o", "json", *split.split())
    rows = json.loads(_printed(*args))
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(9, 0), (0, 2)]
    assert all(row["avg_ts"] > 0 and row["devices"] == split.split()[1] for row in rows)
    assert _printed("warmup", *split.split()).startswith("kernels ready")


@pytest.mark.parametrize("split", [SPLITS[0], SPLITS[5]])
def test_a_split_that_cannot_be_validated_says_so_once(
    told: str, split: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VALIDATE", "1")
    args = ("run", "-p", "Once upon", "--raw", *EXACT, *split.split())
    result = CliRunner().invoke(main, args)
    assert result.stdout == told
    assert result.stderr.count("VALIDATE: nothing is compared on ") == 1
    assert "GB/s" not in result.stderr, "no table of times, which DEBUG=2 shows"
