"""The kernel's list of sockets: what it says of real ones, and whatever bytes come instead."""

import contextlib
import random
import socket
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer.errors import TracerError
from tracer.kernel import sockets
from tracer.kernel.sockets import ESTABLISHED, LISTEN, SOCKET

MAPPED = bytes(10) + b"\xff\xff"


def message(family: int = socket.AF_INET, kind: int = 20, extra: bytes = b"", state: int = 1) -> bytes:
    body = (
        struct.pack(">BBBBHH", family, state, 0, 0, 1000, 80) + bytes(range(32)) + struct.pack("=IQ5I", 0, 77, *[0] * 5)
    )
    body += extra
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)


DONE = struct.pack("=IHHIIi", 20, 3, 2, 1, 0, 0)


def test_real_sockets_of_both_families() -> None:
    for host, raw in (("127.0.0.1", MAPPED + bytes([127, 0, 0, 1])), ("::1", bytes(15) + b"\1")):
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            port = server.getsockname()[1]
            with socket.create_connection((host, port)) as client, server.accept()[0]:
                own = client.getsockname()[1]
                found = sockets.dump()
        ends = {(row["state"].item(), bytes(row["tuple"]["src"]), row["tuple"]["src_port"].item(),
                 row["tuple"]["dst_port"].item()) for row in found}  # fmt: skip
        assert {(LISTEN, raw, port, 0), (ESTABLISHED, raw, own, port), (ESTABLISHED, raw, port, own)} <= ends
        assert len(np.unique(found["cookie"])) == len(found)


def test_a_datagram() -> None:
    found, done = sockets.decode(message() + message(socket.AF_INET6, extra=b"abcde") + message(99) + DONE)
    assert done
    assert found["tuple"]["src"].tolist() == [MAPPED + bytes(range(4)), bytes(range(16))]
    assert found["tuple"]["dst"].tolist() == [MAPPED + bytes(range(16, 20)), bytes(range(16, 32))]
    assert found["tuple"]["src_port"].tolist() == [1000, 1000]
    assert found["cookie"].tolist() == [77, 77]


def test_a_refusal_is_a_sentence() -> None:
    with pytest.raises(TracerError, match=r"does not list its TCP sockets \(ENOENT\): it needs tcp_diag"):
        sockets.decode(struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -2))


@settings(deadline=None, max_examples=400)
@given(st.integers(0, 2**64 - 1).map(random.Random), st.lists(st.binary(max_size=120), max_size=4))
def test_damaged_or_foreign_datagrams_are_understood_or_refused(chance: random.Random, garbage: list[bytes]) -> None:
    whole = [message(chance.choice((2, 10, 0)), extra=bytes(chance.randrange(9))) for _ in range(4)]
    data = bytearray(b"".join(chance.sample([*whole, *garbage], len(whole) + len(garbage))))
    for _ in range(chance.randrange(4)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    with contextlib.suppress(TracerError):
        found, _ = sockets.decode(bytes(data[: chance.randrange(len(data) + 1)]))
        assert found.dtype == SOCKET
