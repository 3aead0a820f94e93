"""What the ClusterRole grants is what the agent asks the API server for: nothing is refused, and nothing is spare."""

import copy
import time
from pathlib import Path

import pytest
from deploy.manifests import Raw, one
from kube_api import KubeApi, serving
from naming.naming_world import sample

from tracer.naming import watch as watching
from tracer.naming.book import Book
from tracer.naming.objects import KINDS
from tracer.naming.watch import Watches

RULES = one("daemonset.yaml", "ClusterRole")["rules"]
GRANTED = [(rule["resources"][0], verb) for rule in RULES for verb in rule["verbs"]]


def listen(rules: list[Raw], config: Path) -> tuple[KubeApi, set[str], dict[str, str | None]]:
    """What the agent asks a server with these rules: the server, the kinds of which it had everything, its errors."""
    may_watch = {rule["resources"][0] for rule in rules if "watch" in rule["verbs"]}
    with serving(rules=rules) as server:
        for kind in KINDS:
            server.set(kind, *sample(kind))
        watches, book = Watches(server.kubeconfig(config), "node-1"), Book()
        watches.start()
        try:
            end = time.monotonic() + 30
            while True:
                failed = {kind: state.last_error for kind, state in watches.state().items() if state.last_error}
                book.apply(watches.changes())  # afterwards: who has failed has told all it knew before
                watched = {kind for kind, verb, _ in server.requests if verb == "watch"} & book.synced & may_watch
                if watched | set(failed) == set(KINDS):
                    return server, set(book.synced), failed
                assert time.monotonic() < end, watches.state()
                time.sleep(0.01)
        finally:
            watches.stop()


def test_the_agent_asks_for_exactly_what_it_is_granted(tmp_path: Path) -> None:
    server, known, failed = listen(RULES, tmp_path / "kubeconfig")
    assert failed == {}
    assert known == set(KINDS)
    assert {(kind, verb) for kind, verb, _ in server.requests} == set(GRANTED)
    assert len(GRANTED) == len(set(GRANTED))


@pytest.mark.parametrize(("kind", "verb"), GRANTED)
def test_no_right_is_spare(kind: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "FIRST_PAUSE_S", 0.02)
    rules = copy.deepcopy(RULES)
    (rule,) = (rule for rule in rules if kind in rule["resources"])
    rule["verbs"].remove(verb)
    _, known, failed = listen(rules, tmp_path / "kubeconfig")
    assert set(failed) == {kind}
    assert f"give this account list and watch on {kind}" in (failed[kind] or "")
    assert known == set(KINDS) - ({kind} if verb == "list" else set())
