"""Faults, of any size: what is done to an agent at work, and what must be true of its rows afterwards.

Small ones are run by the scenarios, large ones by `make test-slow`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from agent_world import rows
from scenarios.truth import accepted

from tracer.lab.cluster import Cluster

SENDS, RECEIVES = 100, 300


def backends(cluster: Cluster) -> dict[tuple[str, int], str]:
    """The servers' own account: the client's address and port, and the address of the backend that accepted it."""
    return {source: backend[0] for _, source, backend in accepted(cluster.servers)}


def never_wrong(output: Path, cluster: Cluster, *, unaccepted: bool = False) -> pd.DataFrame:
    """A row has the right backend or none that it knows of; "not translated" is said of no one. The client rows.

    `unaccepted`: connections may have stood for their client alone, so that no server knows them.
    """
    right, table = backends(cluster), rows(output)
    table = table[table.role == "client"]
    known = table[table.backend_ip.notna()]
    told = dict(zip(zip(known.src_ip, known.src_port, strict=True), known.backend_ip, strict=True))
    if unaccepted:
        told = {source: backend for source, backend in told.items() if source in right}
    assert {source: right.get(source) for source in told} == told
    assert set(table.nat) <= {"dnat", "unknown"}
    return table


@contextmanager
def again_and_again(what: Callable[[], object]) -> Iterator[None]:
    """Does something over and over in another thread, until the block is left."""
    stop = threading.Event()
    failed: list[Exception] = []

    def work() -> None:
        try:
            while not stop.is_set():
                what()
        except Exception as error:  # noqa: BLE001  told below, in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed, failed
