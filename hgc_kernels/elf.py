"""Whether a compiled library is whole and for this machine, read from its ELF headers. The loader
itself kills the process where a file was cut short.
"""

from __future__ import annotations

import struct
from pathlib import Path

_MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}


def _machine(start: bytes) -> str:
    order = ">" if start[5] == 2 else "<"
    number = struct.unpack_from(order + "H", start, 18)[0]
    return _MACHINES.get(number, f"ELF machine {number}")


def fault(path: Path, alike: Path) -> str | None:
    """What is wrong with the library at `path`, or None. `alike` is one that this process loaded,
    so both must be for the same machine.
    """
    with alike.open("rb") as file:
        loaded = file.read(64)
    with path.open("rb") as file:
        start = file.read(64)
        if len(start) < 64 or start[:4] != b"\x7fELF":
            return f"{path} is no library ({path.stat().st_size} bytes)"
        # class, byte order and machine
        if (start[4:6], start[18:20]) != (loaded[4:6], loaded[18:20]):
            return f"{path} is for {_machine(start)}, and this process is {_machine(loaded)}"
        order = ">" if start[5] == 2 else "<"
        segments, sections = struct.unpack_from(order + "QQ", start, 32)
        segment_bytes, segment_count, section_bytes, section_count = struct.unpack_from(
            order + "4H", start, 54
        )
        file.seek(segments)
        table = file.read(segment_bytes * segment_count)
    size = path.stat().st_size
    ends = [segments + segment_bytes * segment_count, sections + section_bytes * section_count]
    for at in range(0, len(table) - 39, max(segment_bytes, 40)):
        offset, _, _, in_file = struct.unpack_from(order + "4Q", table, at + 8)
        ends.append(offset + in_file)
    if size < max(ends):
        return f"{path} is cut short: {size} of {max(ends)} bytes"
    return None
