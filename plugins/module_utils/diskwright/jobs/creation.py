# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blockdev-create and x-blockdev-amend: images are made, and their options changed, by jobs
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockdevCreateOptions)."""

from __future__ import annotations

from typing import Any

from .. import drivers
from ..errors import Error, OptionError
from ..hooks import OpenFlags
from ..node import ALL, CONSISTENT_READ, RESIZE, WRITE, Format, Node, Protocol
from ..options import flatten
from ..root import Root
from .job import Job

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Mapping, Optional

    from ..options import Options
    from .live import Live

SECTOR = 512
# QMP's name and values of an option where they are others than in creation options
_OTHER_WORDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "qcow2": {"version": ("compat", {"v2": "0.10", "v3": "1.1"})},
    "vdi": {"preallocation": ("static", {"off": False, "metadata": True})},
}


class CreateJob(Job):
    """Makes an image."""

    kind = "create"

    def __init__(self, live: Live, id: str, make: Callable[[Job], None]) -> None:
        super().__init__(live.jobs, id, True, False)
        self.make = make

    def work(self) -> None:
        """See Job.work."""
        try:
            self.make(self)
        finally:
            self.current = self.total


class AmendJob(CreateJob):
    """Changes options of an image."""

    kind = "amend"


def create(live: Live, job_id: str, options: Mapping[str, Any]) -> Job:
    """Begin to make an image, as `options` in the form of BlockdevCreateOptions say. Raises Error."""
    values = dict(options)
    cls = _driver(values)
    if getattr(cls, "create_options", None) is None or cls.driver not in (*drivers.FORMATS, *drivers.PROTOCOLS):
        raise OptionError("Driver does not support blockdev-create")
    declared: type[Options] = cls.create_options  # type: ignore[attr-defined]
    file = values.pop("file", None)
    if issubclass(cls, Format) and file is None:
        raise OptionError("Parameter 'options.file' is missing")
    filename = None
    if issubclass(cls, Protocol):
        filename = values.pop("filename", None)
        if filename is None:
            raise OptionError("Parameter 'options.filename' is missing")
    if "size" in declared.fields and values.get("size") is None:
        raise OptionError("Parameter 'options.size' is missing")
    others = {key: values.pop(key) for key in ("data-file",) if key in values}
    record = read_record(cls.driver, declared, values, live.graph.objects)
    job = CreateJob(live, job_id, lambda _job: _make(live, cls, file, filename, record, others))
    with live.lock:
        live.jobs.add(job)
        job.start()
    return job


def _driver(values: dict[str, Any]) -> type[Node]:
    driver = values.pop("driver", None)
    if driver is None:
        raise OptionError("Parameter 'options.driver' is missing")
    if not isinstance(driver, str):
        raise OptionError("Invalid parameter type for 'options.driver', expected: string")
    if driver not in drivers.KNOWN.split():
        raise OptionError("Parameter 'driver' does not accept value '%s'" % driver)
    try:
        return drivers.lookup(driver)
    except OptionError:
        raise OptionError("Driver does not support blockdev-create") from None


def read_record(driver: str, declared: type[Options], values: Mapping[str, Any], objects: Mapping[str, Any]) -> Any:
    """The record that options of a driver under QMP's names mean. Raises OptionError."""
    renamed = _OTHER_WORDS.get(driver, {})
    by_name = {key.replace("_", "-"): key for key, field in declared.fields.items()}
    found: dict[str, Any] = {}
    for key, value in flatten(values).items():
        if key in renamed:
            word, known = renamed[key]
            if value not in known:
                raise OptionError("Parameter '%s' does not accept value '%s'" % (key, value))
            key, value = word, known[value]
        if key == "encrypt.format" and key not in declared.fields and value == "luks":
            continue  # there is no other whose options change
        if key not in by_name:
            raise OptionError("Parameter 'options.%s' is unexpected" % key)
        field = declared.fields[by_name[key]]
        if field.kind in ("int", "Size") and (isinstance(value, bool) or not isinstance(value, int)):
            raise OptionError("Parameter 'options.%s' expects uint64" % key)
        if field.choices and value not in field.choices:
            raise OptionError("Parameter '%s' does not accept value '%s'" % (key, value))
        found[by_name[key]] = value
    return declared.from_mapping(found).bind(objects)


def _make(live: Live, cls: type[Node], file: Any, filename: Optional[str], record: Any, others: Mapping[str, Any]) -> None:
    if issubclass(cls, Protocol):
        cls.create_file(str(filename), record, OpenFlags(writable=True, resize=True))
        return
    if not issubclass(cls, Format):
        raise OptionError("Driver does not support blockdev-create")
    if record.size % SECTOR:
        raise OptionError("Image size must be a multiple of %d bytes" % SECTOR)
    cls.check_creation(record)
    roots: list[Root] = []
    children: dict[str, Node] = {}
    try:
        for role, given in (("file", file), *others.items()):
            with live.graph.lock:
                node = live.node(given) if isinstance(given, str) else live.graph.open_spec(given, OpenFlags(writable=True, perm=0))
                roots.append(Root(live.graph, node, CONSISTENT_READ | WRITE | RESIZE, 0, "a job that makes an image"))
            children[role] = node
            with roots[-1].request() as found:
                found.truncate(0, exact=False)
        with roots[0].request():
            if cls.plain:
                children["file"].truncate(record.size)
            else:
                cls.create_over(children, record)
            children["file"].flush()
    finally:
        for root in roots:
            root.close()


def amend(live: Live, job_id: str, node_name: str, options: Mapping[str, Any], force: bool = False) -> Job:
    """Begin to change options of the image of a node. Raises Error."""
    with live.lock:
        if node_name not in live.graph.named:
            raise OptionError("Cannot find device='' nor node-name='%s'" % node_name)
        node = live.graph.named[node_name]
        live.check_free(node)
        values = dict(options)
        driver = values.pop("driver", None)
        if driver is None:
            raise OptionError("Parameter 'options.driver' is missing")
        if driver != node.driver:
            raise OptionError("x-blockdev-amend doesn't support changing the block driver")
        declared = type(node).amend_options
        if declared is None:
            raise OptionError("Driver does not support x-blockdev-amend")
        record = read_record(node.driver, declared, values, live.graph.objects)

        def make(job: Job) -> None:
            with Root(live.graph, node, CONSISTENT_READ | WRITE | RESIZE, ALL, "a job that changes options") as root, root.request() as found:
                found.amend(record, force)

        made = AmendJob(live, job_id, make)
        live.jobs.add(made)
        made.start()
    return made


def make_image(live: Live, filename: str, format: str, size: int, backing: Optional[Node]) -> None:
    """Make the image `filename` of a format, over a node or over nothing. Raises Error in QEMU's words."""
    from ..graph import parse_filename

    if format not in drivers.FORMATS:
        raise OptionError("Unknown file format '%s'" % format)
    cls = drivers.lookup_format(format)
    declared = getattr(cls, "create_options", None)
    if declared is None:
        raise OptionError("Format driver '%s' does not support image creation" % format)
    if backing is not None and "backing_file" not in declared.fields:
        raise OptionError("Backing file not supported for file format '%s'" % format)
    spec = parse_filename(filename)["file"]
    protocol = drivers.lookup_protocol(spec["driver"])
    values: dict[str, Any] = {"size": size}
    if backing is not None:
        values.update(backing_file=backing.filename, backing_fmt=backing.unfiltered().driver)
    record = declared.from_mapping({key: value for key, value in values.items() if key in declared.fields}).bind(live.graph.objects)
    cls.check_creation(record)
    try:
        file_options = {"size": size if cls.plain else 0} if "size" in protocol.create_options.fields else {}
        protocol.create_file(str(spec.get("filename", filename)), protocol.create_options.from_mapping(file_options), OpenFlags(writable=True, resize=True))
    except OSError as exc:
        raise Error("Could not create '%s': %s" % (filename, exc.strerror or exc), filename=filename, errno=exc.errno) from exc
    if cls.plain:
        return
    flags = OpenFlags(writable=True, resize=True, perm=CONSISTENT_READ | WRITE | RESIZE)
    with live.graph.lock:
        node = live.graph.open_spec(spec, flags)
    try:
        children = {"file": node}
        if backing is not None and cls.creation_needs_backing(record):
            children["backing"] = backing
        cls.create_over(children, record)
    finally:
        node.close()
