"""What speculation is worth: answers with and without, one after the other, in a table.

    python scripts/speculation_table.py MODEL [--draft FILE] [--spec WAY] [-n TOKENS] [-r ROUNDS]

Each text is answered greedily and by chance, `-r` times in each way after one that does not count.
The figures are medians, of the pairs for the last column. Both answers have to be the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import runtime

CODE = '''class Stack:
    """Items of which the last one in is the first one out."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("peek at an empty stack")
        return self.items[-1]

    def size(self):
        return len(self.items)


def load_table(path, delimiter=","):
    """Read a table from a text file and return its header and its rows."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = next(reader)
        rows = [row for row in reader if row]
    return header, rows
'''
ARTICLE = """The harbour of the town was built in 1847, when the railway came to the coast. Before \
that, the fishing boats were pulled up on the beach by horses. The first pier was made of oak from \
the forests of the north and stood for thirty years, until the great storm of 1878 took half of it \
away. The second pier was made of iron and stone, and it stands to this day. In the years before \
the war more than two hundred boats landed their fish here every morning, and the market hall, \
which was opened in 1904, was the largest of its kind on the east coast. After the war the herring \
went away, and with them most of the boats. The market hall was closed in 1961 and stood empty for \
twenty years. Since 1983 it has been a museum of the sea, where visitors can see the last of the \
sailing boats, the engines of the ice factory and a collection of nets. Today the harbour lives on \
yachts and ferries. Every summer about four hundred thousand people come to the town, and most of \
them walk to the end of the iron pier to look at the lighthouse."""
STACK = CODE.partition("\n\n\ndef load_table")[0]
TASKS = {
    "rename a class": f"Here is a Python class:\n\n```python\n{CODE}```\n\n"
    "Rewrite it with the class renamed from Stack to Pile.",
    "rename a method": f"Here is a Python class:\n\n```python\n{STACK}\n```\n\n"
    "Rewrite it with the method `peek` renamed to `top`.",
    "add docstrings": "Add a docstring to every method of this class. Answer with the whole class."
    f"\n\n```python\n{STACK}\n```",
    "summarise": "Summarise this text in five sentences, quoting its own words.\n\n" + ARTICLE,
    "correct": "Repeat this text with its spelling corrected.\n\n"
    + ARTICLE.replace("harbour", "harbuor").replace("boats", "botas"),
    "story": "Write a story about a fox who learns to sail.",
    "explain": "Explain why the sky is blue.",
}
CHOICES: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "seed 1": {"seed": 1}}


def answered(model: runtime.Model, text: str, **options: Any) -> tuple[float, Any]:
    """Tokens of a second behind the first one, and the answer."""
    times: list[float] = []
    answer = model.chat(text, on_token=lambda _: times.append(time.perf_counter()), **options)
    if not answer.text:
        print("an empty answer", file=sys.stderr)
    return (len(times) - 1) / max(times[-1] - times[0], 1e-9), answer


def line(model: runtime.Model, name: str, choice: str, args: argparse.Namespace) -> str:
    """A row of the table."""
    options = {"max_tokens": args.n, **CHOICES[choice]}
    pairs, done = [], None
    for n in range(args.r + 1):
        without, plain = answered(model, TASKS[name], spec="off", **options)
        faster, answer = answered(model, TASKS[name], spec=args.spec, **options)
        assert (answer.tokens, answer.text) == (plain.tokens, plain.text), "the answers differ"
        done = answer.speculation
        if n:
            pairs.append((without, faster))
    drafted, accepted = (done.drafted, done.accepted) if done is not None else (0, 0)
    share = f"{accepted / drafted:.0%}" if drafted else "-"
    a, b = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratio = statistics.median(y / x for x, y in pairs)
    tokens = len(answer.tokens)
    return (
        f"| {name} | {choice} | {tokens} | {drafted} | {share} | {a:.1f} | {b:.1f} | {ratio:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--draft")
    parser.add_argument("--spec", default="auto")
    parser.add_argument("-n", type=int, default=256)
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("-c", "--context", type=int, default=2048)
    args = parser.parse_args()
    print("| text | chosen | tokens | drafted | accepted | t/s without | t/s with | ratio |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    with runtime.load(args.model, draft=args.draft, context=args.context, progress=False) as model:
        for name in args.task or TASKS:
            for choice in CHOICES:
                print(line(model, name, choice, args), flush=True)


if __name__ == "__main__":
    main()
