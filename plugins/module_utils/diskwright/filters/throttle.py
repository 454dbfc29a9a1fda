# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""throttle: no more bytes and requests a second than its throttle group allows (https://www.qemu.org/docs/master/system/qemu-block-drivers.html).

Each limit is a leaky bucket: a request fills it by its bytes, or by one, and it leaks at the limit's average rate. While a bucket is
above its brim, requests wait. With a burst rate the brim is what that rate brings in its length; without, a tenth of a second's worth.
"""

from __future__ import annotations

from _thread import allocate_lock

from ..errors import OptionError
from ..filter import Witness
from ..objects import throttle_limits
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional

    from ..node import OpenFlags
    from ..options import NodeRef, ObjectRef

SLICE = 0.05  # seconds between two looks at whether the graph is about to change
SHARE = 0.1  # seconds of the average rate that go through at once where no burst is given
READ, WRITE = "read", "write"
LIMITS = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")


class ThrottleOptions(Options):
    """Runtime options of throttle."""

    throttle_group: Optional[ObjectRef] = opt(None, help="the id of the throttle-group object")
    file: NodeRef = opt(help="the node that is throttled")


class Bucket:
    """One limit: `average` and `burst` are units a second, the burst may last `length` seconds."""

    __slots__ = ("average", "burst", "length", "level", "burst_level")

    def __init__(self, average: int, burst: int, length: int) -> None:
        self.average = average
        self.burst = burst
        self.length = length
        self.level = 0.0
        self.burst_level = 0.0

    def leak(self, seconds: float) -> None:
        """Let time pass."""
        self.level = max(0.0, self.level - self.average * seconds)
        self.burst_level = max(0.0, self.burst_level - self.burst * seconds)

    def fill(self, units: float) -> None:
        self.level += units
        if self.length > 1:
            self.burst_level += units

    def wait(self) -> float:
        """Seconds until the next request may go."""
        brim = self.burst * self.length if self.burst else self.average * SHARE
        seconds = (self.level - brim) / self.average
        if self.length > 1:  # within the burst, no faster than the burst rate
            seconds = max(seconds, (self.burst_level - self.burst * SHARE) / self.burst)
        return max(0.0, seconds)


class Group:
    """What the nodes of one throttle group share: their limits, and one clock."""

    def __init__(self, limits: Mapping[str, int], clock: Optional[Callable[[], float]] = None) -> None:
        from time import monotonic

        self._clock = clock or monotonic
        self._lock = allocate_lock()
        self._now = self._clock()
        self._unit = limits.get("iops-size", 0)
        self._buckets = {name: Bucket(limits[name], limits.get(name + "-max", 0), limits.get(name + "-max-length", 1)) for name in LIMITS if limits.get(name)}

    def take(self, way: str, length: int) -> float:
        """Account for a request of `length` bytes; the seconds that it has to wait before it is made."""
        with self._lock:
            now = self._clock()
            for bucket in self._buckets.values():
                bucket.leak(now - self._now)
            self._now = now
            requests = max(1.0, length / self._unit) if self._unit else 1.0
            seconds = 0.0
            for name, bucket in self._buckets.items():
                unit, kind = name.split("-")
                if kind in (way, "total"):
                    seconds = max(seconds, bucket.wait())
                    bucket.fill(length if unit == "bps" else requests)
            return seconds


class Throttle(Witness):
    """A node whose reads and writes wait for their group."""

    driver = "throttle"
    options_class = ThrottleOptions
    strong_options = ("throttle-group",)
    changeable = ("throttle-group",)

    def __init__(self, options: ThrottleOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self._group = self._join(options.throttle_group)

    def change_option(self, key: str, value: Any) -> None:
        """throttle-group: another group from the next request on."""
        self._group = self._join(value)

    @staticmethod
    def _join(name: Optional[ObjectRef]) -> Group:
        if name is None:
            raise OptionError("Please specify a throttle group")
        found = name.objects.get(name)
        if found is None or found.type != "throttle-group":
            raise OptionError("Throttle group '%s' does not exist" % str(name))
        if found.group is None:
            found.group = Group(throttle_limits(found.properties))
        group: Group = found.group
        return group

    def _hold(self, way: str, length: int) -> None:
        seconds = self._group.take(way, length)
        gate = getattr(self.graph, "gate", None)
        while seconds > 0 and not (gate is not None and gate.closing):  # a graph that is about to change does not wait
            from time import sleep

            sleep(min(seconds, SLICE) if gate is not None else seconds)
            seconds -= SLICE if gate is not None else seconds

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        self._hold(READ, len(view))
        super()._pread_into(host_offset, view)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self._hold(WRITE, len(view))
        super()._pwrite(host_offset, view)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self._hold(WRITE, length)
        return super()._zero(offset, length, unmap)

    def _discard(self, offset: int, length: int) -> None:
        self._hold(WRITE, length)
        super()._discard(offset, length)
