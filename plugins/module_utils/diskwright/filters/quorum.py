# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""quorum: several nodes hold the same, and what enough of them say is read (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html).

See BlockdevOptionsQuorum there.
"""

from __future__ import annotations

import errno

from ..errors import Error, OptionError
from ..extent import ALLOCATED, DATA, ZERO, Extent, coalesce
from ..node import Alloc, Node
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Iterator, Optional

    from ..node import OpenFlags
    from ..options import NodeRefs


class QuorumOptions(Options):
    """Runtime options of quorum."""

    children: NodeRefs = opt(help="the nodes that hold the same")
    vote_threshold: int = opt(0, help="how many of them must agree")
    blkverify: bool = opt(False, help="two nodes, both of which must agree: the first difference is told")
    rewrite_corrupted: bool = opt(False, help="nodes that lost a vote are written what won it")
    read_pattern: str = opt("quorum", help="quorum: all are read; fifo: the next one only where one fails")


class Quorum(Node):
    """A node that is right as long as enough of its children are."""

    driver = "quorum"
    options_class = QuorumOptions
    strong_options = ("vote-threshold", "blkverify", "rewrite-corrupted", "read-pattern")

    def __init__(self, options: QuorumOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.members: list[Node] = list(options.children)  # type: ignore[arg-type]
        self.threshold = options.vote_threshold
        self.dirty = None
        if not self.members:
            raise OptionError("Number of provided children must be 1 or more")
        if self.threshold < 1:
            raise OptionError("Parameter 'vote-threshold' expects a value >= 1")
        if self.threshold > len(self.members):
            raise OptionError("threshold may not exceed children count")
        if options.read_pattern not in ("quorum", "fifo"):
            raise OptionError("Please set read-pattern as fifo or quorum")
        self.fifo = options.read_pattern == "fifo"
        self.verify = options.blkverify and not self.fifo
        if self.verify and (len(self.members) != 2 or self.threshold != 2):
            raise OptionError("blkverify=on can only be set if there are exactly two files and vote-threshold is 2")
        self.rewrite = options.rewrite_corrupted and not self.fifo
        if self.rewrite and self.verify:
            raise OptionError("rewrite-corrupted=on cannot be used with blkverify=on")
        if len({member.size for member in self.members}) > 1:
            raise Error("Could not refresh total sector count: Input/output error", errno=errno.EIO)
        self.growable = False

    def attach(self, role: str, child: Node) -> None:
        super().attach(role, child)
        self.members = self._present()

    def detach(self, role: str) -> None:
        super().detach(role)
        self.members = self._present()

    def _present(self) -> list[Node]:
        numbers = sorted(int(role.rpartition(".")[2]) for role in self.children)
        return [self.children["children.%d" % number] for number in numbers]

    def new_role(self) -> str:
        """The role of one more child."""
        numbers = [int(role.rpartition(".")[2]) for role in self.children]
        return "children.%d" % (max(numbers) + 1)

    def check_leaving(self) -> None:
        """Raise Error if no child may go."""
        if len(self.members) <= self.threshold:
            raise Error("The number of children cannot be lower than the vote threshold %d" % self.threshold)

    @property
    def size(self) -> int:
        return self.members[0].size

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        """Zero is what all members say is zero."""
        statuses = [self._resolved(member, offset, length) for member in self.members]
        cuts = sorted({extent.offset for found in statuses for extent in found} | {offset, offset + length})
        places = [0] * len(statuses)
        extents = []
        for start, stop in zip(cuts, cuts[1:]):
            zero = True
            for index, found in enumerate(statuses):
                while found[places[index]].offset + found[places[index]].length <= start:
                    places[index] += 1
                zero = zero and bool(found[places[index]].status & ZERO)
            extents.append(Extent(start, stop - start, ZERO | ALLOCATED) if zero else Extent(start, stop - start, DATA | ALLOCATED, self, start))
        return coalesce(extents)

    def _resolved(self, member: Node, offset: int, length: int) -> list[Extent]:
        """What a member says of a range; one that cannot tell does not say that it is zero."""
        try:
            return member.resolve(offset, length, True)
        except (Error, OSError):
            return [Extent(offset, length, DATA, member, offset)]

    def _status(self, offset: int, length: int, want_zero: bool) -> Iterator[Extent]:
        return iter(self._map(offset, length))

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        if self.fifo:
            self._read_first(host_offset, view)
            return
        answers: dict[bytes, list[Node]] = {}
        failure: BaseException = self._failure(errno.EIO)
        for member in self.members:
            try:
                answers.setdefault(member.pread(host_offset, len(view)), []).append(member)
            except (Error, OSError) as exc:
                failure = exc
                self._tell_of(member, "read", host_offset, len(view), exc)
        if not answers:
            self._tell_of(None, "read", host_offset, len(view))
            raise failure
        content, winners = max(answers.items(), key=lambda answer: len(answer[1]))
        if len(winners) < self.threshold:
            if self.verify and len(answers) == 2:
                self._tell_difference(host_offset, *answers)
            self._tell_of(None, "read", host_offset, len(view))
            raise self._failure(errno.EIO)
        view[:] = content
        for member in (loser for found in answers.values() if found is not winners for loser in found):
            self._tell_of(member, "read", host_offset, len(view))
            if self.rewrite and not self.read_only:
                try:
                    member.pwrite(host_offset, content)
                except (Error, OSError) as exc:
                    self._tell_of(member, "write", host_offset, len(view), exc)

    def _tell_of(self, member: Optional[Node], what: str, offset: int, length: int, failure: Optional[BaseException] = None) -> None:
        """Report a member that is wrong, or None: that too few agree."""
        place = {"sector_num": offset // 512, "sectors_count": -(-(offset + length) // 512) - offset // 512}
        if member is None:
            self.report("QUORUM_FAILURE", reference=self.name, **place)
        elif failure is None:
            self.report("QUORUM_REPORT_BAD", type=what, node_name=member.name, **place)
        else:
            reason = getattr(failure, "strerror", None) or str(failure)
            self.report("QUORUM_REPORT_BAD", type=what, error=reason, node_name=member.name, **place)

    def _read_first(self, host_offset: int, view: memoryview) -> None:
        for index, member in enumerate(self.members):
            try:
                member.pread_into(host_offset, view)
                return
            except (Error, OSError):
                if index == len(self.members) - 1:
                    raise

    def _tell_difference(self, host_offset: int, left: bytes, right: bytes) -> None:
        from ..kernels import first_difference

        at = host_offset + first_difference(left, right)
        text = "quorum: offset=%d bytes=%d contents mismatch at offset %d" % (host_offset, len(left), at)
        raise Error(text, filename=self.filename, offset=at, errno=errno.EIO)

    def _failure(self, number: int) -> Error:
        import os

        return Error("%s: %s" % (self.filename, os.strerror(number)), filename=self.filename, errno=number)

    def _on_all(self, action: Callable[[Node], Any], offset: int, length: int) -> None:
        """Do something to all members; it is done where enough of them could."""
        failures: list[BaseException] = []
        for member in self.members:
            try:
                action(member)
            except (Error, OSError) as exc:
                failures.append(exc)
                self._tell_of(member, "write", offset, length, exc)
        if len(self.members) - len(failures) < self.threshold:
            self._tell_of(None, "write", offset, length)
            raise failures[0]

    def flush(self) -> None:
        """Enough of the members must have everything on stable storage."""
        if not self.read_only and not self._closed:
            self._on_all(lambda member: member.flush(), 0, 0)

    def _close_children(self, how: Any) -> None:
        """A member that cannot be closed as it should is one of those that are wrong; flush has seen to it that the others are enough."""
        try:
            super()._close_children(how)
        except (Error, OSError):
            pass  # what the vote could not bear, `flush` has raised before

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self._on_all(lambda member: member.pwrite(host_offset, view), host_offset, len(view))

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self._on_all(lambda member: member.pwrite_zeroes(offset, length, unmap), offset, length)
        return offset, length
