"""Who dials when, and what the connection does then: the traffic of a `World`, before any backend is picked."""

import dataclasses

import numpy as np

#: How clients behave: one request a connection, requests in bursts, or pools of connections that are kept.
PATTERNS = ("steady", "bursty", "pooled")


@dataclasses.dataclass
class Dials:
    """Connections of one service, a value per connection in each array; times in seconds, sizes in bytes."""

    at: np.ndarray
    client: np.ndarray
    life: np.ndarray
    sent: np.ndarray
    received: np.ndarray
    latency: np.ndarray
    src_port: np.ndarray
    result: np.ndarray
    direct: np.ndarray
    resolved: np.ndarray
    socket: np.ndarray
    counted: np.ndarray
    packet: np.ndarray
    node: np.ndarray

    def __len__(self) -> int:
        return len(self.at)

    def take(self, rows: np.ndarray) -> "Dials":
        """Some of them."""
        return Dials(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def fail(self, rows: np.ndarray, result: str, after_s: float) -> None:
        """These never stood: they ended `after_s` with this result, and moved nothing."""
        self.result[rows] = result
        self.life[rows] = after_s
        self.sent[rows] = self.received[rows] = 0.0


def make(rng: np.random.Generator, at: np.ndarray, client: np.ndarray, life: np.ndarray, rate: float = 0.0) -> Dials:
    """Connections at these times; a lognormal response of about 10 kB each, or `rate` bytes a second of life."""
    n = len(at)
    received = rng.lognormal(9.0, 1.0, n) if not rate else life * rate * rng.lognormal(0.0, 0.5, n)
    return Dials(
        at=at.astype(float),
        client=client.astype(np.int64),
        life=life.astype(float),
        sent=rng.lognormal(6.0, 0.5, n) if not rate else received / 10,
        received=received,
        latency=rng.lognormal(-7.8, 0.4, n),
        src_port=rng.integers(32768, 61000, n),
        result=np.full(n, "ok", object),
        direct=np.zeros(n, bool),
        resolved=np.ones(n, bool),
        socket=np.zeros(n, bool),
        counted=np.ones(n, bool),
        packet=np.full(n, 1400.0),
        node=np.zeros(n, np.int64),
    )


def shares(n: int, skew: float) -> np.ndarray:
    """Shares of n clients after Zipf's law with exponent `skew` (0: all alike)."""
    weight = 1.0 / np.arange(1, n + 1) ** skew
    return weight / weight.sum()


def requests(
    rng: np.random.Generator,
    n: int,
    client_shares: np.ndarray,
    span: tuple[float, float] = (0.0, 3600.0),
    burst: float = 1.0,
    life_s: float = 0.3,
) -> Dials:
    """About n short connections, Poisson in time, or in bursts of `burst` on average from one client at once."""
    starts = rng.uniform(*span, max(1, rng.poisson(n / burst)))
    sizes = rng.geometric(1.0 / burst, len(starts)) if burst > 1 else np.ones(len(starts), np.int64)
    at = np.repeat(starts, sizes) + rng.exponential(0.1, sizes.sum()) * (burst > 1)
    client = np.repeat(rng.choice(len(client_shares), len(starts), p=client_shares), sizes)
    return make(rng, at, client, rng.lognormal(np.log(life_s), 0.8, len(at)))


def pools(
    rng: np.random.Generator,
    clients: int,
    size: int,
    life_s: float = 600.0,
    before_s: float = 3000.0,
    range_s: float = 3600.0,
    rate: float = 3000.0,
) -> Dials:
    """Each client keeps `size` connections, each replaced when its life (exponential, mean `life_s`) is over.

    Pools are filled `before_s` before the range, all at once; so many connections are found open at its start.
    """
    at, who, life = [], [], []
    for client in range(clients):
        for _ in range(size):
            now = -before_s + rng.exponential(1.0)
            while now < range_s:
                lives = rng.exponential(life_s) + 1.0
                at.append(now)
                who.append(client)
                life.append(lives)
                now += lives + rng.exponential(0.05)
    return make(rng, np.array(at), np.array(who), np.array(life), rate=rate)


def joined(*parts: Dials) -> Dials:
    """All of them as one."""
    return Dials(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Dials)})
