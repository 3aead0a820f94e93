"""How the benchmark reads and judges what its peers print."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.peers import Command
from tests.bench.said import Accepted, Row, conntrack, joined, score, tcplife, tcpstates
from tracer.lab.netns import Namespace, wait_until

PORTS = frozenset({81, 82})
LIVES = [
    "PID,COMM,IP,LADDR,LPORT,RADDR,RPORT,TX_KB,RX_KB,MS\n",
    "71,traffic,4,10.244.1.10,40000,10.96.0.1,81,0,0,0.31\n",
    "0,swapper/1,4,10.244.1.20,9090,10.244.1.10,40000,0,0,0.2\n",
]
ENTRIES = [
    "[1700000000.1]\t    [NEW] tcp      6 120 SYN_SENT src=10.244.1.10 dst=10.96.0.1 sport=40000 dport=81 [UNREPLIED] "
    "src=10.244.1.20 dst=10.244.1.10 sport=9090 dport=40000 id=7\n",
    "[1700000000.2]\t[DESTROY] tcp      6 src=10.244.1.10 dst=10.96.0.1 sport=40000 dport=81 src=10.244.1.20 "
    "dst=10.244.1.10 sport=9090 dport=40000 [ASSURED] id=7\n",
    "[1700000000.3]\t    [NEW] udp      17 30 src=10.244.1.10 dst=10.96.0.1 sport=40000 dport=81 [UNREPLIED] "
    "src=10.244.1.21 dst=10.244.1.10 sport=53 dport=40000 id=8\n",
]
ONE = Accepted("10.244.1.10", 40000, 81, "10.244.1.20")


def test_tcplife_tells_the_process_and_no_backend() -> None:
    unknown = "0,swapper/1,4,10.244.1.10,40001,10.96.0.1,82,0,0,0.2\n"
    assert list(tcplife([*LIVES, unknown], PORTS)) == [
        Row("10.244.1.10", 40000, 81, "", True),
        Row("10.244.1.10", 40001, 82, "", False),
    ]


def test_tcpstates_is_a_row_at_the_end() -> None:
    lines = [
        "SKADDR,C-PID,C-COMM,IP,LADDR,LPORT,RADDR,RPORT,OLDSTATE,NEWSTATE,MS\n",
        "ffff1,71,traffic,4,10.244.1.10,0,10.96.0.1,81,CLOSE,SYN_SENT,0.0\n",
        "ffff1,71,traffic,4,10.244.1.10,40000,10.96.0.1,81,SYN_SENT,ESTABLISHED,0.1\n",
        "ffff2,9,server,4,10.244.1.20,9090,10.244.1.10,40000,LAST_ACK,CLOSE,0.1\n",
        "ffff1,0,swapper,4,10.244.1.10,40000,10.96.0.1,81,FIN_WAIT2,CLOSE,0.1\n",
    ]
    assert list(tcpstates(lines, PORTS)) == [Row("10.244.1.10", 40000, 81, "", True)]
    assert list(tcpstates(lines[2:], PORTS)) == [Row("10.244.1.10", 40000, 81, "", False)], "nobody saw it dial"
    assert list(tcpstates(lines[4:], PORTS)) == [Row("10.244.1.10", 40000, 81, "", False)]


def test_conntrack_tells_the_backend_and_no_process() -> None:
    assert list(conntrack(ENTRIES, PORTS)) == [Row("10.244.1.10", 40000, 81, "10.244.1.20", False)]


def test_the_join_gives_each_line_the_entry_of_its_tuple() -> None:
    lives = [f"0.{number},{line}" for number, line in enumerate(LIVES * 2)]
    again = ENTRIES[0].replace("[1700000000.1]", "[1700000009.5]").replace("src=10.244.1.20", "src=10.244.1.22")
    for entries in ([again, *ENTRIES], [*ENTRIES, again]):
        assert [row.backend for row in joined(lives, entries, PORTS)] == ["10.244.1.20", "10.244.1.22"]
    assert [row.backend for row in joined(lives, [], PORTS)] == ["", ""]


def test_a_score_counts_what_is_missing_wrong_and_too_much() -> None:
    row = Row("10.244.1.10", 40000, 81, "10.244.1.20", True)
    found = score([row], [ONE])
    assert (found.missing, found.extra, found.wrong, found.unresolved, found.anonymous) == (0, 0, 0, 0, 0)
    assert score([], [ONE]).missing == 1
    assert score([row, row], [ONE]).extra == 1
    assert score([row._replace(backend="10.244.1.21")], [ONE]).wrong == 1
    assert score([row._replace(backend="", process=False)], [ONE]).unresolved == 1
    other = ONE._replace(backend="10.244.1.21")
    for named in ("10.244.1.20", "10.244.1.21"):
        twice = score([row._replace(backend=""), row._replace(backend=named)], [ONE, other])
        assert (twice.missing, twice.extra, twice.wrong, twice.unresolved) == (0, 0, 0, 1)


def waiting(pid: int) -> int:
    """Bytes of conntrack's events that nobody has read, in the process's namespace."""
    lines = [line.split() for line in Path(f"/proc/{pid}/net/netlink").read_text().splitlines()[1:]]
    return sum(int(line[4]) for line in lines if line[1] == "12")


@pytest.mark.needs("netns", "conntrack")
def test_the_reader_tells_what_conntrack_tells() -> None:
    """Of entries that are made, one of them translated, and then all deleted."""
    reader = Command("reader", (sys.executable, "-m", "tests.bench.ctnetlink"), listens=True)
    printer = Command("conntrack -E", ("conntrack", "-E", "-e", "NEW,DESTROY"), listens=True)
    dialled = ["-s", "192.0.2.1", "-d", "192.0.2.2", "--sport", "40000", "--dport", "81"]
    answered = ["-r", "192.0.2.3", "-q", "192.0.2.1", "--reply-port-src", "9090", "--reply-port-dst", "40000"]
    said = []
    with Namespace("reader") as namespace:
        for command, at_once in ((reader, 0), (printer, 6)):  # conntrack drops what it has not shown at SIGINT
            with namespace.popen(command.arguments, stdout=subprocess.PIPE, text=True) as process:
                wait_until(lambda process=process, command=command: command.is_ready(process), "a listener")
                made = ["-t", "60", "--state", "ESTABLISHED"]
                namespace.run(["conntrack", "-I", "-p", "tcp", *dialled, *answered, *made])
                namespace.run(["conntrack", "-I", "-p", "tcp", *dialled[:-1], "82", *made])
                namespace.run(["conntrack", "-I", "-p", "udp", *dialled, "-t", "60"])
                namespace.run(["conntrack", "-F"])
                shown = [process.stdout.readline() for _ in range(at_once)]
                wait_until(lambda process=process: not waiting(process.pid), "events to be read")
                process.send_signal(signal.SIGINT)
                said.append(list(conntrack(shown + process.communicate(timeout=30)[0].splitlines(), PORTS)))
    assert said[0] == said[1]
    assert [(row.dst_port, row.backend) for row in said[0]] == [(81, "192.0.2.3"), (82, "192.0.2.2")]
