"""Partial counts of many files, in bounded memory: what is read at once, how it is put together, how fine time is.

The bins are as fine as the range and the number of cells allow, which depends on the data alone: not on the order of
the files, on who counted them, or on how many did.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Generator, Iterable, Sequence

from tracer.analysis import partial
from tracer.analysis.partial import Bins, Partial
from tracer.errors import TracerError
from tracer.store import reader
from tracer.store.roots import File

#: Widths that bins may begin with, in seconds; the narrowest that makes at most `MOST_BINS` of the range.
WIDTHS_S = (1, 2, 5, 10, 30, 60, 300, 600, 900, 1800, 3600, 3 * 3600, 6 * 3600, 86_400)
MOST_BINS = 64
#: Cells kept in all, some 90 bytes each while two tables are merged; beyond, bins are made twice as wide.
MOST_CELLS = 6_000_000
#: Cells that wait to be merged.
WAITING_CELLS = 3_000_000


@dataclasses.dataclass(frozen=True)
class Counted:
    """What became of so many files: their counts as one, and why some could not be read."""

    part: Partial
    failures: tuple[TracerError, ...] = ()
    files: int = 1


#: Counts files with the given bins, in any order and in any groups.
Engine = Callable[[Sequence[File], Bins], Generator[Counted, None, None]]


def bins_for(begin_ns: int, end_ns: int, interval_s: float = 0.0) -> Bins:
    """Bins of a range, not narrower than the interval that rows are reported in."""
    for width_s in WIDTHS_S:
        bins = Bins(begin_ns, end_ns, width_s * 10**9)
        if bins.count <= MOST_BINS and width_s >= interval_s:
            return bins
    return Bins(begin_ns, end_ns, -(-(end_ns - begin_ns) // MOST_BINS))


def count(path: File, bins: Bins) -> Counted:
    """The counts of one file. What cannot be read is returned, not raised: one file spoils no other's."""
    try:
        parts = [partial.of_table(table, bins) for table in reader.tables(path, columns=partial.COLUMNS)]
    except TracerError as error:
        return Counted(partial.nothing(bins), (error,))
    if len(parts) == 1:
        return Counted(parts[0])
    return Counted(partial.merged(parts) if parts else partial.nothing(bins))


def local(paths: Sequence[File], bins: Bins) -> Generator[Counted, None, None]:
    """The counts of each file, as they come, by as many threads as this process may use CPUs: Arrow and NumPy let go of
    the interpreter for nearly all of it."""
    workers = max(1, len(os.sched_getaffinity(0)))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        # No more at once than are worked on: what is done and not yet taken takes memory too.
        waiting: set[concurrent.futures.Future[Counted]] = set()
        for path in paths:
            waiting.add(pool.submit(count, path, bins))
            if len(waiting) > workers:
                done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in concurrent.futures.as_completed(waiting):
            yield future.result()


def together(counted: Iterable[Counted], bins: Bins, progress: Callable[[int], None] = lambda files: None) -> Counted:
    """All counts as one. `progress` is told how many files are done, each time some are."""
    whole, waiting = partial.nothing(bins), list[Partial]()
    failures: list[TracerError] = []
    files = 0
    for each in counted:
        failures += each.failures
        files += each.files
        if len(each.part):
            waiting.append(_as_wide(each.part, whole.bins))
        if sum(map(len, waiting)) > WAITING_CELLS:
            whole, waiting = _bounded(partial.merged([whole, *waiting])), []
        progress(files)
    whole = _bounded(partial.merged([whole, *(_as_wide(part, whole.bins) for part in waiting)]))
    return Counted(whole, tuple(failures), files)


def _bounded(part: Partial) -> Partial:
    while len(part) > MOST_CELLS and part.bins.count > 1:
        part = partial.coarser(part)
    return part


def _as_wide(part: Partial, bins: Bins) -> Partial:
    while part.bins.width_ns < bins.width_ns:
        part = partial.coarser(part)
    return part
