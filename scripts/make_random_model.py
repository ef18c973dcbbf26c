"""Write a full-size GGUF model with random weights, so that speed is measured without a download.

Sizes, types and tensor names are those of the real models; values are random blocks whose scales
give each matrix a spread of 1/sqrt(row length), so activations stay finite in any depth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from random_presets import PRESETS, Preset, Slot

from runtime.gguf import open_gguf
from runtime.gguf.writer import NewTensor, write_gguf
from runtime.ops import dtypes as dt
from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.dtypes import DTYPES, DType
from runtime.ops.errors import Error
from runtime.ops.quant_blocks import struct_of
from runtime.ops.quants import dequantize
from runtime.quantise.choose import Wishes, choose
from runtime.quantise.mixes import MIXES, Facts, mix_of

POOL_BYTES = 8 << 20  # random data per type and row length; tensors take pieces of it
PIECE_BYTES = 1 << 20


PLAIN_ROLES = ("norm", "rope", "router", "small", "bias", "decay", "pace")  # float32 in every file
PLAIN = ("f32", "f16", "bf16")
WEIGHT_TYPES = [
    name.upper()
    for name, dtype in DTYPES.items()
    if name in PLAIN or (dtype.numpy is None and name not in ("q8_1", "q8_k"))
]

# formats with a minimum: its field, as a multiple of the scale that centres the values
_MINIMUM = {
    "q4_1": ("m", -7.5), "q5_1": ("m", -15.5), "q2_k": ("dmin", 1.5), "q4_k": ("dmin", 7.5),
    "q5_k": ("dmin", 15.5),
}  # fmt: skip


def types_of(preset: Preset, file_type: str, output: str | None = None) -> dict[str, DType]:
    """The type that llama-quantize gives each tensor, by name, in a file of this type."""
    slots = {s.name: NewTensor(s.name, s.shape, dt.F32, tuple) for s in preset.tensors(preset)}
    facts = Facts.of(metadata_of(preset, "", file_type))
    wishes = Wishes(output=output, embedding=output if preset.tied else None)
    return {c.name: c.dtype for c in choose(slots, file_type, facts, wishes, plain=True)}


def set_scale(blocks: np.ndarray, dtype: DType, scale: np.ndarray) -> None:
    """Write each block's scale (float32 [blocks]) the way its format stores scales."""
    base = BLOCK_FORMATS[dtype.name].scale.base
    if dtype is dt.MXFP4:
        blocks["e"] = np.rint(np.log2(scale))[:, None] + 128
    elif dtype.name == "nvfp4":
        exponent = np.floor(np.log2(scale)) + 8
        mantissa = np.rint(scale / np.exp2(np.maximum(exponent, 1) - 11)) - 8 * (exponent > 0)
        blocks["d"] = (np.maximum(exponent, 0) * 8 + mantissa).clip(1, 126)[:, None]
    elif not isinstance(base, str):  # a float16 in pieces
        bits = scale.astype(np.float16).view(np.uint16)[:, None]
        pieces = bits >> np.arange(0, 16, 4, dtype=np.uint16) << 12
        blocks["scales"] = blocks["scales"] & 0x0FFF | pieces
    else:
        blocks[base] = scale[:, None]
    if dtype.name in _MINIMUM:
        field, ratio = _MINIMUM[dtype.name]
        blocks[field] = ratio * scale[:, None]


def random_blocks(dtype: DType, count: int, spread: float, seed: int) -> np.ndarray:
    """`count` blocks of random codes as uint8, their values with this standard deviation."""
    rng = np.random.default_rng(seed)
    struct = struct_of(BLOCK_FORMATS[dtype.name])
    blocks = np.frombuffer(bytearray(rng.bytes(count * dtype.nbytes)), struct)
    if dtype.name in ("tq2_0", "q2_0"):  # without the fourth 2-bit code, so that the mean is zero
        blocks["qs"] &= ~((blocks["qs"] & blocks["qs"] >> 1 & 0x55) << 1)
    set_scale(blocks, dtype, np.ones(count, np.float32))
    sample = blocks[:4096]
    unit = float(dequantize(sample.view(np.uint8), dtype, (len(sample) * dtype.block,)).std())
    set_scale(blocks, dtype, spread / unit * rng.uniform(0.7, 1.3, count).astype(np.float32))
    return blocks.view(np.uint8)


@lru_cache(maxsize=4)
def pool(dtype: DType, row: int, seed: int) -> np.ndarray:
    """Random stored bytes for matrices with rows of `row` elements."""
    spread = 1 / math.sqrt(row)
    if dtype.numpy is None:
        return random_blocks(dtype, POOL_BYTES // dtype.nbytes, spread, seed)
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(POOL_BYTES // 4, np.float32) * np.float32(spread)
    if dtype is dt.BF16:
        return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return values.astype(dtype.numpy).view(np.uint8)


def matrix_chunks(slot: Slot, dtype: DType, seed: int) -> Iterator[np.ndarray]:
    """The bytes of a matrix: pieces from random places of the pool, so that rows differ."""
    source = pool(dtype, slot.shape[-1], seed)
    piece = PIECE_BYTES // dtype.nbytes * dtype.nbytes
    places = (len(source) - piece) // dtype.nbytes
    rng = np.random.default_rng([seed, *slot.name.encode()])
    left = dt.nbytes_for(dtype, slot.shape)
    while left:
        start = int(rng.integers(places)) * dtype.nbytes
        yield source[start : start + min(piece, left)]
        left -= min(piece, left)


def llama3_factors(preset: Preset) -> np.ndarray:
    """Llama 3.2's frequency divisors: factor 32, between 1 and 4 turns in 8192 positions."""
    half = preset.head_dim // 2
    turns = 8192 * preset.rope_base ** -(np.arange(half) / half) / (2 * math.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / 32 + smooth)).astype("<f4")


def plain_values(slot: Slot, rng: np.random.Generator) -> np.ndarray:
    """Values of a tensor that no file type quantises, near those of trained models."""
    noise = rng.standard_normal(slot.shape)
    if slot.role == "decay":  # -exp(A_log): rates at which a state fades
        return -rng.uniform(1, 16, slot.shape)
    if slot.role == "pace":
        return rng.uniform(-6, -2, slot.shape)
    scale, shift = {"norm": (0.1, 1.0), "bias": (0.1, 0.0)}.get(
        slot.role, (1 / math.sqrt(slot.shape[-1]), 0.0)
    )
    return shift + scale * noise


def new_tensor(slot: Slot, dtype: DType, preset: Preset, seed: int) -> NewTensor:
    """What to write for this slot."""
    if slot.role == "rope":
        return NewTensor.of(slot.name, slot.shape, dtype, llama3_factors(preset))
    if slot.role in PLAIN_ROLES:
        values = plain_values(slot, np.random.default_rng([seed, *slot.name.encode()]))
        return NewTensor.of(slot.name, slot.shape, dtype, values.astype("<f4"))
    return NewTensor(slot.name, slot.shape, dtype, lambda: matrix_chunks(slot, dtype, seed))


def metadata_of(preset: Preset, name: str, file_type: str) -> dict[str, Any]:
    """The metadata keys of the model, the tokenizer's apart."""
    values = {
        "block_count": preset.layers + preset.mtp,
        "context_length": preset.context,
        "embedding_length": preset.hidden,
        "feed_forward_length": preset.ff or (preset.experts.inner if preset.experts else 0),
        "attention.head_count": preset.heads,
        "attention.head_count_kv": preset.kv_heads,
        "attention.key_length": preset.head_dim,
        "attention.value_length": preset.head_dim,
        "attention.layer_norm_rms_epsilon": preset.epsilon,
        "rope.freq_base": preset.rope_base,
        "rope.dimension_count": preset.rotated or preset.head_dim,
        "vocab_size": preset.vocab,
        **({"nextn_predict_layers": 1} if preset.mtp else {}),
        **expert_keys(preset),
        **delta_keys(preset),
        **preset.more,
    }
    general = {
        "general.architecture": preset.architecture,
        "general.type": "model",
        "general.name": f"random {name}",
        "general.quantization_version": 2,
    }
    if number := mix_of(file_type, plain=True).file_type:
        general["general.file_type"] = number
    return general | {f"{preset.architecture}.{key}": value for key, value in values.items()}


def expert_keys(preset: Preset) -> dict[str, Any]:
    """Metadata of a mixture of experts."""
    if not (e := preset.experts):
        return {}
    keys = {
        "expert_count": e.count, "expert_used_count": e.used,
        "expert_feed_forward_length": e.inner,
    }  # fmt: skip
    return keys | ({"expert_shared_feed_forward_length": e.shared} if e.shared else {})


def delta_keys(preset: Preset) -> dict[str, Any]:
    """Metadata of delta-net layers."""
    if not (d := preset.delta):
        return {}
    return {
        "ssm.conv_kernel": d.taps, "ssm.state_size": d.dim, "ssm.group_count": d.key_heads,
        "ssm.time_step_rank": d.heads, "ssm.inner_size": d.heads * d.dim,
        "full_attention_interval": d.interval,
        "attention.recurrent_layers": [(i + 1) % d.interval != 0 for i in range(preset.layers)],
    }  # fmt: skip


def vocabulary_of(path: Path | None, preset: Preset) -> tuple[dict[str, Any], int]:
    """(tokenizer keys, vocabulary size): copied from a file, or none at all."""
    if path is None:
        return {"tokenizer.ggml.model": "none"}, preset.vocab
    keys = {k: v for k, v in open_gguf(path).metadata.items() if k.startswith("tokenizer.")}
    if "tokenizer.ggml.tokens" not in keys:
        raise click.BadParameter(f"{path} has no vocabulary", param_hint="--vocab-from")
    return keys, len(keys["tokenizer.ggml.tokens"])


def write_with_progress(path: Path, metadata: dict[str, Any], tensors: list[NewTensor]) -> None:
    """Write the file, with a bar on stderr where it is a terminal."""
    console = Console(stderr=True)
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(path.name, total=sum(tensor.nbytes for tensor in tensors))
        write_gguf(path, metadata, tensors, lambda nbytes: bar.advance(task, nbytes))


EPILOG = """
\b
Examples:
  python scripts/make_random_model.py qwen3-0.6b Q4_0 q4_0.gguf
  python scripts/make_random_model.py qwen3-0.6b Q4_K_M tiny.gguf --layers 2
  python scripts/make_random_model.py llama-1b F16 l.gguf --vocab-from real.gguf

Presets and their sizes in Q4_0: qwen3-0.6b 358 MiB, llama-1b 730 MiB, qwen3-4b 2.1 GiB,
llama-8b 4.4 GiB, qwen35-0.8b 468 MiB, qwen35moe-mini 954 MiB, qwen35moe-35b 19 GiB,
qwen3next-mini 960 MiB, qwen3next-80b 42 GiB, gpt-oss-mini 940 MiB.
Real models compute the same way, so speeds carry over; the text does not: it is noise.
"""


@click.command(
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("preset", type=click.Choice(list(PRESETS)))
@click.argument(
    "type", type=click.Choice(dict.fromkeys([*MIXES, *WEIGHT_TYPES]), case_sensitive=False)
)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(1), help="Number of layers (default: the preset's).")
@click.option(
    "--mtp", is_flag=True,
    help="With the block that predicts one token more (NextN), which Qwen3.5's files have.",
)  # fmt: skip
@click.option("--vocab-size", type=click.IntRange(1), help="Tokens (default: the preset's).")
@click.option(
    "--vocab-from",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Copy tokenizer and vocabulary size from this GGUF (default: no tokenizer).",
)
@click.option(
    "--output-type",
    type=click.Choice(WEIGHT_TYPES, case_sensitive=False),
    help="Type of the output matrix, which the presets share with the embedding "
    "(default: as llama-quantize: Q6_K, or TYPE where that is F32, F16, BF16 or Q8_0).",
)
@click.option("--seed", default=0, show_default=True, help="Another seed, other weights.")
def main(
    preset: str,
    type: str,
    out: Path,
    layers: int | None,
    mtp: bool,
    vocab_size: int | None,
    vocab_from: Path | None,
    output_type: str | None,
    seed: int,
) -> None:
    """Write OUT, a GGUF model with random weights: the shapes of PRESET, stored as TYPE.

    TYPE is a GGUF tensor type, or a mix that spends more bits on some tensors, as llama-quantize
    does. Without --vocab-from there is no tokenizer: enough to measure speed.
    """
    row = PRESETS[preset]
    if mtp and not row.architecture.startswith("qwen35"):
        raise click.BadParameter(f"{preset} has no such block", param_hint="--mtp")
    row = replace(row, layers=layers or row.layers, vocab=vocab_size or row.vocab, mtp=mtp)
    try:
        tokenizer, vocab = vocabulary_of(vocab_from, row)
        row = replace(row, vocab=vocab)
        types = types_of(row, type, output_type)
        tensors = [new_tensor(slot, types[slot.name], row, seed) for slot in row.tensors(row)]
        write_with_progress(out, metadata_of(row, preset, type) | tokenizer, tensors)
    except Error as error:
        raise click.ClickException(str(error)) from error
    size = out.stat().st_size / (1 << 20)
    print(f"{out}: {preset} {type}, {len(tensors)} tensors, {size:.0f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
