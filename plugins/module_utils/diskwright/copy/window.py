# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Copy parts of a node to the same places of another one, a window at a time: for jobs that may pause between two windows
(https://www.qemu.org/docs/master/interop/live-block-operations.html)."""

from __future__ import annotations

from ..errors import Unsupported
from ..extent import ZERO
from .overlay import _content, _Layers
from .transfer import SPARSE_SIZE, thread_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Sequence

    from ..node import Node
    from .pieces import Run


def copy_ranges(
    source: Node, target: Node, ranges: Sequence[tuple[int, int]], *, compress: bool = False, threads: int = 2, sparse_size: int = SPARSE_SIZE
) -> None:
    """Write what `source` has in `ranges`, (offset, length) in ascending order, to the same offsets of `target`; behind the end of the
    source are zeroes. Nobody may write there meanwhile.

    Ranges are best made of whole allocation units of the target: of others it reads what is around them. Raises Error as `copy` does,
    Unsupported.
    """
    if compress and not target.supports_compression:
        raise Unsupported("Compression not supported for this file format")
    if not compress and sparse_size:
        ranges = [found for found in ranges if not _zeroed(source, target, *found)]
    if ranges:
        window = Window(target, sum(ranges[-1]), False, sparse_size, False, compress)
        window.ranges = ranges
        window.run((source,), 0, thread_count(threads, (source,), compress))


def zeroes(node: Node, offset: int, length: int) -> int:
    """How many bytes at `offset` are known to be zero, `length` at most."""
    inside = min(length, node.size - offset)
    if inside <= 0:
        return length
    first = node.resolve(offset, inside, True, 1)[0]
    if not first[2] & ZERO:
        return 0
    return length if first[1] == inside else first[1]


def _zeroed(source: Node, target: Node, offset: int, length: int) -> bool:
    """Whether a range was all zeroes, which are written then: for that no threads are needed."""
    if zeroes(source, offset, length) < length:
        return False
    target.pwrite_zeroes(offset, length, True)
    return True


class Window(_Layers):
    """Some ranges, and nothing else."""

    ranges: Sequence[tuple[int, int]] = ()

    def _ranges(self, top: Node) -> Iterator[Run]:
        position = 0
        for offset, length in self.ranges:
            if offset > position:
                yield position, offset - position, 0, None, 0
            yield from _content(top, offset, length)
            position = offset + length
