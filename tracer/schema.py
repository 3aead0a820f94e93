"""The tables on disk: every column with its type, meaning, unit and names in other standards.

The one source from which the Arrow schemas, ``docs/schema.md`` and the output of ``vip-tracer schema`` are made.
Knows nothing of how rows come about or where files lie. Within version 1 only nullable columns may be added.

Names in other standards are given only where the definition there fits: ECS
(https://www.elastic.co/docs/reference/ecs), OpenTelemetry semantic conventions
(https://opentelemetry.io/docs/specs/semconv/) and IPFIX (https://www.iana.org/assignments/ipfix/).
"""

import dataclasses
import functools
import json

import pyarrow as pa

#: Version of the tables; part of every path and of every file's metadata.
SCHEMA_VERSION = 1

DICT = pa.dictionary(pa.int32(), pa.string())
TIME = pa.timestamp("ns", tz="UTC")


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column: what it is, and what it is called elsewhere (None: no such name, or it means something else)."""

    name: str
    type: pa.DataType
    description: str
    nullable: bool = False
    unit: str | None = None
    ecs: str | None = None
    otel: str | None = None
    ipfix: str | None = None

    @property
    def type_name(self) -> str:
        """The type as people write it: ``dict`` for a dictionary of strings, otherwise Arrow's own word."""
        return "dict" if self.type == DICT else str(self.type)

    def field(self) -> pa.Field:
        """The Arrow field, with everything that is known about the column as metadata."""
        known = {
            "description": self.description,
            "unit": self.unit,
            "ecs": self.ecs,
            "otel": self.otel,
            "ipfix": self.ipfix,
        }
        metadata = {key: value for key, value in known.items() if value is not None}
        return pa.field(self.name, self.type, nullable=self.nullable, metadata=metadata)


def _null(name: str, kind: pa.DataType, description: str, **names: str) -> Column:
    return Column(name, kind, description, nullable=True, **names)


#: The connections table. A row is an interval of one connection's life, as one node saw it.
CONNECTIONS: tuple[Column, ...] = (
    Column("node", DICT, "the node that saw the connection", ecs="host.name", otel="k8s.node.name"),
    Column(
        "ts",
        TIME,
        "end of the row's interval",
        unit="ns since the epoch",
        ecs="event.end",
        ipfix="observationTimeNanoseconds",
    ),
    Column(
        "conn_id", pa.uint64(), "the same in all rows of one connection; unique per node and agent run", ipfix="flowId"
    ),
    Column("opened", pa.bool_(), "the row holds the connection's beginning"),
    Column("closed", pa.bool_(), "the row holds the connection's end"),
    _null(
        "started",
        TIME,
        "when the connection began; null if that was before the tracer and nothing recorded it",
        unit="ns since the epoch",
        ecs="event.start",
        ipfix="flowStartNanoseconds",
    ),
    Column(
        "role",
        DICT,
        "client (a local socket dialled), forwarded (only conntrack saw it), server (a local socket accepted)",
    ),
    Column(
        "protocol",
        DICT,
        "tcp, udp or sctp",
        ecs="network.transport",
        otel="network.transport",
        ipfix="protocolIdentifier",
    ),
    Column(
        "src_ip",
        DICT,
        "the client's address, as the client sees itself",
        ecs="source.ip",
        otel="source.address",
        ipfix="sourceIPv4Address/sourceIPv6Address",
    ),
    Column(
        "src_port",
        pa.uint16(),
        "the client's port, as the client sees itself",
        ecs="source.port",
        otel="source.port",
        ipfix="sourceTransportPort",
    ),
    Column(
        "dst_ip",
        DICT,
        "the address dialled: the virtual IP where there is one",
        ecs="destination.ip",
        otel="destination.address",
        ipfix="destinationIPv4Address/destinationIPv6Address",
    ),
    Column(
        "dst_port",
        pa.uint16(),
        "the port dialled",
        ecs="destination.port",
        otel="destination.port",
        ipfix="destinationTransportPort",
    ),
    _null(
        "backend_ip",
        DICT,
        "where the connection really went; equals dst_ip where nothing was rewritten; null where that is not known",
        ecs="destination.nat.ip",
        ipfix="postNATDestinationIPv4Address/postNATDestinationIPv6Address",
    ),
    _null(
        "backend_port",
        pa.uint16(),
        "the port the connection really went to; null where that is not known",
        ecs="destination.nat.port",
        ipfix="postNAPTDestinationTransportPort",
    ),
    _null(
        "snat_ip",
        DICT,
        "the source address after masquerading; null where the source was not rewritten",
        ecs="source.nat.ip",
        ipfix="postNATSourceIPv4Address/postNATSourceIPv6Address",
    ),
    _null(
        "snat_port",
        pa.uint16(),
        "the source port after masquerading; null where the source was not rewritten",
        ecs="source.nat.port",
        ipfix="postNAPTSourceTransportPort",
    ),
    Column("nat", DICT, "none, dnat, snat, dnat+snat or unknown: not rewritten and not seen are different things"),
    _null("nat_source", DICT, "where the translation was learnt: conntrack, socket (rewritten at connect) or dump"),
    _null("src_namespace", DICT, "namespace of the client pod", otel="k8s.namespace.name"),
    _null("src_pod", DICT, "the client pod", otel="k8s.pod.name"),
    _null("src_workload", DICT, "the workload the client pod belongs to"),
    _null("dst_namespace", DICT, "namespace of the service behind dst_ip", otel="k8s.namespace.name"),
    _null("dst_service", DICT, "the service behind dst_ip"),
    _null("dst_service_port", DICT, "name of the service's port behind dst_port"),
    _null("backend_pod", DICT, "the pod behind backend_ip at that time", otel="k8s.pod.name"),
    _null("backend_workload", DICT, "the workload the backend pod belongs to"),
    _null("backend_node", DICT, "the node the backend pod ran on", otel="k8s.node.name"),
    _null(
        "backend_zone",
        DICT,
        "the zone of the backend's node",
        ecs="cloud.availability_zone",
        otel="cloud.availability_zone",
    ),
    _null("pid", pa.uint32(), "process that called connect()", ecs="process.pid", otel="process.pid"),
    _null(
        "comm",
        DICT,
        "name of the thread that called connect(), often the program's; chosen by the program itself",
        ecs="process.thread.name",
        otel="thread.name",
    ),
    _null("cgroup_id", pa.uint64(), "cgroup v2 id of the process"),
    _null("netns", pa.uint32(), "inode number of the socket's network namespace"),
    _null(
        "result",
        DICT,
        "ok, refused, timeout, reset, unreachable, aborted, or another errno's name; null while open or unproven",
    ),
    _null("connect_latency_us", pa.uint32(), "from connect() to established; on the row with opened", unit="us"),
    Column(
        "duration_us",
        pa.uint64(),
        "length of the row's interval: sums to connection time",
        unit="us",
        ipfix="flowDurationMicroseconds",
    ),
    _null(
        "bytes_sent",
        pa.uint64(),
        "application bytes from client to server in the interval; null where not counted, and for TCP of role "
        "forwarded, whose headers and retransmissions conntrack does not tell apart (see ip_bytes_sent)",
        unit="byte",
        ecs="source.bytes",
    ),
    _null(
        "bytes_received",
        pa.uint64(),
        "application bytes from server to client in the interval; null as for bytes_sent",
        unit="byte",
        ecs="destination.bytes",
    ),
    _null(
        "packets_sent",
        pa.uint64(),
        "packets from client to server in the interval; null where not counted",
        unit="packet",
        ecs="source.packets",
        ipfix="initiatorPackets",
    ),
    _null(
        "packets_received",
        pa.uint64(),
        "packets from server to client in the interval; null where not counted",
        unit="packet",
        ecs="destination.packets",
        ipfix="responderPackets",
    ),
    _null("retransmits", pa.uint32(), "segments sent again in the interval; null where not counted", unit="packet"),
    _null("rtt_us", pa.uint32(), "smoothed round-trip time at ts", unit="us"),
    _null("ct_zone", pa.uint16(), "zone of the connection tracking entry"),
    _null("ct_id", pa.uint32(), "id of the connection tracking entry, as `conntrack -L -o id` prints it"),
    _null(
        "ip_bytes_sent",
        pa.uint64(),
        "bytes from client to server with their IP and transport headers, and with what was sent again, where only "
        "conntrack counted them (role forwarded, and UDP)",
        unit="byte",
        ipfix="initiatorOctets",
    ),
    _null(
        "ip_bytes_received",
        pa.uint64(),
        "bytes from server to client with their IP and transport headers, likewise",
        unit="byte",
        ipfix="responderOctets",
    ),
)


def _count(name: str, description: str, unit: str = "connection") -> Column:
    """A counter the agent reports: the increment over the interval, null where this agent does not count it."""
    return Column(name, pa.uint64(), description, nullable=True, unit=unit)


#: The coverage table. A row is one interval between publications of one agent run; counters are increments over it.
COVERAGE: tuple[Column, ...] = (
    Column("node", DICT, "the node", ecs="host.name", otel="k8s.node.name"),
    Column("ts", TIME, "end of the interval", unit="ns since the epoch", ecs="event.end"),
    Column("started", TIME, "start of the interval: the end of the run's row before", unit="ns since the epoch"),
    Column("boot_id", DICT, "the kernel's boot id", ecs="host.boot.id"),
    Column("run_id", DICT, "one run of the agent: between the last row of one and the first of the next is a gap"),
    Column("version", DICT, "version of the agent", ecs="agent.version"),
    Column("kernel", DICT, "kernel release", ecs="host.os.kernel"),
    Column("programs", DICT, "what ran, comma separated"),
    Column("roles", DICT, "the roles that were recorded, comma separated"),
    Column("interval_s", pa.uint32(), "reporting interval of long connections", unit="s"),
    Column("first", pa.bool_(), "the first row of the run: nothing was observed before `started`"),
    Column("last", pa.bool_(), "the last row of the run: nothing was observed after `ts`; missing after a crash"),
    _count("opened", "connections that began: a local socket entered SYN_SENT"),
    _count("accepted", "connections that a local socket accepted (role server)"),
    _count("failed", "connects that failed before the first SYN (seen with the connect probe)"),
    _count("adopted", "connections found open at the start"),
    _count("closed", "closing records handed over by the kernel side", "row"),
    _count("interim", "interim records handed over by the kernel side", "row"),
    _count("excluded", "connections left out after they began: loopback without a rewrite, or by option"),
    _count("flows", "flows that ended: what only conntrack tells of (role forwarded, and UDP)", "row"),
    _count("withdrawn", "rows of flows that were none: a socket of this node claimed them, or they were over", "row"),
    _count("transit", "entries that ended without a row: no local socket's, and not rewritten by this node", "entry"),
    Column("emitted", pa.uint64(), "rows handed to the writer", unit="row"),
    Column("written", pa.uint64(), "rows that reached a published file", unit="row"),
    _count("lost_ring", "LOST: closing records that found the ring buffer full", "row"),
    _count("lost_connection_map", "LOST: connections that found the connection map full"),
    _count("lost_end", "LOST: closing records nobody made: the socket is gone, and its end was not seen", "row"),
    _count("lost_flow_ring", "LOST: closing records of flows that found the ring buffer full", "row"),
    _count("lost_owner_map", "LOST: processes of UDP sockets that found no room: their rows are of role forwarded"),
    _count("lost_dial_map", "LOST: addresses given to connect() that found no room"),
    _count(
        "lost_listener_map",
        "LOST: ports with a listener at the start that found no room: what they accepted may be taken for dialled",
        "port",
    ),
    _count("lost_translation_map", "LOST: translations that found the translation map full", "translation"),
    Column("lost_writer", pa.uint64(), "LOST: rows that never reached a published file", unit="row"),
    _count("deferred", "interim records that found the ring buffer full: the next row carries them", "row"),
    _count("late_begin", "connections whose beginning the kernel did not show, taken at their next state"),
    _count("late_end", "connections whose end the kernel did not show, taken when the socket was freed"),
    _count("missed_runs", "state changes for which the kernel did not run a program; most are made up for", "event"),
    _count("unresolved", "closing records whose translation is unknown", "row"),
    _count("untold", "flows whose end only a dump told: what they moved since the dump before is in no row", "row"),
    _count("undialled", "connections whose dialled address may have been rewritten, and was not seen"),
    _count("ambiguous", "joins refused: one tuple open in two namespaces, or in two zones"),
    _count("after_pause", "connections that began while the tracer was stopping: in no row"),
    _count("conntrack_new", "connection tracking entries born", "event"),
    _count("conntrack_destroy", "connection tracking entries that ended", "event"),
    _count("ignored_protocol", "connection tracking events of protocols that are not traced", "event"),
    _count("malformed_events", "connection tracking events whose layout was not understood", "event"),
    _count("stale_destroy", "ends of connection tracking entries that were not, or no longer, known", "event"),
    _count("kept", "entries that connection tracking dropped before their socket was done, kept for it", "event"),
    _count("enobufs", "times the kernel could not deliver connection tracking events", "event"),
    _null("open_connections", pa.uint64(), "connections open at ts (a gauge)", unit="connection"),
    _null(
        "directional",
        pa.uint64(),
        "connection tracking entries with a zone for one direction only, which no tuple is joined with, as of the last "
        "dump (a gauge)",
        unit="entry",
    ),
    _null(
        "unentered_namespaces",
        pa.uint64(),
        "network namespaces that could not be entered when rows were due: no interim rows from there (a gauge)",
        unit="namespace",
    ),
    _null("translations", pa.uint64(), "translations known at ts (a gauge)", unit="translation"),
    _count("checks", "times that what the agent held was compared with the kernel's own tables", "look"),
    _count("checked_translations", "entries of connection tracking and of the agent that were compared", "entry"),
    _count("missing_translations", "of these, entries that connection tracking had and the agent had not", "entry"),
    _count("stale_translations", "of these, entries that the agent had and connection tracking had no more", "entry"),
    _count("wrong_translations", "of these, entries that the agent held otherwise than connection tracking", "entry"),
    _count("checked_connections", "established sockets and open connections that were compared"),
    _count("missing_connections", "of these, sockets that the kernel listed and the agent had not"),
    _count("stale_connections", "of these, connections that the agent held open and the kernel listed no more"),
    _count("undecided_connections", "sockets of which nothing says who dialled: not compared"),
    _count("checked_backends", "open connections whose backend was compared with connection tracking's entry"),
    _count("missing_backends", "of these, connections whose translation the agent did not know"),
    _count("wrong_backends", "of these, connections that the agent took to another backend"),
    _count(
        "unnamed",
        "rows whose service, backend or client was not known by name when they had waited long enough for it",
        "row",
    ),
    _count("ambiguous_names", "rows with an address that more than one pod or service may have had: not named", "row"),
    _null(
        "naming",
        DICT,
        "names of the API server at ts: off (not asked for), starting (no complete list yet), current, stale (the API "
        "server is not heard, the names are the last ones known)",
    ),
    _null("names_age_s", pa.uint32(), "how long before ts the API server was last heard (a gauge)", unit="s"),
    _count(
        "lost_expired",
        "LOST: rows deleted before they were exported, because the disk budget demanded it; in a row of its own, of no "
        "length, of the hour they were of",
        "row",
    ),
    _count("names_malformed", "objects and watch lines of the API server that could not be read", "object"),
    _count("names_forgotten", "names of what is gone, forgotten before their time for want of room", "name"),
)

#: The endpoints table. A row is an interval in which one backend of one service port stood as the row says.
ENDPOINTS: tuple[Column, ...] = (
    Column("node", DICT, "the node whose agent heard it from the API server", ecs="host.name", otel="k8s.node.name"),
    Column("ts", TIME, "end of the row's interval", unit="ns since the epoch", ecs="event.end"),
    Column("started", TIME, "start of the row's interval", unit="ns since the epoch", ecs="event.start"),
    Column("run_id", DICT, "one run of the agent"),
    Column("dst_namespace", DICT, "namespace of the service", otel="k8s.namespace.name"),
    Column("dst_service", DICT, "the service"),
    _null("dst_service_port", DICT, "name of the service's port; null where it has none"),
    Column("dst_port", pa.uint16(), "the service's port"),
    Column("protocol", DICT, "tcp, udp or sctp", otel="network.transport"),
    Column("virtual_ips", DICT, "the service's cluster, external and load balancer addresses, comma separated"),
    _null("node_port", pa.uint16(), "the service port's NodePort"),
    Column("backend_ip", DICT, "the endpoint's address"),
    Column("backend_port", pa.uint16(), "the endpoint's port"),
    _null("backend_pod", DICT, "the pod behind the endpoint", otel="k8s.pod.name"),
    _null("backend_workload", DICT, "the workload the pod belongs to, where that is known"),
    _null("backend_node", DICT, "the node the endpoint is on", otel="k8s.node.name"),
    _null("backend_zone", DICT, "the zone the endpoint is in", otel="cloud.availability_zone"),
    Column("ready", pa.bool_(), "whether it was to get connections; unknown counts as true, as the API has it"),
    Column("serving", pa.bool_(), "whether it answered, terminating or not; unknown counts as ready"),
    Column("terminating", pa.bool_(), "whether it was being shut down"),
    _null("hint_zones", DICT, "zones whose clients it was meant for, comma separated; null: no hint"),
    _null("hint_nodes", DICT, "nodes whose clients it was meant for, comma separated; null: no hint"),
    Column("session_affinity", DICT, "None or ClientIP"),
    _null("affinity_s", pa.uint32(), "how long a client stays with its backend, of ClientIP", unit="s"),
    Column("internal_policy", DICT, "internalTrafficPolicy: Cluster or Local"),
    Column("external_policy", DICT, "externalTrafficPolicy: Cluster or Local"),
)

#: Tables by name, as they are named on disk.
TABLES: dict[str, tuple[Column, ...]] = {"connections": CONNECTIONS, "coverage": COVERAGE, "endpoints": ENDPOINTS}

_ABOUT = {
    "connections": (
        "A row is an **interval of one connection's life**, as one node saw it. A connection shorter than the "
        "reporting interval has exactly one row, a longer one a row per interval. Measures are increments over the "
        "row's interval, so sums over rows (roles client and forwarded) are right at every level."
    ),
    "coverage": (
        "A row is **one interval between publications** of one run of the agent on one node: what ran, what was seen, "
        "what was lost at which stage. Counters are increments over the interval; null means that this agent does not "
        "count it. `emitted` of a run is the sum of `written` and `lost_writer` once its `last` row is there."
    ),
    "endpoints": (
        "A row is **an interval in which one backend of one service port stood as the row says**, as the API server "
        "told the agent of one node; for the services that the node's connections dialled. Every hour is complete in "
        "itself; expected shares are computed from it. Intervals of one endpoint do not overlap within one run. "
        "Written with each publication, where the agent has an API server to ask (`--kubeconfig`)."
    ),
}


@functools.cache
def arrow(table: str = "connections") -> pa.Schema:
    """The Arrow schema of a table of `TABLES`."""
    return pa.schema([column.field() for column in TABLES[table]])


def as_json() -> str:
    """All tables as a JSON document, for programs."""
    tables = {
        table: [
            {"name": c.name, "type": c.type_name, "nullable": c.nullable, "description": c.description}
            | {key: value for key in ("unit", "ecs", "otel", "ipfix") if (value := getattr(c, key)) is not None}
            for c in columns
        ]
        for table, columns in TABLES.items()
    }
    return json.dumps({"schema_version": SCHEMA_VERSION, "tables": tables}, indent=2)


def as_table(table: str = "connections") -> str:
    """One table as aligned text, for people: column, type, unit, description."""
    rows = [("COLUMN", "TYPE", "NULL", "UNIT", "DESCRIPTION")]
    rows += [(c.name, c.type_name, "yes" if c.nullable else "", c.unit or "", c.description) for c in TABLES[table]]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]).rstrip() for row in rows)


def as_markdown() -> str:
    """The text of ``docs/schema.md``."""
    lines = [
        f"# Schema, version {SCHEMA_VERSION}",
        "",
        "<!-- Generated from tracer/schema.py; do not edit. -->",
        "",
        "`dict` is a dictionary of strings (`dictionary<int32, string>`); pandas reads it as a category. Every field",
        "carries this page's text as Arrow field metadata (`description`, `unit`, `ecs`, `otel`, `ipfix`). Names of",
        "[ECS](https://www.elastic.co/docs/reference/ecs),",
        "[OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/) and",
        "[IPFIX](https://www.iana.org/assignments/ipfix/) are given only where their definition fits.",
        "",
        "Within a version columns are only added, and only nullable ones.",
    ]
    for table, columns in TABLES.items():
        lines += ["", f"## {table}", "", _ABOUT[table], ""]
        lines += ["| column | type | meaning | elsewhere |", "|---|---|---|---|"]
        for c in columns:
            kind = c.type_name + (f" ({c.unit})" if c.unit else "") + (", null" if c.nullable else "")
            names = (("ECS", c.ecs), ("OTel", c.otel), ("IPFIX", c.ipfix))
            elsewhere = ", ".join(f"{standard} `{name}`" for standard, name in names if name)
            lines.append(f"| {c.name} | {kind} | {c.description} | {elsewhere} |")
    return "\n".join(lines) + "\n"
