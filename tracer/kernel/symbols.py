"""What is put into compiled programs when they are loaded: map descriptors, and values that differ from run to run.

The sources name them as -D symbols (bpf/symbols.h). The compiler turns each use into the one instruction that loads 64
bits (BPF_LD | BPF_IMM | BPF_DW, two slots; Documentation/bpf/standardization/instruction-set.rst), which is found here
by the symbol it holds.
"""

from collections.abc import Mapping
from dataclasses import fields

import numpy as np

from tracer.errors import TracerError
from tracer.kernel.maps import Maps

#: Values that a program reads, by the name that the sources have for them.
VALUES = ("NODE_NETNS", "RUN_ID", "RING_BYTES", "YOUNG_SLOTS")

_MAPS = tuple(field.name for field in fields(Maps))
_INSTRUCTION = np.dtype([("code", "u1"), ("registers", "u1"), ("offset", "<i2"), ("immediate", "<u4")])
_LOAD_64, _PSEUDO_MAP_FD = 0x18, 1
_FIRST_MAP = 0x56540000  # no descriptor is that large
_FIRST_VALUE = 0x5654_0000_5654_0000  # no constant of the programs is in its neighbourhood


def defines() -> dict[str, int]:
    """The symbols, for -D: NAME_FD for each map, NAME_SYMBOL for each value."""
    maps = {f"{name.upper()}_FD": _FIRST_MAP + place for place, name in enumerate(_MAPS)}
    return maps | {f"{name}_SYMBOL": _FIRST_VALUE + place for place, name in enumerate(VALUES)}


def resolve(instructions: bytes, maps: Mapping[str, int], values: Mapping[str, int]) -> bytes:
    """The instructions with descriptors and values in the place of symbols.

    Args:
        instructions: as the compiler made them.
        maps: descriptors by map name, all of them.
        values: by name, all of VALUES; unsigned, up to 64 bits.

    Raises:
        TracerError: a map that is none of ours.
    """
    code = np.frombuffer(instructions, _INSTRUCTION).copy()
    # The second slot of such an instruction has opcode 0.
    (loads,) = np.nonzero(code["code"] == _LOAD_64)
    immediate = code["immediate"]
    of_map = code["registers"][loads] >> 4 == _PSEUDO_MAP_FD
    numbers = immediate[loads[of_map]].astype(np.int64) - _FIRST_MAP
    if np.any((numbers < 0) | (numbers >= len(_MAPS))):
        raise TracerError("A compiled program names an unknown map: remove the directory of compiled programs.")
    descriptors = np.array([maps[name] for name in _MAPS], np.uint32)
    immediate[loads[of_map]] = descriptors[numbers]
    plain = loads[~of_map]
    words = immediate[plain].astype(np.uint64) | immediate[plain + 1].astype(np.uint64) << np.uint64(32)
    for place, name in enumerate(VALUES):
        where = plain[words == _FIRST_VALUE + place]
        immediate[where], immediate[where + 1] = values[name] & 0xFFFFFFFF, values[name] >> 32
    return code.tobytes()
