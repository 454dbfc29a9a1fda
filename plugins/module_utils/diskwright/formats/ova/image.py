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
from . import envelope, tar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Optional

    from ...node import Node
    from ...options import NodeRef
    from ...tally import CheckResult

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
        if options.verify:
            wrong = self.verify()
            if wrong:
                raise Corrupt(wrong[0], errno=EINVAL)
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
        return [line for name, reader in self._checksums() for line in self._compare(name, reader)]

    def _manifest_name(self) -> str:
        return self.envelope_name[: -len(".ovf")] + ".mf"

    def _checksums(self) -> list[tuple[tuple[str, str, str], Optional[Callable[[int, int], bytes]]]]:
        """Each line of the manifest, and what reads the file that it is about (None: there is none)."""
        manifest = self.members.get(self._manifest_name())
        if manifest is None:
            return []
        found = []
        for line in envelope.read_manifest(self._content(manifest, envelope.MAX_MANIFEST)):
            member = self.members.get(_plain(line[1]))
            found.append((line, self._reader(member) if member is not None else None))
        return found

    def _reader(self, member: tar.Member) -> Callable[[int, int], bytes]:
        def read(position: int, length: int) -> bytes:
            count = max(0, min(length, member.size - position))
            return self.file.pread(member.offset + position, count)

        return read

    def _compare(self, line: tuple[str, str, str], read: Optional[Callable[[int, int], bytes]]) -> list[str]:
        import hashlib

        kind, name, checksum = line
        if read is None:
            return ["The manifest names '%s', which is not there" % name]
        digest = hashlib.new(kind)
        position = 0
        while True:
            data = read(position, CHUNK)
            if not data:
                break
            digest.update(data)
            position += len(data)
        return [] if digest.hexdigest() == checksum else ["The %s checksum of '%s' is not that of the manifest" % (kind.upper(), name)]

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, PASS, self.children["disk"], offset),)

    def disk_size(self) -> Optional[int]:
        return self.file.disk_size()

    def _check(self, repair: str) -> CheckResult:
        from ...tally import CheckResult

        if repair:
            raise Unsupported("This image format does not support checks", filename=self.filename, errno=ENOTSUP)
        result = CheckResult()
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
        return {"disk": self.index, "disks": disks, "envelope": self.envelope_name, "manifest": bool(self._checksums())}

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
        return self.file.filename.rsplit("/", 1)[-1]

    def _envelope(self) -> bytes:
        return self._content(tar.Member(self.envelope_name, 0, self.file.size), envelope.MAX_ENVELOPE)

    def _reference(self, disk: envelope.Disk) -> Reference:
        href = _plain(disk.href or "")
        if not href or href.startswith("/") or ".." in href.split("/") or "://" in href or "\0" in href:
            raise Corrupt("The disk '%s' of the package is not beside the envelope: '%s'" % (disk.id, href), errno=EACCES)
        return Reference("disk", "./" + href, disk.format)

    def verify(self) -> list[str]:
        raise Unsupported("The checksums of a package can be verified if it is one file (ova)", filename=self.filename, errno=ENOTSUP)

    def disk_size(self) -> Optional[int]:
        return Format.disk_size(self)

    def _check(self, repair: str) -> CheckResult:
        return self.children["disk"].check(repair)

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if envelope.NAMESPACE in head and b"<" in head[:64] else 0


def _plain(name: str) -> str:
    """The name of a member without what says only that it is in this place."""
    while name.startswith("./"):
        name = name[2:]
    return name
