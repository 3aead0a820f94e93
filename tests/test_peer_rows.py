"""How the benchmark reads and judges what its peers print."""

from tests.bench.said import Accepted, Row, conntrack, joined, score, tcplife, tcpstates

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
    assert list(tcplife(LIVES, PORTS)) == [Row("10.244.1.10", 40000, 81, "", True)]


def test_tcpstates_is_a_row_at_the_end() -> None:
    lines = [
        "SKADDR,C-PID,C-COMM,IP,LADDR,LPORT,RADDR,RPORT,OLDSTATE,NEWSTATE,MS\n",
        "ffff1,71,traffic,4,10.244.1.10,0,10.96.0.1,81,CLOSE,SYN_SENT,0.0\n",
        "ffff1,71,traffic,4,10.244.1.10,40000,10.96.0.1,81,SYN_SENT,ESTABLISHED,0.1\n",
        "ffff2,9,server,4,10.244.1.20,9090,10.244.1.10,40000,LAST_ACK,CLOSE,0.1\n",
        "ffff1,0,swapper,4,10.244.1.10,40000,10.96.0.1,81,FIN_WAIT2,CLOSE,0.1\n",
    ]
    assert list(tcpstates(lines, PORTS)) == [Row("10.244.1.10", 40000, 81, "", True)]
    assert list(tcpstates(lines[4:], PORTS)) == [Row("10.244.1.10", 40000, 81, "", False)]


def test_conntrack_tells_the_backend_and_no_process() -> None:
    assert list(conntrack(ENTRIES, PORTS)) == [Row("10.244.1.10", 40000, 81, "10.244.1.20", False)]


def test_the_join_gives_each_line_the_entry_of_its_tuple() -> None:
    lives = [f"0.{number},{line}" for number, line in enumerate(LIVES * 2)]
    again = ENTRIES[0].replace("[1700000000.1]", "[1700000009.5]").replace("src=10.244.1.20", "src=10.244.1.22")
    assert [row.backend for row in joined(lives, [again, *ENTRIES], PORTS)] == ["10.244.1.20", "10.244.1.22"]
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
    twice = score([row._replace(backend=""), row._replace(backend="10.244.1.21")], [ONE, other])
    assert (twice.missing, twice.extra, twice.wrong, twice.unresolved) == (0, 0, 0, 1)
