"""Several requests at once: `runtime bench --parallel 1,4,16`, in llama-batched-bench's columns."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from runtime.cli.output import note
from runtime.cli.parsing import Refused
from runtime.report.requests_svg import Steps, picture

_COLUMNS = (
    ("PP", 6), ("TG", 6), ("B", 4), ("N_KV", 6), ("T_PP s", 8), ("S_PP t/s", 8), ("T_TG s", 8),
    ("S_TG t/s", 8), ("T s", 8), ("S t/s", 8),
)  # fmt: skip


class Rates(NamedTuple):
    """Of `requests` with `prompt` tokens each and `tokens` to generate: seconds up to the first
    token of the last of them, seconds in all, and how many tokens had been chosen by then."""

    prompt: int
    tokens: int
    requests: int
    first: float
    seconds: float
    begun: int

    @property
    def row(self) -> dict[str, float]:
        """By llama-batched-bench's names."""
        b, after = self.requests, self.seconds - self.first
        chosen = b * self.tokens
        total = b * (self.prompt + self.tokens)
        return {
            "pp": self.prompt, "tg": self.tokens, "pl": b, "n_kv": total, "t_pp": self.first,
            "speed_pp": b * self.prompt / self.first, "t_tg": after,
            "speed_tg": (chosen - self.begun) / after if after > 0 else 0.0,
            "t": self.seconds, "speed": total / self.seconds,
        }  # fmt: skip


def lines(
    models: Iterator[Any], counts: Sequence[int], sizes: tuple[Sequence[int], Sequence[int]],
    repetitions: int, output: str, timeline: str | None,
) -> Iterator[str]:  # fmt: skip
    """The table; timeline: where the last one is drawn. sizes: of prompts and of answers."""
    if output == "md":
        yield "|" + "|".join(f" {name:>{width}} " for name, width in _COLUMNS) + "|"
        yield "|" + "|".join("-" * (width + 1) + ":" for _, width in _COLUMNS) + "|"
    drawn = None
    for model in models:
        for prompt in sizes[0]:
            for tokens in sizes[1]:
                measured(model, max(counts), prompt, min(tokens, 4))  # kernels, memory
                for n in counts:
                    note(f"{n} requests of pp{prompt}+tg{tokens} ...")
                    runs = [measured(model, n, prompt, tokens) for _ in range(repetitions)]
                    best = sorted(runs, key=lambda run: run[0].seconds)[len(runs) // 2]
                    drawn = best[1]
                    yield _line(best[0], output)
    if timeline and drawn is not None:
        from runtime.outputs import write_text

        write_text(timeline, picture(drawn))
        note(f"what each request does in each step: {timeline}")


def _line(rates: Rates, output: str) -> str:
    row = rates.row
    if output == "jsonl":
        return json.dumps(row)
    cells = [f"{v:{w}d}" if isinstance(v, int) else f"{v:{w}.{3 if n.startswith('T') else 2}f}"
             for v, (n, w) in zip(row.values(), _COLUMNS, strict=True)]  # fmt: skip
    return "|" + "|".join(f" {cell} " for cell in cells) + "|"


def measured(model: Any, requests: int, prompt: int, tokens: int) -> tuple[Rates, Steps]:
    """Submit so many requests at once, each with a prompt of its own; what it takes."""
    import numpy as np

    random = np.random.default_rng(requests)
    prompts = random.integers(0, model.vocab_size, (requests, max(1, prompt))).tolist()
    steps = Steps(f"{requests} requests, pp{prompt}+tg{tokens}, {model.file.path.name}")
    options = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0, "spec": "off"}
    rounds = model._scheduler._rounds
    rounds.watched = steps.add
    try:
        began = time.perf_counter()
        handles = [model.submit(ids, **options) for ids in prompts]
        steps.begin(began, [handle._task for handle in handles])
        for handle in handles:
            handle.result()
        seconds = time.perf_counter() - began
    finally:
        rounds.watched = None
    first = max(handle._task.times[2] - handle._task.times[0] for handle in handles)
    begun = steps.tokens_until(began + first)
    return Rates(prompt, tokens, requests, first, seconds, begun), steps


def check(options: dict[str, Any], output: str) -> None:
    """Refused: what is not measured of several requests."""
    for name, option in (("n_pg", "-pg"), ("n_depth", "-d"), ("roofline", "--roofline")):
        if options[name]:
            raise Refused(f"{option} is not measured with --parallel; give -p and -n")
    if output not in ("md", "jsonl"):
        raise Refused("--parallel prints -o md or -o jsonl")
