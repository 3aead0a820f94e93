"""What the peers print, as rows, and how true it is: parsers, the join that a user would write, the score. Pure.

A row is of a client's connection: its own address and port, the port that it dialled, where it went ("" if the tool
does not say), and whether the process is told.
"""

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One connection, as a tool tells it."""

    src: str
    src_port: int
    dst_port: int
    backend: str
    process: bool


class Accepted(NamedTuple):
    """One connection, as the server that accepted it tells it."""

    src: str
    src_port: int
    dst_port: int
    backend: str


@dataclass(frozen=True)
class Score:
    """Of `connections` accepted: rows that are missing, rows of no connection (or a second of one), rows that name
    another backend than accepted, that name none, and that do not tell the process."""

    connections: int
    missing: int
    extra: int
    wrong: int
    unresolved: int
    anonymous: int


_ENTRY = re.compile(
    r"\[NEW\] tcp +6 .*? src=(\S+) dst=\S+ sport=(\d+) dport=(\d+) (?:\[UNREPLIED\] )?src=(\S+) dst=\S+ sport="
)
_STAMP = re.compile(r"^\[(\d+\.\d+)")


def tcplife(lines: Iterable[str], ports: frozenset[int]) -> Iterator[Row]:
    """`tcplife -s`: PID,COMM,IP,LADDR,LPORT,RADDR,RPORT,TX_KB,RX_KB,MS. Those that dialled one of `ports`."""
    for line in lines:
        field = line.strip().split(",")
        if len(field) == 10 and field[6].isdigit() and int(field[6]) in ports:
            yield Row(field[3], int(field[4]), int(field[6]), "", field[0] != "0")


def tcpstates(lines: Iterable[str], ports: frozenset[int]) -> Iterator[Row]:
    """`tcpstates -s`: SKADDR,C-PID,C-COMM,IP,LADDR,LPORT,RADDR,RPORT,OLDSTATE,NEWSTATE,MS. A row per connection: its
    end. Whose process is at work at that moment says nothing, but SYN_SENT, which the same socket had, tells."""
    dialled: set[str] = set()
    for line in lines:
        field = line.strip().split(",")
        if len(field) != 11 or not field[7].isdigit() or int(field[7]) not in ports:
            continue
        if field[9] == "SYN_SENT":
            dialled.add(field[0])
        elif field[9] == "CLOSE":
            yield Row(field[4], int(field[5]), int(field[7]), "", field[0] in dialled)
            dialled.discard(field[0])


def conntrack(lines: Iterable[str], ports: frozenset[int]) -> Iterator[Row]:
    """`conntrack -E`: those entries that are new, whose original destination is one of `ports`."""
    for line in lines:
        found = _ENTRY.search(line)
        if found and int(found[3]) in ports:
            yield Row(found[1], int(found[2]), int(found[3]), found[4], False)


def joined(lives: Iterable[str], entries: Iterable[str], ports: frozenset[int]) -> Iterator[Row]:
    """What a user writes today: each line of `tcplife -t -s` (which has the seconds since the first as its first field)
    goes with the next entry of its tuple. By order, because the two clocks have nothing in common.
    """
    began: dict[tuple[str, int, int], list[tuple[float, str]]] = defaultdict(list)
    for line in entries:
        found, stamp = _ENTRY.search(line), _STAMP.match(line)
        if found and stamp:
            began[found[1], int(found[2]), int(found[3])].append((float(stamp[1]), found[4]))
    for one in began.values():
        one.sort(reverse=True)
    for row in tcplife((line.partition(",")[2] for line in lives), ports):
        known = began.get((row.src, row.src_port, row.dst_port))
        yield row._replace(backend=known.pop()[1] if known else "")


def score(rows: Iterable[Row], accepted: Iterable[Accepted]) -> Score:
    """Rows against what the servers accepted, each row counting once; of one tuple used twice, rows go to what they
    name."""
    waiting: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    connections = 0
    for one in accepted:
        bisect.insort(waiting[one.src, one.src_port, one.dst_port], one.backend)
        connections += 1
    count = Counter[str]()
    for row in sorted(rows, key=lambda row: row.backend == ""):  # those that name a backend choose first
        left = waiting.get((row.src, row.src_port, row.dst_port))
        if not left:
            count["extra"] += 1
            continue
        count["wrong"] += bool(row.backend) and row.backend not in left
        left.remove(row.backend if row.backend in left else left[0])
        count["unresolved"] += not row.backend
        count["anonymous"] += not row.process
    missing = sum(map(len, waiting.values()))
    return Score(connections, missing, count["extra"], count["wrong"], count["unresolved"], count["anonymous"])
