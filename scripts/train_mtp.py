"""Trains a small hybrid model with a head that predicts a further token, and writes it as GGUF.

    python scripts/train_mtp.py --minutes 30 --out build/mtp.gguf

The architecture is Qwen3.5's ("qwen35") with one NextN block; the text is the demo model's. The
head learns what the model itself says, from the model's hidden rows and then from its own, as it
is used for several tokens ahead. Needs torch, gguf and tokenizers; a checkpoint is continued from.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from demo_corpus import held_out_text
from demo_gguf import train_tokenizer, write_tokenizer
from mtp_model import HybridModel, Shape
from tokenizers import Tokenizer
from train_demo import Training, batches

TOGETHER = 0.6  # share of the time in which the model learns, too; then the head alone
OWN = 2  # how often the head is used in a row while it learns
WEIGHTS = (0.4, 0.2)  # of each use in the loss


class Run(Training):
    """Of the hybrid model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = HybridModel(Shape(vocabulary=tokenizer.get_vocab_size()))
        super().__init__(model, tokenizer, narrow=16)

    def step(self, ids: torch.Tensor, progress: float) -> tuple[float, list[float]]:
        """One update; the model's loss in nats, and how often the head says what the model says."""
        alone = progress >= TOGETHER
        progress = (progress - TOGETHER) / (1 - TOGETHER) if alone else progress / TOGETHER
        if alone:
            self.model.requires_grad_(False)
            self.model.head.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            loss, own, agreed = losses(self.model, ids)
        self.model.zero_grad(set_to_none=True)
        (own if alone else loss + own).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            self.update(progress)
        return loss.item(), agreed


def losses(model: HybridModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Loss of the model, weighted losses of the head, and the share of tokens they agree on."""
    given, wanted = ids[:, :-1], ids[:, 1:]
    hidden = model.hidden(given)
    logits = model.logits(hidden).float()
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    said, best = logits.detach().softmax(-1), logits.detach().argmax(-1)
    own, agreed = torch.zeros(()), []
    for weight in WEIGHTS[:OWN]:
        hidden = model.ahead(given, hidden)
        guess = model.logits(hidden).float()
        own = own + weight * F.cross_entropy(guess.flatten(0, 1), said.flatten(0, 1))
        agreed.append(float((guess.argmax(-1) == best).float().mean()))
    return loss, own, agreed


@torch.no_grad()
def held_out(run: Run) -> tuple[float, list[float]]:
    """Loss in nats per token and agreement over the held-out text."""
    ids = torch.tensor(run.tokenizer.encode(held_out_text()).ids)
    rows = ids[: len(ids) // 257 * 257].view(-1, 257)
    found = [losses(run.model, rows[i : i + 8]) for i in range(0, len(rows), 8)]
    loss = sum(float(each[0]) for each in found) / len(found)
    return loss, np.mean([each[2] for each in found], 0).tolist()


def train(run: Run, minutes: float, rows: int, length: int, checkpoint: Path) -> None:
    """Trains for the given time of its threads; writes a checkpoint every 2 minutes."""
    stream = batches(run.tokenizer, rows, length, seed=2 + run.steps)
    last_save = time.monotonic()
    while (progress := run.seconds / 60 / minutes) < 1:
        start = time.process_time()
        loss, agreed = run.step(next(stream), progress)
        run.seconds += time.process_time() - start
        if run.steps % 20 == 0:
            shares = " ".join(f"{share:.3f}" for share in agreed)
            said = f"step {run.steps}  {run.seconds:.0f} s  loss {loss:.4f}  agreed {shares}"
            print(said, file=sys.stderr, flush=True)
        if time.monotonic() - last_save > 120:
            run.save(checkpoint)
            last_save = time.monotonic()
    run.save(checkpoint)


def write_gguf(path: Path, run: Run, facts: dict[str, float]) -> None:
    """Weights (matrices F16, the rest F32), tokenizer and description."""
    s, writer = run.model.s, gguf.GGUFWriter(path, "qwen35")
    writer.add_type("model")
    writer.add_name("Demo stories with a further token")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in facts.items():
        writer.add_float32(f"demo.{key}", value)
    for key, value in _keys(s).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"qwen35.{key}", value)
    third = s.rotated // 2 // 3
    writer.add_array(
        "qwen35.rope.dimension_sections", [s.rotated // 2 - 2 * third, third, third, 0]
    )
    write_tokenizer(writer, run.tokenizer)
    for name, weight in run.model.state_dict().items():
        values = weight.detach().float().numpy()
        if name.endswith("decay_log"):
            values = -np.exp(values)
        plain = values.ndim == 1 or "conv1d" in name
        writer.add_tensor(tensor_name(name, s), values.astype(np.float32 if plain else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _keys(s: Shape) -> dict[str, Any]:
    return {
        "context_length": s.context, "embedding_length": s.hidden, "block_count": s.layers + 1,
        "nextn_predict_layers": 1, "feed_forward_length": s.ff, "attention.head_count": s.heads,
        "attention.head_count_kv": s.kv_heads, "attention.key_length": s.head,
        "attention.value_length": s.head, "attention.layer_norm_rms_epsilon": s.eps,
        "rope.freq_base": s.rope_base, "rope.dimension_count": s.rotated,
        "vocab_size": s.vocabulary, "full_attention_interval": s.interval,
        "ssm.conv_kernel": s.taps, "ssm.state_size": s.delta, "ssm.group_count": s.delta_heads,
        "ssm.time_step_rank": s.delta_heads, "ssm.inner_size": s.delta_heads * s.delta,
    }  # fmt: skip


_SPECIAL = {
    "embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
    "ssm_dt": "ssm_dt.bias", "ssm_conv1d": "ssm_conv1d.weight", "decay_log": "ssm_a",
}  # fmt: skip


def tensor_name(name: str, s: Shape) -> str:
    """The GGUF name of a parameter of `HybridModel`."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    group, rest = name.split(".", 1)
    at = f"blk.{s.layers}"
    if group == "blocks":
        number, rest = rest.split(".", 1)
        at = f"blk.{number}"
    elif not rest.startswith("block."):
        return f"{at}.nextn.{rest}"
    rest = rest.removeprefix("block.").removeprefix("mixer.")
    return f"{at}.{_SPECIAL.get(rest, rest)}"


@click.command(help=__doc__)
@click.option(
    "--minutes", default=30.0, show_default=True, help="CPU time to train, all runs together."
)
@click.option("--rows", default=8, show_default=True, help="Sequences in a step.")
@click.option("--length", default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of torch.")
@click.option("--checkpoint", type=Path, default=Path("build/mtp.pt"), show_default=True)
@click.option("--out", type=Path, default=Path("build/mtp.gguf"), show_default=True)
def main(minutes: float, rows: int, length: int, threads: int, checkpoint: Path, out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    state = torch.load(checkpoint) if checkpoint.exists() else None
    tokenizer = (
        Tokenizer.from_str(state["tokenizer"]) if state else train_tokenizer(Shape.vocabulary)
    )
    run = Run(tokenizer)
    if state:
        run.restore(state)
    train(run, minutes, rows, length, checkpoint)
    run.model.eval()
    loss, agreed = held_out(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(out, run, {"heldout_loss": loss, "steps": float(run.steps)})
    shares = ", ".join(f"{share:.3f}" for share in agreed)
    click.echo(
        f"{out}: {out.stat().st_size} bytes, {run.steps} steps, held-out loss {loss:.4f} nats "
        f"(perplexity {math.exp(loss):.3f}); the head agrees with the model on {shares}", err=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
