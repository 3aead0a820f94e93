"""Flows on a kernel whose DESTROY has neither state nor timeout: what the last dump saw is what can be told."""

import errno
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tracer.kernel.conntrack import ENTRY
from tracer.kernel.flows import Flows
from tracer.kernel.maps import OWNER, TRANSLATION
from tracer.kernel.timeouts import TCP_CLOSE, TCP_ESTABLISHED, TCP_TIME_WAIT
from tracer.record import RECORD, RESULT_OPEN, Flag, Nat, NatSource, Role

SECOND = 1_000_000_000
TCP, SEEN_REPLY, ASSURED = 6, 0x02, 0x04
BORN, LAST_PACKET, DUMPED, GONE = (at * SECOND for at in (1000, 1020, 1050, 1170))


def dumped(flows: Flows, state: int, status: int, packets: int = 10, source: NatSource = NatSource.CONNTRACK) -> None:
    """A dump in which the entry has waited for 30 s."""
    entries = np.zeros(1, ENTRY)
    entries["key"]["protocol"], entries["state"], entries["status"] = TCP, state, status
    entries["timeout_s"] = int(flows.timeouts.tcp[state]) - (DUMPED - LAST_PACKET) // SECOND
    entries["packets_sent"] = packets
    entries["counted"] = 1
    values = np.zeros(1, TRANSLATION)
    values["created"], values["ct_id"], values["nat"], values["source"] = BORN, 7, Nat.DNAT, source
    assert not len(flows.look(entries, values, np.zeros(1, OWNER), DUMPED))


def ended(
    flows: Flows, status: int, state: int = 0, packets: int = 10, source: NatSource = NatSource.CONNTRACK
) -> npt.NDArray[Any]:
    """The kernel's record of its end, settled."""
    record = np.zeros(1, RECORD)
    record["tuple"]["protocol"], record["role"] = TCP, Role.FORWARDED
    record["ts"], record["duration_ns"], record["started"] = GONE, GONE - BORN, BORN
    record["flags"] = int(Flag.CLOSED | Flag.OPENED | Flag.COUNTED)
    record["packets_sent"], record["result"] = packets, RESULT_OPEN
    record["ct_id"], record["ct_status"], record["ct_state"] = 7, status, state
    record["nat_source"] = source
    return flows.settle(record)


@pytest.fixture
def flows() -> Flows:
    made = Flows(1, 3600 * SECOND)
    made.timeouts.tcp[TCP_CLOSE] = 120
    return made


@pytest.mark.parametrize(
    ("state", "result"), [(TCP_TIME_WAIT, 0), (TCP_CLOSE, errno.ECONNRESET)], ids=["time-wait", "close"]
)
def test_the_last_dump_tells_how_and_when_it_ended(flows: Flows, state: int, result: int) -> None:
    dumped(flows, state, SEEN_REPLY | ASSURED)
    (row,) = ended(flows, SEEN_REPLY | ASSURED)
    assert (row["result"], row["ts"], row["duration_ns"]) == (result, LAST_PACKET, LAST_PACKET - BORN)


def test_a_reset_of_what_was_never_assured_proves_nothing(flows: Flows) -> None:
    dumped(flows, TCP_CLOSE, SEEN_REPLY)
    (row,) = ended(flows, SEEN_REPLY)
    assert (row["result"], row["ts"]) == (RESULT_OPEN, LAST_PACKET)


def test_a_connection_that_stood_in_the_last_dump_may_have_ended_anyhow(flows: Flows) -> None:
    dumped(flows, TCP_ESTABLISHED, SEEN_REPLY | ASSURED)
    (row,) = ended(flows, SEEN_REPLY | ASSURED, packets=12)
    assert (row["result"], row["ts"], row["ct_state"]) == (RESULT_OPEN, GONE, 0)


@pytest.mark.parametrize(("state", "told"), [(TCP_ESTABLISHED, 1), (TCP_TIME_WAIT, 0)], ids=["stood", "over"])
def test_of_what_never_moved_that_is_told_which_stood_in_the_last_dump(flows: Flows, state: int, told: int) -> None:
    dumped(flows, state, SEEN_REPLY | ASSURED, source=NatSource.DUMP)
    found = ended(flows, SEEN_REPLY | ASSURED, source=NatSource.DUMP)
    assert len(found) == told
    assert flows.withdrawn == 1 - told


def test_what_no_dump_saw_ends_when_its_entry_does(flows: Flows) -> None:
    (row,) = ended(flows, SEEN_REPLY | ASSURED)
    assert (row["result"], row["ts"], row["duration_ns"]) == (RESULT_OPEN, GONE, GONE - BORN)


def test_a_kernel_that_tells_is_believed(flows: Flows) -> None:
    dumped(flows, TCP_CLOSE, SEEN_REPLY | ASSURED)
    (row,) = ended(flows, SEEN_REPLY | ASSURED, state=TCP_TIME_WAIT)
    assert row["ct_state"] == TCP_TIME_WAIT


def refusal(ct_id: int, ts: int) -> npt.NDArray[Any]:
    """The kernel's record of an entry that its first answer ended."""
    record = np.zeros(1, RECORD)
    record["tuple"]["protocol"], record["tuple"]["src_port"], record["role"] = TCP, ct_id, Role.FORWARDED
    record["ts"], record["flags"], record["ct_id"] = ts, int(Flag.CLOSED | Flag.PROVISIONAL), ct_id
    record["nat_source"] = NatSource.CONNTRACK
    return record


def claim(ct_id: int, ts: int) -> npt.NDArray[Any]:
    """The row of the socket that was refused."""
    record = refusal(ct_id, ts)
    record["role"], record["flags"] = Role.CLIENT, int(Flag.CLOSED)
    return record


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "later"])
def test_a_refusal_that_a_socket_tells_of_is_withdrawn_at_once(flows: Flows, together: bool) -> None:
    batches = [refusal(7, GONE), claim(7, GONE + 1)]
    told = [flows.settle(batch) for batch in ([np.concatenate(batches)] if together else batches)]
    assert [len(rows) for rows in told] == ([1] if together else [0, 1])
    assert (flows.withdrawn, flows.holds) == (1, False)


def test_a_refusal_that_no_socket_tells_of_is_told_after_a_second(flows: Flows) -> None:
    flows.settle(refusal(7, GONE))
    flows.settle(claim(8, GONE + 1))
    assert len(flows.release(GONE + SECOND - 1, lambda key, ct_id: True)) == 0
    (row,) = flows.release(GONE + SECOND, lambda key, ct_id: True)
    assert (row["ct_id"], row["flags"] & Flag.PROVISIONAL) == (7, 0)
    assert not flows.holds


def test_refusals_without_end_leave_nothing_behind(flows: Flows) -> None:
    """There is always one that waits, and others' rows come all the time."""
    for number in range(1, 1000):
        flows.settle(np.concatenate([refusal(number, GONE + number), claim(number - 1, GONE + number)]))
    assert flows.withdrawn == 998
    held = sum(value.nbytes for value in vars(flows).values() if isinstance(value, np.ndarray))
    assert held == RECORD.itemsize
    assert not [name for name, value in vars(flows).items() if isinstance(value, list) and value]
