"""What the tools tell, as rows, and how true it is: parsers, the join that a user would write, the score. Pure.

A row is of a client's connection: its own address and port, the port that it dialled, where it went ("" if the tool
does not say), whose it was (0 if the tool does not say), and whether it tells of the beginning, of the end, or of both.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import NamedTuple


class Of(Flag):
    """What of a connection's life a row tells."""

    BEGINNING = auto()
    END = auto()
    WHOLE = BEGINNING | END


class Row(NamedTuple):
    """One connection, or one end of its life, as a tool tells it."""

    src: str
    src_port: int
    dst_port: int
    backend: str
    pid: int
    of: Of = Of.WHOLE


class Accepted(NamedTuple):
    """One connection, as the server that accepted it tells it."""

    src: str
    src_port: int
    dst_port: int
    backend: str


@dataclass(frozen=True)
class Score:
    """Of `connections`: those whose beginning, whose end no row tells; rows of no connection (or a second of one);
    of rows that tell a beginning, those with another backend than accepted, or with none, and those with another
    process than dialled, or with none. None: not known here."""

    connections: int
    missing: int
    ends_missing: int
    extra: int
    backend_wrong: int | None
    backend_untold: int
    process_wrong: int | None
    process_untold: int


_ENTRY = re.compile(
    r"\[(NEW|DESTROY)\] tcp +6 .*?src=(\S+) dst=\S+ sport=(\d+) dport=(\d+) "
    r"(?:packets=\d+ bytes=\d+ )?(?:\[UNREPLIED\] )?src=(\S+) dst=\S+ sport="
)
_STAMP = re.compile(r"^\[(\d+\.\d+)")
_OF = {"NEW": Of.BEGINNING, "DESTROY": Of.END}


def tcplife(lines: Iterable[str], ports: Collection[int]) -> Iterator[Row]:
    """`tcplife -s`: PID,COMM,IP,LADDR,LPORT,RADDR,RPORT,TX_KB,RX_KB,MS. Those that dialled one of `ports`."""
    for line in lines:
        field = line.strip().split(",")
        if len(field) == 10 and field[6].isdigit() and int(field[6]) in ports:
            yield Row(field[3], int(field[4]), int(field[6]), "", int(field[0]))


def tcpstates(lines: Iterable[str], ports: Collection[int]) -> Iterator[Row]:
    """`tcpstates -t -s`: TIME(s),SKADDR,C-PID,C-COMM,IP,LADDR,LPORT,RADDR,RPORT,OLDSTATE,NEWSTATE,MS. A row per
    connection: its end. Whose process is at work at that moment says nothing, but SYN_SENT, which the same socket had,
    tells. Lines are in the order of each CPU; the time, which is the kernel's, puts them into that of all."""
    fields = [line.strip().split(",") for line in lines]
    dialled: dict[str, int] = {}
    for field in sorted((field for field in fields if len(field) == 12 and field[8].isdigit()), key=_seconds):
        if int(field[8]) not in ports:
            continue
        if field[10] == "SYN_SENT":
            dialled[field[1]] = int(field[2])
        elif field[10] == "CLOSE":
            yield Row(field[5], int(field[6]), int(field[8]), "", dialled.pop(field[1], 0))


def _seconds(field: list[str]) -> float:
    return float(field[0])


def conntrack(lines: Iterable[str], ports: Collection[int]) -> Iterator[Row]:
    """`conntrack -E`: entries whose original destination is one of `ports`, a row when they begin and one when they
    end."""
    for line in lines:
        found = _ENTRY.search(line)
        if found and int(found[4]) in ports:
            yield Row(found[2], int(found[3]), int(found[4]), found[5], 0, _OF[found[1]])


def joined(lives: Iterable[str], entries: Iterable[str], ports: Collection[int]) -> Iterator[Row]:
    """What a user writes today: each line of `tcplife -s` goes with the next entry of its tuple. By order, because the
    two clocks have nothing in common."""
    began: dict[tuple[str, int, int], list[tuple[float, str]]] = defaultdict(list)
    for line in entries:
        found, stamp = _ENTRY.search(line), _STAMP.match(line)
        if found and stamp and found[1] == "NEW":
            began[found[2], int(found[3]), int(found[4])].append((float(stamp[1]), found[5]))
    for one in began.values():
        one.sort(reverse=True)
    for row in tcplife(lives, ports):
        known = began.get((row.src, row.src_port, row.dst_port))
        yield row._replace(backend=known.pop()[1] if known else "")


def score(rows: Iterable[Row], accepted: Iterable[Accepted], processes: Mapping[str, Collection[int]]) -> Score:
    """Rows against what the servers accepted, each row counting once; of one tuple used twice, rows go to what they
    name. `processes`: who may have dialled, by address."""
    waiting: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    open_ends = Counter[tuple[str, int, int]]()
    for one in accepted:
        waiting[one.src, one.src_port, one.dst_port].append(one.backend)
        open_ends[one.src, one.src_port, one.dst_port] += 1
    connections, count = open_ends.total(), Counter[str]()
    for row in sorted(rows, key=lambda row: row.backend == ""):  # those that name a backend choose first
        key = row.src, row.src_port, row.dst_port
        if Of.END in row.of:
            count["extra"] += not open_ends[key] and Of.BEGINNING not in row.of
            open_ends[key] -= open_ends[key] > 0
        if Of.BEGINNING not in row.of:
            continue
        left = waiting.get(key)
        if not left:
            count["extra"] += 1
            continue
        count["backend_wrong"] += bool(row.backend) and row.backend not in left
        left.remove(row.backend if row.backend in left else left[0])
        count["backend_untold"] += not row.backend
        count["process_wrong"] += bool(row.pid) and row.pid not in processes.get(row.src, ())
        count["process_untold"] += not row.pid
    return Score(
        connections, sum(map(len, waiting.values())), open_ends.total(), count["extra"], count["backend_wrong"],
        count["backend_untold"], count["process_wrong"], count["process_untold"],
    )  # fmt: skip


def counted(rows: Iterable[Row], connections: int, processes: Mapping[str, Collection[int]]) -> Score:
    """Rows against how many connections there were, where no server has accepted any."""
    count = Counter[str]()
    for row in rows:
        count["ends"] += Of.END in row.of
        if Of.BEGINNING in row.of:
            count["beginnings"] += 1
            count["backend_untold"] += not row.backend
            count["process_wrong"] += bool(row.pid) and row.pid not in processes.get(row.src, ())
            count["process_untold"] += not row.pid
    return Score(
        connections, max(0, connections - count["beginnings"]), max(0, connections - count["ends"]),
        max(0, max(count["beginnings"], count["ends"]) - connections), None, count["backend_untold"],
        count["process_wrong"], count["process_untold"],
    )  # fmt: skip
