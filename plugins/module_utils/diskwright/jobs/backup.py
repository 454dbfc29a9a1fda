# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blockdev-backup: another node gets what a node had when the job began, or what of it has changed since some moment
(https://www.qemu.org/docs/master/interop/live-block-operations.html#live-disk-backup-blockdev-backup-and-the-deprecated-drive-backup)."""

from __future__ import annotations

from ..copy.window import copy_ranges
from ..errors import Error, OptionError, ReadOnly, Unsupported
from ..filters.copy_before_write import CopyBeforeWrite, CopyBeforeWriteOptions
from ..filters.snapshot_access import SnapshotAccess, SnapshotAccessOptions
from ..moment import Moment
from ..node import ALL, OpenFlags
from ..options import opt
from . import chain
from .block import ON_ERROR, WINDOW, BlockJob, BlockJobOptions, begin, show_as_child
from .filters import only_through
from .recording import Found, duplicate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from ..bitmaps import Bitmap
    from ..node import Node
    from .live import Live

SYNC = ("top", "full", "none", "incremental", "bitmap")
MODES = ("on-success", "never", "always")
IDLE = 0.2  # seconds between two looks at what is asked of a job that only waits for writes


class BackupOptions(BlockJobOptions):
    """Options of blockdev-backup."""

    device: str = opt(help="the node that is backed up")
    target: str = opt(help="the node that gets the backup")
    sync: str = opt(choices=SYNC, help="what is copied")
    bitmap: Optional[str] = opt(None, help="the dirty bitmap that says what has changed")
    bitmap_mode: Optional[str] = opt(None, choices=MODES, help="when the bitmap begins anew")
    compress: bool = opt(False, help="whether the target stores it compressed")
    on_source_error: str = opt("report", choices=ON_ERROR, help="what to do about errors of reading")
    on_target_error: str = opt("report", choices=ON_ERROR, help="what to do about errors of writing")
    discard_source: bool = opt(False, help="whether the source gives up what was copied")
    on_cbw_error: str = opt("break-guest-write", choices=("break-guest-write", "break-snapshot"), help="what a copy that fails ends: the write, or the backup")
    x_perf: dict = opt(None, help="taken and ignored")  # type: ignore[type-arg]


class BackupMoment(Moment):
    """Its data is moved by the copy engine."""

    def _move(self, start: int, end: int) -> None:
        copy_ranges(self.source, self.target, [(start, end - start)], compress=self._compress, threads=1 if end - start <= self.unit else 2)


class BackupTop(CopyBeforeWrite):
    """On top of the source."""

    @classmethod
    def child_flags(cls, role: str, flags: OpenFlags) -> OpenFlags:
        return only_through(flags) if role == "file" else flags.but(shared=ALL)


class KeptSource(SnapshotAccess):
    """The source as it was when the job began, for a target that reads from it what was not copied yet."""

    def keep(self, moment: Moment) -> None:
        """What is read."""
        self._moment = moment
        self._size = moment.size

    def unfiltered(self) -> Node:
        return self.children["file"].unfiltered()


class BackupJob(BlockJob):
    """One backup."""

    kind = "backup"

    def __init__(self, live: Live, options: BackupOptions, source: Node, target: Node, found: Optional[Found]) -> None:
        super().__init__(live, options, options.on_source_error, options.on_target_error)
        self.options = options
        self.source = source
        self.target = target
        self.found = found
        self.moment: Optional[Moment] = None
        self._frozen: Optional[Bitmap] = None  # the bitmap's bits when the job began
        self._top: Optional[CopyBeforeWrite] = None
        self._kept: Optional[Node] = None  # the layer of the target whose backing node is a KeptSource

    def begin(self) -> None:
        """Put it into the graph: this is the moment that is backed up."""
        options = self.options
        self.occupy(self.source, shared=True)
        self.occupy(self.target)
        self.use_target(self.target)
        if self.found is not None:
            self._freeze(self.found)
        wanted = self._frozen if options.sync in ("incremental", "bitmap") else None
        record = CopyBeforeWriteOptions.from_mapping({"file": self.source, "target": self.target})
        top = BackupTop(record, OpenFlags(writable=True, perm=0, shared=ALL))
        breaks = options.on_cbw_error == "break-snapshot"
        self.moment = top.moment = BackupMoment(self.source, self.target, bitmap=wanted, compress=options.compress, breaks=breaks)
        self.graph.adopt(top, options.filter_node_name)
        show_as_child(top)
        try:
            self.graph.replace(self.source, top)
            self.use(top)
        except BaseException:
            top.close()
            raise
        self._top = top
        self._read_through(self.moment)
        self.root = self.use(self.source)
        self.total = self.moment.remaining()

    def _read_through(self, moment: Moment) -> None:
        """If the target reads from the source what was not copied, let it read what was there when the job began."""
        source = self.source.unfiltered()
        for layer in chain.layers(self.target):
            below = layer.backing
            if below is not None and below.unfiltered() is source:
                made = KeptSource(SnapshotAccessOptions.from_mapping({"file": below}), OpenFlags(perm=0, shared=ALL))
                made.keep(moment)
                self.graph.adopt(made)
                show_as_child(made)
                self.graph.set_child(layer, "backing", made)
                self._kept = layer
                return

    def _freeze(self, found: Found) -> None:
        """Remember the bits, and let the bitmap begin anew if it is to."""
        self.live.take(found)
        with found.lock:
            self._frozen = duplicate(found.bitmap, list(found.bitmap.runs()))
            if self._begins_anew():
                found.bitmap.clear()

    def _begins_anew(self) -> bool:
        return self.options.sync == "incremental" or self.options.bitmap_mode != "never"

    @property
    def kept(self) -> Moment:
        """What the filter and the job share. Raises Error once it is gone."""
        if self.moment is None:
            raise Error("The job is over")
        return self.moment

    def work(self) -> None:
        """See Job.work."""
        moment = self.kept
        if self.options.sync == "top":
            self._leave_out(moment)
        if self.options.sync == "none":
            while True:
                self.current = moment.copied
                self._check(moment)
                self.pause_point()
                self.sleep(IDLE)
        position = 0
        while True:
            self._check(moment)
            run = moment.pending(position)
            if run is None and position:
                position = 0
                continue
            if run is None:
                break
            with self.root.request():
                offset, length = run[0], min(run[1], self.window(moment.unit, self.source, *run))
            if not self.attempt(lambda offset=offset, length=length: self._copy(moment, offset, length)):  # type: ignore[misc]
                position = offset + length
            self.current = moment.copied
            self.pace(length)
        self.current = self.total
        with self.root.request():
            self.target.flush()

    def _copy(self, moment: Moment, offset: int, length: int) -> None:
        with self.root.request():
            moment.copy(offset, length)
            if self.options.discard_source:
                self.source.pdiscard(offset, length)

    def _check(self, moment: Moment) -> None:
        if moment.broken is not None:
            raise Error("Input/output error", errno=5, hint=str(moment.broken))

    def _leave_out(self, moment: Moment) -> None:
        """Of the topmost image alone: what its backing files have is not copied."""
        layer = self.source.unfiltered()
        base = layer.backing
        for offset in range(0, self.source.size if base is not None else 0, WINDOW):
            length = min(WINDOW, self.source.size - offset)
            with self.root.request():
                position = offset
                for start, count in [*chain.added(layer, base, offset, length), (offset + length, 0)]:
                    first, end = -(-position // moment.unit) * moment.unit, start // moment.unit * moment.unit
                    if start == self.source.size and not count:
                        end = start
                    if first < end:
                        moment.exclude(first, end - first)
                    position = start + count
            self.pause_point()
        self.total = moment.remaining() + moment.copied

    def _take_off(self) -> None:
        top, self._top = self._top, None
        layer, self._kept = self._kept, None
        if layer is not None and isinstance(layer.backing, KeptSource):
            self.graph.set_child(layer, "backing", layer.backing.children["file"])
        if top is not None:
            self.graph.replace(top, top.file)

    def prepare(self) -> None:
        """The filter goes; the bitmap stays as it is."""
        with self.graph.drained():
            self._check(self.kept)
            self._take_off()

    def undo(self) -> None:
        """Give the bitmap back what is not backed up."""
        found, frozen, moment = self.found, self._frozen, self.moment
        if found is None or frozen is None or not self._begins_anew():
            return
        if self.options.bitmap_mode == "always" and moment is not None:
            runs = self._left(moment)
        else:
            runs = list(frozen.runs())
        with found.lock:
            for offset, length in runs:
                found.bitmap.set(offset, length)

    def _left(self, moment: Moment) -> list[tuple[int, int]]:
        runs = []
        run = moment.pending()
        while run is not None:
            runs.append(run)
            run = moment.pending(sum(run))
        return runs

    def clean(self) -> None:
        """See Job.clean."""
        with self.graph.drained():
            self._take_off()
        super().clean()
        if self.found is not None and self._frozen is not None:
            self.live.give_back(self.found)
            self._frozen = None


def backup(live: Live, options: BackupOptions) -> BackupJob:
    """Begin a backup: of what the node has when this returns. Raises Error."""
    with live.lock:
        with live.graph.drained():
            job = prepare_backup(live, options)
            job.start(held=True)
        job.release()
        return job


def prepare_backup(live: Live, options: BackupOptions) -> BackupJob:
    """The same under `drained`, and without starting it."""
    source = live.node(options.device)
    target = live.node(options.target)
    options = _checked(options)
    found = _bitmap(live, source, options)
    if source is target:
        raise OptionError("Source and target cannot be the same")
    live.check_free(source, below=True, shared=True)
    live.check_free(target)
    if options.compress and not target.supports_compression:
        raise Unsupported("Compression is not supported for this drive ")
    if source.size != target.size:
        raise Error("Source and target image have different sizes")
    if target.read_only:
        raise ReadOnly("Could not create node: Block node is read-only", filename=target.filename)
    job = BackupJob(live, options, source, target, found)
    begin(live, job, job.begin)
    return job


def _checked(options: BackupOptions) -> BackupOptions:
    """Raise OptionError for what does not go together."""
    if options.sync == "incremental":
        if options.bitmap is None:
            raise OptionError("must provide a valid bitmap name for 'incremental' sync mode")
        if options.bitmap_mode not in (None, "on-success"):
            raise OptionError("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
        values: dict[str, Any] = {**vars(options), "bitmap_mode": "on-success"}
        values.pop("more", None)
        return type(options)(**values)
    if options.sync == "bitmap" and options.bitmap is None:
        raise OptionError("must provide a valid bitmap name for 'bitmap' sync mode")
    return options


def _bitmap(live: Live, source: Node, options: BackupOptions) -> Optional[Found]:
    if options.bitmap is None:
        if options.bitmap_mode is not None:
            raise OptionError("Cannot specify bitmap sync mode without a bitmap")
        return None
    try:
        live.bitmap(source, options.bitmap, idle=False)
    except Error:
        raise OptionError("Bitmap '%s' could not be found" % options.bitmap) from None
    if options.bitmap_mode is None:
        raise OptionError("Bitmap sync mode must be given when providing a bitmap")
    found = live.bitmap(source, options.bitmap)
    if options.sync == "none":
        raise OptionError("sync mode '%s' does not produce meaningful bitmap outputs" % options.sync)
    return found
