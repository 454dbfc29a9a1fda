# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Job, work that takes a while: its states, and what can be asked of it in each of them
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, JobStatus and JobVerb).

Each job has a thread that works in small steps and between two of them comes to `pause_point`. What changes the state, and the graph
at the end, happens under the lock of all jobs.
"""

from __future__ import annotations

import errno
import os
from threading import Condition, RLock, Thread

from ..errors import Error, OptionError
from ..objects import _LETTERS
from .events import Events, NotActive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterator, Optional, Union

    Failure = Union[Error, OSError]

UNDEFINED, CREATED, RUNNING, PAUSED, READY, STANDBY = "undefined", "created", "running", "paused", "ready", "standby"
WAITING, PENDING, ABORTING, CONCLUDED, NULL = "waiting", "pending", "aborting", "concluded", "null"

MAX_JOBS = 1024  # those that are concluded and not dismissed among them
SOON = 0.5  # seconds that who asks for a pause waits for it; it may come later

_ACTIVE = (CREATED, RUNNING, PAUSED, READY, STANDBY)
VERBS = {
    "cancel": (*_ACTIVE, WAITING, PENDING),
    "pause": _ACTIVE,
    "resume": _ACTIVE,
    "set-speed": _ACTIVE,
    "complete": (READY, STANDBY),
    "finalize": (PENDING,),
    "dismiss": (CONCLUDED,),
    "change": _ACTIVE,
}


class Cancelled(Error):
    """The job was told to end."""

    def __init__(self) -> None:
        super().__init__("Operation canceled", errno=errno.ECANCELED)


class Job:
    """Base of all jobs. A subclass has `work`, and what it needs of `prepare`, `undo` and `clean`."""

    kind: ClassVar[str] = ""
    block: ClassVar[bool] = False  # one that query-block-jobs lists, with events of its own

    def __init__(self, jobs: Jobs, id: str, auto_finalize: bool = True, auto_dismiss: bool = True) -> None:
        self.jobs = jobs
        self.id = id
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = UNDEFINED
        self.current = 0  # progress, in the job's own unit: bytes of block jobs
        self.total = 1
        self.failure: Optional[Failure] = None
        self.group: list[Job] = [self]  # they succeed or fail together
        self.paused_by_user = False
        self.holds = 0  # others that want it to pause
        self.cancelled = False
        self.completing = False  # `complete` was asked for
        self.ended = False  # its thread has
        self.changed = Condition(jobs.lock)
        self._resumed = ""  # the state to come back to from a pause
        self._thread: Optional[Thread] = None

    # -- what a subclass does ------------------------------------------------------------------------------------

    def work(self) -> None:
        """Do it, in the job's thread. Raises Error, OSError."""
        raise NotImplementedError(self.kind)

    def prepare(self) -> None:
        """All that remains to be done once all jobs of the group have succeeded; may fail. Under the lock."""

    def undo(self) -> None:
        """It failed. Under the lock."""

    def clean(self) -> None:
        """Give back what it used, whether it failed or not. Under the lock."""

    def announce(self) -> None:
        """Tell how it ended. Under the lock."""

    # -- its life ------------------------------------------------------------------------------------------------

    def set_status(self, status: str) -> None:
        """Go into a state, and tell about it. Under the lock."""
        self.status = status
        self.jobs.events.emit("JOB_STATUS_CHANGE", status=status, id=self.id)
        self.changed.notify_all()

    def start(self, held: bool = False) -> None:
        """Run. With `held` it pauses at once, until `release`: its thread begins then."""
        with self.jobs.lock:
            self.set_status(RUNNING)
            if held:
                self.holds += 1
                self._pause()
            self._thread = Thread(target=self._main, name="job-" + self.id, daemon=True)
            if not held:
                self._thread.start()

    def release(self) -> None:
        """End what `start(held=True)` or `hold` began."""
        with self.jobs.lock:
            self.holds -= 1
            if self._thread is not None and self._thread.ident is None and not self.ended:
                self._unpause()
                self._thread.start()
            self.changed.notify_all()

    def hold(self) -> None:
        """Have it pause; `release` lets it go on."""
        with self.jobs.lock:
            self.holds += 1
            self.changed.notify_all()

    def _main(self) -> None:
        failure: Optional[Failure] = None
        try:
            self.pause_point()
            self.work()
        except (Error, OSError) as exc:
            failure = exc
        except BaseException as exc:
            failure = Error("%s: %s" % (type(exc).__name__, exc))  # a bug must not leave a job that never ends
        with self.jobs.lock:
            if failure is None and self.cancelled:
                failure = Cancelled()
            self._completed(failure)

    def pause_point(self) -> None:
        """Between two steps: wait while the job is to pause. Raises Cancelled."""
        with self.jobs.lock:
            while self.wants_pause and not self.cancelled:
                self._pause()
                self.changed.wait()
            self._unpause()
            if self.cancelled:
                raise Cancelled

    @property
    def wants_pause(self) -> bool:
        return self.paused_by_user or self.holds > 0

    def _pause(self) -> None:
        if self.status in (RUNNING, READY):
            self._resumed = self.status
            self.set_status(PAUSED if self.status == RUNNING else STANDBY)

    def _unpause(self) -> None:
        if self.status in (PAUSED, STANDBY) and not self.cancelled:
            self.set_status(self._resumed)

    def sleep(self, seconds: float) -> None:
        """Wait between two steps, but not beyond anything that changes for the job."""
        with self.jobs.lock:
            if not self.cancelled and not self.wants_pause:
                self.changed.wait(seconds)

    def _completed(self, failure: Optional[Failure]) -> None:
        """Its thread is through, well or not. Under the lock."""
        self.ended = True
        self.failure = failure
        self.changed.notify_all()
        if failure is not None:
            self._abort_group()
            return
        self.set_status(WAITING)
        if any(job.status != WAITING for job in self.group):
            return
        for job in self.group:
            job.set_status(PENDING)
            job.announce_pending()
        if all(job.auto_finalize for job in self.group):
            self._finalize_group()

    def announce_pending(self) -> None:
        """It waits for `finalize`, perhaps. Under the lock."""

    def _finalize_group(self) -> None:
        group = list(self.group)
        for job in group:
            try:
                job.prepare()
            except (Error, OSError) as exc:
                job.failure = exc
                job._abort_group()
                return
        for job in group:
            job._conclude()

    def _abort_group(self) -> None:
        """One of the group failed: end all of them. Those that are at work end by themselves, and come here again."""
        for job in list(self.group):
            if job is not self:
                job.cancelled = True
                job.changed.notify_all()
        for job in list(self.group):
            if job.status in (CONCLUDED, NULL) or not job.ended:
                continue
            job.failure = job.failure or Cancelled()
            job.set_status(ABORTING)
            try:
                job.undo()
            except (Error, OSError):
                pass  # it failed for another reason before
            job._conclude()

    def _conclude(self) -> None:
        try:
            self.clean()
        except (Error, OSError) as exc:
            self.failure = self.failure or exc
        self.announce()
        self.set_status(CONCLUDED)
        if self.auto_dismiss:
            self._dismiss()

    def _dismiss(self) -> None:
        self.set_status(NULL)
        self.jobs.forget(self)

    # -- verbs ---------------------------------------------------------------------------------------------------

    def allow(self, verb: str) -> None:
        """Raise Error unless this can be asked of it in its state."""
        if self.status not in VERBS[verb]:
            raise Error("Job '%s' in state '%s' cannot accept command verb '%s'" % (self.id, self.status, verb), errno=errno.EPERM)

    def pause(self) -> None:
        """Let it pause after the step that it is at."""
        with self.jobs.lock:
            self.allow("pause")
            if self.paused_by_user:
                raise Error("Job is already paused")
            self.paused_by_user = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.status not in (RUNNING, READY) or not self.paused_by_user, SOON)

    def resume(self) -> None:
        """Let it go on."""
        with self.jobs.lock:
            if not self.paused_by_user:
                raise Error("Can't resume a job that was not paused")
            self.allow("resume")
            self.paused_by_user = False
            self.resumed()
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.status not in (PAUSED, STANDBY) or self.wants_pause, SOON)

    def resumed(self) -> None:
        """It will go on after a pause that a user, or an error, asked for. Under the lock."""

    def cancel(self, force: bool = True) -> None:
        """Let it fail. Without `force` one that is ready ends well instead, and changes nothing of the graph."""
        with self.jobs.lock:
            self.allow("cancel")
            if not force and self.status in (READY, STANDBY) and self.cancel_softly():
                return
            self.cancelled = True
            self.changed.notify_all()
            if self.ended or self._thread is None or self._thread.ident is None:  # waiting, pending or not begun: nobody else would
                self.ended = True
                self.failure = Cancelled()
                self._abort_group()

    def cancel_softly(self) -> bool:
        """End well if it can without what `complete` does. Under the lock."""
        return False

    def complete(self) -> None:
        """Let one that is ready end."""
        with self.jobs.lock:
            self.allow("complete")
            self.check_completion()
            self.completing = True
            self.changed.notify_all()

    def check_completion(self) -> None:
        """Raise Error unless `complete` is possible. Under the lock."""
        raise Error("The active block job '%s' cannot be completed" % self.id)

    def finalize(self) -> None:
        """Let one that is pending do its last, with the others of its group."""
        with self.jobs.lock:
            self.allow("finalize")
            self._finalize_group()

    def dismiss(self) -> None:
        """Forget one that is concluded."""
        with self.jobs.lock:
            self.allow("dismiss")
            self._dismiss()

    def wait(self, *statuses: str, seconds: Optional[float] = None) -> str:
        """Wait until it is in one of these states, by default until it is concluded; its state then."""
        wanted = statuses or (CONCLUDED, NULL)
        with self.jobs.lock:
            self.changed.wait_for(lambda: self.status in wanted or self.status == NULL, seconds)
            return self.status

    def discard_made(self) -> None:
        """Give up one that was made, and perhaps not started: as if it had never been."""
        with self.jobs.lock:
            self.ended = True
            try:
                self.undo()
                self.clean()
            finally:
                if self.status == CREATED:
                    self._dismiss()

    def drop(self) -> None:
        """Give up one that was made and will not be started, since something else of its transaction failed."""
        with self.jobs.lock:
            self.ended = True
            self.auto_dismiss = True
            self.failure = Cancelled()
            self.set_status(ABORTING)
            self.undo()
            self.clean()
            self.set_status(CONCLUDED)
            self._dismiss()

    @property
    def error(self) -> Optional[str]:
        """Why it failed, None where it did not."""
        if self.failure is None:
            return None
        if isinstance(self.failure, OSError):
            return self.failure.strerror or str(self.failure)
        return str(self.failure)

    def as_json(self) -> dict[str, Any]:
        """Its element of query-jobs."""
        found = {"id": self.id, "type": self.kind, "status": self.status, "current-progress": self.current, "total-progress": self.total}
        error = self.error
        if error is not None and self.status in (CONCLUDED, ABORTING):
            found["error"] = error
        return found


class Jobs:
    """All jobs, by id."""

    def __init__(self, events: Events) -> None:
        self.lock = RLock()
        self.events = events
        self._all: dict[str, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        with self.lock:
            return iter(list(self._all.values()))

    def add(self, job: Job) -> None:
        """Take a new job. Raises OptionError, Error for an id that it cannot have."""
        with self.lock:
            self.check_id(job.id)
            self._all[job.id] = job
            job.set_status(CREATED)

    def check_id(self, id: str) -> None:
        """Raise OptionError, Error for an id that no new job can have."""
        with self.lock:
            if id[:1] not in _LETTERS or not id or id.strip(_LETTERS + "0123456789-._"):
                raise OptionError("Invalid job ID '%s'" % id)
            if len(self._all) >= MAX_JOBS:
                raise Error("There are %d jobs already" % MAX_JOBS)
            if id in self._all:
                raise Error("Job ID '%s' already in use" % id)

    def forget(self, job: Job) -> None:
        """The job is no more. Under the lock."""
        if self._all.get(job.id) is job:
            del self._all[job.id]

    def find(self, id: str) -> Job:
        """The job of that id. Raises Error."""
        with self.lock:
            job = self._all.get(id)
            if job is None:
                raise Error("Job not found")
            return job

    def find_block(self, id: str) -> Job:
        """The block job of that id. Raises NotActive."""
        with self.lock:
            job = self._all.get(id)
            if job is None or not job.block or job.status in (CONCLUDED, NULL) and job.auto_dismiss:
                raise NotActive("Block job '%s' not found" % id)
            return job

    def stop(self) -> None:
        """Cancel all jobs and wait for them."""
        for job in self:
            with self.lock:
                job.auto_dismiss = True
                if job.status == CONCLUDED:
                    job.dismiss()
                    continue
                job.paused_by_user, job.holds = False, 0
                if job.status in VERBS["cancel"]:
                    job.cancel()
            job.wait(NULL)


def reason(number: int) -> str:
    """The text of an error number."""
    return os.strerror(number)
