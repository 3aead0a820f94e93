"""How the benchmark reads and judges what the tools tell, and what it makes of one that fails."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.bench import page, said
from tests.bench.said import Accepted, Of, Row, conntrack, counted, joined, score, tcplife, tcpstates
from tests.bench.side_by_side import Line, ratio
from tests.bench.tools import Command, Tools, losses, resident
from tests.bench.workloads import Done
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
        Row("10.244.1.10", 40000, 81, "", 71),
        Row("10.244.1.10", 40001, 82, "", 0),
    ]


def test_tcpstates_is_a_row_at_the_end() -> None:
    """Each CPU's lines come together: in the order of time they are only with the kernel's stamps."""
    lines = [
        "TIME(s),SKADDR,C-PID,C-COMM,IP,LADDR,LPORT,RADDR,RPORT,OLDSTATE,NEWSTATE,MS\n",
        "0.4,ffff1,0,swapper,4,10.244.1.10,40000,10.96.0.1,81,FIN_WAIT2,CLOSE,0.1\n",
        "0.3,ffff2,9,server,4,10.244.1.20,9090,10.244.1.10,40000,LAST_ACK,CLOSE,0.1\n",
        "0.1,ffff1,71,traffic,4,10.244.1.10,0,10.96.0.1,81,CLOSE,SYN_SENT,0.0\n",
        "0.2,ffff1,72,other,4,10.244.1.10,40000,10.96.0.1,81,SYN_SENT,ESTABLISHED,0.1\n",
        "0.5,ffff1,0,swapper,4,10.244.1.10,40001,10.96.0.1,81,FIN_WAIT2,CLOSE,0.1\n",
    ]
    unseen = Row("10.244.1.10", 40001, 81, "", 0)  # the socket's next connection, which nobody saw dial
    assert list(tcpstates(lines, PORTS)) == [Row("10.244.1.10", 40000, 81, "", 71), unseen]


def test_conntrack_tells_the_backend_and_no_process() -> None:
    begins = Row("10.244.1.10", 40000, 81, "10.244.1.20", 0, Of.BEGINNING)
    assert list(conntrack(ENTRIES, PORTS)) == [begins, begins._replace(of=Of.END)]
    accounted = ENTRIES[1].replace("dport=81 src", "dport=81 packets=6 bytes=400 src")
    assert list(conntrack([accounted], PORTS)) == [begins._replace(of=Of.END)]


def test_the_join_gives_each_line_the_entry_of_its_tuple() -> None:
    again = ENTRIES[0].replace("[1700000000.1]", "[1700000009.5]").replace("src=10.244.1.20", "src=10.244.1.22")
    for entries in ([again, *ENTRIES], [*ENTRIES, again]):
        assert [row.backend for row in joined(LIVES * 2, entries, PORTS)] == ["10.244.1.20", "10.244.1.22"]
    assert [row.backend for row in joined(LIVES * 2, [], PORTS)] == ["", ""]


def found(score: said.Score) -> dict[str, int | None]:
    """What is not 0."""
    return {name: count for name, count in vars(score).items() if count and name != "connections"}


def test_a_score_counts_what_is_missing_wrong_and_too_much() -> None:
    row = Row("10.244.1.10", 40000, 81, "10.244.1.20", 71)
    begins, ends = row._replace(of=Of.BEGINNING), row._replace(of=Of.END)

    def of(*rows: Row, accepted: tuple[Accepted, ...] = (ONE,)) -> dict[str, int | None]:
        return found(score(rows, accepted, {"10.244.1.10": {71}}))

    assert of(row) == of(begins, ends) == {}
    assert of() == {"missing": 1, "ends_missing": 1}
    assert of(begins) == {"ends_missing": 1}
    assert of(ends) == {"missing": 1}
    assert of(row, row) == of(begins, row) == of(row, ends) == of(row, row._replace(src_port=1)) == {"extra": 1}
    assert of(row._replace(backend="10.244.1.21")) == {"backend_wrong": 1}
    assert of(row._replace(backend="", pid=0)) == {"backend_untold": 1, "process_untold": 1}
    assert of(row._replace(pid=72)) == {"process_wrong": 1}
    other = ONE._replace(backend="10.244.1.21")
    for named in ("10.244.1.20", "10.244.1.21"):
        assert of(row._replace(backend=""), row._replace(backend=named), accepted=(ONE, other)) == {"backend_untold": 1}


def test_where_no_server_accepts_rows_are_counted() -> None:
    row = Row("10.244.1.10", 40000, 81, "10.244.1.20", 71)
    clients = {"10.244.1.10": {71}}
    assert found(counted([row, row], 2, clients)) == {}
    assert found(counted([row], 2, clients)) == {"missing": 1, "ends_missing": 1}
    assert found(counted([row, row, row._replace(of=Of.BEGINNING, pid=0)], 2, clients)) == {
        "extra": 1, "process_untold": 1
    }  # fmt: skip


def test_a_tools_own_word_of_its_losses_is_summed() -> None:
    said_by = "Possibly lost 12 samples\nWARNING: We have hit ENOBUFS! We are losing events.\nPossibly lost 3 samples\n"
    assert losses(said_by) == {"samples": 15, "overflows (ENOBUFS)": 1}


def test_the_ratio_of_a_mix_does_not_go_by_its_quickest_part() -> None:
    without = {"short": Done(10, 0, 10.0), "failed": Done(1000, 0, 1000.0)}
    assert ratio(without, {"short": Done(5, 0, 5.0), "failed": Done(2000, 0, 2000.0)}) == pytest.approx(1.0)


def test_a_tool_that_is_ending_has_its_own_words() -> None:
    """Its memory is gone before its exit code is there."""
    begun = iter(range(9))

    def check() -> None:
        if next(begun):
            raise RuntimeError("it ended (exit code 3): no more")

    tool: Any = SimpleNamespace(pids=[2**30], check=check)
    tool.check()
    with pytest.raises(RuntimeError, match="no more"):
        resident(tool)


class Clients:
    """Clients that get done what they are asked to, in no time."""

    processes: dict[str, set[int]] = {}  # noqa: RUF012

    def window(self, seconds: float) -> dict[str, Done]:
        return {"short": Done(100, 0, 100 / seconds)}


def line(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Line:
    """A tool that is this shell script, and ready at once."""
    monkeypatch.setattr("tests.bench.side_by_side.rest", lambda: None)
    monkeypatch.setattr(Command, "is_ready", lambda self, process: True)
    rig: Any = SimpleNamespace(directory=tmp_path)
    load: Any = Clients()
    workload: Any = SimpleNamespace(ports=frozenset(), options=())
    return Line(rig, load, workload, lambda rig, _: Tools(rig, [Command("it", ("sh", "-c", script))], said.conntrack))


def test_a_tool_that_dies_has_a_line_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = line(tmp_path, f"[ -e {tmp_path}/once ] && {{ echo no more >&2; exit 3; }}; touch {tmp_path}/once; "
                    "while :; do sleep 0.05; done", monkeypatch)  # fmt: skip
    for _ in range(3):
        measured.pair((False, True), 0.5)
    figures = measured.figures()
    assert figures["error"] == "it ended (exit code 3): no more"
    assert (figures["ratios"], figures["operations"]) == ([1.0], 100), "what was measured before stays"
    workload = {"unit": "connections", "seconds": 0.5, "tools": {"it": figures}}
    shown = page.render({"date": "", "linux": "", "cpus": 2, "processor": "", "additions_s": 1.0,
                         "workloads": {"short": workload}, "errors": ["kernel: try again"]})  # fmt: skip
    assert "- it: it ended (exit code 3): no more" in shown
    assert "- kernel: try again" in shown
    assert "least and greatest" in shown, "one pair bounds nothing"


def test_the_best_of_each_line_is_bold() -> None:
    def tool(figure: float, pairs: int = 6) -> dict[str, Any]:
        return {"ratio": figure, "low": figure, "high": figure, "ratios": [figure] * pairs, "without": 5.0, "error": ""}

    tools = {"nothing": tool(1.0), "ours": tool(0.9), "theirs": tool(0.8), "broken": {"error": "gone", "ratios": []}}
    (_, _, shown) = page.rates({"short": {"unit": "short ones", "tools": tools}}).splitlines()
    assert shown == (
        "| short ones | 5 | 1.000 (1.000 to 1.000; 6) | **0.900 (0.900 to 0.900; 6)** | 0.800 (0.800 to 0.800; 6) | - |"
    )


def waiting(pid: int) -> int:
    """Bytes of conntrack's events that nobody has read, in the process's namespace."""
    lines = [line.split() for line in Path(f"/proc/{pid}/net/netlink").read_text().splitlines()[1:]]
    return sum(int(line[4]) for line in lines if line[1] == "12")


@pytest.mark.needs("netns", "conntrack")
def test_the_reader_tells_what_conntrack_tells() -> None:
    """Of entries that are made, one of them translated, and then all deleted."""
    reader = Command("reader", (sys.executable, "-m", "tests.bench.ctnetlink", "65536"), listens=True)
    printer = Command("conntrack -E", ("conntrack", "-E", "-e", "NEW,DESTROY"), listens=True)
    dialled = ["-s", "192.0.2.1", "-d", "192.0.2.2", "--sport", "40000", "--dport", "81"]
    answered = ["-r", "192.0.2.3", "-q", "192.0.2.1", "--reply-port-src", "9090", "--reply-port-dst", "40000"]
    told = []
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
                told.append(list(conntrack(shown + process.communicate(timeout=30)[0].splitlines(), PORTS)))
    assert told[0] == told[1]
    begun, over = told[0][:2], told[0][2:]
    assert [(row.dst_port, row.backend, row.of) for row in begun] == [
        (81, "192.0.2.3", Of.BEGINNING),
        (82, "192.0.2.2", Of.BEGINNING),
    ]
    assert sorted(over) == sorted(row._replace(of=Of.END) for row in begun)
