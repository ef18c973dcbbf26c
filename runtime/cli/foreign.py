"""Options of llama.cpp's programs that have no meaning of their own here.

What would not change an answer is accepted, with one line where the user may have expected
something else; what would change it is refused. None is ever read as something else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from runtime.missing import NO_DOWNLOAD, fetch

# The words that may follow an option whose value is optional.
_SWITCH = frozenset(("on", "off", "auto", "0", "1", "-1", "true", "false", "enabled", "disabled"))


@dataclass(frozen=True)
class Foreign:
    """An option of another program. `values`: 0 none, 1 one, -1 one if it is on, off or like."""

    line: str
    values: int = 0
    refused: bool = False

    def value(self, rest: deque[str]) -> str | None:
        """The option's value, taken from the words that follow it."""
        if not rest or not self.values:
            return None
        if self.values < 0 and rest[0] not in _SWITCH:
            return None
        return rest.popleft()

    def says(self, name: str, value: str | None) -> str:
        """What is said about it; "" for nothing."""
        if self.line == _FETCH and value:
            return f"{name}: {fetch(value)}"
        return self.line.format(name=name, value=value)


def _rows() -> dict[str, Foreign]:
    found: dict[str, Foreign] = {}
    for names, values, line in (*_SILENT, *_ACCEPTED):
        found |= dict.fromkeys(names.split(), Foreign(line, values))
    for names, values, line in _REFUSED:
        found |= dict.fromkeys(names.split(), Foreign(line, values, refused=True))
    return found


# names, values, nothing to say: they ask for what is done anyway
_SILENT = (
    ("--jinja --offline --perf --show-timings --simple-io --log-disable", 0, ""),
    ("--no-display-prompt --no-escape --no-mmproj --no-mmproj-auto --cache-prompt", 0, ""),
    ("--warmup --progress -cb --cont-batching -kvu --kv-unified --no-log-prefix", 0, ""),
    ("--no-log-timestamps --skip-chat-parsing --repack", -1, ""),
    ("--log-colors", 1, ""),
)

_ON_CPU = "{name}: models run on the CPU here, all layers and experts with them"
_PLACED = "{name} has no effect: the system places the threads (-t says how many)"
_PACKED = "{name} has no effect: weights are packed into memory of their own when a model is loaded"
_SHOWN = "DEBUG=1 to 4 shows what is computed"
_NOTHING = "{name} has no effect here"

_SPLIT = "{name} has no effect here: it is an option of the commands that run a model, and of plan"

_CACHE = "{name} has no effect here: runtime inspect shows the memory of every type"

_ACCEPTED = (
    ("-ctk --cache-type-k -ctv --cache-type-v --kv-type", 1, _CACHE),
    ("--no-cache-rotation", 0, "{name} has no effect here: it is an option of what runs a model"),
    ("-dev --devices --device -sm --split-mode -ts --tensor-split", 1, _SPLIT),
    ("-mg --main-device --main-gpu", 1, _SPLIT),
    ("-ngl --gpu-layers --n-gpu-layers -ncmoe --n-cpu-moe", 1, _SPLIT),
    ("-cmoe --cpu-moe", 0, _SPLIT),
    ("-ncffn --n-cpu-ffn", 1, _ON_CPU),
    ("-ot --override-tensor -fitt --fit-target -fitc --fit-ctx", 1, _ON_CPU),
    ("-nkvo --no-kv-offload -kvo --kv-offload -nopo --no-op-offload --op-offload", -1, _ON_CPU),
    ("--no-host", -1, _ON_CPU),
    ("-fa --flash-attn", -1, "{name}: attention is always computed flash-style here"),
    ("--no-mmap --mmap -mmp --mlock -dio --direct-io --no-direct-io", -1, _PACKED),
    ("-lm --load-mode -lzm --lazy-mode", 1, _PACKED),
    ("-nr --no-repack", 0, "{name} has no effect: weights are always packed for the processor"),
    ("--numa", 1, "{name} has no effect: --devices numa uses each NUMA node as a device"),
    ("--prio --prio-batch --poll --poll-batch -C --cpu-mask -Cr --cpu-range", 1, _PLACED),
    ("-Cb --cpu-mask-batch -Crb --cpu-range-batch --cpu-strict --cpu-strict-batch", 1, _PLACED),
    ("-tb --threads-batch", 1, "{name} has no effect: prompts and answers use the threads of -t"),
    ("--no-jinja", 0, "{name} has no effect: chat templates are always the file's own, in Jinja"),
    ("--no-perf --no-show-timings", 0, "{name}: -q leaves the timings out"),
    (
        "-b --batch-size -ub --ubatch-size",
        1,
        "{name} has no effect: prompts are read 512 tokens at a time, which changes no result",
    ),
    ("--no-warmup", 0, "{name} has no effect: nothing is warmed up before an answer"),
    ("--swa-full --check-tensors", 0, _NOTHING),
    ("--keep -np --parallel -dt --defrag-thold -ctxcp --ctx-checkpoints", 1, _NOTHING),
    ("-cms --checkpoint-min-step --cache-reuse", 1, _NOTHING),
    (
        "--context-shift --no-context-shift",
        0,
        "{name}: a full conversation forgets its oldest messages",
    ),
    ("-mli --multiline-input", 0, '{name}: begin and end a message of several lines with """'),
    (
        "--draft-n --draft-max --draft-min --draft-n-min --draft-p-min",
        1,
        "{name} has no effect: drafts are as long as pays on this machine",
    ),
    ("--max-buffer-size", 1, "{name} has no effect: memory does not grow with the file"),
    ("-v --verbose --log-verbose", 0, f"{{name}}: {_SHOWN}"),
    ("-lv --verbosity --log-verbosity --log-file", 1, f"{{name}} has no effect: {_SHOWN}"),
)

_FETCH = f"{{name}}: {NO_DOWNLOAD}; give the path of a .gguf file"
_NOT_HERE = "{name} is not supported in this version"
_ROPE = "{name} is not supported: rope is scaled as the model's file says"

_REFUSED = (
    ("-hf -hfr --hf-repo", 1, _FETCH),
    ("-hff --hf-file -hft --hf-token", 1, _FETCH),
    ("-mu --model-url", 1,
     f"{{name}}: {NO_DOWNLOAD}; fetch {{value}} with curl -LO, then give the file"),
    ("--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx", 1, _ROPE),
    ("--yarn-ext-factor --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast", 1, _ROPE),
    ("-gan --grp-attn-n -gaw --grp-attn-w", 1, _NOT_HERE),
    ("--lora --lora-scaled --control-vector --control-vector-scaled", 1,
     "{name} is not supported: merge adapters into the model's file first"),
    ("-mm --mmproj -mmu --mmproj-url --image --audio --video", 1,
     "{name} is not supported: models read text alone in this version"),
    ("-hfd -hfrd --hf-repo-draft", 1,
     f"{{name}}: {NO_DOWNLOAD}; fetch the draft model, then give its file with --draft"),
    ("--spec-type", 1, "{name} is not supported: --spec says who drafts"),
    ("-ngld --gpu-layers-draft", 1,
     "{name} is not supported: the draft model runs where the model does"),
    ("--chat-template --chat-template-file --chat-template-kwargs", 1,
     "{name} is not supported: the template is the one in the model's file (--raw uses none)"),
    ("-rea --reasoning --reasoning-format --reasoning-effort --reasoning-budget", 1, _NOT_HERE),
    ("--prompt-cache -lcs --lookup-cache-static -lcd --lookup-cache-dynamic", 1,
     "{name} is not supported: /save and /load keep a conversation"),
    ("--override-kv", 1, "{name} is not supported: what the file says is what is run"),
    ("--keep-split", 0, "{name} is not supported: the new model is one file"),
    ("--prune-layers --include-weights --exclude-weights", 1, _NOT_HERE),
    ("--adaptive-target --adaptive-decay", 1, _NOT_HERE),
    ("--sampler-seq --sampling-seq", 1, "{name} is not supported: name them with --samplers"),
    ("--in-prefix --in-suffix -bf --binary-file -ptc --print-token-count --rpc -rpc", 1,
     _NOT_HERE),
    ("-oe --output-err", 1, "{name} is not supported: use -o, and 2> for the rest"),
    ("--in-prefix-bos --spm-infill -bs --backend-sampling --mtp --prompt-cache-all -sp", 0,
     _NOT_HERE),
    ("--special --prompt-cache-ro --verbose-prompt --completion-bash -cl --cache-list", 0,
     _NOT_HERE),
    ("-embd --embeddings --embedding", -1,
     "{name} is not supported: Model.eval gives logits, embeddings are not in this version"),
    ("--list-devices", 0, "{name}: 'runtime devices' shows them"),
    ("--outfile", 1, "{name}: give the new file's name without it, behind the folder"),
    ("--host --port --api-key", 1, "{name}: there is no server in this version"),
)  # fmt: skip

OPTIONS = _rows()
