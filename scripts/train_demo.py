"""Trains the bundled demo model on generated text and writes it as GGUF.

    python scripts/train_demo.py --minutes 60          train, then write runtime/data/demo.gguf
    python scripts/train_demo.py --steps 0 --check     no training: write and check the checkpoint

Needs torch, gguf and tokenizers. A checkpoint is written every few minutes and continued from.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from demo_corpus import SEPARATOR, held_out_text, training_documents
from demo_gguf import SPECIAL, token_id, train_tokenizer, write_gguf
from demo_model import DemoModel, Muon, Shape, generate
from tokenizers import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "runtime" / "data"
PROMPTS = (
    "Once upon a time",
    "It was a stormy night in Lantern Valley.",
    "There was once a little girl named Lily.",
    "Pip the mouse",
)
QUESTIONS = (
    "Where does Pip live?",
    "What colour is the lake?",
    "Who is afraid of spiders?",
    "What does Gus like to eat?",
    "Is Olwen a fox?",
    "What is the capital of France?",
    "Who is Gandalf?",
    "Hello!",
    "Tell me a story about a dragon.",
)


def batches(tokenizer: Tokenizer, rows: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Token ids [rows, length + 1]; a row starts with a document and is filled with more."""
    stream = training_documents(seed)
    separator = token_id(tokenizer, SEPARATOR)
    while True:
        batch = []
        for _ in range(rows):
            ids: list[int] = []
            while len(ids) <= length:
                ids += [*tokenizer.encode(next(stream)).ids, separator]
            batch.append(ids[: length + 1])
        yield torch.tensor(batch)


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of ids[:, 1:] given what comes before."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: DemoModel, tokenizer: Tokenizer) -> float:
    """Mean loss in nats per token over the held-out text, in windows of the whole context."""
    ids = torch.tensor(tokenizer.encode(held_out_text()).ids)
    width = model.s.context + 1
    rows = ids[: len(ids) // width * width].view(-1, width)
    return sum(float(loss_of(model, row[None])) for row in rows) / len(rows)


class Training:
    """A model with its optimisers, and how far its training has come (seconds and steps).

    Muon changes matrices of more than `narrow` rows and columns but for embeddings, AdamW the rest.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, narrow: int = 0) -> None:
        self.model, self.tokenizer = model, tokenizer
        matrices, others = list[torch.nn.Parameter](), list[torch.nn.Parameter]()
        for name, weight in model.named_parameters():
            large = weight.ndim == 2 and min(weight.shape) > narrow and "embed" not in name
            (matrices if large else others).append(weight)
        adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, lr=0.02), 0.02),
            (adam, 4e-3),
        ]
        self.steps, self.seconds = 0, 0.0

    def update(self, progress: float) -> None:
        """A step of the optimisers at `progress` (0 to 1) through the schedule."""
        for optimiser, rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(progress, self.steps)
            optimiser.step()
        self.steps += 1

    def save(self, path: Path) -> None:
        """Everything that `restore` needs, in place of the last."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "steps": self.steps, "seconds": self.seconds}
        state["tokenizer"] = self.tokenizer.to_str()
        state["optimisers"] = [optimiser.state_dict() for optimiser, _ in self.optimisers]
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `save` wrote."""
        self.model.load_state_dict(state["model"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


class Run(Training):
    """Of the demo model."""

    def __init__(self, tokenizer: Tokenizer, rows: int, bf16: bool = False) -> None:
        super().__init__(DemoModel(Shape(vocabulary=tokenizer.get_vocab_size())), tokenizer)
        self.rows, self.bf16 = rows, bf16

    def step(self, ids: torch.Tensor, progress: float) -> float:
        """One update at `progress` (0 to 1) through the schedule; returns the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = loss_of(self.model, ids)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        self.update(progress)
        return loss.item()


def schedule(progress: float, step: int) -> float:
    """Share of the learning rate: short warm-up, constant, linear to 0 over the last 40 %."""
    return min(1.0, (step + 1) / 50, max(0.0, (1 - progress) / 0.4))


def train(run: Run, minutes: float, steps: int, checkpoint: Path) -> None:
    """Trains until the given time or number of steps; writes a checkpoint every 3 minutes."""
    stream = batches(run.tokenizer, run.rows, run.model.s.context, seed=2 + run.steps)
    limit = steps if steps else math.inf
    last_save = time.monotonic()
    with click.progressbar(length=1000, label="training", file=sys.stderr) as bar:
        while (progress := max(run.seconds / 60 / minutes, run.steps / limit)) < 1:
            start = time.monotonic()
            loss = run.step(next(stream), progress)
            run.seconds += time.monotonic() - start
            bar.update(int(progress * 1000) - bar.pos)
            if run.steps % 50 == 0:
                click.echo(f" step {run.steps}  {run.seconds:.0f} s  loss {loss:.4f}", err=True)
            if time.monotonic() - last_save > 180:
                run.save(checkpoint)
                last_save = time.monotonic()
    run.save(checkpoint)


@torch.no_grad()
def round_to_f16(model: DemoModel) -> None:
    """Makes the matrices what the file will hold, so that loss and samples are the file's."""
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.copy_(weight.half())


def print_samples(run: Run) -> None:
    """Greedy continuations and answers, to be read."""
    stop = {token_id(run.tokenizer, mark) for mark in SPECIAL}
    chats = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]
    for prompt in (*PROMPTS, *chats):
        made = generate(run.model, run.tokenizer.encode(prompt).ids, 200, stop)
        click.echo(f"{prompt}|{run.tokenizer.decode(made)}\n")


@click.command(help=__doc__)
@click.option(
    "--minutes", default=60.0, show_default=True, help="Time to train, all runs together."
)
@click.option("--steps", default=-1, help="Train this many steps instead (0: not at all).")
@click.option(
    "--bf16", is_flag=True, help="Matrix products in bfloat16, for CPUs that are fast at it."
)
@click.option("--rows", default=8, show_default=True, help="Sequences of 512 tokens in a step.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of torch.")
@click.option("--checkpoint", type=Path, default=Path("build/demo.pt"), show_default=True)
@click.option("--out", type=Path, default=DATA / "demo.gguf", show_default=True)
@click.option("--check", is_flag=True, help="Print the held-out loss and samples at the end.")
def main(
    minutes: float,
    steps: int,
    bf16: bool,
    rows: int,
    threads: int,
    checkpoint: Path,
    out: Path,
    check: bool,
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    state = torch.load(checkpoint) if checkpoint.exists() else None
    tokenizer = (
        Tokenizer.from_str(state["tokenizer"]) if state else train_tokenizer(Shape.vocabulary)
    )
    run = Run(tokenizer, rows, bf16)
    if state:
        run.restore(state)
    if steps != 0:
        train(run, minutes if steps < 0 else math.inf, max(steps, 0), checkpoint)
    round_to_f16(run.model)
    loss = held_out_loss(run.model.eval(), run.tokenizer)
    write_gguf(out, run.model, run.tokenizer, {"heldout_loss": loss, "steps": float(run.steps)})
    (out.parent / "demo-heldout.txt").write_text(held_out_text(), encoding="utf-8")
    click.echo(f"{out}: {out.stat().st_size} bytes, {run.steps} steps", err=True)
    click.echo(
        f"held-out loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}", err=True
    )
    if check:
        print_samples(run)


if __name__ == "__main__":
    main()
