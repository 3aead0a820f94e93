"""conntrack's accounting of bytes and packets: whether it is on in a network namespace, and turning it on if asked to.

The one setting of a node that the tracer ever writes, and only for `--enable-accounting`.
"""

import logging
from pathlib import Path

from tracer.errors import TracerError
from tracer.kernel import netns

_log = logging.getLogger(__name__)

#: Of the network namespace of the thread that reads or writes it.
_SETTING = Path("/proc/sys/net/netfilter/nf_conntrack_acct")
NAME = "net.netfilter.nf_conntrack_acct"


def is_on() -> bool:
    """Whether entries made from now on are counted, in the calling thread's network namespace."""
    try:
        return _SETTING.read_text(encoding="ascii").strip() == "1"
    except OSError:
        return False


def enable(path: str) -> None:
    """Turns it on in the network namespace at `path`, says so, and leaves it on: others may rely on it by then.

    Raises:
        TracerError: there is no such namespace or no such setting, or it may not be written.
    """
    with netns.entered(path):
        if is_on():
            return
        try:
            _SETTING.write_text("1\n", encoding="ascii")
        except OSError as error:
            raise TracerError(
                f"{NAME} cannot be set ({error.strerror}): --enable-accounting needs conntrack, root, and "
                f"a writable /proc/sys; else leave it out, and run 'sysctl -w {NAME}=1' on the node."
            ) from error
    _log.warning(
        "%s was 0 and is 1 now, in the node's network namespace, as --enable-accounting asks; it stays so when the "
        "agent ends. Entries older than this are not counted.",
        NAME,
    )
