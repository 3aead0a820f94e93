"""The page: everything on it, nothing fetched, and nothing hostile comes alive."""

import dataclasses
import html.parser
import re
from pathlib import Path

import pytest
from analysis import agents, cases, habits, troubles
from command_world import HOSTILE, dataset, named, rows
from datasets import publish

from tracer.analysis import diagnose, page


class Elements(html.parser.HTMLParser):
    """All elements, their attributes and texts."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("page")
    publish(where, cases.troubled(troubles.late_joiner, "late-backend", "strong", 3).tables)
    return where


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return page.render(diagnose.diagnose(root), "the dataset")


def test_it_says_everything(root: Path, text: str) -> None:
    found = diagnose.diagnose(root)
    (web, neighbour) = found.findings
    elements = Elements(text)
    assert elements.open == []
    said = " ".join("".join(elements.texts).split())
    assert "1 of 2 services is unevenly loaded" in said
    for words in (web.answer, web.causes[0].remedy, neighbour.service, *web.verdict.reasons, *web.backends["backend"]):
        assert " ".join(words.split()) in said
    # A row per backend in the heat map, with a cell per bin; a row per client in the matrix.
    assert text.count('style="--v:') == len(web.backends) * (found.bins.count + len(web.depth.clients))  # type: ignore[union-attr]
    # Bars of three measures with their fair share, and of failures and latency.
    assert text.count('<b style="left:') == 3 * len(web.backends)
    assert text.count('class="bar fail"') == text.count('class="bar slow"') == len(web.backends)


def test_a_backend_that_others_make_busier_is_in_the_headline(root: Path) -> None:
    found = diagnose.diagnose(root)
    even = found.findings[1]
    assert "beyond chance</h1>" in page.render(dataclasses.replace(found, findings=[even]), "x")
    noted = dataclasses.replace(even, note="But its backend web-1 gets 2.0 times its even share.")
    text = page.render(dataclasses.replace(found, findings=[noted]), "x")
    assert "beyond chance, but 1 has a backend that others make busier</h1>" in text
    text = page.render(dataclasses.replace(found, findings=[noted, noted]), "x")
    assert "beyond chance, but 2 have backends that others make busier</h1>" in text


def test_it_needs_nothing_and_runs_nothing(text: str) -> None:
    elements = Elements(text)
    assert not {"script", "link", "img", "iframe", "object", "form"} & {tag for tag, _ in elements.found}
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action")], tag
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [m["content"] for m in elements.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_it_can_be_used_by_keyboard(text: str) -> None:
    elements = Elements(text)
    targets = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    links = [attributes["href"] or "" for attributes in elements.all("a")]
    assert links[0] == "#services"
    assert {link[1:] for link in links} <= targets
    # What scrolls can be reached, and has a name.
    for attributes in elements.all("div"):
        assert attributes["tabindex"] == "0"
        assert attributes["aria-label"]
    assert len(elements.all("summary")) == len(elements.all("details")) == 1


def test_hostile_names_are_text(tmp_path: Path) -> None:
    evil = f"<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{{{7*7}}}}{HOSTILE}"
    columns = ("src_pod", "dst_service", "backend_pod", "dst_namespace", "dst_service_port")
    dataset(tmp_path, named(rows(400), **dict.fromkeys(columns, evil)))
    text = page.render(diagnose.diagnose(tmp_path, service=f"{evil}/{evil}"), evil)
    elements = Elements(text)
    assert {"script", "img"} & {tag for tag, _ in elements.found} == set()
    assert "<script>alert(1)</script>" in "".join(elements.texts)
    assert "{{7*7}}" in "".join(elements.texts)
    assert text.replace("\n", "").isprintable()
    assert len(elements.all("section")) > 2  # it is shown in depth


def test_many_services_are_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = cases.World(5)
    for build in (habits.heavy_client, habits.hashed_clients):
        build(world, 1.0)
    cases.balanced(world, "even", 3000, "requests", 5)
    publish(tmp_path, agents.tables(world))
    monkeypatch.setattr(page, "SERVICES", 1)
    monkeypatch.setattr(page, "BACKENDS", 2)
    found = diagnose.diagnose(tmp_path)
    text = page.render(found, "x")
    assert f"And {len(found.findings) - 1} more services." in text
    assert re.search(r"And \d+ more backends\.", text)


def test_nothing_is_said_twice_and_only_what_is_known(tmp_path: Path) -> None:
    world = cases.World(4)
    habits.heavy_client(world, 1.0)
    publish(tmp_path, agents.tables(world, named=False))  # addresses alone
    made = page.render(diagnose.diagnose(tmp_path), str(tmp_path))
    assert re.search(r'<th scope="row">[\d.]+:\d+<span class="where">', made)
    assert not re.search(r'([\d.]+):\d+<span class="where">\1', made)
    assert "the loads by client" in made
    assert "and zone" not in made
    widths = [float(width) for width in re.findall(r'bar slow"><i style="width:([\d.]+)%', made)]
    assert 40 < max(widths) < 70, "all are alike"
