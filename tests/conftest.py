"""What the machine must be able to do, asked once: `@pytest.mark.needs("bpf", "netns")`.

A skip is loud, and a failure where VIP_TRACER_REQUIRE names the capability (CI names them all).
"""

import functools
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from object_stores import azurite_lacks

from tracer.errors import TracerError
from tracer.kernel import checks
from tracer.kernel.capture import Options
from tracer.lab.netns import Namespace


def _bpf() -> str:
    lacking = checks.missing(
        [check for check in checks.preconditions(Options()) if not check.name.startswith("conntrack")]
    )
    return "; ".join(f"{check.name}: {check.found}" for check in lacking)


def _netns() -> str:
    try:
        with Namespace("probe"):
            return ""
    except TracerError as error:
        return str(error)


def _conntrack() -> str:
    if not Path("/proc/sys/net/netfilter/nf_conntrack_max").exists():
        return "the kernel has no conntrack"
    return "" if shutil.which("conntrack") else "the conntrack command is not installed"


def _command(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"{name} is not installed"


def _cgroup2() -> str:
    mounts = (line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines())
    trees = [where for _, where, kind, *_ in mounts if kind == "cgroup2"]
    return "" if trees and os.access(trees[0], os.W_OK) else "no cgroup v2 tree that can be written is mounted"


def _bridge_netfilter() -> str:
    with Namespace("probe") as probe:
        there = probe.call(lambda: Path("/proc/sys/net/bridge").is_dir())
    return "" if there else "the kernel has no bridge netfilter"


def _memory_cgroup() -> str:
    there = Path("/sys/fs/cgroup/memory").is_dir()  # v1
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")  # v2
    there = there or (controllers.exists() and "memory" in controllers.read_text().split())
    return "" if there else "no memory cgroup is mounted at /sys/fs/cgroup"


CAPABILITIES: dict[str, Callable[[], str]] = {
    "bpf": _bpf,
    "netns": _netns,
    "conntrack": _conntrack,
    "iptables": _command("iptables-restore"),
    "nft": _command("nft"),
    "ipv6": lambda: "" if Path("/proc/net/if_inet6").exists() else "the kernel has no IPv6",
    "mptcp": lambda: "" if Path("/proc/sys/net/mptcp/enabled").exists() else "the kernel has no MPTCP",
    "ipvs": lambda: "" if Path("/proc/net/ip_vs").exists() else "the kernel has no IPVS, or its module is not loaded",
    "guest": lambda: (
        "" if "vm.run=" in Path("/proc/cmdline").read_text() else "done to a guest only: make test-kernels"
    ),
    "bridge-netfilter": _bridge_netfilter,
    "cgroup2": _cgroup2,
    "memory-cgroup": _memory_cgroup,
    "azurite": azurite_lacks,
    "bcc": lambda: "" if importlib.util.find_spec("bcc") else "python3-bpfcc is not installed",
}


def pytest_configure(config: pytest.Config) -> None:
    """Lets all agents of a run share what was compiled once: what is left out is a second of CPU, not a check.

    No example of hypothesis has a deadline: how long one takes is the machine's affair.
    """
    hypothesis.settings.register_profile("any-machine", deadline=None)
    hypothesis.settings.load_profile("any-machine")
    if not os.environ.get("VIP_TRACER_CACHE"):
        cache = tempfile.mkdtemp(prefix="vip-tracer-programs-")
        os.environ["VIP_TRACER_CACHE"] = cache
        config.add_cleanup(functools.partial(shutil.rmtree, cache))


@functools.cache
def lacking(capability: str) -> str:
    """Why this machine lacks a capability; empty if it has it."""
    return CAPABILITIES[capability]()


def _shut_out() -> set[str]:
    return {name for name, module in sys.modules.items() if module is None}


def pytest_sessionstart() -> None:
    """A shell without job control starts what is to run behind it (`&`) deaf to SIGINT, and so what that starts."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A command that runs in this process holds signals and shuts modules out; what follows must not inherit that."""
    mask, shut_out = signal.pthread_sigmask(signal.SIG_BLOCK, ()), _shut_out()
    try:
        return (yield)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name in _shut_out() - shut_out:
            del sys.modules[name]


def _require(capability: str) -> None:
    reason = lacking(capability)
    required = set(filter(None, os.environ.get("VIP_TRACER_REQUIRE", "").split(",")))
    assert required <= set(CAPABILITIES), (
        f"VIP_TRACER_REQUIRE names unknown capabilities: {required - set(CAPABILITIES)}"
    )
    if reason and capability in required:
        pytest.fail(f"{capability} is required here: {reason}", pytrace=False)
    if reason:
        pytest.skip(f"{capability}: {reason}")


@pytest.fixture
def need() -> Callable[[str], None]:
    """`needs` for fixtures: skips or fails the test that asks for one."""
    return _require


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for capability in mark.args:
            _require(capability)
