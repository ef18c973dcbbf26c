"""Special ids, what is added to a text, merges and chat templates, as in llama.cpp's files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.conversion.checkpoint import Checkpoint
from runtime.conversion.config import Config
from runtime.ops.errors import TextError

_NAMES = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding",
    "mask": "mask", "eot": "eot",
}  # fmt: skip
_TOLD = (*tuple(_NAMES)[:-1], "cls")  # that tokenizer_config.json gives the texts of
_ADDS = ("bos", "eos", "sep")


def special_keys(
    checkpoint: Checkpoint, spec: Mapping[str, Any] | None, settings: Mapping[str, Any],
    config: Config, merges: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Keys behind those of the tokens. spec, settings: what tokenizer.json and
    tokenizer_config.json hold."""
    texts = {name: _text(settings.get(f"{name}_token")) for name in _TOLD}
    adds = _adds(spec, texts) if spec else {}
    for name in _ADDS:
        told = settings.get(f"add_{name}_token")
        if isinstance(told, bool):
            adds.setdefault(name, told)
    found: dict[str, Any] = {"tokenizer.ggml.merges": list(merges)} if merges else {}
    for name, number in _ids(spec, texts, config).items():
        found[f"tokenizer.ggml.{_NAMES[name]}_token_id"] = number
    found |= {f"tokenizer.ggml.add_{name}_token": add for name, add in adds.items()}
    return found | _templates(checkpoint, settings)


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _ids(
    spec: Mapping[str, Any] | None, texts: Mapping[str, str | None], config: Config
) -> dict[str, int]:
    """By the texts that tokenizer_config.json gives, else by the ids of config.json."""
    added = {t["content"]: t["id"] for t in reversed((spec or {}).get("added_tokens") or [])}
    found = {name: added[text] for name, text in texts.items() if name in _NAMES and text in added}
    for name in _NAMES:
        number = config.get(f"{name}_token_id")
        if type(number) is int and 0 <= number < config.size("vocab_size"):
            found.setdefault(name, number)
    return found


def _adds(spec: Mapping[str, Any], texts: dict[str, str | None]) -> dict[str, bool]:
    """What the post-processor of tokenizer.json puts around a text. Completes `texts` by it."""
    found: dict[str, bool] = {}
    steps = spec.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "ByteLevel":
            found = {"bos": False, "eos": False} | found
        if step.get("type") == "TemplateProcessing":
            single = [_special(item) for item in step.get("single") or []]
            first, last = (single[0], single[-1]) if len(single) > 1 else (None, None)
            if first:
                if first != texts["bos"] and not texts["bos"]:
                    texts["bos"] = first
                found["bos"] = first in (texts["bos"], texts["cls"])
            if last:
                if last != texts["eos"]:
                    # the one that ends texts, and the one that ends turns
                    texts["eot"], texts["eos"] = texts["eos"], last
                found["eos"] = True
            between = _between(step.get("pair") or [], first, last)
            if between:
                found["sep"] = not last and between[0] in (texts["sep"], texts["eos"])
    return found


def _special(item: Mapping[str, Any]) -> str | None:
    """The text of a special token in a template; None for a sequence."""
    return (item.get("SpecialToken") or {}).get("id")


def _between(pair: Sequence[Mapping[str, Any]], first: str | None, last: str | None) -> list[Any]:
    """What a template puts between two texts."""
    items = list(pair)
    if items and first and _special(items[0]) == first:
        items = items[1:]
    if items and last and _special(items[-1]) == last:
        items = items[:-1]
    return [_special(item) for item in items[1:-1]]


def _templates(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of chat templates, those of files where tokenizer_config.json has none."""
    found = settings.get("chat_template")
    if found is None and (found := checkpoint.text("chat_template.jinja")) is not None:
        others = sorted(checkpoint.folder.glob("additional_chat_templates/*.jinja"))
        if others:
            more = [{"name": p.stem, "template": p.read_text("utf-8")} for p in others]
            found = [{"name": "default", "template": found}, *more]
    if found is None:
        found = (checkpoint.json("chat_template.json") or {}).get("chat_template")
    if found is None or isinstance(found, str):
        return {} if found is None else {"tokenizer.chat_template": found}
    try:
        named = {_plain(entry["name"]): str(entry["template"]) for entry in found}
    except (TypeError, KeyError):
        raise TextError(
            f"{checkpoint.folder / 'tokenizer_config.json'}: chat_template is neither a text nor "
            "a list of named ones"
        ) from None
    default = named.pop("default", None)
    keys: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    keys |= {"tokenizer.chat_templates": list(named)} if named else {}
    return keys | ({} if default is None else {"tokenizer.chat_template": default})


def _plain(name: str) -> str:
    return re.sub("[^A-Za-z0-9]", "_", name)
