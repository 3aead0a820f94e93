"""What the independent witnesses of a connection say: the node's conntrack, and the ledgers of the servers."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from tracer.lab.netns import Namespace
from tracer.lab.traffic import Server, addresses

_TUPLE = r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)"
_ENTRY = re.compile(rf"^(tcp|udp) .*?{_TUPLE} .*?{_TUPLE}")

Where = tuple[str, int]


class Entry(NamedTuple):
    """One entry: who dialled what, and which backend answers to whom."""

    client: Where
    dialled: Where
    backend: Where
    source: Where

    @property
    def rewrites(self) -> tuple[bool, bool]:
        """Whether the destination was rewritten, and the source."""
        return self.dialled != self.backend, self.client != self.source


def entries(node: Namespace, family: int = 4, protocol: str = "tcp") -> list[Entry]:
    """Every entry of that protocol, as `conntrack -L` in the node has it."""
    found = []
    for line in node.run(["conntrack", "-L", "-p", protocol, "-f", f"ipv{family}"]).splitlines():
        match = _ENTRY.match(line)
        assert match, line
        _, client, dialled, port, dialled_port, backend, source, backend_port, source_port = match.groups()
        found.append(
            Entry(
                (client, int(port)),
                (dialled, int(dialled_port)),
                (backend, int(backend_port)),
                (source, int(source_port)),
            )
        )
    return found


def accepted(servers: Iterable[Server]) -> Counter[tuple[Where, Where]]:
    """(peer, the server's own address) of every connection that the servers accepted."""
    found: Counter[tuple[Where, Where]] = Counter()
    for server in servers:
        rows = server.ledger()
        peers = zip(addresses(rows["peer"]), rows["peer_port"].tolist(), strict=True)
        found.update(zip(peers, zip(addresses(rows["local"]), rows["local_port"].tolist(), strict=True), strict=True))
    return found
