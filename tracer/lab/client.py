"""The process that dials from a pod, and keeps a ledger of every connection it attempted and every flow it made.

Knows the parent's requests: which connections and flows are made, and when. How one is made is in `connection`,
`connects` (the stranger ways) and `flow` (UDP). Standard library only.
"""

import gc
import itertools
import sys
import time
from typing import Any

from tracer.lab import child, wire
from tracer.lab.connection import CHUNK, Address, Connection, Dial, UnableError, blocking, within
from tracer.lab.connects import WAYS, Task, tcp_socket
from tracer.lab.flow import Flow


class Client:
    """Carries out the parent's requests, one after the other."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(CHUNK))
        self.rows = bytearray()
        self.held: dict[int, Connection | Flow] = {}
        self.number = itertools.count().__next__  # of connections and flows
        self.attempted = self.established = self.flows = 0

    def attempt(self, peer: Address, dial: Dial, bind: Address | None = None) -> Connection:
        """One connection; closed if it does not stand."""
        connection = Connection(self.number(), peer, tcp_socket(peer, bind))
        self.attempted += 1
        if connection.connect(dial):
            self.established += 1
        else:
            connection.close()
        return connection

    def connect_many(self, request: dict[str, Any]) -> bytes:
        """Connects, exchanges and closes, time after time."""
        peer = (request["address"], request["port"])
        sends, receives, dial = request["sends"], request["receives"], _dial(request["timeout"])
        pause = 1 / request["rate"] if request["rate"] else 0.0
        due = time.monotonic()
        begin = len(self.rows)
        for _ in range(request["count"]):
            if pause:
                time.sleep(max(0.0, due - time.monotonic()))
                due += pause
            connection = self.attempt(peer, dial)
            if connection.established:
                connection.exchange(sends, receives, self.buffer)
                connection.close()
            self.rows += connection.row()
        return bytes(self.rows[begin:])

    def connect_as(self, request: dict[str, Any]) -> bytes:
        """Connects in one of the `connects.WAYS`, time after time."""
        peer, options = (request["address"], request["port"]), request["options"]
        way, _ = WAYS[request["how"]]
        rows = bytearray()
        for _ in range(request["count"]):
            task = Task(self.number, peer, request["sends"], request["receives"], self.buffer, options)
            try:
                way(task)
            finally:  # what was attempted is in the ledger, also if it could not be gone on with
                for connection in task.attempts:
                    self.attempted += 1
                    self.established += bool(connection.established)
                    if not connection.ended and not options.get("keep"):
                        connection.close()
                    rows += self.keep(connection)
        return bytes(rows)

    def keep(self, connection: Connection | Flow) -> bytes:
        """Holds it if it is open, else files its row, which is returned."""
        row = connection.row()
        if connection.ended:
            self.rows += row
        else:
            self.held[connection.number] = connection
        return row

    def hold(self, request: dict[str, Any]) -> bytes:
        """Opens connections and keeps those that stand; with `bind`, each from the next port."""
        rows = bytearray()
        dial = _dial(request["timeout"])
        for index in range(request["count"]):
            bind = request["bind"] and (request["bind"][0], request["bind"][1] and request["bind"][1] + index)
            rows += self.keep(self.attempt((request["address"], request["port"]), dial, bind))
        return bytes(rows)

    def datagrams(self, request: dict[str, Any]) -> bytes:
        """Makes UDP flows, one after the other, and exchanges on each.

        None is closed before the last is done: so the kernel cannot give two of them the same port.
        """
        peer, first = (request["address"], request["port"]), request["source_port"]
        flows: list[Flow] = []
        try:
            for index in range(request["flows"]):
                port = first and first + index
                flow = Flow(self.number(), peer, request["connected"], port, request["timeout"])
                flows.append(flow)
                self.flows += 1
                for _ in range(request["times"]):
                    if flow.error or not flow.exchange(request["sends"], request["receives"], self.buffer):
                        break
        finally:
            if not request["keep"]:
                for flow in flows:
                    flow.close()
            rows = b"".join(self.keep(flow) for flow in flows)
        return rows

    def exchange(self, request: dict[str, Any]) -> bytes:
        """Exchanges on held connections and flows, round robin; a failed one is left alone."""
        chosen = [self.held[number] for number in request["numbers"]]
        for connection in chosen * request["times"]:
            if not connection.error:
                connection.exchange(request["sends"], request["receives"], self.buffer)
        return b"".join(connection.row() for connection in chosen)

    def close(self, request: dict[str, Any]) -> bytes:
        """Closes held connections and flows."""
        rows = bytearray()
        for number in request["numbers"]:
            connection = self.held[number]
            if isinstance(connection, Flow):
                if request["half"] or request["reset"]:
                    raise UnableError(f"release number {number} by half or with a RST: it is a UDP flow")
                connection.close()
            elif request["half"]:
                connection.close_half(self.buffer)
            else:
                connection.close(request["reset"])
            del self.held[number]
            rows += self.keep(connection)
        return bytes(rows)

    def totals(self) -> dict[str, int]:
        """Connections (attempted, established, held) and flows."""
        return {
            "attempted": self.attempted,
            "established": self.established,
            "held": sum(isinstance(held, Connection) for held in self.held.values()),
            "flows": self.flows,
        }

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """What the parent gets for its request."""
        match request["do"]:
            case "connect":
                return {}, self.connect_many(request)
            case "connect as":
                return {}, self.connect_as(request)
            case "datagrams":
                return {}, self.datagrams(request)
            case "hold":
                return {}, self.hold(request)
            case "exchange":
                return {}, self.exchange(request)
            case "close":
                return {}, self.close(request)
            case "ledger":
                return {}, bytes(self.rows) + b"".join(c.row() for c in self.held.values())
            case "totals":
                return self.totals(), b""
            case other:
                return {"error": f"no such request: {other}"}, b""


def _dial(timeout: float | None) -> Dial:
    return blocking if timeout is None else within(timeout)


def main(arguments: list[str]) -> None:
    """Runs until standard input ends. `arguments`: the name that the process shall have."""
    child.set_name(arguments[0])
    gc.disable()  # there are no cycles to collect
    client = Client()
    try:
        while True:
            request, _ = wire.receive(0)
            try:
                reply, data = client.answer(request)
            except KeyError as error:
                reply, data = {"error": f"{request['do']}: connection {error} is not open"}, b""
            except UnableError as error:
                reply, data = {"error": str(error)}, b""
            except OSError as error:  # no more descriptors, say
                reply, data = {"error": f"{request['do']}: {error.strerror}"}, b""
            wire.send(1, reply, data)
    except (EOFError, BrokenPipeError):
        sys.exit(0)
