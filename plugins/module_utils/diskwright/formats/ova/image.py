# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Ova and Ovf, the node of one disk in a package (https://www.dmtf.org/standards/ovf, DSP0243).

The disk's own format is opened over the part of the tar file that holds it, or over the file beside the envelope.
"""

from __future__ import annotations

from ...errors import Corrupt, Error, OptionError, ReadOnly, Unsupported
from ...extent import PASS, Extent
from ...node import Format, OpenFlags, Reference
from ...options import Options, opt
from ...parts import part
from . import envelope, tar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Optional

    from diskwright.tally import CheckResult

    from ...node import Node
    from ...options import NodeRef

CHUNK = 1 << 20
EINVAL, ENOENT, ENOTSUP, EACCES = 22, 2, 95, 13


class OvaOptions(Options):
    """Runtime options of ova and ovf."""

    file: NodeRef = opt(help="the node that holds the package, or the envelope")
    disk: Optional[str] = opt(None, help="which disk: its number (the first is 0), its id, or the name of its file")
    verify: bool = opt(False, help="compare all files with the checksums of the manifest first")


class Ova(Format):
    """A disk of a package that is one tar file."""

    driver = "ova"
    options_class = OvaOptions
    strong_options = ("disk",)
    unwritable = True

    options: OvaOptions

    def __init__(self, options: OvaOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if flags.writable:
            raise ReadOnly("A package of virtual machines can only be read", errno=EACCES)
        self.decodes = True
        self.members = {_plain(member.name): member for member in self._members()}
        self.envelope_name = self._envelope_name()
        self.disks = envelope.read_disks(self._envelope())
        self.index = self._chosen(options.disk)
        self.disk = self.disks[self.index]
        if options.disk is None and len(self.disks) > 1:
            self.warnings.append("The package has %d disks, and this is the first of them; the option disk=1 (and so on) names another" % len(self.disks))

    # -- the package ---------------------------------------------------------------------------------------------

    def _members(self) -> list[tar.Member]:
        return tar.read_members(self.file)

    def _envelope_name(self) -> str:
        for name in self.members:
            if name.endswith(".ovf"):
                return name
        raise Corrupt("The tar file has no member *.ovf", errno=EINVAL)

    def _envelope(self) -> bytes:
        return self._content(self.members[self.envelope_name], envelope.MAX_ENVELOPE)

    def _content(self, member: tar.Member, limit: int) -> bytes:
        if member.size > limit:
            raise Corrupt("'%s' is larger than %d bytes" % (member.name, limit), errno=EINVAL)
        return self.file.pread(member.offset, member.size)

    def _chosen(self, wanted: Optional[str]) -> int:
        """The number of the disk that the user wants. Raises OptionError, Corrupt."""
        if not self.disks:
            raise Corrupt("The package has no disk", errno=EINVAL)
        for number, disk in enumerate(self.disks):
            if wanted is None or wanted in (disk.id, disk.href):
                return number
        if wanted is not None and wanted.isascii() and wanted.isdigit() and len(wanted) < 6 and int(wanted) < len(self.disks):
            return int(wanted)
        known = ", ".join("%d (%s)" % (number, disk.href or disk.id) for number, disk in enumerate(self.disks[:20]))
        raise OptionError("The package has no disk '%s'; it has %s" % (wanted, known), errno=ENOENT)

    def references(self) -> list[Reference]:
        if self.options.verify:
            wrong = self.verify()
            if wrong:
                raise Corrupt(wrong[0], errno=EINVAL)
            if not self.has_manifest():
                self.warnings.append("The package has no manifest, so nothing of it was verified")
        disk = self.disk
        what = "The disk '%s' of the package" % disk.id
        if disk.href is None:
            raise Unsupported("%s has no file, since it is empty" % what, errno=ENOTSUP)
        if disk.compression or disk.chunked:
            how = "compressed (%s)" % disk.compression if disk.compression else "cut into chunks"
            raise Unsupported("%s is %s, and cannot be read in place" % (what, how), errno=ENOTSUP)
        if disk.parent:
            raise Unsupported("%s is an overlay of the disk '%s'" % (what, disk.parent), errno=ENOTSUP)
        return [self._reference(disk)]

    def _reference(self, disk: envelope.Disk) -> Reference:
        member = self.members.get(_plain(disk.href or ""))
        if member is None:
            raise Corrupt("The package has no file '%s'" % disk.href, errno=ENOENT)
        length = min(-(-member.size // tar.BLOCK), (self.file.size - member.offset) // tar.BLOCK) * tar.BLOCK
        spec: dict[str, Any] = {"file": {"driver": "raw", "offset": member.offset, "size": length, "file": self.file}}
        if disk.format is not None:
            spec["driver"] = disk.format
        return Reference("disk", disk.href or "", spec=spec)

    def attach(self, role: str, child: Node) -> None:
        super().attach(role, child)
        self._size = child.size
        self.cluster_size = child.cluster_size

    # -- checksums -----------------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """What the manifest contradicts, a line for each file; empty also where there is no manifest. Reads all files."""
        text = self._manifest()
        if text is None:
            return []
        return [wrong for line in envelope.read_manifest(text) for wrong in self._compare(*line)]

    def has_manifest(self) -> bool:
        """Whether the package says what the checksums of its files are."""
        return self._manifest_name() in self.members

    def _manifest_name(self) -> str:
        return self.envelope_name.rpartition(".")[0] + ".mf"

    def _manifest(self) -> Optional[bytes]:
        member = self.members.get(self._manifest_name())
        return None if member is None else self._content(member, envelope.MAX_MANIFEST)

    def _compare(self, kind: str, name: str, checksum: str) -> list[str]:
        import hashlib

        digest = hashlib.new(kind)
        try:
            for data in self._pieces(name):
                digest.update(data)
        except FileNotFoundError:
            return ["The manifest names '%s', which is not there" % name]
        return [] if digest.hexdigest() == checksum else ["The %s checksum of '%s' is not that of the manifest" % (kind.upper(), name)]

    def _pieces(self, name: str) -> Iterator[bytes]:
        """The content of a file of the package. Raises FileNotFoundError."""
        member = self.members.get(_plain(name))
        if member is None:
            raise FileNotFoundError(name)
        yield from _content_of(self.file, member.offset, member.size)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, PASS, self.children["disk"], offset),)

    def disk_size(self) -> Optional[int]:
        return self.file.disk_size()

    def _check(self, repair: str) -> CheckResult:

        if repair:
            raise Unsupported("This image format does not support checks", filename=self.filename, errno=ENOTSUP)
        result: CheckResult = part(__package__, "..tally").CheckResult()
        for line in self.verify():
            result.say("ERROR: " + line)
            result.corruptions += 1
        try:
            inner = self.children["disk"].check()
        except Unsupported:
            return result
        for line in inner.messages:
            result.say(line)
        result.corruptions += inner.corruptions
        result.leaks += inner.leaks
        result.check_errors += inner.check_errors
        result.failure = inner.failure
        return result

    def format_specific(self) -> dict[str, Any]:
        disks = []
        for disk in self.disks:
            entry: dict[str, Any] = {"id": disk.id, "capacity": disk.capacity}
            if disk.href is not None:
                entry["filename"] = disk.href
            if disk.format is not None:
                entry["format"] = disk.format
            disks.append(entry)
        return {"disk": self.index, "disks": disks, "envelope": self.envelope_name, "manifest": self.has_manifest()}

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """The envelope is the first file of the package (or comes after directories)."""
        position = 0
        while len(head) >= position + tar.BLOCK:
            try:
                name, size, kind = tar.parse_header(head[position : position + tar.BLOCK])
            except Error:
                return 0
            if kind in "0\0":
                return 100 if name.endswith(".ovf") else 0
            position += tar.BLOCK + -(-size // tar.BLOCK) * tar.BLOCK
        return 0


class Ovf(Ova):
    """A disk of a package whose files lie beside its envelope."""

    driver = "ovf"

    def _members(self) -> list[tar.Member]:
        return []

    def _envelope_name(self) -> str:
        leaf: Node = self.file
        while not leaf.leaf and "file" in leaf.children:
            leaf = leaf.children["file"]
        return leaf.filename.rsplit("/", 1)[-1]

    def _envelope(self) -> bytes:
        return self._content(tar.Member(self.envelope_name, 0, self.file.size), envelope.MAX_ENVELOPE).rstrip(b"\0")  # raw pads it

    def _reference(self, disk: envelope.Disk) -> Reference:
        href = _plain(disk.href or "")
        if not href or href.startswith("/") or ".." in href.split("/") or "://" in href or "\0" in href:
            raise Corrupt("The disk '%s' of the package is not beside the envelope: '%s'" % (disk.id, href), errno=EACCES)
        return Reference("disk", "./" + href, disk.format)

    def has_manifest(self) -> bool:
        try:
            manifest = self._beside(self._manifest_name())
        except Error:
            return False
        if manifest is not None:
            manifest.close()
        return manifest is not None

    def _manifest(self) -> Optional[bytes]:
        manifest = self._beside(self._manifest_name())
        if manifest is None:
            return None
        with manifest:
            if manifest.size > envelope.MAX_MANIFEST:
                raise Corrupt("'%s' is larger than %d bytes" % (self._manifest_name(), envelope.MAX_MANIFEST), errno=EINVAL)
            return manifest.pread(0, manifest.size)

    def _pieces(self, name: str) -> Iterator[bytes]:
        file = self._beside(_plain(name))
        if file is None:
            raise FileNotFoundError(name)
        with file:
            yield from _content_of(file, 0, file.size)

    def _beside(self, name: str) -> Optional[Node]:
        """A file of the package, open; None where there is none. Raises Denied for one that is elsewhere."""
        if self.open_beside is None:
            raise Unsupported("The files of a package are not known", filename=self.filename, errno=ENOTSUP)
        try:
            return self.open_beside(Reference("package", name, protocol=True))
        except Error as exc:
            if exc.errno != ENOENT:
                raise
            return None

    def disk_size(self) -> Optional[int]:
        return Format.disk_size(self)

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if envelope.NAMESPACE in head and b"<" in head[:64] else 0


def _content_of(node: Node, offset: int, size: int) -> Iterator[bytes]:
    """Bytes of `node`, in pieces."""
    for position in range(0, size, CHUNK):
        yield node.pread(offset + position, min(CHUNK, size - position))


def _plain(name: str) -> str:
    """The name of a member without what says only that it is in this place."""
    while name.startswith("./"):
        name = name[2:]
    return name
