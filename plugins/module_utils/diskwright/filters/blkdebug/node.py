# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blkdebug: requests that fail, or stop, at chosen points (https://www.qemu.org/docs/master/devel/testing/blkdebug.html).

The node above says which point it has reached (Hooks.mention); rules for that event, in a certain state, then make requests fail, change the
state, or stop the request that is there until it is resumed.
"""

from __future__ import annotations

import errno
import os
from threading import Condition

from ...errors import Error, OptionError
from ...filter import Witness
from ...options import Options, Size, opt
from .rules import EVENTS, INJECT_ERROR, KEYS, PERMISSIONS, SET_STATE, SUSPEND, Rule, collect, read_config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence, Union

    from typing_extensions import Self

    from ...extent import Extent
    from ...node import Node, OpenFlags
    from ...options import NodeRef

    Rows = Sequence[Mapping[str, Any]]
    TextList = Sequence[str]

MAX_LIMIT = 1 << 31  # bytes, of the options that limit requests; less than this


class BlkdebugOptions(Options):
    """Runtime options of blkdebug."""

    image: NodeRef = opt(help="the node whose requests go wrong")
    config: Optional[str] = opt(None, help="a file of rules")
    align: Size = opt(0, help="requests must be multiples of so many bytes")
    max_transfer: Size = opt(0, help="bytes of one request at most")
    opt_write_zero: Size = opt(0, help="zeroes are written in multiples of so many bytes; what is around them is written like data")
    max_write_zero: Size = opt(0, help="bytes of one request to write zeroes at most")
    opt_discard: Size = opt(0, help="discards are multiples of so many bytes; what is around them is dropped")
    max_discard: Size = opt(0, help="bytes of one discard at most")
    inject_error: Optional[Rows] = opt(None, help="after an event, requests fail")
    set_state: Optional[Rows] = opt(None, help="at an event, the state changes")
    take_child_perms: Optional[TextList] = opt(None, help="list of permissions to take on the image besides those that are needed")
    unshare_child_perms: Optional[TextList] = opt(None, help="list of permissions that no other user of the image may have")

    rows = KEYS

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], unknown: str = "Invalid parameter '%s'") -> Self:
        rest, lists = collect(values, ("inject-error", "set-state", "take-child-perms", "unshare-child-perms"))
        record = super().from_mapping(rest, "Block protocol 'blkdebug' doesn't support the option '%s'")
        for key, found in lists.items():
            setattr(record, cls.fields[key].name, found)
        return record


class Blkdebug(Witness):
    """A node that breaks by plan."""

    driver = "blkdebug"
    primary = "image"
    options_class = BlkdebugOptions
    strong_options = ("config", "align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard")

    options: BlkdebugOptions

    def __init__(self, options: BlkdebugOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.say: Optional[Callable[[str], None]] = None  # is told of requests that stop and go on
        self._changed = Condition()  # the lock of all that follows
        self._rules: list[Rule] = [*read_config(options.config), *self._given()]
        self._active: list[Rule] = []  # what may make the next request fail
        self._state = 1
        self._stopped: list[tuple[str, object]] = []
        self._written = False  # since it was flushed
        self._check_limits(options)
        self.request_alignment = options.align or 1
        self._take, self._unshare = (_permissions(names) for names in (options.take_child_perms, options.unshare_child_perms))
        self._apply_permissions()
        self.hear("none")

    def _given(self) -> Iterator[Rule]:
        for key, items in ((INJECT_ERROR, self.options.inject_error), (SET_STATE, self.options.set_state)):
            for item in items or ():
                yield Rule.read(key, item, "[%s] section doesn't support the option '%%s'" % key)

    def _check_limits(self, options: BlkdebugOptions) -> None:
        align = options.align
        unit = max(align, 1)
        for key, value, multiple in (
            ("align", align, 1),
            ("max-transfer", options.max_transfer, unit),
            ("opt-write-zero", options.opt_write_zero, unit),
            ("max-write-zero", options.max_write_zero, max(options.opt_write_zero, unit)),
            ("opt-discard", options.opt_discard, unit),
            ("max-discard", options.max_discard, max(options.opt_discard, unit)),
        ):
            if value >= MAX_LIMIT or value % multiple or key == "align" and value & (value - 1):
                raise OptionError("Cannot meet constraints with %s %d" % (key, value), errno=errno.EINVAL)

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def file(self) -> Node:
        return self.children["image"]

    def options_name(self) -> str:
        """`blkdebug:CONFIG:IMAGE` where that says it all."""
        given = set(self.options.given()) - {"config", "image"}
        name = self.file.filename
        return "" if given or name.startswith("json:") else "blkdebug:%s:%s" % (self.options.config or "", name)

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        config, colon, image = filename[len("blkdebug:") :].partition(":")
        if not colon:
            raise OptionError("blkdebug requires both config file and image path")
        return {"image": {"filename": image}, **({"config": config} if config else {})}

    def disk_size(self) -> None:
        return None

    def _apply_permissions(self) -> None:
        if self._take or self._unshare:
            from ...edges import change

            for edge in self.file.parents[-1:]:
                change(edge, edge.perm | self._take, edge.shared & ~self._unshare)

    def change_child(self, role: str, flags: OpenFlags) -> None:
        perm, shared = flags.permissions()
        super().change_child(role, flags.but(perm=perm | self._take, shared=shared & ~self._unshare))

    # -- events and breakpoints ----------------------------------------------------------------------------------

    def listener(self) -> Callable[[str], None]:
        return self.hear

    def hear(self, event: str) -> None:
        """A request has come to `event`: apply the rules, and wait here if one says so."""
        with self._changed:
            rules = [rule for rule in self._rules if rule.event == event and rule.state in (0, self._state)]
            errors = [rule for rule in rules if rule.kind == INJECT_ERROR]
            if errors:
                self._active = errors[::-1]
            for rule in rules:
                if rule.kind == SET_STATE:
                    self._state = rule.new_state
            stops = [rule for rule in rules if rule.kind == SUSPEND]
            for rule in stops:
                self._rules.remove(rule)
        if stops:
            self._stop([rule.tag for rule in reversed(stops)])

    def _stop(self, tags: list[str]) -> None:
        """Wait until all of these are resumed."""
        entries = [(tag, object()) for tag in tags]
        for tag in tags:
            if self.say is not None:
                self.say("blkdebug: Suspended request '%s'" % tag)
        with self._changed:
            self._stopped += entries
            self._changed.notify_all()
            while any(entry in self._stopped for entry in entries):
                self._changed.wait()

    def breakpoint(self, event: str, tag: str) -> None:
        """Stop the next request that comes to `event`, under the name of `tag`. Raises Error (ENOENT) for an unknown event."""
        if event not in EVENTS:
            raise _no_such()
        with self._changed:
            self._rules.append(Rule(SUSPEND, event, tag=tag))

    def remove_breakpoint(self, tag: str) -> None:
        """Forget breakpoints, and let requests go on that stopped there. Raises Error (ENOENT) where no breakpoint is left."""
        with self._changed:
            found = [rule for rule in self._rules if rule.kind == SUSPEND and rule.tag == tag]
            self._rules = [rule for rule in self._rules if rule not in found]
        while self.wait_suspended(tag, 0):
            self.resume(tag)
        if not found:
            raise _no_such()

    def resume(self, tag: str) -> None:
        """Let the request go on that stopped first under this name. Raises Error (ENOENT) where none did."""
        with self._changed:
            for entry in self._stopped:
                if entry[0] == tag:
                    break
            else:
                raise _no_such()
            if self.say is not None:
                self.say("blkdebug: Resuming request '%s'" % tag)
            self._stopped.remove(entry)
            self._changed.notify_all()

    def wait_suspended(self, tag: str, seconds: float) -> bool:
        """Whether a request has stopped under this name, or does within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: any(entry[0] == tag for entry in self._stopped), seconds)

    def suspended_count(self) -> int:
        """How many requests have stopped."""
        return len(self._stopped)

    def release_all(self) -> None:
        """Forget all breakpoints, and let all requests go on."""
        with self._changed:
            self._rules = [rule for rule in self._rules if rule.kind != SUSPEND]
            self._stopped.clear()
            self._changed.notify_all()

    # -- requests ------------------------------------------------------------------------------------------------

    def _allow(self, kind: str, offset: int = 0, length: int = 0) -> None:
        """Raise OSError if a rule wants this request to fail."""
        with self._changed:
            for rule in self._active:
                if kind in rule.iotypes and (rule.offset < 0 or offset <= rule.offset < offset + length):
                    if rule.once:
                        self._active = [other for other in self._active if other is not rule]
                        self._rules = [other for other in self._rules if other is not rule]
                    if rule.errno > 0:
                        raise OSError(rule.errno, os.strerror(rule.errno))
                    return

    def pread_into(self, offset: int, buffer: Union[bytearray, memoryview]) -> None:
        """What a driver reads for itself. The guest's bytes are read by read_own, at the event read_aio."""
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view))
        super().read_own(offset, view)

    def read_own(self, host_offset: int, view: memoryview) -> None:
        self.hear("read_aio")
        super().read_own(host_offset, view)

    def write_own(self, host_offset: int, view: memoryview) -> None:
        if host_offset % self.request_alignment:
            self.hear("pwritev_rmw_head")
            self.hear("pwritev_rmw_after_head")
        if (host_offset + len(view)) % self.request_alignment:
            self.hear("pwritev_rmw_tail")
            self.hear("pwritev_rmw_after_tail")
        super().write_own(host_offset, view)

    def _status(self, offset: int, length: int, want_zero: bool) -> Iterator[Extent]:
        self._allow("block-status", offset, length)
        return super()._status(offset, length, want_zero)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        for at, length in self._requests(host_offset, len(view), self.options.max_transfer):
            self._allow("read", at, length)
            super()._pread_into(at, view[at - host_offset : at - host_offset + length])

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self._written = True
        self.hear("pwritev")
        for at, length in self._requests(host_offset, len(view), self.options.max_transfer):
            self._allow("write", at, length)
            super()._pwrite(at, view[at - host_offset : at - host_offset + length])
        self.hear("pwritev_done")

    def _requests(self, offset: int, length: int, most: int) -> Iterable[tuple[int, int]]:
        """(offset, length) of the pieces in which a request is made."""
        step = most or max(length, 1)
        return [(at, min(step, offset + length - at)) for at in range(offset, offset + length, step)]

    def _inner(self, offset: int, length: int, unit: int) -> tuple[int, int]:
        """The whole units in a range: (offset, end)."""
        unit = max(unit, self.request_alignment)
        end = offset + length
        return -(-offset // unit) * unit, end if end == self.size and not end % self.request_alignment else end // unit * unit

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        first, end = self._inner(offset, length, self.options.opt_write_zero)
        if first >= end:
            return offset, 0
        self._written = True
        self.hear("pwritev_zero")
        for at, size in self._requests(first, end - first, self.options.max_write_zero):
            self._allow("write-zeroes", at, size)
            super()._zero(at, size, unmap)
        self.hear("pwritev_done")
        return first, end - first

    def _discard(self, offset: int, length: int) -> None:
        first, end = self._inner(offset, length, self.options.opt_discard)
        for at, size in self._requests(first, max(0, end - first), self.options.max_discard):
            self._allow("discard", at, size)
            super()._discard(at, size)

    def _flush(self) -> None:
        if self._written:  # otherwise there is nothing to flush
            self._allow("flush")
            self._written = False

    def _close(self) -> None:
        self.release_all()


def _no_such() -> Error:
    return Error(os.strerror(errno.ENOENT), errno=errno.ENOENT)


def _permissions(names: Optional[Iterable[str]]) -> int:
    """The permissions of these names together. Raises OptionError."""
    found = 0
    for name in names or ():
        if name not in PERMISSIONS:
            raise OptionError("Parameter 'null' does not accept value '%s'" % name)
        found |= PERMISSIONS[name]
    return found
