"""What the API server has said, over time: whose an address was, and which service was behind an address and port.

Single-threaded. Takes changes, answers with timelines (`tracer.naming.intervals`); what is to be said where several
hold the same is in `holders`, rows are `names`', the API server `watch`'s. Times are ns of this node's wall clock.

When somebody's time begins and ends:
- A pod of this node has its first addresses from its status.startTime on, or when heard, until it is heard to be
  deleted or finished. If two have one address, the first has lost it when the second is heard to have it, provided
  that the first was being deleted; otherwise both have it, and neither is named.
- An endpoint has its address from a little before it is heard (`EARLY_NS`), or if somebody else was heard to have it
  then, from when it is heard, until a moment before it is heard to be gone (`LAG_NS`), which is nobody's. If a list
  shows that an address went from one pod to another, nobody knows when: all the time since something was heard before
  is nobody's.
- Services and nodes begin with their creationTimestamp; what is added to them later, a little before it is heard.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Protocol, TypeVar

from tracer.naming import holders
from tracer.naming.endpoints import EndpointHistory
from tracer.naming.holders import Address, Claim, Local, NodePort, OnNode, ServiceName, Virtual, Who
from tracer.naming.intervals import FOREVER, UNKNOWN, Intervals, Timeline, timeline
from tracer.naming.objects import Key, Node, Pod, Service, Slice

#: How long what is gone is kept: a connection's last row comes within the reporting interval and its publication.
KEEP_NS = 15 * 60 * 10**9
#: How long before it is heard a new endpoint, address or port may have been there: an agent starts to see connections
#: before its first list is complete, and a watch lags.
EARLY_NS = 60 * 10**9
#: How long a change may take from the one who makes it to us, the control plane's batching of endpoints included.
LAG_NS = 10**9

#: Addresses, and keys of services, whose timelines are remembered, and ports of an address: some 30 MB at most.
MAX_CACHED = 50_000
MAX_PORTS = 64

K = TypeVar("K")
V = TypeVar("V")


class Change(Protocol):
    """One thing heard: "set" (`object` is as it is now), "delete" (it is gone) or "all" (a list: all there is)."""

    @property
    def kind(self) -> str:
        """One of `objects.KINDS`."""

    @property
    def what(self) -> str:
        """What has happened to it."""

    @property
    def object(self) -> Any:
        """What `objects.read` made of it; of "all", a sequence."""

    @property
    def at_ns(self) -> int:
        """When it was heard."""


class Book:
    """Everything known of the cluster, and for `keep_ns` what was known of what is gone.

    Cannot leak: what lives is what the API server's last lists and events say lives (`objects` bounds each of them);
    what is gone is in `Intervals` and `EndpointHistory`, which forget it by time and by number.
    """

    def __init__(self, keep_ns: int = KEEP_NS) -> None:
        self.keep_ns = keep_ns
        self.services: dict[Key, Service] = {}
        self.slices: dict[Key, Slice] = {}
        self.pods: dict[Key, Pod] = {}
        self.nodes: dict[Key, Node] = {}
        #: Whose an address was; which service a virtual address and port, or a NodePort, was; pods by what cgroups
        #: call them.
        self.addresses: Intervals[bytes, Address] = Intervals(keep_ns)
        self.virtual: Intervals[Virtual, ServiceName] = Intervals(keep_ns)
        self.node_ports: Intervals[NodePort, ServiceName] = Intervals(keep_ns)
        self.identities: Intervals[str, Pod] = Intervals(keep_ns)
        self.endpoints = EndpointHistory(keep_ns, self.workload)
        #: Kinds of which a complete list was heard.
        self.synced: set[str] = set()
        # Timelines that were asked for, until something they depend on changes: slices change all the time in a big
        # cluster, services, nodes and this node's pods seldom. Bounded by MAX_CACHED.
        self._whose: dict[bytes, dict[tuple[int, int], Timeline[Who]]] = {}
        self._services: dict[tuple[bytes, int, int, bool], Timeline[ServiceName]] = {}
        self._of_service: dict[Key, dict[Key, Slice]] = {}
        self._last_ns: dict[str, int] = {}

    def apply(self, changes: Iterable[Change]) -> None:
        """Takes over what was heard, in this order."""
        now = 0
        for change in changes:
            at_ns = now = change.at_ns
            if change.what == "all":
                self._replace(change.kind, change.object, at_ns, min(self._last_ns.get(change.kind, 0), at_ns - LAG_NS))
                if change.kind not in self.synced:
                    self._whose.clear()
                self.synced.add(change.kind)
            else:
                new = change.object if change.what == "set" else None
                self._change(change.kind, change.object.key, new, at_ns, at_ns - LAG_NS)
            self._last_ns[change.kind] = at_ns
        self.forget(now)

    def restore(self, kind: str, objects: Iterable[Any], at_ns: int) -> None:
        """Takes over objects as they were at `at_ns`, of which the intervals are put in from elsewhere (a snapshot)."""
        self.living(kind).update((item.key, item) for item in objects)
        self._last_ns[kind] = at_ns
        for key, item in self.slices.items() if kind == "endpointslices" else ():
            if item.service is not None:
                self._of_service.setdefault((item.namespace, item.service), {})[key] = item
        for service in self.services.keys() | self._of_service.keys():
            slices = tuple(self._of_service.get(service, {}).values())
            self.endpoints.changed(service, at_ns, self.services.get(service), slices)

    def forget(self, now_ns: int) -> None:
        """Forgets what is gone for longer than `keep_ns`; `apply` does so too."""
        for intervals in (self.addresses, self.virtual, self.node_ports, self.identities):
            intervals.forget(now_ns)
        self.endpoints.forget(now_ns)

    @property
    def forgotten_early(self) -> int:
        """How much had to be forgotten before its time, for want of room."""
        kept = (self.addresses, self.virtual, self.node_ports, self.identities, self.endpoints)
        return sum(each.forgotten_early for each in kept)

    def pod(self, uid: str, container: str | None = None) -> Pod | None:
        """The pod that a cgroup names by uid (a static pod: by its file's), else by container; None: not known."""
        for identity in (uid, container):
            held = self.identities.of(identity) if identity else ()
            found = {h.value.uid: h.value for h in ([h for h in held if h.end == FOREVER] or held)}
            if found:
                return holders.only(found.values())
        return None

    def workload(self, uid: str | None) -> str | None:
        """The workload of a pod of this node; None for others."""
        pod = self.pod(uid) if uid else None
        return pod.workload if pod else None

    def zone(self, node: str | None) -> str | None:
        """The zone of a node, as its label says."""
        known = self.nodes.get(("", node)) if node else None
        return known.zone if known else None

    def describe(self, pod: Pod) -> Who:
        """The pod as an answer."""
        return holders.pod_name(pod, self.zone(pod.node))

    def whose(self, address: bytes, protocol: int = 0, port: int = 0) -> Timeline[Who]:
        """Whose an address was, and behind a node's address the given port."""
        held = self.addresses.of(address)
        if not held:
            return UNKNOWN
        by_port = self._whose.get(address)
        if by_port is None:
            if len(self._whose) >= MAX_CACHED:
                self._whose.clear()
            by_port = self._whose[address] = {}
        found = by_port.get((protocol, port))
        if found is None:
            shared = "nodes" not in self.synced
            found = timeline(held, lambda now: holders.whose(now, (protocol, port), shared, self.pod, self.zone))
            if len(by_port) >= MAX_PORTS:
                by_port.clear()
            by_port[protocol, port] = found
        return found

    def service(self, address: bytes, protocol: int, port: int, rewritten_here: bool = False) -> Timeline[ServiceName]:
        """Which service was dialled.

        `rewritten_here`: this node rewrote the destination of a packet from outside, or of one to loopback; the
        address is then one of its own, whether the node's object lists it or not, and the port may be a NodePort.
        """
        key = (address, protocol, port, rewritten_here)
        found = self._services.get(key)
        if found is None:
            if len(self._services) >= MAX_CACHED:
                self._services.clear()
            found = self._services[key] = self._service_of(*key)
        return found

    def _service_of(self, address: bytes, protocol: int, port: int, rewritten_here: bool) -> Timeline[ServiceName]:
        virtual = self.virtual.of((address, protocol, port))
        if virtual:
            return timeline(virtual, holders.service)
        by_port = self.node_ports.of((protocol, port))
        if not by_port or rewritten_here:
            return timeline(by_port, holders.service)
        of_nodes = [held for held in self.addresses.of(address) if isinstance(held.value, OnNode)]
        return timeline([*by_port, *of_nodes], holders.service_at_node) if of_nodes else UNKNOWN  # type: ignore[list-item]

    def _replace(self, kind: str, objects: Iterable[Any], at_ns: int, since_ns: int) -> None:
        new = {item.key: item for item in objects}
        for key in [key for key in self.living(kind) if key not in new]:
            self._change(kind, key, None, at_ns, since_ns)
        for key, item in new.items():
            self._change(kind, key, item, at_ns, since_ns)

    def living(self, kind: str) -> MutableMapping[Key, Any]:
        """The objects of a kind that were there when it was last heard of, by namespace and name."""
        kinds: Mapping[str, MutableMapping[Key, Any]] = {
            "services": self.services,
            "endpointslices": self.slices,
            "pods": self.pods,
            "nodes": self.nodes,
        }
        return kinds[kind]

    def _change(self, kind: str, key: Key, new: Any, at_ns: int, since_ns: int) -> None:
        """An object becomes `new` (None: is gone), at some time between `since_ns` and `at_ns`."""
        living = self.living(kind)
        old = living.get(key)
        if old == new:
            return
        if kind == "endpointslices":
            new = holders.sharing(new, old) if old and new else new
        elif old is not None and new is not None and old.uid != new.uid:  # another one of the same name
            self._change(kind, key, None, at_ns, since_ns)
            old = None
        if kind != "endpointslices":
            self._whose.clear()
            self._services.clear()
        if new is None:
            del living[key]
        else:
            living[key] = new
        if kind == "endpointslices":
            self._slice(key, old, new, at_ns, since_ns)
        elif kind == "services":
            self._service(key, old, new, at_ns)
        elif kind == "pods":
            self._pod(old, new, at_ns)
        else:
            _move(
                self.addresses,
                holders.node_addresses(old),
                holders.node_addresses(new),
                _created(old, new, at_ns),
                at_ns,
            )

    def _service(self, key: Key, old: Service | None, new: Service | None, at_ns: int) -> None:
        begin = _created(old, new, at_ns)
        _move(self.virtual, holders.virtual(old), holders.virtual(new), begin, at_ns)
        _move(self.node_ports, holders.node_ports(old), holders.node_ports(new), begin, at_ns)
        self.endpoints.changed(key, at_ns, new, tuple(self._of_service.get(key, {}).values()))

    def _slice(self, key: Key, old: Slice | None, new: Slice | None, at_ns: int, since_ns: int) -> None:
        before, after = holders.claims(old), holders.claims(new)
        begun, ended = after - before, before - after
        taken = dict(begun)
        for address, _ in begun | ended:
            self._whose.pop(address, None)
        for address, claim in ended:
            swapped = address in taken and taken[address].other_than(claim)
            lost = since_ns if swapped else at_ns - LAG_NS
            self.addresses.end(address, claim, lost)
            self.addresses.add(address, claim._replace(sure=False), lost, at_ns)
        for address, claim in begun:
            self._claimed(address, claim, at_ns)
        for owner in {(each.namespace, each.service) for each in (old, new) if each and each.service}:
            assert owner[1] is not None
            service = (owner[0], owner[1])
            mine = self._of_service.setdefault(service, {})
            mine.pop(key, None)
            if new is not None and (new.namespace, new.service) == owner:
                mine[key] = new
            if not mine:
                del self._of_service[service]
            self.endpoints.changed(service, at_ns, self.services.get(service), tuple(mine.values()))

    def _claimed(self, address: bytes, claim: Claim, at_ns: int) -> None:
        begin = at_ns - EARLY_NS
        for held in self.addresses.of(address):
            value = held.value
            if isinstance(value, OnNode):
                continue
            if not claim.other_than(self.pod(value.uid) if isinstance(value, Local) else value):
                continue
            if held.end != FOREVER:
                # Rules may lead to the one before for a while after its end was heard, and it may still answer.
                begin = at_ns if held.end > begin else begin
            elif isinstance(value, Claim):
                begin = max(begin, at_ns - LAG_NS)
            elif self._leaving(value.uid):
                self.addresses.cut(address, held, at_ns)
                begin = at_ns
        self.addresses.add(address, claim, begin)

    def _pod(self, old: Pod | None, new: Pod | None, at_ns: int) -> None:
        before, after = holders.identities(old), holders.identities(new)
        if old is not None:
            for identity in before - after:
                self.identities.end(identity, old, at_ns)
            for address in holders.own_addresses(old) - holders.own_addresses(new):
                self.addresses.end(address, Local(old.uid, True), at_ns)
        if new is None:
            return
        for identity in after - before:
            self.identities.add(identity, new, 0)  # nobody else ever had it
        for identity in after & before:
            for held in self.identities.living(identity):
                held.value = new if held.value == old else held.value
        for address in holders.own_addresses(new) - holders.own_addresses(old):
            self._taken(address, new, at_ns, first=not holders.own_addresses(old))

    def _taken(self, address: bytes, pod: Pod, at_ns: int, first: bool) -> None:
        for held in self.addresses.living(address):
            if isinstance(held.value, Local) and self._leaving(held.value.uid):
                self.addresses.cut(address, held, at_ns)
        begin = min(pod.started_ns or at_ns, at_ns) if first else at_ns
        self.addresses.add(address, Local(pod.uid, False), begin, at_ns)
        self.addresses.add(address, Local(pod.uid, True), at_ns)

    def _leaving(self, uid: str) -> bool:
        pod = self.pod(uid)
        return pod is None or pod.deleted_ns is not None


def _created(old: Service | Node | None, new: Service | Node | None, at_ns: int) -> int:
    """When what an object newly says may have begun."""
    if old is not None or new is None:
        return at_ns - EARLY_NS
    return at_ns if new.created_ns is None else min(new.created_ns, at_ns)


def _move(intervals: Intervals[Any, Any], before: Mapping[K, V], after: Mapping[K, V], begin: int, at_ns: int) -> None:
    """What one object held it holds no more, and what it holds now it holds from `begin` on."""
    for key, value in before.items():
        if after.get(key) != value:
            intervals.end(key, value, at_ns)
    for key, value in after.items():
        if before.get(key) != value:
            # A creation is known; the rest is a guess, which nobody else's time may be given to.
            ended = [held.end for held in intervals.of(key) if before and held.end <= at_ns]
            intervals.add(key, value, max([begin, *ended]))
