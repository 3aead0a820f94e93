"""Counting on a Dask cluster: the same integers, added up by its workers.

Each worker counts some files at a time and merges their counts, so that little comes back. Files must have the same
names there as here, and the package the same version.
"""

from collections.abc import Generator, Sequence
from typing import Any

from tracer import version
from tracer.analysis import gather
from tracer.analysis.gather import Counted, Engine
from tracer.analysis.partial import Bins
from tracer.errors import TracerError
from tracer.store.roots import File

#: Files that a worker merges before it gives anything back.
GROUP = 8
#: Seconds to wait for the scheduler.
PATIENCE_S = 30


def engine(scheduler: str) -> Engine:
    """Counts with the workers of the scheduler at this address. Raises TracerError if it cannot be used."""
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise TracerError(
            "Dask is not installed here: pip install 'vip-tracer[dask]', here and on the workers"
        ) from error

    def counted(paths: Sequence[File], bins: Bins) -> Generator[Counted, None, None]:
        try:
            client = Client(scheduler, timeout=PATIENCE_S, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, TimeoutError, ValueError) as error:
            raise TracerError(
                f"no Dask scheduler answers at {scheduler} ({error}); check the address, such as tcp://10.0.0.5:8786"
            ) from error
        with client:
            threads = _checked(client, scheduler)
            groups = (paths[begin : begin + GROUP] for begin in range(0, len(paths), GROUP))
            done = as_completed(loop=client.loop)  # type: ignore[no-untyped-call]
            # No more at once than keep the workers busy: what is done and not yet taken takes their memory.
            for _ in range(2 * threads):
                _next(client, groups, bins, done)
            for future in done:
                try:
                    yield future.result()
                except TracerError:
                    raise
                except Exception as error:
                    raise TracerError(f"a worker of {scheduler} failed: {error!r}; see its log") from error
                _next(client, groups, bins, done)

    return counted


def count_group(paths: Sequence[File], bins: Bins) -> Counted:
    """Some files' counts as one. Runs on a worker."""
    return gather.together((gather.count(path, bins) for path in paths), bins)


def own_version() -> str:
    """The package's version. Runs on a worker."""
    return version.__version__


def _next(client: Any, groups: Any, bins: Bins, done: Any) -> None:
    for group in groups:
        done.add(client.submit(count_group, group, bins, pure=False))
        return


def _checked(client: Any, scheduler: str) -> int:
    """How many threads the workers have in all; TracerError if there is none, or one that would count otherwise."""
    threads = int(sum(client.nthreads().values()))
    if not threads:
        raise TracerError(f"the Dask scheduler at {scheduler} has no workers; start some, then try again")
    try:
        versions = set(client.run(own_version).values())
    except ImportError as error:
        raise TracerError(
            f"the workers of {scheduler} lack a package ({error}); pip install 'vip-tracer[dask]' there"
        ) from error
    if versions != {version.__version__}:
        raise TracerError(
            f"the workers of {scheduler} have vip-tracer {', '.join(sorted(versions))}, here it is "
            f"{version.__version__}: install the same there"
        )
    return threads
