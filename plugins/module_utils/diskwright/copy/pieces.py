# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What is where in the sources, cut into pieces of work (QEMU's block status, https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html).

Everything here is lazy: a range is asked for when somebody is about to work on it.
"""

from __future__ import annotations

from ..errors import Error
from ..extent import DATA, ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterable, Iterator, Optional, Sequence

    from ..node import Node

    # offset, length, status (DATA, ZERO, or 0 for what the backing file gives), host, host_offset
    Run = tuple[int, int, int, Optional[Node], int]
    # host, host_offset, offset in the buffer, length
    Read = tuple[Node, int, int, int]
    # offset, length, reads; no reads: the range is zero
    Piece = tuple[int, int, list[Read]]
    # offset, length, reads, where its bytes begin in the buffer
    Part = tuple[int, int, list[Read], int]

CHUNK = 512 << 10  # bytes of a buffer: smaller ones cost more calls, much larger ones fall out of the L2 cache
EXTENTS = 1024  # extents that are asked for at a time
LOST = 32 << 10  # bytes that are given up at a time where metadata cannot be read; no table of qcow2 describes fewer
NEARBY = 64 << 10  # bytes of zeroes between two extents that are not worth two pieces


def source_runs(
    sources: Sequence[Node], offset: int = 0, length: Optional[int] = None, own: bool = False, lost: Optional[Callable[[Error], None]] = None
) -> Iterator[Run]:
    """The content of `sources`, one after the other, from `offset` on, as runs that begin at 0 and follow one another.

    With `own` only what the sources' own layers hold is looked up. Raises Error "error while reading block status ...". With
    `lost` that is told of it, and what nothing is known of are zeroes.
    """
    total = sum(node.size for node in sources)
    end = total if length is None else min(total, offset + length)
    first = 0
    for node in sources:
        position = max(offset, first)
        last = min(end, first + node.size)
        limit, failing = EXTENTS, False
        while position < last:
            try:
                extents = node.resolve(position - first, last - position, True, limit, own)
            except (Error, OSError) as exc:
                if limit > 1:  # all up to the place that fails
                    limit = 1
                    continue
                error = failure("error while reading block status at offset", position - offset, exc)
                if lost is None:
                    raise error from exc
                if not failing:
                    lost(error)
                failing = True
                count = min(_lost_length(position - first), last - position)
                yield position - offset, count, ZERO, None, 0
                position += count
                continue
            limit, failing = EXTENTS, False
            for start, count, status, host, host_offset in extents:
                yield first + start - offset, count, status, host, host_offset
            position = first + extents[-1][0] + extents[-1][1]
        first += node.size


def _lost_length(position: int) -> int:
    """How many bytes to give up where the metadata for `position` cannot be read: few, but not one sector after the other
    where many clusters are lost."""
    length = LOST
    while position % length:
        length //= 2
    return max(length, 1)


def layer_runs(
    sources: Sequence[Node], offset: int, length: int, unit: int, lost: Optional[Callable[[Error], None]] = None
) -> Iterator[Run]:
    """source_runs of the sources' own layers, but what they lack only in whole units: the rest of a unit that they hold a part
    of comes from their backing files. For targets that are written in whole units."""
    for run in source_runs(sources, offset, length, True, lost):
        start, count, status = run[:3]
        end = start + count
        first = -(-start // unit) * unit
        last = end if end == length else end // unit * unit
        if status or first == start and last == end:
            yield run
            continue
        if first >= last:
            first = last = end
        yield from _resolved(sources, offset, start, first, lost)
        if first < last:
            yield first, last - first, 0, None, 0
        yield from _resolved(sources, offset, last, end, lost)


def _resolved(sources: Sequence[Node], offset: int, start: int, end: int, lost: Optional[Callable[[Error], None]]) -> Iterator[Run]:
    """The full content between two places, both counted from `offset`."""
    for run in source_runs(sources, offset + start, end - start, False, lost) if start < end else ():
        yield (start + run[0], *run[1:])


def failure(words: str, offset: int, exc: BaseException, kind: type[Error] = Error, where: str = "") -> Error:
    """What went wrong, "`words` `offset``where`: reason", in QEMU's words: the errno's text. What we know beyond it becomes the hint."""
    import errno
    import os

    number = getattr(exc, "errno", None) or errno.EIO
    hint = str(exc) if isinstance(exc, Error) else None
    return kind("%s %d%s: %s" % (words, offset, where, os.strerror(number)), offset=offset, errno=number, hint=hint)


def pieces(runs: Iterable[Run], unit: int, chunk: int, end: int) -> Iterator[Piece]:
    """Runs as pieces of at most `chunk` bytes with data in them, and of any length that are zero; ascending.

    Data is aligned out to `unit` (of which `chunk` is a multiple), but not beyond `end`, so that whoever writes it never
    has to read what is around it. Runs of status 0 are left out, and no data is aligned out over them.
    """
    cursor = 0  # what is before it has been yielded
    first = limit = stop = 0  # the piece in hand begins at first, its data ends at stop, it may grow to limit
    reads: list[Read] = []
    for offset, length, status, host, host_offset in runs:
        if host is None or not status & DATA:
            whole = min(-(-stop // unit) * unit, end if status & ZERO else offset)
            if reads and (not status & ZERO or offset + length >= min(limit, end) or offset + length - whole >= NEARBY):
                yield first, whole - first, reads
                cursor, reads = whole, []
            if not status & ZERO:
                if offset > cursor:
                    yield cursor, offset - cursor, []
                cursor = offset + length
            continue
        while length:
            if not reads:
                first = max(offset // unit * unit, cursor)
                if first > cursor:
                    yield cursor, first - cursor, []
                    cursor = first
                limit = (first // chunk + 1) * chunk
            count = min(length, limit - offset)
            reads.append((host, host_offset, offset - first, count))
            offset += count
            host_offset += count
            length -= count
            stop = offset
            if stop == limit:
                yield first, stop - first, reads
                cursor, reads = stop, []
    if reads:
        whole = min(-(-stop // unit) * unit, end)
        yield first, whole - first, reads
        cursor = whole
    if cursor < end:
        yield cursor, end - cursor, []


def batches(work: Iterable[Piece], grain: int, room: int) -> Iterator[list[Part]]:
    """Pieces with data, one or more small ones that fit into a buffer of `room` bytes together, each at a multiple of `grain`
    there; and pieces that are zero, each alone. What costs the same for each batch, as a change of threads, is worth it."""
    batch: list[Part] = []
    base = 0
    for offset, length, reads in work:
        taken = -(-length // grain) * grain
        if batch and (not reads or base + taken > room):
            yield batch
            batch, base = [], 0
        if not reads:
            yield [(offset, length, reads, 0)]
            continue
        if base:
            reads = [(host, host_offset, base + at, count) for host, host_offset, at, count in reads]
        batch.append((offset, length, reads, base))
        base += taken
    if batch:
        yield batch


class Loader:
    """Fills buffers with what pieces say: all plain files in one kernel call, other hosts by themselves."""

    def __init__(self) -> None:
        from ..kernels import gather

        self._gather = gather
        self._descriptors: dict[Node, int] = {}

    def descriptor(self, host: Node) -> int:
        """The descriptor that gives `host`'s bytes at their host offsets, or -1."""
        try:
            return self._descriptors[host]
        except KeyError:
            found = host.fileno() if host.request_alignment == 1 else -1
            self._descriptors[host] = found
            return found

    def load(self, reads: Iterable[Read], view: memoryview, length: int) -> None:
        """Fill view[:length]: what no read covers is zero. Raises OSError or Error as the hosts do."""
        plain = []
        done = 0
        for host, host_offset, at, count in reads:
            if at > done:
                clear(view, done, at)
            done = at + count
            descriptor = self.descriptor(host)
            if descriptor < 0:
                host.read_own(host_offset, view[at:done])
            else:
                plain.append((descriptor, host_offset, at, count))
        if done < length:
            clear(view, done, length)
        if plain:
            self._gather(plain, view)

    def culprit(self, reads: Iterable[Read], view: memoryview) -> int:
        """After a failed `load`: the offset in the buffer of the first part that fails by itself: a read, or what lies of
        it in one cluster of a host that has them."""
        first = -1
        for host, host_offset, at, count in reads:
            if first < 0:
                first = at
            end = at + count
            while at < end:
                step = end - at
                if self.descriptor(host) < 0 and host.cluster_size:
                    step = min(step, host.cluster_size - host_offset % host.cluster_size)
                try:
                    host.read_own(host_offset, view[at : at + step])
                except (Error, OSError):
                    return at
                at += step
                host_offset += step
        return max(first, 0)


_ZEROES = bytes(CHUNK)


def clear(view: memoryview, start: int, stop: int) -> None:
    """Set view[start:stop] to zero."""
    while start < stop:
        part = min(stop - start, len(_ZEROES))
        view[start : start + part] = memoryview(_ZEROES)[:part]
        start += part
