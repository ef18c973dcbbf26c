"""What a file is that is no GGUF file, and what to do about it."""

from __future__ import annotations

import string
import struct

HEAD = 4096  # bytes that are looked at

_CONVERT = "convert the model with llama.cpp's convert_hf_to_gguf.py"
_OLD = "convert the original model again with a current converter"
_UNPACK = "unpack it first"
_OTHER_FILE = "give the path of the model's .gguf file"

# beginning of the file -> what it is, what to do
_MAGIC: dict[bytes, tuple[str, str]] = {
    b"lmgg": ("a GGML file from before GGUF", _OLD),
    b"tjgg": ("a GGJT file from before GGUF", _OLD),
    b"fmgg": ("a GGMF file from before GGUF", _OLD),
    b"algg": ("a GGLA adapter from before GGUF", _OLD),
    b"PK\x03\x04": ("a PyTorch or zip file", f"unpack it, or {_CONVERT}"),
    b"\x80\x02": ("a Python pickle (a PyTorch checkpoint)", _CONVERT),
    b"\x80\x04": ("a Python pickle (a PyTorch checkpoint)", _CONVERT),
    b"\x89HDF": ("an HDF5 file", _CONVERT),
    b"\x1f\x8b": ("compressed with gzip", _UNPACK),
    b"\xfd7zXZ": ("compressed with xz", _UNPACK),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\x7fELF": ("a program", _OTHER_FILE),
    b"MZ": ("a program (perhaps a llamafile)", _OTHER_FILE),
    b"%PDF": ("a PDF document", _OTHER_FILE),
    b"\x89PNG": ("a picture", _OTHER_FILE),
    b"\xff\xd8\xff": ("a picture", _OTHER_FILE),
    b"SQLite format 3": ("a database", _OTHER_FILE),
}
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")
_AGAIN = "download the file itself"
_POINTER = b"version https://git-lfs.github.com/spec/"


def describe(head: bytes, size: int) -> tuple[str, str]:
    """(what a file of `size` bytes is that begins with `head` and not with "GGUF", what to do)."""
    if head[:4] == b"FUGG":
        return "a big-endian GGUF file", "convert it with gguf-py's gguf_convert_endian.py"
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    for magic, answer in _MAGIC.items():
        if head.startswith(magic):
            return answer
    if _is_safetensors(head, size):
        return "a safetensors file", "convert its folder with 'runtime convert FOLDER OUT.gguf'"
    if not head.strip(b"\0"):
        return "filled with zeros, a download that did not finish", "download it again"
    return (
        stand_in(head)
        or _text(head)
        or (f"not a GGUF file (it starts with {head[:4]!r})", _OTHER_FILE)
    )


def _is_safetensors(head: bytes, size: int) -> bool:
    """A length of 8 bytes, then that much JSON."""
    if len(head) < 10:
        return False
    return head[8:9] == b"{" and 2 <= struct.unpack_from("<Q", head)[0] <= size - 8


def stand_in(head: bytes) -> tuple[str, str] | None:
    """As `describe`, of a text that downloads leave in place of a file; None if it is none."""
    begin = _begin(head)
    if begin.lower().startswith(_PAGES):
        return "a web page (HTML)", f"{_AGAIN}, not the page about it (/resolve/, not /blob/)"
    if begin.startswith(_POINTER):
        return "a git-LFS pointer", f"fetch what it stands for with `git lfs pull`, or {_AGAIN}"
    return None


def _begin(head: bytes) -> bytes:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def _text(head: bytes) -> tuple[str, str] | None:
    """What kind of text this is; None if it is none."""
    text = head.decode("utf-8", "replace")
    printable = sum(c in string.printable or c.isalpha() for c in text)
    if printable < 0.95 * len(text):
        return None
    shown = ascii(" ".join(text.split())[:60])
    return f"{'JSON' if _begin(head)[:1] in (b'{', b'[') else 'a text file'}: {shown}", _AGAIN
