"""The services of the node whose rules are in `data/kube-proxy-*`, as that node saw them."""

from pathlib import Path

from tracer.lab.rules import Endpoint, Service

IPTABLES = Path(__file__).parent / "data" / "kube-proxy-iptables.rules"
NFTABLES = Path(__file__).parent / "data" / "kube-proxy-nftables.nft"
POD_CIDR = "10.244.0.0/16"
SERVICE_CIDR = "10.96.0.0/16"
NODE_ADDRESS = "172.30.0.11"

WEB = ("10.244.1.11", "10.244.1.12", "10.244.2.13")
REAL = ("10.244.1.100", "10.244.1.101", "10.244.2.101")


def at(pods: tuple[str, ...], port: int) -> tuple[Endpoint, ...]:
    return tuple((pod, port) for pod in pods)


HTTP = Service("shop", "web", "http", "10.96.10.10", 80, at(WEB, 8080), local_endpoints=at(WEB[:2], 8080))
ECHO = Service("shop", "web", "echo", "10.96.10.10", 9000, at(WEB, 9000), local_endpoints=at(WEB[:2], 9000))
NONE = Service("shop", "web-none", "http", "10.96.10.50", 80, ())
AFFINE = Service(
    "shop",
    "web-aff",
    "http",
    "10.96.10.40",
    80,
    at(WEB, 8080),
    local_endpoints=at(WEB[:2], 8080),
    affinity_seconds=600,
)
SERVICES = (
    HTTP,
    ECHO,
    Service("shop", "web", "dgram", "10.96.10.10", 8081, at(WEB, 8081), "udp", local_endpoints=at(WEB[:2], 8081)),
    Service("shop", "web-np", "http", "10.96.10.20", 80, at(WEB, 8080), "tcp", 30080, (), at(WEB[:2], 8080)),
    AFFINE,
    NONE,
    Service(
        "shop", "web-local", "http", "10.96.10.60", 80, at(WEB, 8080), "tcp", 30081, (), at(WEB[:2], 8080), "Local"
    ),
    Service("shop", "web-sel", "http", "10.96.10.70", 80, ()),
    Service(
        "shop",
        "web-itp",
        "http",
        "10.96.10.90",
        80,
        at(WEB, 8080),
        local_endpoints=at(WEB[:2], 8080),
        internal_policy="Local",
    ),
    Service("shop", "rweb", "http", "10.96.20.10", 80, at(REAL, 8080), local_endpoints=at(REAL[:2], 8080)),
    Service("shop", "rweb", "dgram", "10.96.20.10", 8081, at(REAL, 8081), "udp", local_endpoints=at(REAL[:2], 8081)),
    Service("shop", "rweb-np", "http", "10.96.20.20", 80, at(REAL, 8080), "tcp", 30090, (), at(REAL[:2], 8080)),
    Service("default", "kubernetes", "https", "10.96.0.1", 443, (("172.30.0.10", 6443),)),
)

#: What the sampled node did not have, in IPv6: a load balancer, no endpoint here, none at all.
PODS6 = ("fd00:10:244:1::b", "fd00:10:244:2::c")
POD_CIDR6 = "fd00:10:244::/48"
NODE_ADDRESS6 = "fd00:172:30::2"
SERVICES6 = (
    Service("shop", "web", "http", "fd00:10:96::10", 80, at(PODS6, 8080), "tcp", 30080, ("fd00:172:31::1",)),
    Service(
        "shop", "away", "http", "fd00:10:96::11", 80, at(PODS6, 8080), "tcp", 30081, ("fd00:172:31::2",), (), "Local"
    ),
    Service(
        "shop", "here", "http", "fd00:10:96::12", 80, at(PODS6, 8080), "tcp", 30082, (), at(PODS6[:1], 8080), "Local"
    ),
    Service("shop", "none", "http", "fd00:10:96::13", 80, (), "tcp", 30083, ("fd00:172:31::3",)),
    Service("shop", "same", "dgram", "fd00:10:96::14", 80, at(PODS6, 8081), "udp", affinity_seconds=10800),
)
