"""Decode and prompt speed at depth, cache types side by side, and llama-bench beside them.

All cache types are loaded together and take turns, so that a busy machine slows all alike. With
--llama-bench the peer measures the same file at the same depths, one type after another.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import runtime
from runtime.report.drawing import MARGIN, Drawing

PROMPT, WIDTH, HEIGHT = 512, 560.0, 260.0
COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518")
Speeds = dict[tuple[str, str], dict[int, float]]  # (whose, cache type) -> depth -> tokens/s


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("--types", default="f16,q8_0,q4_0", show_default=True, help="Cache types.")
@click.option("--depths", default="0,8192,16384", show_default=True, help="Tokens in the cache.")
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("-r", "--repetitions", default=8, show_default=True)
@click.option("--llama-bench", type=click.Path(exists=True), help="The peer's program.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw decode speed.")
def main(
    model: str, types: str, depths: str, threads: int, repetitions: int, llama_bench: str | None,
    svg: Path | None,
) -> None:  # fmt: skip
    """Print a table of speeds, ratios to the first type and to the peer."""
    kinds, places = types.split(","), sorted(int(n) for n in depths.split(","))
    decode, prompt = ours(model, kinds, places, threads, repetitions)
    for (_, kind), speeds in decode.items():
        for depth, speed in speeds.items():
            line = f"ours         {kind:7} depth {depth:6} decode {speed:8.2f} t/s"
            line += f"  {speed / decode['ours', kinds[0]][depth]:5.2f}x of {kinds[0]}"
            line += f"  prompt {prompt[kind][depth]:7.1f} t/s"
            print(line + f" {prompt[kind][depth] / prompt[kinds[0]][depth]:5.2f}x", flush=True)
    for kind in kinds if llama_bench else ():
        assert llama_bench is not None
        decode |= peer(llama_bench, model, kind, places, threads)
        for depth, speed in decode["llama-bench", kind].items():
            line = f"llama-bench  {kind:7} depth {depth:6} decode {speed:8.2f} t/s"
            print(line + f"  ours {decode['ours', kind][depth] / speed:5.2f}x", flush=True)
    if svg:
        svg.write_text(draw(decode, Path(model).name, threads), encoding="utf-8")


def ours(
    path: str, kinds: Sequence[str], depths: Sequence[int], threads: int, repetitions: int
) -> tuple[Speeds, dict[str, dict[int, float]]]:
    """Tokens/s of decoding and of a prompt, medians of turns."""
    context = depths[-1] + PROMPT + 64
    models = {k: runtime.load(path, kv_type=k, context=context, threads=threads) for k in kinds}
    sessions = {kind: model.session() for kind, model in models.items()}
    decode: Speeds = {("ours", kind): {} for kind in kinds}
    prompt: dict[str, dict[int, float]] = {kind: {} for kind in kinds}
    ids = [7 + n * 31 % 900 for n in range(PROMPT)]
    before = 0
    for depth in depths:
        for kind, session in sessions.items():
            for start in range(before, depth, PROMPT):
                session.eval(ids[: min(PROMPT, depth - start)], logits="last")
                print(f"\r{kind} {start} of {depth}   ", end="", file=sys.stderr)
        before = depth
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        with_prompt: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(repetitions):
            for kind, session in sessions.items():
                times[kind].append(timed(session, [5 + turn], 4))
                if turn % 3 == 0:
                    with_prompt[kind].append(timed(session, ids, 1))
        for kind in kinds:
            decode["ours", kind][depth] = 4 / statistics.median(times[kind])
            prompt[kind][depth] = PROMPT / statistics.median(with_prompt[kind])
    return decode, prompt


def timed(session: Any, ids: list[int], n: int) -> float:
    """Seconds of n steps of a fork."""
    with session.fork() as fork:
        fork.eval(ids[:1], logits="last")
        start = time.perf_counter()
        for _ in range(n):
            fork.eval(ids, logits="last")
        return time.perf_counter() - start


def peer(program: str, path: str, kind: str, depths: Sequence[int], threads: int) -> Speeds:
    """The same of llama-bench, which fills the cache anew for every depth."""
    print(f"\rllama-bench {kind}   ", end="", file=sys.stderr)
    command = [program, "-m", path, "-p", "0", "-n", "16", "-r", "2", "-t", str(threads), "-fa"]
    command += ["1", "-ctk", kind, "-ctv", kind, "-d", ",".join(map(str, depths)), "-o", "json"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {("llama-bench", kind): {row["n_depth"]: row["avg_ts"] for row in rows}}


def draw(decode: Speeds, name: str, threads: int) -> str:
    """Decode speed against depth: ours in whole lines, the peer's dashed."""
    out = Drawing()
    most = max(speed for speeds in decode.values() for speed in speeds.values()) * 1.08
    last = max(depth for speeds in decode.values() for depth in speeds) or 1
    left, top = 60.0, 60.0
    out.text(MARGIN, 26, f"{name}: tokens/s of decoding, {threads} threads", 15)
    out.rect(left, top, WIDTH, HEIGHT, "none", 'stroke="#c8ccd2"')
    for part in range(5):
        y, x = top + HEIGHT * (1 - part / 4), left + WIDTH * part / 4
        out.text(left - 34, y + 4, f"{most * part / 4:.0f}")
        out.text(x - 12, top + HEIGHT + 16, f"{last * part / 4:,.0f}")
        out.path(f"M{left},{y}H{left + WIDTH}", 'stroke="#e7e9ec"')
    kinds = list(dict.fromkeys(kind for _, kind in decode))
    ends: list[tuple[float, str, str]] = []
    for (whose, kind), speeds in decode.items():
        points = [
            (left + WIDTH * depth / last, top + HEIGHT * (1 - speed / most))
            for depth, speed in speeds.items()
        ]
        colour = COLOURS[kinds.index(kind) % len(COLOURS)]
        dash = "" if whose == "ours" else ' stroke-dasharray="5 4"'
        line = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.path(f"M{line}", f'stroke="{colour}" stroke-width="2"{dash}')
        ends.append((points[-1][1] + 4, f"{kind}, {whose}", colour))
    below = top + HEIGHT + 4.0
    for y, name_of_line, colour in sorted(ends, reverse=True):  # apart, from the lowest up
        below = min(y, below - 13)
        out.text(left + WIDTH + 8, below, name_of_line, more=f'fill="{colour}"')
    out.text(left, top + HEIGHT + 34, "tokens in the cache")
    out.width = left + WIDTH + 110
    return out.svg()


if __name__ == "__main__":
    main()
