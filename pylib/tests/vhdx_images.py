# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Small VHDX images, made field by field (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/)."""

from __future__ import annotations

import struct
import uuid
from typing import Optional

from diskwright.kernels import crc32c

K = 1 << 10
M = 1 << 20
LOG, BAT, METADATA, DATA = M, 2 * M, 2 * M + 4 * K, 3 * M
LOG_GUID = b"L" * 16
DATA_GUID = uuid.UUID("01020304-0506-0708-090a-0b0c0d0e0f10")

REGIONS = {"bat": "2dc27766-f623-4200-9d64-115e9bfd4a08", "metadata": "8b7ca206-4790-4b9a-b8fe-575f050f886e"}
ITEMS = {
    "parameters": "caa16737-fa36-4d43-b3b6-33f0aa44e76b",
    "size": "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
    "id": "beca12ab-b2e6-4523-93ef-c309e000c746",
    "logical": "8141bf1d-a96f-4709-ba47-f233a8faab5f",
    "physical": "cda348c7-445d-4471-9cc9-e9885251c556",
    "parent": "a8d35f2d-b30b-454d-abf7-d3d84834ab0c",
}
HEADER = "<4sIQ16s16s16sHHIQ"
# name -> (offset, struct code): of a header, a region, a metadata entry
HEADER_FIELDS = {
    "signature": (0, "<I"),
    "checksum": (4, "<I"),
    "sequence_number": (8, "<Q"),
    "log_guid": (48, "<Q"),
    "log_version": (64, "<H"),
    "version": (66, "<H"),
    "log_length": (68, "<I"),
    "log_offset": (72, "<Q"),
}
REGION_FIELDS = {"guid": (0, "<Q"), "file_offset": (16, "<Q"), "length": (24, "<I"), "required": (28, "<I")}
ITEM_FIELDS = {"item_id": (0, "<Q"), "offset": (16, "<I"), "length": (20, "<I"), "flags": (24, "<I")}


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


def summed(raw: bytes) -> bytes:
    """With its checksum, at byte 4."""
    raw = raw[:4] + bytes(4) + raw[8:]
    return raw[:4] + struct.pack("<I", crc32c(raw)) + raw[8:]


def page(offset: int, content: bytes, number: int, **wrong: object) -> tuple[bytes, bytes]:
    """A descriptor of the log for 4 KiB at `offset`, and its data sector."""
    signature = wrong.get("signature", b"desc")
    descriptor = struct.pack("<4s4s8sQQ", signature, content[4092:], content[:8], offset, wrong.get("descriptor_number", number))
    own = wrong.get("data_number", number)
    assert isinstance(own, int)
    return descriptor, struct.pack("<4sI", b"data", own >> 32) + content[8:4092] + struct.pack("<I", own & 0xFFFFFFFF)


def zeroes(offset: int, length: int, number: int) -> tuple[bytes, bytes]:
    """A descriptor of the log for zeroes."""
    return struct.pack("<4sIQQQ", b"zero", 0, length, offset, number), b""


def entry(number: int, changes: list[tuple[bytes, bytes]], tail: int = 0, **fields: int) -> bytes:
    """A log entry; `fields` are numbers in its header that lie."""
    size = -(-(64 + 32 * len(changes)) // 4096) * 4096
    rest = b"".join(change[0] for change in changes).ljust(size - 64, b"\0") + b"".join(change[1] for change in changes)
    values = {"length": 64 + len(rest), "count": len(changes), "flushed": 4 * M, "last": 4 * M, **fields}
    head = struct.pack(
        "<4sIIIQII16sQQ",
        b"loge",
        0,
        values["length"],
        tail,
        values.get("number", number),
        values["count"],
        0,
        LOG_GUID,
        values["flushed"],
        values["last"],
    )
    return summed(head + rest)


class Draft:
    """An image of 3 blocks of 1 MiB, the first of which is stored, full of "d"."""

    def __init__(self) -> None:
        self.header = {"sequence_number": 7, "log_version": 0, "version": 1, "log_length": M, "log_offset": LOG}
        self.regions: list[tuple[bytes, int, int, int]] = [
            (guid(REGIONS["bat"]), BAT, 4 * K, 1),
            (guid(REGIONS["metadata"]), METADATA, 128 * K, 1),
        ]
        self.items: dict[str, bytes] = {
            "parameters": struct.pack("<II", M, 0),
            "size": struct.pack("<Q", 3 * M),
            "id": b"i" * 16,
            "logical": struct.pack("<I", 512),
            "physical": struct.pack("<I", 512),
        }
        self.bat = [DATA | 6, 2, 0]
        self.log = b""
        self.log_at = 0
        self.pieces: dict[int, bytes] = {DATA: b"d" * M}

    def build(self, patches: Optional[dict[int, bytes]] = None) -> bytes:
        """The image; `patches` go over it before checksums are made."""
        image = bytearray(4 * M)

        def put(offset: int, data: bytes) -> None:
            image[offset : offset + len(data)] = data

        put(0, b"vhdxfile" + "test".encode("utf-16-le"))
        header = self.header
        log_guid = LOG_GUID if self.log else bytes(16)
        for number, offset in enumerate((64 * K, 128 * K)):
            words = (header["log_version"], header["version"], header["log_length"], header["log_offset"])
            put(offset, struct.pack(HEADER, b"head", 0, header["sequence_number"] + number, b"f" * 16, DATA_GUID.bytes_le, log_guid, *words))
        table = struct.pack("<4sIII", b"regi", 0, len(self.regions), 0) + b"".join(struct.pack("<16sQII", *region) for region in self.regions)
        put(192 * K, table)
        put(256 * K, table)
        at = 64 * K
        table = struct.pack("<8sHH20x", b"metadata", 0, len(self.items))
        for name, value in self.items.items():
            table += struct.pack("<16sIIII", guid(ITEMS[name]), at, len(value), 4 if name == "parameters" else 6, 0)
            put(METADATA + at, value)
            at += len(value)
        put(METADATA, table)
        put(BAT, struct.pack("<%dQ" % len(self.bat), *self.bat))
        for start in range(0, len(self.log), 4096):
            put(LOG + (self.log_at + start) % M, self.log[start : start + 4096])
        for offset, data in {**self.pieces, **(patches or {})}.items():
            image.extend(bytes(max(0, offset + len(data) - len(image))))
            put(offset, data)
        for offset, size in ((64 * K, 4 * K), (128 * K, 4 * K), (192 * K, 64 * K), (256 * K, 64 * K)):
            put(offset, summed(bytes(image[offset : offset + size])))
        return bytes(image)


def differencing(parent: str, linkage: uuid.UUID = DATA_GUID, **keys: str) -> Draft:
    """An image over `parent`: block 0 is stored, of block 1 every other sector of the first 64 KiB, block 2 not at all."""
    draft = Draft()
    values = {"parent_linkage": "{%s}" % linkage, "relative_path": parent, **keys}
    head = struct.pack("<16sHH", guid("b04aefb7-d19e-4a81-b789-25b8e9445913"), 0, len(values))
    at = len(head) + 12 * len(values)
    texts = b""
    for key, value in values.items():
        words = [key.encode("utf-16-le"), value.encode("utf-16-le")]
        head += struct.pack("<IIHH", at, at + len(words[0]), len(words[0]), len(words[1]))
        texts += b"".join(words)
        at += sum(map(len, words))
    draft.items["parameters"] = struct.pack("<II", M, 2)
    draft.items["parent"] = head + texts
    ratio = 4096  # blocks of a chunk
    draft.regions[0] = (guid(REGIONS["bat"]), BAT + M, 64 * K, 1)
    draft.bat = []
    entries = [0] * (ratio + 1)
    entries[0], entries[1], entries[ratio] = 5 * M | 6, 6 * M | 7, 7 * M | 6
    draft.pieces = {
        3 * M: struct.pack("<%dQ" % len(entries), *entries),
        5 * M: b"c" * M,
        6 * M: b"p" * M,
        7 * M: bytes(256) + b"\x55" * 16 + bytes(M - 272),
    }
    return draft
