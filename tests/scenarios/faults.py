"""Faults, of any size: what is done to an agent at work, and what must be true of its rows afterwards.

Small ones are run by the scenarios, large ones by `make test-slow`.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from agent_world import rows
from scenarios.truth import accepted

from tracer.lab.cluster import Cluster

SENDS, RECEIVES = 100, 300


def never_wrong(output: Path, cluster: Cluster, *, unaccepted: bool = False) -> pd.DataFrame:
    """A row has a backend that accepted its client, or none that it knows of; "not translated" is said of no one.

    `unaccepted`: connections may have stood for their client alone, so that no server knows them.

    Returns:
        The rows of role client.
    """
    right: dict[tuple[str, int], list[str]] = defaultdict(list)
    for _, source, (backend, _) in accepted(cluster.servers):
        right[source].append(backend)
    table = rows(output)
    table = table[table.role == "client"]
    # Before it stands, each try may go to another backend: the last row counts.
    lives = table[table.backend_ip.notna()].sort_values("ts").drop_duplicates("conn_id", keep="last")
    for source, told in lives.groupby(["src_ip", "src_port"]).backend_ip:
        # One port may have been used for several connections: of those that nobody accepted it cannot be told which.
        if not unaccepted or len(told) <= len(right[source]):
            assert set(told) <= set(right[source]), source
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
