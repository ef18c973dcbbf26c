"""Names an object file needs from outside: ELF, Mach-O and COFF symbol tables, 64-bit, read here.

Formats: System V ABI chapter 4 (ELF), Apple's <mach-o/loader.h> and <mach-o/nlist.h>, Microsoft's
PE/COFF specification. Only what an object just made by LLVM contains is understood.
"""

from __future__ import annotations

import struct

from runtime.ops.errors import BackendError

_SHT_SYMTAB = 2
_LC_SYMTAB = 2
_MACH_O_64 = b"\xcf\xfa\xed\xfe"
_COFF_MACHINES = (0x8664, 0xAA64)


def undefined_symbols(code: bytes) -> set[str]:
    """Names of the symbols that the object file `code` uses and does not define.

    Raises BackendError when the bytes are not an object file (a damaged cache entry, say).
    """
    try:
        if code[:4] == b"\x7fELF":
            return _elf(code)
        if code[:4] == _MACH_O_64:
            return _mach_o(code)
        if struct.unpack_from("<H", code)[0] in _COFF_MACHINES:
            return _coff(code)
    except (struct.error, IndexError, ValueError) as error:
        raise BackendError(f"damaged object file ({error}): delete the kernel cache") from None
    raise BackendError("not an object file: delete the kernel cache")


def _elf(code: bytes) -> set[str]:
    (table,) = struct.unpack_from("<Q", code, 0x28)
    entry_size, count = struct.unpack_from("<HH", code, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", code, table + i * entry_size) for i in range(count)
    ]
    names: set[str] = set()
    for _, kind, _, _, offset, size, link, _, _, step in sections:
        if kind != _SHT_SYMTAB:
            continue
        strings = sections[link][4]
        for at in range(offset + step, offset + size, step):  # the first symbol is a null entry
            name, _, _, section = struct.unpack_from("<IBBH", code, at)
            if section == 0:
                names.add(_text(code, strings + name))
    return names


def _mach_o(code: bytes) -> set[str]:
    (n_commands,) = struct.unpack_from("<I", code, 16)
    at, names = 32, set()
    for _ in range(n_commands):
        command, size = struct.unpack_from("<II", code, at)
        if command == _LC_SYMTAB:
            symbols, count, strings = struct.unpack_from("<III", code, at + 8)
            for entry in range(symbols, symbols + 16 * count, 16):
                name, kind = struct.unpack_from("<IB", code, entry)
                if kind & 0x0E == 0 and kind & 0xE0 == 0:
                    names.add(_text(code, strings + name).removeprefix("_"))
        at += size
    return names


def _coff(code: bytes) -> set[str]:
    symbols, count = struct.unpack_from("<II", code, 8)
    strings, names, i = symbols + 18 * count, set(), 0
    while i < count:
        at = symbols + 18 * i
        _, section, _, storage, n_aux = struct.unpack_from("<IhHBB", code, at + 8)
        if section == 0 and storage == 2:
            zero, offset = struct.unpack_from("<II", code, at)
            short = code[at : at + 8].rstrip(b"\0").decode("ascii")
            names.add(short if zero else _text(code, strings + offset))
        i += 1 + n_aux
    return names


def _text(code: bytes, at: int) -> str:
    return code[at : code.index(b"\0", at)].decode("utf-8")
