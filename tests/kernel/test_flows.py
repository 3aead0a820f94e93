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


def dumped(flows: Flows, state: int, status: int, packets: int = 10) -> None:
    """A dump in which the entry has waited for 30 s."""
    entries = np.zeros(1, ENTRY)
    entries["key"]["protocol"], entries["state"], entries["status"] = TCP, state, status
    entries["timeout_s"] = int(flows.timeouts.tcp[state]) - (DUMPED - LAST_PACKET) // SECOND
    entries["packets_sent"] = packets
    entries["counted"] = 1
    values = np.zeros(1, TRANSLATION)
    values["created"], values["ct_id"], values["nat"], values["source"] = BORN, 7, Nat.DNAT, NatSource.CONNTRACK
    assert not len(flows.look(entries, values, np.zeros(1, OWNER), DUMPED))


def ended(flows: Flows, status: int, state: int = 0, packets: int = 10) -> npt.NDArray[Any]:
    """The kernel's record of its end, settled."""
    record = np.zeros(1, RECORD)
    record["tuple"]["protocol"], record["role"] = TCP, Role.FORWARDED
    record["ts"], record["duration_ns"], record["started"] = GONE, GONE - BORN, BORN
    record["flags"] = int(Flag.CLOSED | Flag.OPENED | Flag.COUNTED)
    record["packets_sent"], record["result"] = packets, RESULT_OPEN
    record["ct_id"], record["ct_status"], record["ct_state"] = 7, status, state
    record["nat_source"] = NatSource.CONNTRACK
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


def test_what_no_dump_saw_ends_when_its_entry_does(flows: Flows) -> None:
    (row,) = ended(flows, SEEN_REPLY | ASSURED)
    assert (row["result"], row["ts"], row["duration_ns"]) == (RESULT_OPEN, GONE, GONE - BORN)


def test_a_kernel_that_tells_is_believed(flows: Flows) -> None:
    dumped(flows, TCP_CLOSE, SEEN_REPLY | ASSURED)
    (row,) = ended(flows, SEEN_REPLY | ASSURED, state=TCP_TIME_WAIT)
    assert row["ct_state"] == TCP_TIME_WAIT
