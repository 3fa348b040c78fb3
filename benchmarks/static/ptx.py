"""Which argument of a kernel each load of its PTX reads, and how wide: pointers are followed from the parameters on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_POINTER = re.compile(r"\.param \.u64 \.ptr .*_param_(\d+)")
_PARAM = re.compile(r"(?:ld\.param\.[bu]64|mov\.[bu](?:32|64))\s+(%\w+), \[?\w+_param_(\d+)\]?;")  # its value, or where it lies
_LOAD = re.compile(r"ld\.global([\w.:]*)\s+(?:\{[^}]*\}|%\w+), \[\s*(%\w+)")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^]]*\], \[\s*(%\w+)[^]]*\], (0x[0-9a-f]+|\d+)")
_MOVES = re.compile(r"(?:add|sub|mov|cvta|mad|selp|ld\.param)[\w.:]*\s+(%rd?\d+), (.*);")
_REGISTER = re.compile(r"%rd?\d+")


def loads_by_argument(ptx: str, arguments: Sequence[str]) -> dict[str, Counter[int]]:
    """Bytes that the load instructions fetch a thread, by argument and by width in bits.

    Args:
        ptx: text of a kernel.
        arguments: names of its parameters in order; parameters beyond them are the compiler's own.

    Returns:
        One entry for each argument that is read; "a|b" where one instruction reads a or b.
    """
    pointers = set(map(int, _POINTER.findall(ptx)))
    lines = [line for line in ptx.splitlines() if "%" in line]
    origin: dict[str, frozenset[int]] = {}
    for line in lines:
        if (found := _PARAM.search(line)) and int(found[2]) in pointers:
            origin[found[1]] = frozenset([int(found[2])])
    while _follow(lines, origin):
        pass
    loads: dict[str, Counter[int]] = {}
    for line in lines:
        if found := _LOAD.search(line):
            register, size = found[2], _bytes(found[1])
        elif found := _COPY.search(line):
            register, size = found[1], int(found[2], 0)
        else:
            continue
        at = sorted(origin.get(register, ()))
        name = "|".join(arguments[i] for i in at if i < len(arguments)) or "?"
        loads.setdefault(name, Counter())[size * 8] += size
    return loads


def _follow(lines: Sequence[str], origin: dict[str, frozenset[int]]) -> bool:
    """One pass over the instructions that make addresses of addresses; whether anything was learnt."""
    learnt = False
    for line in lines:
        if not (found := _MOVES.search(line)):
            continue
        before = origin.get(found[1], frozenset())
        after = before.union(*(origin.get(r, frozenset()) for r in _REGISTER.findall(found[2])))
        if after != before:
            origin[found[1]] = after
            learnt = True
    return learnt


def _bytes(modifiers: str) -> int:
    """Bytes of an ordinary load: `.v4.b32` is 16."""
    vector, bits = re.search(r"\.v(\d)", modifiers), re.search(r"\.[bfsu](\d+)$", modifiers)
    return (int(vector[1]) if vector else 1) * int(bits[1] if bits else 0) // 8
