"""Which backends each service port had, from when to when: the rows of the `endpoints` table.

Keeps the states of each service and its slices as they followed each other, and makes rows of them only for the
services that are asked for. Knows nothing of Arrow. Times are ns of this node's wall clock.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tracer.naming.fields import address_text
from tracer.naming.objects import Endpoint, Key, Service, ServicePort, Slice
from tracer.record import PROTOCOL_NAMES

#: Room for past states, in endpoints and slices referred to (8 bytes each; what did not change is shared).
MAX_WEIGHT = 2_000_000

#: Columns of `tracer.schema.ENDPOINTS` that are made here: all but the node and the run.
COLUMNS = (
    "ts",
    "started",
    "dst_namespace",
    "dst_service",
    "dst_service_port",
    "dst_port",
    "protocol",
    "virtual_ips",
    "node_port",
    "backend_ip",
    "backend_port",
    "backend_pod",
    "backend_workload",
    "backend_node",
    "backend_zone",
    "ready",
    "serving",
    "terminating",
    "hint_zones",
    "hint_nodes",
    "session_affinity",
    "affinity_s",
    "internal_policy",
    "external_policy",
)


class _State(NamedTuple):
    """A service and its slices from `since` on, until the next state; no service: it is not there (or not yet)."""

    since: int
    service: Service | None
    slices: tuple[Slice, ...]
    weight: int


class _Backend(NamedTuple):
    """One endpoint of one port of a service: what an interval of the table is about."""

    port: ServicePort
    address: bytes
    backend_port: int


class EndpointHistory:
    """States of services over time.

    Cannot leak: past states are queued in the order in which they ended, and forgotten when `keep_ns` have passed or
    all of them together weigh more than `MAX_WEIGHT`; a service that is gone goes with its last past state.
    """

    def __init__(self, keep_ns: int, workload: Callable[[str | None], str | None]) -> None:
        """`workload` tells the workload of a pod's uid, if it is known."""
        self._keep_ns, self._workload = keep_ns, workload
        self._states: dict[Key, deque[_State]] = {}
        self._past: deque[tuple[int, Key]] = deque()
        self._weight = 0
        #: Past states that had to go before their time.
        self.forgotten_early = 0

    def changed(self, key: Key, at_ns: int, service: Service | None, slices: tuple[Slice, ...]) -> None:
        """The service with this namespace and name is now as given."""
        states = self._states.setdefault(key, deque())
        before = states[-1] if states else None
        weight = 0
        if before is not None and before.since >= at_ns:  # the same moment: only what it ended in counts
            states.pop()
            at_ns, weight = before.since, before.weight
        elif before is not None:
            self._past.append((at_ns, key))
            self._weight += before.weight
        known = {id(each) for each in before.slices} if before else set()
        weight += 1 + len(slices) + sum(len(each.endpoints) for each in slices if id(each) not in known)
        states.append(_State(at_ns, service, slices, weight))
        if len(states) == 1 and service is None and not slices:
            del self._states[key]

    def forget(self, now_ns: int) -> None:
        """Forgets states that ended more than `keep_ns` ago, and the oldest of what is too much."""
        while self._past and (self._past[0][0] + self._keep_ns < now_ns or self._weight > MAX_WEIGHT):
            ended, key = self._past.popleft()
            self.forgotten_early += ended + self._keep_ns >= now_ns
            states = self._states[key]
            self._weight -= states.popleft().weight
            if len(states) == 1 and states[0].service is None and not states[0].slices:
                del self._states[key]

    def rows(self, begin_ns: int, end_ns: int, services: Iterable[Key]) -> dict[str, list[Any]]:
        """The table's columns (`COLUMNS`) for [begin_ns, end_ns): a list of n values each, None for null.

        Every endpoint of every port of the services, in intervals in each of which nothing changed. Consecutive
        calls leave no gap and no overlap, provided that no change before `end_ns` is still to come.
        """
        found: list[tuple[Any, ...]] = []
        for key in sorted(set(services)):
            states = list(self._states.get(key, ()))
            open_rows: dict[_Backend, tuple[int, tuple[Any, ...]]] = {}
            for number, state in enumerate(states):
                until = states[number + 1].since if number + 1 < len(states) else end_ns
                since = max(state.since, begin_ns)
                if min(until, end_ns) <= since:
                    continue
                now = self._backends(state)
                for backend, (started, row) in list(open_rows.items()):
                    if now.get(backend) != row:
                        found.append((since, started, *row))
                        del open_rows[backend]
                for backend, row in now.items():
                    open_rows.setdefault(backend, (since, row))
            found += ((end_ns, started, *row) for started, row in open_rows.values())
        found.sort(key=lambda row: (row[2:4], row[5:7], row[9:11], row[1]))
        return {name: [row[place] for row in found] for place, name in enumerate(COLUMNS)}

    def _backends(self, state: _State) -> dict[_Backend, tuple[Any, ...]]:
        """The rows of one state, without their times. Of two endpoints that are one backend, the ready one counts."""
        service = state.service
        if service is None:
            return {}
        virtual = ",".join(address_text(address) for address in service.addresses)
        chosen: dict[_Backend, Endpoint] = {}
        for port in service.ports:
            for each in state.slices:
                # The control plane names the slice's ports after the service's, and has resolved targetPort.
                targets = [p.port for p in each.ports if (p.name, p.protocol) == (port.name, port.protocol)]
                for endpoint in each.endpoints if targets else ():
                    for address in endpoint.addresses:
                        backend = _Backend(port, address, targets[0])
                        other = chosen.get(backend)
                        if other is None or _standing(endpoint) > _standing(other):
                            chosen[backend] = endpoint
        return {backend: self._row(service, virtual, backend, endpoint) for backend, endpoint in chosen.items()}

    def _row(self, service: Service, virtual: str, backend: _Backend, endpoint: Endpoint) -> tuple[Any, ...]:
        port = backend.port
        return (
            service.namespace,
            service.name,
            port.name,
            port.port,
            PROTOCOL_NAMES.get(port.protocol, str(port.protocol)),
            virtual,
            port.node_port or None,
            address_text(backend.address),
            backend.backend_port,
            endpoint.pod,
            self._workload(endpoint.uid),
            endpoint.node,
            endpoint.zone,
            endpoint.ready,
            endpoint.serving,
            endpoint.terminating,
            ",".join(endpoint.hint_zones) or None,
            ",".join(endpoint.hint_nodes) or None,
            service.affinity,
            service.affinity_s,
            service.internal_policy,
            service.external_policy,
        )


def _standing(endpoint: Endpoint) -> tuple[bool, bool, bool, bool]:
    return endpoint.ready, endpoint.serving, not endpoint.terminating, endpoint.pod is not None
