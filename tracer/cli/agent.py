"""``vip-tracer agent``: the node process."""

import signal
from typing import Any

import click

from tracer import memory
from tracer.cli.options import (
    capture_from,
    capture_options,
    duration,
    log_option,
    names_options,
    node_option,
    path,
    size,
)
from tracer.cli.signals import hold


@click.command()
@click.option("--output", type=path(directory=True), required=True, help="The dataset's directory.")
@node_option
@click.option("--rotate", type=duration, default="5m", show_default=True, help="Publish a file at least this often.")
@click.option("--rotate-bytes", type=size, default="64MiB", show_default=True, help="Publish a file of this size.")
@click.option(
    "--disk-budget",
    type=size,
    help="Delete this node's oldest files, exported or not, beyond so many bytes; counted in coverage/. For a node "
    "without an exporter, which has an option of that name. Default: none.",
)
@click.option("--ready-file", type=path(), help="Write this file once tracing.")
@click.option(
    "--listen",
    metavar="ADDR:PORT",
    help="Serve /metrics, /healthz and /readyz there, as 127.0.0.1:9464 or [::1]:9464. Default: nowhere.",
)
@click.option("--duration", type=duration, help="Stop by itself after so long.")
@click.option(
    "--enable-accounting",
    is_flag=True,
    help="Set net.netfilter.nf_conntrack_acct on the node, and leave it: bytes of forwarded connections.",
)
@log_option()
@names_options
@capture_options
def agent(**values: Any) -> None:
    """Trace this node's connections into Parquet files until SIGTERM or Ctrl-C. SIGHUP: publish what there is."""
    hold(signal.SIGHUP)
    memory.save()
    from tracer.agent import AgentOptions, run
    from tracer.operations.server import parse_address

    capture = capture_from(values)
    run(
        AgentOptions(
            output=values["output"],
            node=values["node"],
            capture=capture,
            enable_accounting=values["enable_accounting"],
            kubeconfig=values["kubeconfig"],
            name_wait_s=values["name_wait"],
            rotate_s=values["rotate"],
            rotate_bytes=values["rotate_bytes"],
            disk_budget=values["disk_budget"],
            ready_file=values["ready_file"],
            duration_s=values["duration"],
            listen=parse_address(values["listen"]) if values["listen"] is not None else None,
        )
    )
