# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Move data between the layers of a backing chain (https://www.qemu.org/docs/master/tools/qemu-img.html, rebase and commit)."""

from __future__ import annotations

from ..errors import Error, OptionError, Unsupported
from ..extent import ALLOCATED, ZERO
from .pieces import EXTENTS, failure, pieces, source_runs
from .transfer import SPARSE_SIZE, Transfer, rest, thread_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterable, Iterator, Optional, Sequence, TypeVar, Union

    _Item = TypeVar("_Item")

    from ..node import Node
    from .crew import Turn
    from .pieces import Part, Piece, Read, Run
    from .transfer import Span


def rebase(
    overlay: Node,
    backing: Optional[Node],
    *,
    compress: bool = False,
    threads: int = 8,
    progress: Optional[Callable[[int, int], None]] = None,
) -> None:
    """Write into `overlay` all that it would lose if `backing` (None: nothing) took the place of its backing node.

    Only allocation units are written that differ; what both chains have in common is not even read. The overlay names
    its old backing file until its driver is told otherwise. Raises Error as `copy` does, Unsupported.
    """
    if compress and not overlay.supports_compression:
        raise Unsupported("Compression not supported for this file format")
    transfer = Rebase(overlay, overlay.size, backing is None, SPARSE_SIZE, False, compress)
    transfer.backing = backing
    transfer.progress = progress
    if overlay.size:
        try:
            transfer.run((overlay,), 0, thread_count(threads, [node for node in (overlay, backing) if node is not None], compress))
        except Error as exc:
            if str(exc).startswith("error while reading at byte"):
                raise Error(OLD, filename=overlay.filename, offset=exc.offset, errno=exc.errno, hint=exc.hint) from exc
            raise


def commit(
    top: Node,
    base: Node,
    *,
    rate: Optional[int] = None,
    threads: int = 8,
    progress: Optional[Callable[[int, int], None]] = None,
) -> None:
    """Write into `base`, a node below `top` that is open for writing, what the nodes above it hold.

    `rate` is in bytes a second. Raises Error as `copy` does, and where the base is shorter.
    """
    if base.size < top.size:
        raise OptionError("the base is shorter than the image that is committed into it", filename=base.filename)
    transfer = Commit(base, top.size, False, SPARSE_SIZE, False, False)
    transfer.rate = rate or 0
    transfer.progress = progress
    if top.size:
        transfer.run((top,), 0, thread_count(threads, (top,)))


def allocated_above(top: Node, base: Optional[Node], offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether a layer from `top` down to, but without, `base` decides) for all of offset .. end.

    What lies behind the end of a shorter layer reads as zeroes by that layer's decision.
    """
    while offset < end:
        for start, count, status, _host, _host_offset in top.block_status(offset, end - offset, False, EXTENTS):
            offset = start + count
            below = top.backing
            if status & ALLOCATED:
                yield start, count, True
            elif below is None or below is base:
                yield start, count, False
            else:
                inside = max(0, min(count, below.size - start))
                if inside:
                    yield from allocated_above(below, base, start, start + inside)
                if inside < count:
                    yield start + inside, count - inside, True


def _content(node: Optional[Node], offset: int, length: int) -> Iterator[Run]:
    """What `node` has in a range; zeroes behind its end."""
    inside = 0 if node is None else max(0, min(length, node.size - offset))
    if inside and node is not None:
        for start, count, status, host, host_offset in source_runs((node,), offset, inside):
            yield offset + start, count, status, host, host_offset
    if inside < length:
        yield offset + inside, length - inside, ZERO, None, 0


OLD = "error while reading from old backing file"
NEW = "error while reading from new backing file"


def _said(words: str, items: Iterable[_Item]) -> Iterator[_Item]:
    """The items; what goes wrong on the way is said in these words, "%s" being the reason. What we know beyond it becomes the hint."""
    try:
        yield from items
    except (Error, OSError) as exc:
        raise _retold(words, exc) from exc


def _retold(words: str, exc: Union[Error, OSError]) -> Error:
    import errno
    import os

    number = exc.errno or errno.EIO
    hint = exc.hint or str(exc) if isinstance(exc, Error) else None
    return Error(words.replace("%s", os.strerror(number)), errno=number, hint=hint)


class _Layers(Transfer):
    """A transfer within one chain: only some ranges are its affair."""

    def _ranges(self, top: Node) -> Iterator[Run]:
        raise NotImplementedError

    def _checked(self, runs: Iterator[Run]) -> Iterator[Run]:
        """The runs; an error is that of the place that was come to."""
        position = 0
        try:
            for run in runs:
                yield run
                position = run[0] + run[1]
        except (Error, OSError) as exc:
            if isinstance(exc, Error) and str(exc).startswith("error while "):
                raise
            raise failure("error while reading block status at offset", position, exc) from exc

    def _work(self, sources: Sequence[Node], offset: int) -> Iterator[Piece]:
        return pieces(self._checked(self._ranges(sources[0])), self.unit, self._chunk, self.size)


class Commit(_Layers):
    """What is above the target, into the target."""

    def _ranges(self, top: Node) -> Iterator[Run]:
        for start, count, allocated in allocated_above(top, self.target, 0, self.size):
            if allocated:
                yield from _content(top, start, count)
            else:
                yield start, count, 0, None, 0


class Rebase(_Layers):
    """What the target's backing node has and `backing` has not, into the target."""

    backing: Optional[Node]

    def __init__(self, target: Node, size: int, target_is_zero: bool, sparse_size: int, own: bool, compress: bool) -> None:
        from ..kernels import difference_runs

        super().__init__(target, size, target_is_zero, sparse_size, own, compress)
        self._difference_runs = difference_runs
        self._found: dict[int, list[Read]] = {}  # what the new backing node has in pieces that are under way, by offset
        self._buffers: dict[int, memoryview] = {}  # of each thread

    def _ranges(self, top: Node) -> Iterator[Run]:
        old = top.backing
        for start, count, allocated in _said("error while reading image metadata: %s", allocated_above(top, old, 0, self.size)):
            if allocated:
                yield start, count, 0, None, 0
            else:
                yield from _said(OLD, _content(old, start, count))

    def _work(self, sources: Sequence[Node], offset: int) -> Iterator[Piece]:
        new = self.backing
        for piece in super()._work(sources, offset):
            start, length, reads = piece
            if new is None:
                if reads:
                    yield piece
            elif reads:
                other = [
                    (host, host_offset, at - start, count)
                    for at, count, _status, host, host_offset in _said(NEW, _content(new, start, length))
                    if host is not None
                ]
                if other != reads:
                    self._found[start] = other
                    yield piece
            else:
                inside = max(0, min(length, new.size - start))
                for at, count, other in pieces(_said(NEW, source_runs((new,), start, inside)), self.unit, self._chunk, inside) if inside else ():
                    if other:
                        self._found[start + at] = other
                        yield start + at, min(count, length - at), []

    def _write_zeroes(self, offset: int, length: int, buffer: memoryview, turn: Turn) -> None:
        """Zeroes under which the new backing node has data."""
        self._copy([(offset, length, [], 0)], buffer, turn)

    def _select(self, batch: Sequence[Part], buffer: memoryview) -> tuple[list[Span], list[Span]]:
        """What differs from the new backing node, in whole allocation units."""
        if self.backing is None:
            return super()._select(batch, buffer)
        from _thread import get_ident

        other = self._buffers.get(get_ident())
        if other is None:
            other = self._buffers[get_ident()] = memoryview(bytearray(self._chunk))
        data: list[Span] = []
        zeroes: list[Span] = []
        for offset, length, _reads, base in batch:
            try:
                self._loader.load(self._found.pop(offset), other, length)
            except (Error, OSError) as exc:
                raise _retold(NEW, exc) from exc
            for at, count in self._difference_runs(buffer[base : base + length], other[:length], self._grain):
                runs = self._nonzero_runs(buffer, base + at, count, self._grain)
                data += runs
                zeroes += rest(runs, base + at, base + at + count)
        return data, zeroes
