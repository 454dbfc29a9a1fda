# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Copy nodes into a node (https://www.qemu.org/docs/master/tools/qemu-img.html, convert)."""

from __future__ import annotations

import os

from ..errors import Error, Unsupported
from ..node import aligned_buffer
from .crew import Crew
from .pieces import CHUNK, Loader, batches, clear, failure, layer_runs, pieces, source_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterator, Optional, Sequence

    from ..node import Alloc, Node
    from .crew import Turn
    from .pieces import Part, Piece, Read

    Span = tuple[int, int]  # offset in the buffer, length

SECTOR = 512
SPARSE_SIZE = 4096  # bytes; runs of zeroes as long as this are not written
UNIT_MAX = 4 << 20  # bytes; larger allocation units are left to the node's own copy-on-write
RANGE_CHUNK = 16 << 20  # bytes that are given to copy_file_range at a time
BUFFERS = 32 << 20  # bytes of all buffers together, at most (one is always allowed)
THREADS = 2  # more do not help: the kernel lets one thread at a time write to a file


def copy(
    sources: Sequence[Node],
    target: Node,
    *,
    offset: int = 0,
    length: Optional[int] = None,
    target_is_zero: bool = False,
    own: bool = False,
    sparse_size: int = SPARSE_SIZE,
    compress: bool = False,
    copy_range: bool = False,
    salvage: bool = False,
    threads: int = 8,
    ordered: bool = True,
    rate: Optional[int] = None,
    progress: Optional[Callable[[int, int], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> None:
    """Write the content of `sources`, one after the other, to `target` from 0 on; what is behind it there stays.

    offset, length   the part of the sources that is copied, in bytes; None: to the end
    target_is_zero   the target reads as zeroes, so zeroes need not be written
    own              the target has a backing file which gives what the sources' own layers do not hold
    sparse_size      runs of so many zero bytes are found and not written as data; 0 writes data and zeroes in full
    compress         store it compressed
    copy_range       let the kernel copy between files where it can
    salvage          what cannot be read becomes zeroes, and `warn` is told
    threads          at most so many; fewer where more are known not to help
    ordered          space in the target is taken in the order of the content
    rate             bytes a second, at most
    progress         called with (bytes done, bytes in all) in the caller's thread; what it raises ends the copy

    Raises Error "error while reading at byte N: ..." or "error while writing at byte N: ...", Unsupported. No thread
    is left running, whatever is raised.
    """
    if compress and not target.supports_compression:
        raise Unsupported("Compression not supported for this file format")
    total = sum(node.size for node in sources)
    size = max(0, min(total, total if length is None else offset + length) - offset)
    transfer = Transfer(target, size, target_is_zero, sparse_size, own, compress)
    transfer.copy_range = copy_range and not compress
    transfer.salvage = salvage
    transfer.ordered = ordered
    transfer.rate = rate or 0
    transfer.progress = progress
    transfer.warn = warn
    if not size:
        if progress is not None:
            progress(0, 0)
        return
    count = 1 if transfer.copy_range else thread_count(threads, sources, compress)
    transfer.run(sources, offset, count)


def thread_count(most: int, sources: Sequence[Node], compress: bool = False) -> int:
    """How many threads to use if `most` are allowed: one a processor where codecs are at work, otherwise THREADS."""
    busy = compress or any(layer.compressed or layer.decodes or layer.encrypted for node in sources for layer in node.layers())
    if busy and hasattr(os, "sched_getaffinity"):
        return max(1, min(most, max(THREADS, len(os.sched_getaffinity(0)))))
    return max(1, min(most, THREADS))


class Transfer:
    """One copy under way."""

    def __init__(self, target: Node, size: int, target_is_zero: bool, sparse_size: int, own: bool, compress: bool) -> None:
        from ..kernels import nonzero_runs, scatter

        self._nonzero_runs = nonzero_runs
        self._scatter = scatter
        self.target = target
        self.size = size
        self.own = own
        whole = compress or not own  # an overlay copies what it does not get from its own backing file
        unit = max(target.allocation_unit, target.cluster_size) if compress else target.allocation_unit  # subclusters are not compressed
        self.unit = unit if whole and 0 < unit <= UNIT_MAX else 1
        self.sparse_size = sparse_size
        self.skip_zeroes = target_is_zero
        self.compress = compress
        self.copy_range = self.salvage = False
        self.ordered = True
        self.rate = 0
        self.progress: Optional[Callable[[int, int], None]] = None
        self.warn: Optional[Callable[[str], None]] = None
        self._loader = Loader()
        self._reach: dict[Node, int] = {}  # how far each host must reach at least where zeroes at the end were not written
        self._caller = 0  # the thread that progress is told in
        self._due = 0.0  # when the next write may begin, for rate

    def run(self, sources: Sequence[Node], offset: int, threads: int) -> None:
        """Copy with so many threads."""
        from _thread import get_ident

        self._caller = get_ident()
        # Where nothing smaller than a cluster can be left out, smaller runs need not be looked for.
        self._grain = -(-max(self.sparse_size, 1) // self.unit) * self.unit
        self._chunk = RANGE_CHUNK if self.copy_range else -(-max(CHUNK, self._grain) // self.unit) * self.unit
        threads = max(1, min(threads, BUFFERS // self._chunk))
        for node in (*sources, self.target):
            node.preload()
        work = self._work(sources, offset)
        self._crew = Crew(batches(work, self._grain, 0 if self.copy_range else self._chunk))
        if self.progress is not None:
            self.progress(0, self.size)
        self._crew.run(self._member, threads)
        for host, end in self._reach.items():
            if host.size < end:
                host.truncate(end)
        if self.progress is not None:
            self.progress(self.size, self.size)

    def _work(self, sources: Sequence[Node], offset: int) -> Iterator[Piece]:
        """The pieces to be brought over, ascending."""
        lost = self._lost if self.salvage else None
        if self.own and self.unit > 1:
            runs = layer_runs(sources, offset, self.size, self.unit, lost)
        else:
            runs = source_runs(sources, offset, self.size, self.own, lost)
        work = pieces(runs, self.unit, self._chunk, self.size)
        return filter(_has_data, work) if self.skip_zeroes else work

    def _member(self) -> None:
        """What each thread does."""
        from _thread import get_ident

        progress = self.progress if get_ident() == self._caller else None
        # Room for what the last allocation unit has behind the end.
        buffer = aligned_buffer(0 if self.copy_range else self._chunk)
        take = self._crew.take
        while True:
            item = take()
            if item is None:
                return
            batch, turn = item
            offset, length, reads, _base = batch[-1]
            try:
                if not self.ordered:
                    turn.pass_on()
                if not reads:
                    self._write_zeroes(offset, length, buffer, turn)
                elif not self.copy_range or not self._copy_range(offset, length, reads):
                    if len(buffer) < self._chunk:  # the kernel would not copy after all
                        buffer = aligned_buffer(self._chunk)
                    self._copy(batch, buffer, turn)
            except Error:
                self._crew.stop()
                raise
            except OSError as exc:
                self._crew.stop()
                raise failure("error while writing at byte", offset, exc) from exc
            finally:
                turn.pass_on()
            if progress is not None:
                progress(offset + length, self.size)

    def _copy(self, batch: Sequence[Part], buffer: memoryview, turn: Turn) -> None:
        """Bring pieces with data over."""
        reads = batch[0][2] if len(batch) == 1 else [read for part in batch for read in part[2]]
        try:
            self._loader.load(reads, buffer, batch[-1][3] + batch[-1][1])
        except (Error, OSError) as exc:
            if not self.salvage:
                raise failure("error while reading at byte", place(batch, self._loader.culprit(reads, buffer)), exc) from exc
            self._salvage(batch, reads, buffer)
        runs, zeroes = self._select(batch, buffer)
        if self.rate:
            self._hold_back(sum(run[1] for run in runs))
        units = self._units(batch, runs) if self.compress else []
        encoded = [self.target.encode(buffer[at : at + count]) for at, count in units]
        if self.ordered:
            turn.wait()
        position = 0
        try:
            if self.compress:
                for (at, count), stored in zip(units, encoded):
                    position, offset = at, place(batch, at)
                    if count < self.unit and (offset % self.unit or offset + count < self.target.size):  # the target has some of its subclusters
                        self.target.pwrite(offset, buffer[at : at + count])
                    else:
                        self.target.write_compressed(offset, buffer[at : at + count], stored)
            else:
                position = runs[0][0] if runs else 0
                self._write(batch, runs, buffer, turn)
            for position, count in zeroes:
                self.target.pwrite_zeroes(place(batch, position), count, True)
        except (Error, OSError) as exc:
            raise failure("error while writing at byte", place(batch, position), exc) from exc

    def _select(self, batch: Sequence[Part], buffer: memoryview) -> tuple[list[Span], list[Span]]:
        """What of the pieces that are loaded is written as data, and what as zeroes: runs of the buffer, none in two pieces."""
        if not self.sparse_size:
            return [(base, length) for _offset, length, _reads, base in batch], []
        runs = self._nonzero_runs(buffer, 0, batch[-1][3] + batch[-1][1], self._grain)
        if len(batch) > 1:
            runs = [run for _offset, length, _reads, base in batch for run in within(runs, base, base + length)]
        if self.skip_zeroes:
            return runs, []
        return runs, [gap for _offset, length, _reads, base in batch for gap in rest(within(runs, base, base + length), base, base + length)]

    def _units(self, batch: Sequence[Part], runs: Sequence[Span]) -> list[Span]:
        """Runs cut at the bounds of allocation units: (offset in the buffer, length)."""
        unit = self.unit
        units: list[Span] = []
        for at, count in runs:
            end = at + count
            while at < end:
                step = min(unit - place(batch, at) % unit, end - at)
                units.append((at, step))
                at += step
        return units

    def _write(self, batch: Sequence[Part], runs: Sequence[Span], buffer: memoryview, turn: Optional[Turn]) -> None:
        """Write runs of the buffer, which holds the pieces.

        In order is only what decides where the data comes to lie. The writes themselves overlap: they are at most as many
        pieces out of order as there are threads.
        """
        target = self.target
        allocs: list[Alloc] = []
        writes: list[tuple[int, int, int, int]] = []
        others: list[tuple[Node, int, int, int]] = []
        descriptor = self._loader.descriptor
        try:
            rising = iter(batch)
            end = -1
            for at, count in runs:
                while at >= end:
                    offset, length, reads, base = next(rising)
                    offset -= base
                    end = base + length
                if not self._whole_units(offset + at, count):
                    others.append((target, offset + at, at, count))
                    continue
                found = target.reserve(offset + at, count)
                allocs += found
                for alloc in found:
                    at = low = alloc.offset - offset
                    high = low + alloc.length
                    if high > end:  # the last unit goes on behind the end of the image
                        clear(buffer, end, high)
                    fd = descriptor(alloc.host)
                    if alloc.zeroed and reads:  # what no source holds need not be written
                        low = max(low, reads[0][2])
                        high = min(high, reads[-1][2] + reads[-1][3])
                        self._reach[alloc.host] = max(self._reach.get(alloc.host, 0), alloc.host_offset + alloc.length)
                    if fd < 0:
                        others.append((alloc.host, alloc.host_offset + low - at, low, high - low))
                    else:
                        writes.append((fd, alloc.host_offset + low - at, low, high - low))
            if turn is not None:
                turn.pass_on()
            if writes:
                self._scatter(writes, buffer)
            for host, position, at, count in others:
                if host is target:
                    host.pwrite(position, buffer[at : at + count])
                else:
                    host.write_hosted(position, buffer[at : at + count])
        except BaseException:
            target.withdraw(allocs)
            raise
        target.publish(allocs)

    def _whole_units(self, offset: int, length: int) -> bool:
        """Whether a write covers whole allocation units, as far as the target goes: nothing around it must be kept."""
        unit = self.target.allocation_unit
        if unit <= 1:
            return True
        end = offset + length
        return self.unit == unit and not offset % unit and (not end % unit or end == self.target.size)

    def _write_zeroes(self, offset: int, length: int, buffer: memoryview, turn: Turn) -> None:
        if self.ordered:
            turn.wait()
        if self.sparse_size:
            if self.rate:
                self._hold_back(length)
            self.target.pwrite_zeroes(offset, length, True)
            return
        end = offset + length
        while offset < end and not self._crew.stopped:  # zeroes are data like any other
            count = min(self._chunk - offset % self._chunk, end - offset)
            if self.rate:
                self._hold_back(count)
            clear(buffer, 0, count)
            self._write([(offset, count, [], 0)], [(0, count)], buffer, turn if offset + count == end else None)
            offset += count

    def _copy_range(self, offset: int, length: int, reads: list[Read]) -> bool:
        """Let the kernel copy a piece; False, and never tried again, where it cannot."""
        descriptor = self._loader.descriptor
        covered = sum(read[3] for read in reads)
        if not hasattr(os, "copy_file_range") or any(descriptor(read[0]) < 0 for read in reads):
            self.copy_range = False
            return False
        if covered != length or not self._whole_units(offset, length):
            return False
        if self.rate:
            self._hold_back(length)
        allocs = self.target.reserve(offset, length)
        try:
            done = all(
                descriptor(alloc.host) >= 0 and alloc.offset - offset + alloc.length <= length and self._copy_alloc(alloc, offset, reads)
                for alloc in allocs
            )
        except OSError:
            done = False  # many reasons (other file systems, block devices, old kernels): reading and writing will tell
        except BaseException:
            self.target.withdraw(allocs)
            raise
        if done:
            self.target.publish(allocs)
        else:
            self.target.withdraw(allocs)
            self.copy_range = False
        return done

    def _copy_alloc(self, alloc: Alloc, offset: int, reads: list[Read]) -> bool:
        """Fill one allocation by copy_file_range; False where the kernel copies less than it was told to."""
        target = self._loader.descriptor(alloc.host)
        first = alloc.offset - offset
        for host, host_offset, at, count in reads:
            start, stop = max(at, first), min(at + count, first + alloc.length)
            while start < stop:
                copied = os.copy_file_range(
                    self._loader.descriptor(host), target, stop - start, host_offset + start - at, alloc.host_offset + start - first
                )
                if not copied:
                    return False
                start += copied
        return True

    def _lost(self, error: Error) -> None:
        if self.warn is not None:
            self.warn(str(error))

    def _salvage(self, batch: Sequence[Part], reads: list[Read], buffer: memoryview) -> None:
        """Load pieces sector by sector; what cannot be read is zero."""
        clear(buffer, 0, batch[-1][3] + batch[-1][1])
        for host, host_offset, at, count in reads:
            for start in range(at, at + count, SECTOR):
                stop = min(start + SECTOR, at + count)
                try:
                    host.read_own(host_offset + start - at, buffer[start:stop])
                except (Error, OSError) as exc:
                    clear(buffer, start, stop)
                    if self.warn is not None:
                        self.warn(str(failure("error while reading offset", place(batch, start), exc)))

    def _hold_back(self, length: int) -> None:
        """Wait until `length` bytes may be written without going faster than `rate`."""
        from time import monotonic

        now = monotonic()
        due = max(self._due, now)
        self._due = due + length / self.rate
        while due > now and not self._crew.stopped:
            self._crew.pause(due - now)
            now = monotonic()


def _has_data(piece: Piece) -> bool:
    return bool(piece[2])


def place(batch: Sequence[Part], at: int) -> int:
    """The offset of what is at `at` in the buffer."""
    offset, _length, _reads, base = next(part for part in reversed(batch) if part[3] <= at)
    return offset + at - base


def within(runs: Sequence[Span], start: int, stop: int) -> list[Span]:
    """What of `runs` lies between two places."""
    return [(max(at, start), min(at + count, stop) - max(at, start)) for at, count in runs if at < stop and at + count > start]


def rest(runs: Sequence[Span], position: int, end: int) -> list[Span]:
    """What `runs` leave out of position .. end."""
    gaps = []
    for at, count in runs:
        if at > position:
            gaps.append((position, at - position))
        position = at + count
    if position < end:
        gaps.append((position, end - position))
    return gaps
