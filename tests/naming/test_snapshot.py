import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from naming_world import NOON, SECOND, Heard, name_of, pod, sample_book, service_of
from test_objects import JSON

from tracer.errors import TracerError
from tracer.naming import snapshot
from tracer.naming.book import Book
from tracer.naming.holders import Address, Claim, Local
from tracer.naming.typed import decode, encode


def lived() -> Book:
    """A real cluster, and an address that went from one pod to another."""
    known = sample_book()
    known.apply(
        [
            Heard("pods", "set", pod("old", "10.244.1.200"), NOON + 5 * SECOND),
            Heard("pods", "delete", pod("old", "10.244.1.200"), NOON + 10 * SECOND),
            Heard("pods", "set", pod("new", "10.244.1.200"), NOON + 20 * SECOND),
        ]
    )
    return known


def contents(known: Book) -> list[Any]:
    spans = [(key, h.begin, h.end, h.value) for each in _intervals(known) for key, h in each]
    return [known.services, known.slices, known.pods, known.nodes, known.synced, sorted(spans, key=repr)]


def _intervals(known: Book) -> tuple[Any, ...]:
    return known.addresses, known.virtual, known.node_ports, known.identities


def test_a_book_comes_back_as_it_was(tmp_path: Path) -> None:
    known, path = lived(), tmp_path / "names.json"
    snapshot.save(known, path, NOON + 30 * SECOND)
    back = snapshot.load(path)
    assert contents(back) == contents(known)
    assert [name_of(back, "10.244.1.200", NOON + s * SECOND) for s in (6, 12, 20)] == ["old", None, "new"]
    assert service_of(back, "10.96.20.20", 80) == "rweb-np"
    begin, end = NOON + 30 * SECOND, NOON + 40 * SECOND
    assert back.endpoints.rows(begin, end, back.services) == known.endpoints.rows(begin, end, known.services)
    assert list(tmp_path.iterdir()) == [path]


def test_a_book_that_came_back_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    snapshot.save(lived(), path, NOON + 30 * SECOND)
    back = snapshot.load(path)
    back.apply([Heard("pods", "delete", pod("new", "10.244.1.200"), NOON + 50 * SECOND)])
    assert [name_of(back, "10.244.1.200", NOON + s * SECOND) for s in (49, 50)] == ["new", None]
    back.forget(NOON + 60 * SECOND + back.keep_ns)
    assert name_of(back, "10.244.1.200", NOON + 20 * SECOND) is None


def test_what_cannot_be_written_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.mkdir()
    with pytest.raises(TracerError, match=r"cannot write .*names.json: Is a directory; choose"):
        snapshot.save(Book(), path, NOON)
    with pytest.raises(TracerError, match="No such file or directory; choose"):
        snapshot.save(Book(), tmp_path / "no" / "names.json", NOON)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"vip_tracer_names": 1, "keep', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no snapshot of names; give a file"),
        ('{"kind": "List"}', "is no snapshot of names; give a file"),
        ('{"vip_tracer_names": 2}', "has version 2, this vip-tracer reads 1; use"),
        ('{"vip_tracer_names": 1}', "is damaged .*; save the snapshot again"),
        ('{"vip_tracer_names": 1, "keep_ns": "1"}', "is damaged .*; save the snapshot again"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(TracerError, match=message):
        snapshot.load(path)
    with pytest.raises(TracerError, match="cannot read"):
        snapshot.load(tmp_path / "absent.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "names.json"
    snapshot.save(lived(), path, NOON + 30 * SECOND)
    return path


@given(st.data())
def test_a_damaged_file_is_refused_or_still_a_book(saved: Path, data: st.DataObject) -> None:
    content = json.loads(saved.read_text())
    place: Any = content
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(JSON | st.just("\x1b[2J"))
            break
        place = place[key]
    path = saved.with_name("damaged.json")
    path.write_text(json.dumps(content))
    try:
        back = snapshot.load(path)
    except TracerError:
        return
    name_of(back, "10.244.1.200", NOON)
    back.endpoints.rows(NOON, NOON + 60 * SECOND, [("shop", "rweb")])
    service_of(back, "10.96.20.20", 80)


class _Pair(NamedTuple):
    number: int
    flag: bool
    texts: tuple[str, ...]
    maybe: bytes | None = None


@given(
    st.builds(
        _Pair,
        st.integers(0, 2**63 - 1),
        st.booleans(),
        st.lists(st.text(alphabet="ab c")).map(tuple),
        st.none() | st.binary(min_size=16, max_size=16),
    )
)
def test_values_come_back_by_their_types(value: _Pair) -> None:
    assert decode(_Pair, json.loads(json.dumps(encode(_Pair, value)))) == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True),
        (int, -1),
        (int, 1 << 63),
        (int, 1.0),
        (bool, 1),
        (str, "\x1b"),
        (str, 7),
        (bytes, "00"),
        (bytes, "zz" * 16),
        (tuple[int, ...], [1, "2"]),
        (tuple[int, int], [1]),
        (_Pair, [1, True]),
        (Address, {"Claim": []}),
        (Address, {"_Pair": []}),
        (Address, None),
        (Address, {"Local": ["u", True], "OnNode": ["n"]}),
    ],
)
def test_values_of_other_types_are_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(kind, value)


def test_one_of_several_classes_says_which() -> None:
    assert encode(Address, Local("u", True)) == {"Local": ["u", True]}
    claim = Claim(("shop", "s"), (), None, None, None, "n", None)
    assert decode(Address, encode(Address, claim)) == claim
