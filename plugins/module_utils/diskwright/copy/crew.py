# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A few threads over one list of work, the caller being one of them (https://docs.python.org/3/library/_thread.html).

Reads, writes, codecs and kernels release the GIL, so two threads overlap. Being one of them, the caller sees signals
between two pieces of work: an interrupt stops all threads at once, like any other failure.
"""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from typing import Any, Callable, Iterator, Optional


class Turn:
    """The place of one piece of work in line: what must happen in order waits for it."""

    __slots__ = ("_before", "_own")

    def __init__(self, before: Optional[Turn]) -> None:
        self._before: Optional[LockType] = None if before is None else before._own
        own = allocate_lock()
        own.acquire()
        self._own: Optional[LockType] = own

    def wait(self) -> None:
        """Wait until the work before this has passed its turn on. May be called again."""
        if self._before is not None:
            with self._before:
                pass
            self._before = None

    def pass_on(self) -> None:
        """Let the next one go, once the one before this has passed its turn on too. May be called again."""
        own = self._own
        if own is None:
            return
        try:
            self.wait()
        finally:
            self._own = None  # whoever comes next has nothing to wait for
            own.release()


class Crew:
    """Hands the items of `work` out to threads, in order, each with its Turn. The first failure stops all of them."""

    def __init__(self, work: Iterator[Any]) -> None:
        self._work = work
        self._lock = allocate_lock()
        self._turn: Optional[Turn] = None
        self._failure: Optional[BaseException] = None
        self._ended = allocate_lock()  # free once the crew has stopped or failed; see pause
        self._ended.acquire()

    def run(self, member: Callable[[], None], count: int) -> None:
        """Run `member` (which loops over `take`) in `count` threads, this one included, until all are done.

        Raises the first failure of any of them; KeyboardInterrupt and the like are failures too.
        """
        waiting = []
        try:
            for _number in range(count - 1):
                lock = allocate_lock()
                lock.acquire()
                start_new_thread(self._serve, (member, lock))
                waiting.append(lock)
            member()
        except BaseException as exc:
            self.fail(exc)
        while waiting:
            try:
                waiting[-1].acquire()
                waiting.pop()
            except BaseException as exc:  # a signal's handler raised
                self.fail(exc)
        if self._failure is not None:
            raise self._failure

    def _serve(self, member: Callable[[], None], done: LockType) -> None:
        try:
            member()
        except BaseException as exc:
            self.fail(exc)
        finally:
            done.release()

    def fail(self, exc: BaseException) -> None:
        """Note a failure, unless there was one before, and stop."""
        if self._failure is None:
            self._failure = exc
        self.stop()

    @property
    def stopped(self) -> bool:
        return not self._ended.locked()

    def stop(self) -> None:
        """Hand out nothing more."""
        try:
            self._ended.release()
        except RuntimeError:
            pass  # stopped before

    def pause(self, seconds: float) -> None:
        """Sleep, but not beyond a failure."""
        if self._ended.acquire(timeout=seconds):
            self.stop()

    def take(self) -> Optional[tuple[Any, Turn]]:
        """The next item and its turn, which must be passed on; None when there is nothing more to do."""
        with self._lock:
            if not self._ended.locked():
                return None
            for work in self._work:
                self._turn = Turn(self._turn)
                return work, self._turn
            return None
