"""From partial counts, endpoints and coverage to one `Situation` per service port.

A service port is told by its name; where rows carry none, by the address that was dialled, and if the endpoints table
says whose virtual address that is, by that service's name after all. Rows that dialled a backend's own address belong
to the services that have this backend, as direct.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tracer.analysis.causes.situation import COUNTS, Situation
from tracer.analysis.coding import Ints, numbered, summed
from tracer.analysis.endpoints import ready
from tracer.analysis.frames import frame
from tracer.analysis.partial import ROUTE, SOURCE, Key, Partial
from tracer.analysis.watched import losses

_NS = 10**9
_DST_NAMESPACE, _SERVICE, _PORT_NAME, _DST_IP, _DST_PORT, _PROTOCOL, _IP, _PORT, _POD, _PLAIN, _SOCKET = range(
    len(ROUTE)
)
_NODE, _, _CLIENT_POD, _CLIENT_IP = range(len(SOURCE))
_TOLD = ("backend_ip", "backend_port", "backend_pod", "backend_workload", "backend_node", "backend_zone")
#: An address that is dialled: address, port, protocol.
Dialled = tuple[str, int, str]


class ServicePort(NamedTuple):
    """A port of a service; or, where nobody knows its name, the address, port and protocol that are dialled."""

    namespace: str | None
    name: str | None
    port_name: str | None
    address: str | None
    port: int | None
    protocol: str


class Situations:
    """The situations of all service ports that rows are about."""

    def __init__(self, part: Partial, endpoints: pa.Table, coverage: pa.Table) -> None:
        """Takes the counts, and the tables endpoints and coverage of the same range (maybe without rows)."""
        self._part, self._bins = part, part.bins
        self._ends = frame(endpoints)
        self._by_service: dict[ServicePort, pd.DataFrame] = {
            _named(*key): group
            for key, group in self._ends.groupby(
                ["dst_namespace", "dst_service", "dst_service_port", "protocol"], dropna=False
            )
        }
        self.losses = losses(coverage)
        self.interval_s = float(pc.max(coverage["interval_s"]).as_py() or 60) if len(coverage) else 60.0
        self._services = self._whose()
        # Cells are in the order of their routes: those of a route are one slice.
        self._slices = np.searchsorted(part.route, np.arange(len(part.routes) + 1))
        self._plain: dict[Dialled, list[int]] = {}
        for place, route in enumerate(part.routes):
            if route[_PLAIN]:
                self._plain.setdefault(_dialled(route), []).append(place)

    def ports(self) -> list[ServicePort]:
        """All service ports, in a fixed order."""
        return sorted(self._services, key=lambda port: tuple(str(part or "") for part in port))

    def __iter__(self) -> Iterator[tuple[ServicePort, Situation]]:
        for port in self.ports():
            yield port, self.of(port)

    def through(self, ip: str, but: ServicePort) -> list[str]:
        """Labels of the service ports, all but one, that lead to a backend's address."""
        routes = self._part.routes
        return [
            self._label(port, mine, self._by_service.get(port, self._ends.iloc[:0]))
            for port, mine in sorted(self._services.items(), key=lambda each: str(each[0]))
            if port != but and any(routes[i][_IP] == ip for i in mine)
        ]

    def of(self, port: ServicePort) -> Situation:
        """One service port's situation."""
        routes, ends = self._services[port], self._by_service.get(port, self._ends.iloc[:0])
        backends = self._backends(routes, ends)
        place = {at: i for i, at in enumerate(zip(backends["ip"], backends["port"], strict=True))}
        virtual = set(routes)
        direct = [
            each
            for (ip, number) in place
            for each in self._plain.get((ip, number, port.protocol), ())
            if each not in virtual
        ]
        cells, clients, column, nodes = self._cells(routes, direct, place)
        known = len(ends) > 0
        return Situation(
            service=self._label(port, routes, ends),
            protocol=port.protocol,
            bin_s=self._bins.width_ns / _NS,
            range_s=(self._bins.end_ns - self._bins.begin_ns) / _NS,
            cells=cells,
            clients=clients,
            nodes=nodes,
            node_zones=[self._zones.get(name) for name in nodes],
            backends=backends,
            ready=ready(ends, place, self._bins) if known else None,
            affinity=bool((ends["session_affinity"] == "ClientIP").any()) if known else None,
            local=bool((ends["internal_policy"] == "Local").any()) if known else None,
            hinted=bool(ends["hint_zones"].notna().any()) if known else None,
            lost={node: each.lost / max(1, each.emitted) for node, each in self.losses.items() if each.lost},
            gaps={node: each.gap_s / each.watched_s for node, each in self.losses.items() if each.gap_s},
            interval_s=self.interval_s,
            client_column=column,
        )

    def _whose(self) -> dict[ServicePort, list[int]]:
        """Places of the routes that lead through each service port's virtual addresses."""
        routes = self._part.routes
        owner: dict[Dialled, ServicePort] = {}
        for port, ends in self._by_service.items():
            for ips, number in set(zip(ends["virtual_ips"], ends["dst_port"], strict=True)):
                owner.update({(ip, int(number), port.protocol): port for ip in str(ips).split(",") if ip})
        rewritten = set()
        for route in routes:
            if route[_SERVICE] is not None:
                owner[_dialled(route)] = _service_of(route)
            elif not route[_PLAIN] and route[_IP] is not None:
                rewritten.add(_dialled(route))
        found: dict[ServicePort, list[int]] = {}
        for place, route in enumerate(routes):
            at = _dialled(route)
            if route[_SERVICE] is not None:
                found.setdefault(_service_of(route), []).append(place)
            elif at in owner:
                found.setdefault(owner[at], []).append(place)
            elif at in rewritten and not route[_PLAIN]:
                found.setdefault(ServicePort(None, None, None, *at), []).append(place)
        return found

    def _cells(
        self, virtual: list[int], direct: list[int], place: dict[tuple[str, int], int]
    ) -> tuple[dict[str, Ints], list[str], str, list[str]]:
        """The cells of some routes; names of clients, their column in connections, names of nodes."""
        part, routes = self._part, self._part.routes
        chosen = np.array(sorted({*virtual, *direct}), dtype=np.int64)
        rows = np.concatenate([np.arange(self._slices[i], self._slices[i + 1]) for i in chosen])
        keys = Partial(part.bins, routes, part.sources, part.keys[rows], {})
        sources, source = np.unique(keys.source, return_inverse=True)
        told = [part.sources[i] for i in sources]
        column = "src_pod" if all(each[_CLIENT_POD] is not None for each in told) else "src_ip"
        client, clients = _coded([_client(each, column) for each in told])
        node, nodes = _coded([str(each[_NODE]) for each in told])
        at = np.searchsorted(chosen, keys.route)
        backend = np.array([place.get((routes[i][_IP], routes[i][_PORT]), -1) for i in chosen], dtype=np.int64)
        socket = np.array([bool(routes[i][_SOCKET]) for i in chosen])
        told_by = {
            "bin": (keys.bin, part.bins.count),
            "client": (client[source], len(clients)),
            "node": (node[source], len(nodes)),
            "backend": (backend[at] + 1, len(place) + 1),
            "direct": (np.isin(chosen, direct)[at].astype(np.int64), 2),
            "socket": (socket[at].astype(np.int64), 2),
        }
        # Several routes may lead to one backend (two virtual addresses), several sources be one client.
        cell, example = numbered(list(told_by.values()))
        cells = {name: codes[example] for name, (codes, _) in told_by.items()}
        cells["backend"] -= 1
        for name in COUNTS:
            counted = part.sums[name][rows] if name in part.sums else np.zeros(len(rows), np.int64)
            cells[name] = summed(cell, counted, len(example))
        return cells, clients, column, nodes

    def _backends(self, routes: list[int], ends: pd.DataFrame) -> pd.DataFrame:
        """A row per backend: of the endpoints, and of the rows. What somebody knows of one is known."""
        told = list(zip(*(ends[name] for name in _TOLD), strict=True))
        seen = [self._part.routes[i] for i in routes]
        told += [
            (r[_IP], r[_PORT], r[_POD], None, None, None) for r in seen if r[_IP] is not None and r[_PORT] is not None
        ]
        known: dict[tuple[str, int], list[object]] = {}
        for ip, port, *rest in told:
            found = known.setdefault((ip, int(port)), [None] * len(rest))
            for place, name in enumerate(rest):
                found[place] = name if found[place] is None else found[place]
        backends = [(*at, *known[at]) for at in sorted(known)]
        return pd.DataFrame(backends, columns=["ip", "port", "pod", "workload", "node", "zone"], dtype=object)

    @functools.cached_property
    def _zones(self) -> dict[str, str]:
        """The zone of every node that any service has an endpoint on."""
        both = self._ends[["backend_node", "backend_zone"]].drop_duplicates().dropna()
        return dict(zip(both["backend_node"], both["backend_zone"], strict=True))

    def _label(self, port: ServicePort, routes: list[int], ends: pd.DataFrame) -> str:
        """namespace/name:port/protocol, or address:port/protocol."""
        if port.name is None:
            address = f"[{port.address}]" if ":" in str(port.address) else port.address
            return f"{address}:{port.port}/{port.protocol}"
        numbers = ends["dst_port"] if len(ends) else [self._part.routes[i][_DST_PORT] for i in routes]
        return f"{port.namespace}/{port.name}:{min(numbers)}/{port.protocol}"


def _service_of(route: Key) -> ServicePort:
    return _named(route[_DST_NAMESPACE], route[_SERVICE], route[_PORT_NAME], route[_PROTOCOL])


def _named(namespace: Any, name: Any, port_name: Any, protocol: Any) -> ServicePort:
    return ServicePort(namespace, name, port_name if isinstance(port_name, str) else None, None, None, protocol)


def _dialled(route: Key) -> Dialled:
    return str(route[_DST_IP]), int(route[_DST_PORT]), str(route[_PROTOCOL])  # type: ignore[call-overload]


def _client(source: Key, column: str) -> str:
    return str(source[_CLIENT_IP if column == "src_ip" else _CLIENT_POD])


def _coded(names: list[str]) -> tuple[Any, list[str]]:
    """Codes of names (n,), and the different names in order."""
    different = sorted(set(names))
    place = {name: i for i, name in enumerate(different)}
    return np.array([place[name] for name in names], dtype=np.int64), different


def matching(ports: Iterable[ServicePort], wanted: str) -> list[ServicePort]:
    """The service ports that ``namespace/name`` or an address means."""
    return [port for port in ports if wanted in (f"{port.namespace}/{port.name}", port.address)]
