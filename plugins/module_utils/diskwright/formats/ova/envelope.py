# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The envelope of a package, XML that lists files and disks, and the manifest with their checksums (https://www.dmtf.org/standards/ovf, DSP0243)."""

from __future__ import annotations

from ...errors import Corrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

MAX_ENVELOPE = 4 << 20  # bytes
MAX_MANIFEST = 1 << 20
MAX_DISKS = 1000
MAX_CHECKSUMS = 3000  # three kinds for each file
MAX_DEPTH = 100
EINVAL = 22

NAMESPACE = b"schemas.dmtf.org/ovf/envelope"

# the kind of a disk by a word in the URI of its format; other disks are looked at
FORMATS = (("vmdk", "vmdk"), ("bb676673", "vpc"), ("vhdx", "vhdx"), ("vhd", "vpc"), ("qcow2", "qcow2"))


class Disk:
    """A disk of the package: its id, the file that holds it (None: it is empty), and what the envelope says of both."""

    __slots__ = ("id", "href", "format", "capacity", "compression", "chunked", "parent")

    def __init__(self, id: str, href: Optional[str], format: Optional[str], capacity: int, compression: str, chunked: bool, parent: str) -> None:
        self.id = id
        self.href = href
        self.format = format
        self.capacity = capacity
        self.compression = compression
        self.chunked = chunked
        self.parent = parent


class _Reader:
    """Collects the elements File and Disk."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, str]] = {}
        self.disks: list[dict[str, str]] = []
        self.depth = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH or len(self.files) + len(self.disks) > MAX_DISKS:
            raise Corrupt("The OVF envelope has more files and disks, or is nested deeper, than is sensible", errno=EINVAL)
        local = name.rsplit(" ", 1)[-1]
        values = {key.rsplit(" ", 1)[-1]: value for key, value in attributes.items()}
        if local == "File" and "id" in values:
            self.files[values["id"]] = values
        elif local == "Disk" and "diskId" in values:
            self.disks.append(values)

    def end(self, _name: str) -> None:
        self.depth -= 1

    def entity(self, *_rest: Any) -> None:
        raise Corrupt("The OVF envelope declares entities, which no envelope needs", errno=EINVAL)


def read_disks(text: bytes) -> list[Disk]:
    """The disks that an envelope lists, in its order. Raises Corrupt."""
    from urllib.parse import unquote
    from xml.parsers import expat

    reader = _Reader()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.EntityDeclHandler = reader.entity
    try:
        parser.Parse(text, True)
    except (expat.ExpatError, LookupError, ValueError) as exc:
        raise Corrupt("The OVF envelope is no XML: %s" % exc, errno=EINVAL) from exc
    found = []
    for disk in reader.disks:
        file = reader.files.get(disk.get("fileRef", ""))
        if disk.get("fileRef") and file is None:
            raise Corrupt("The OVF envelope has no file '%s' for its disk '%s'" % (disk["fileRef"], disk["diskId"]), errno=EINVAL)
        href = unquote(file.get("href", "")) if file is not None else None
        compression = (file or {}).get("compression", "")
        found.append(
            Disk(
                disk["diskId"],
                href,
                next((name for word, name in FORMATS if word in disk.get("format", "").lower()), None),
                _capacity(disk),
                "" if compression == "identity" else compression,
                "chunkSize" in (file or {}),
                disk.get("parentRef", ""),
            )
        )
    return found


def _capacity(disk: dict[str, str]) -> int:
    """The size of a disk in bytes, 0 where the envelope does not say it in numbers."""
    number, unit = disk.get("capacity", ""), disk.get("capacityAllocationUnits", "byte").replace(" ", "")
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        return 0
    shift = unit[len("byte*2^") :] if unit.startswith("byte*2^") else "0" if unit in ("byte", "") else ""
    return int(number) << int(shift) if shift.isascii() and shift.isdigit() and int(shift[:3]) <= 60 else 0


def read_manifest(text: bytes) -> list[tuple[str, str, str]]:
    """(algorithm, file, checksum) of each line `SHA256(file)= checksum`. Raises Corrupt."""
    found: dict[tuple[str, str], str] = {}
    for line in text.decode("utf-8", "surrogateescape").splitlines():
        if not line.strip():
            continue
        algorithm, opened, rest = line.partition("(")
        name, closed, checksum = rest.rpartition(")")
        kind = algorithm.strip().lower().replace("-", "")
        if not opened or not closed or kind not in ("sha1", "sha256", "sha512") or not checksum.strip().startswith("="):
            raise Corrupt("The manifest has a line that is no checksum: %s" % line[:100], errno=EINVAL)
        if (kind, name.strip()) in found or len(found) >= MAX_CHECKSUMS:
            raise Corrupt("The manifest has a file twice, or more than %d lines" % MAX_CHECKSUMS, errno=EINVAL)
        found[kind, name.strip()] = checksum.strip()[1:].strip().lower()
    return [(kind, name, checksum) for (kind, name), checksum in found.items()]
