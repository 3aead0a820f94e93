"""``vip-tracer check``: whether a running agent holds what the kernel's own tables say."""

import json
from typing import TYPE_CHECKING, Any

import click

from tracer.errors import NoDataError, TracerError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from tracer.kernel.ledger import Agreement
    from tracer.kernel.witness import Running

#: Disagreements that are shown one by one.
SHOWN = 20
_MEANING = {
    "missing": "the kernel has it, the agent has not",
    "stale": "the agent has it, the kernel has it no more",
    "wrong": "the agent holds another than the kernel",
}


@click.command()
@click.option("--pid", type=click.IntRange(min=1), help="Which process, where several trace this node.")
@click.option("-o", "--output-format", type=click.Choice(["table", "json"]), default="table", show_default=True)
def check(pid: int | None, output_format: str) -> None:
    """Compare what a running agent holds with conntrack's table and the kernel's list of sockets.

    What disagrees is looked at twice, as connections come and go meanwhile. Changes nothing, and asks nothing of the
    agent. Exit code 1 if anything is wrong, which is a defect; what is missing or stale may have its reasons, such as a
    full map: coverage/ counts them.
    """
    from tracer.kernel import witness

    which = _choose(pid)
    with witness.opened(which) as scope:
        agreement = witness.check(scope)
    if output_format == "json":
        click.echo(json.dumps(_document(which.pid, agreement), indent=2))
    else:
        click.echo("\n".join(_lines(agreement)))
    if agreement.is_wrong:
        raise TracerError("What the agent holds is not what the kernel says (see above): please report this.")


def _choose(pid: int | None) -> "Running":
    from tracer.kernel import witness

    found = witness.running()
    chosen = [one for one in found if pid in (None, one.pid)]
    if not chosen:
        who = "No process that is visible here traces" if pid is None else f"Process {pid} does not trace"
        raise NoDataError(f"{who} this node: start 'vip-tracer agent', or run this where its process is visible.")
    if len(chosen) > 1:
        pids = ", ".join(str(one.pid) for one in chosen)
        raise UsageError(f"Several processes trace this node ({pids}): choose one with --pid.")
    return chosen[0]


def _lines(agreement: "Agreement") -> list[str]:
    from tracer.kernel.ledger import OUTCOMES, Account, How

    rows = [("", "compared", "agreeing", *(how.name.lower() for how in How if how != How.UNDECIDED))]
    for account in Account:
        counts = [
            str(agreement.count(account, how)) if (account, how) in OUTCOMES else "-"
            for how in How
            if how != How.UNDECIDED
        ]
        rows.append((account.name.lower(), str(agreement.compared[account]), str(agreement.agreeing(account)), *counts))
    lines = [f"{row[0]:<12}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    if agreement.undecided:
        lines.append(f"not compared: {agreement.undecided} sockets of which nothing says who dialled")
    shown = [_row(found) for found in agreement.found[:SHOWN]]
    for row in shown:
        said = [f"here {row['here']}"] * bool(row["here"]) + [f"there {row['there']}"] * bool(row["there"])
        lines.append(
            f"{row['how']} {row['account'].removesuffix('s')}: {row['protocol']} {row['src']} → {row['dst']}"
            f"{' (' + ', '.join(said) + ')' if said else ''}: {_MEANING[row['how']]}"
        )
    more = len(agreement.found) - len(shown)
    return [*lines, f"and {more} more"] if more else lines


def _row(found: "np.void") -> dict[str, Any]:
    """A disagreement as text."""
    from tracer.cli.lines import endpoint_text
    from tracer.kernel.ledger import Account, How
    from tracer.record import PROTOCOL_NAMES
    from tracer.store.columns import address_text

    def end(address: Any, port: Any) -> str | None:
        raw = address.tobytes()
        return endpoint_text(address_text(raw), int(port)) if any(raw) else None

    key = found["tuple"]
    return {
        "account": Account(found["account"]).name.lower(),
        "how": How(found["how"]).name.lower(),
        "protocol": PROTOCOL_NAMES.get(int(key["protocol"]), str(int(key["protocol"]))),
        "src": end(key["src"], key["src_port"]),
        "dst": end(key["dst"], key["dst_port"]),
        "here": end(found["here"], found["here_port"]),
        "there": end(found["there"], found["there_port"]),
        "netns": int(found["netns"]) or None,
        "mark": int(found["mark"]),
    }


def _document(pid: int, agreement: "Agreement") -> dict[str, Any]:
    from tracer.kernel.ledger import Account, How

    accounts = {
        account.name.lower(): {"compared": agreement.compared[account], "agreeing": agreement.agreeing(account)}
        | {how.name.lower(): agreement.count(account, how) for how in How if how != How.UNDECIDED}
        for account in Account
    }
    return {
        "pid": pid,
        "accounts": accounts,
        "undecided_connections": agreement.undecided,
        "disagreements": [_row(found) for found in agreement.found],
    }
