"""Namespaces: made quickly, entered, and gone with their holder."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tracer.errors import TracerError
from tracer.lab.netns import Namespace, open_all, wait_until

pytestmark = pytest.mark.needs("netns", "iptables")


def test_each_namespace_is_its_own_and_not_ours() -> None:
    made = open_all(["a", "b"])
    try:
        inodes = {namespace.inode for namespace in made} | {os.stat("/proc/self/ns/net").st_ino}
        assert len(inodes) == 3
        assert all(os.stat(namespace.path).st_ino == namespace.inode for namespace in made)
    finally:
        for namespace in made:
            namespace.close()


def test_run_and_call_and_popen_are_inside_and_we_are_not() -> None:
    ours = os.readlink("/proc/self/ns/net")
    with Namespace("a") as namespace:
        theirs = f"net:[{namespace.inode}]"
        assert namespace.run(["readlink", "/proc/self/ns/net"]).strip() == theirs
        assert namespace.call(lambda: os.readlink("/proc/thread-self/ns/net")) == theirs
        process = namespace.popen(["readlink", "/proc/self/ns/net"], stdout=subprocess.PIPE)
        assert process.communicate()[0].decode().strip() == theirs
    assert os.readlink("/proc/self/ns/net") == ours


def test_a_socket_opened_by_call_belongs_to_the_namespace() -> None:
    with Namespace("a") as namespace:
        namespace.run(["ip", "link", "set", "lo", "up"])
        with namespace.call(socket.socket) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            with namespace.call(lambda: socket.create_connection(listener.getsockname())):
                pass
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(listener.getsockname())


def test_settings_stay_inside() -> None:
    here = Path("/proc/sys/net/ipv4/ip_local_port_range")
    before = here.read_text()
    with Namespace("a") as namespace:
        namespace.sysctl({"net.ipv4.ip_local_port_range": "20000 20100"})
        assert namespace.call(here.read_text).split() == ["20000", "20100"]
    assert here.read_text() == before


def test_a_failure_says_what_and_where_and_what_the_program_said() -> None:
    with Namespace("a") as namespace:
        with pytest.raises(TracerError, match=r"`ip link show nosuch` in the namespace a failed: .*does not exist"):
            namespace.run(["ip", "link", "show", "nosuch"])
        with pytest.raises(TracerError, match=r"apt-get install iptables"):
            namespace.run(["iptables-nosuch-restore"])
        with pytest.raises(TracerError, match=r"net\.nosuch=1 was refused in the namespace a"):
            namespace.sysctl({"net.nosuch": 1})
        with pytest.raises(TracerError, match=r"was not done after 0 s"):
            namespace.run(["sleep", "30"], timeout=0.05)


def test_the_holder_is_reaped_and_close_can_be_repeated() -> None:
    namespace = Namespace("a").wait()
    namespace.close()
    namespace.close()
    assert not Path(f"/proc/{namespace.pid}").exists()


def test_a_lasting_program_keeps_the_namespace_only_while_it_lives() -> None:
    with Namespace("a") as namespace:
        process = namespace.popen(["sleep", "infinity"])
        inside = Path(f"/proc/{process.pid}/ns/net")
        wait_until(lambda: os.stat(inside).st_ino == namespace.inode, "the program to be inside")
        process.kill()
        process.wait()
    assert not inside.exists()
