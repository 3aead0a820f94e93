"""Many rounds of real connections under one capture: what it holds in the kernel, and in this process.

    python -m tests.endurance.connections [--rounds N]

A round is connections and flows that begin, last and end, refusals, entries deleted under their connections, a pod that
comes and goes, and everything that the agent does now and then: drain, interim rows, reconciliation, sweep, check.
Prints memory, descriptors and map entries as it goes; exit code 1 if they grew.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from endurance.held import Sample, grown, sample

from tracer.kernel import libbpf
from tracer.kernel.capture import Capture, Options
from tracer.kernel.maps import OWNER
from tracer.lab.cluster import Cluster
from tracer.lab.netns import Namespace, wait_until
from tracer.lab.topology import Conntrack
from tracer.record import TUPLE


class Rounds:
    """A capture of a small cluster. `turn` is one round."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.rows = cluster, 0
        cluster.add_service("dns", port=53, target_port=5353, protocol="udp")
        self.outside = (cluster.client_pods[0].ips[4], 7)  # nobody listens
        pods = (pod.netns.path for pod in (*cluster.client_pods, *cluster.backend_pods))
        scope = (cluster.node.path, *pods)
        self.capture = Capture(Options(node_netns=cluster.node.path, only_netns=scope, interval_s=0.1))

    def _take(self) -> None:
        self.rows += len(self.capture.drain())

    def turn(self) -> None:
        client, other = self.cluster.clients
        vip, dns = self.cluster.vip(), self.cluster.vip("dns")
        held = client.hold(5, vip)["number"]
        other.connect_many(20, vip, 100, 300)
        other.connect_many(3, self.outside, 0, 0)
        flows = other.datagrams(5, dns, 100, 300, keep=True)["number"]
        self.cluster.node.run(["sh", "-c", "conntrack -D -p tcp >/dev/null 2>&1 || true"])
        with Namespace("endurance"):
            self.capture.interim(self._take)
        client.exchange(held, 100, 300)
        self.capture.check(self._take)
        self.capture.reconcile(self._take)
        self.capture.watch_balancers()
        other.release(flows)
        client.release(held)
        self.capture.sweep()
        self._take()

    def _rest(self) -> bool:
        self.cluster.node.run(["sh", "-c", "conntrack -L >/dev/null 2>&1"])  # a listing drops what has expired
        self._take()
        self.capture.reconcile(self._take)
        return not any(self.entries().values())

    def rest(self) -> None:
        """Waits until nothing is open, and conntrack's entries have expired."""
        wait_until(self._rest, "the maps to be empty", 60)

    def entries(self) -> dict[str, int]:
        """How many each of the maps has."""
        totals = self.capture.totals()
        owners = libbpf.map_count(self.capture.maps.owners, TUPLE, OWNER)
        return {"connections": totals["open_connections"], "translations": totals["translations"], "owners": owners}


def cluster() -> Cluster:
    """The cluster of `Rounds`."""
    # One backend: an entry that is made anew in the middle of a connection leads to where it led.
    return Cluster(backends=1, clients=2, conntrack=Conntrack(timeouts=Conntrack.SHORT))


def run(rounds: Rounds, count: int, samples: int) -> list[Sample]:
    """That many rounds, and a sample at so many places, each of them at rest."""
    places = {round(count * (n + 1) / samples) for n in range(samples)}
    taken = []
    for number in range(1, count + 1):
        rounds.turn()
        if number in places:
            rounds.rest()
            taken.append(sample(number, rounds.entries()))
            print(taken[-1], flush=True)
    return taken


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=500)
    given = options.parse_args()
    began = time.monotonic()
    with cluster() as made:
        rounds = Rounds(made)
        taken = run(rounds, given.rounds, 20)
        totals = rounds.capture.totals()
        rounds.capture.close()
    wrong = totals["wrong_translations"] + totals["wrong_backends"]
    print(
        f"{totals['opened']:,} connections, {totals['flows']:,} flows, {rounds.rows:,} rows, "
        f"{totals['checks']:,} checks ({wrong} wrong) in {time.monotonic() - began:,.0f} s"
    )
    # Caches of NumPy's and CPython's fill for a while (decisions/016).
    said = grown(taken, 8.0, allocated=1.0)
    if said:
        sys.exit("grew: " + "; ".join(said))


if __name__ == "__main__":
    main()
