"""Which argument of a compiled kernel is loaded in what widths, read from its PTX."""

import re
from collections.abc import Iterator, Sequence

_LOAD = re.compile(r"\bld\.global(?:\.\w+|::\w+)*?(?:\.v(\d))?\.[bsuf](\d+)\s+[^\[]*\[\s*(%\w+)")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[\s*(%\w+)[^]]*\],\s*(0x[0-9a-f]+|\d+)")
_PARAMETER = re.compile(r"\bld\.param\.\w+\s+(%\w+),\s*\[\w+_param_(\d+)\]")
_DEFINITION = re.compile(r"^\s*(?:@!?%\w+\s+)?[a-z]\S*\s+(%rd?\d+),\s*(.*);")


def load_bits(ptx: str, arguments: Sequence[str]) -> dict[str, list[int]]:
    """Bits of each load from global memory, by argument, in the order of the text.

    `arguments` are the names of those that are no constants, which is how PTX numbers them. An address is followed back
    through the registers that it is made of to the pointers among the arguments.
    """
    sources: dict[str, set[str]] = {}
    pointers: dict[str, str] = {}
    for line in ptx.splitlines():
        if found := _PARAMETER.search(line):
            if found[1].startswith("%rd") and int(found[2]) < len(arguments):
                pointers[found[1]] = arguments[int(found[2])]
        elif (found := _DEFINITION.match(line)) and not _LOAD.search(line):
            sources.setdefault(found[1], set()).update(re.findall(r"%rd?\d+", found[2]))
    named = set(re.findall(r"\.ptr \.global[^,\n]*_param_(\d+)", ptx))
    globals_ = {arguments[int(number)] for number in named if int(number) < len(arguments)}
    bits: dict[str, list[int]] = {}
    for address, width in _loads(ptx):
        for name in sorted(_reached(address, sources, pointers) & globals_):
            bits.setdefault(name, []).append(width)
    return bits


def _loads(ptx: str) -> Iterator[tuple[str, int]]:
    """(address register, bits) of each."""
    for line in ptx.splitlines():
        if found := _LOAD.search(line):
            yield found[3], int(found[1] or 1) * int(found[2])
        elif found := _COPY.search(line):
            yield found[1], 8 * int(found[2], 0)


def _reached(address: str, sources: dict[str, set[str]], pointers: dict[str, str]) -> set[str]:
    seen, left = set(), [address]
    while left:
        register = left.pop()
        if register not in seen:
            seen.add(register)
            left += sources.get(register, ())
    return {pointers[register] for register in seen if register in pointers}
