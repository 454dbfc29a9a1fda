# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""THE table of what the conformance suite is run over: a line for each writable driver and set of options."""

from __future__ import annotations

import random
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

from diskwright import drivers
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from diskwright.node import Format, Node
from diskwright.objects import parse_object
from diskwright.protocols.file import File

K = 1024
M = 1024 * K
SECTOR = 512
ODD = M - 5 * K + SECTOR  # a size that ends inside a cluster, where clusters are larger than sectors


class Subject(NamedTuple):
    """One driver with one set of options.

    `options` are those of creation; `backing` says how long the backing image is: "shorter", "equal", "longer";
    `runtime` are options of opening, `flags` fields of OpenFlags.
    """

    name: str
    driver: str
    options: dict[str, Any] = {}
    size: int = ODD
    backing: Optional[str] = None
    runtime: dict[str, Any] = {}
    flags: dict[str, Any] = {}

    @property
    def format(self) -> type[Format]:
        return drivers.lookup_format(self.driver)

    def is_fixed(self) -> bool:
        """Whether it is a window of a file."""
        return "size" in self.runtime

    def is_resizable(self, grows: bool) -> bool:
        """Whether its size can change, up or down."""
        return (self.driver in RESIZABLE or grows and self.driver in GROWING) and not self.is_fixed()


CHECKED = ("qcow2", "vdi", "vmdk", "vhdx", "qed", "parallels")  # formats that qemu-img checks
RESIZABLE = ("raw", "qcow2", "luks")
GROWING = ("qed",)  # formats whose images can be made larger, not smaller
OWN_BACKING = ("vmdk",)  # formats whose backing file must be of the same format


V3 = {"compat": "1.1"}
V2 = {"compat": "0.10"}
SUB = {"extended_l2": True}
KEY = {"key-secret": "s"}
QCOW2_KEY = {"encrypt.key-secret": "s"}
LUKS = {"encrypt.format": "luks", "encrypt.iter-time": 10, **QCOW2_KEY}
AES = {"encrypt.format": "aes", **QCOW2_KEY}
SECRET = "secret,id=s,data=abc"
OBJECTS = {"s": parse_object(SECRET)}

SUBJECTS = [
    Subject("raw", "raw"),
    Subject("raw-window", "raw", size=ODD, runtime={"offset": 3 * SECTOR, "size": ODD}),
    Subject("raw-direct", "raw", flags={"direct": True}),
    Subject("raw-falloc", "raw", {"preallocation": "falloc"}),
    Subject("qcow2-v2", "qcow2", V2),
    Subject("qcow2-v2-512", "qcow2", {**V2, "cluster_size": 512}),
    Subject("qcow2-v3-512", "qcow2", {**V3, "cluster_size": 512}),
    Subject("qcow2-v3-4k", "qcow2", {**V3, "cluster_size": 4 * K}),
    Subject("qcow2-v3", "qcow2", V3),
    Subject("qcow2-v3-2M", "qcow2", {**V3, "cluster_size": 2 * M}, size=9 * M + SECTOR),
    *(Subject("qcow2-r%d" % bits, "qcow2", {**V3, "cluster_size": 1 * K, "refcount_bits": bits}) for bits in (1, 2, 4, 8, 32, 64)),
    Subject("qcow2-zstd", "qcow2", {"compression_type": "zstd", "cluster_size": 8 * K}),
    Subject("qcow2-lazy", "qcow2", {"lazy_refcounts": True, "cluster_size": 4 * K}),
    Subject("qcow2-metadata", "qcow2", {"preallocation": "metadata", "cluster_size": 4 * K}),
    Subject("qcow2-full", "qcow2", {"preallocation": "full", "cluster_size": 16 * K}),
    Subject("qcow2-direct", "qcow2", {"cluster_size": 512}, flags={"direct": True}),
    Subject("qcow2-data", "qcow2", {"data_file": "data", "cluster_size": 4 * K}),
    Subject("qcow2-sub-16k", "qcow2", {**SUB, "cluster_size": 16 * K}),
    Subject("qcow2-sub-metadata", "qcow2", {**SUB, "preallocation": "metadata", "cluster_size": 32 * K}, backing="longer"),
    Subject("qcow2-sub-shorter", "qcow2", SUB, backing="shorter"),
    Subject("qcow2-sub-2M", "qcow2", {**SUB, "cluster_size": 2 * M}, size=9 * M + SECTOR, backing="equal"),
    Subject("qcow2-sub-data", "qcow2", {**SUB, "data_file": "data", "cluster_size": 16 * K}, backing="equal"),
    Subject("qcow2-data-raw", "qcow2", {"data_file": "data", "data_file_raw": True, "cluster_size": 4 * K}),
    Subject("qcow2-data-shorter", "qcow2", {"data_file": "data", "cluster_size": 4 * K}, backing="shorter"),
    *(Subject("qcow2-v2-" + backing, "qcow2", {**V2, "cluster_size": 4 * K}, backing=backing) for backing in ("shorter", "equal", "longer")),
    *(Subject("qcow2-v3-" + backing, "qcow2", {**V3, "cluster_size": 16 * K}, backing=backing) for backing in ("shorter", "equal", "longer")),
    Subject("qcow2-luks", "qcow2", {**LUKS, "cluster_size": 4 * K}, runtime=QCOW2_KEY),
    Subject("qcow2-luks-sub", "qcow2", {**LUKS, **SUB, "cluster_size": 16 * K}, backing="shorter", runtime=QCOW2_KEY),
    Subject("qcow2-aes", "qcow2", {**AES, **V2, "cluster_size": 1 * K}, backing="longer", runtime=QCOW2_KEY),
    Subject("qcow2-aes-data", "qcow2", {**AES, "data_file": "data", "cluster_size": 8 * K}, runtime=QCOW2_KEY),
    Subject("luks", "luks", {**KEY, "iter-time": 10}, runtime=KEY),
    Subject("luks-essiv", "luks", {**KEY, "iter-time": 10, "cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv"}, runtime=KEY),
    Subject("luks-ctr", "luks", {**KEY, "iter-time": 10, "cipher-alg": "serpent-256", "cipher-mode": "ctr", "hash-alg": "sha1"}, runtime=KEY),
    Subject("vdi", "vdi", size=3 * M + 5 * SECTOR),
    Subject("vmdk", "vmdk", size=2 * M + SECTOR),
    Subject("vmdk-zero", "vmdk", {"zeroed_grain": True}),
    Subject("vmdk-flat", "vmdk", {"subformat": "monolithicFlat"}),
    Subject("vmdk-split", "vmdk", {"subformat": "twoGbMaxExtentSparse", "compat6": True}),
    Subject("vmdk-shorter", "vmdk", backing="shorter"),
    Subject("vmdk-zero-longer", "vmdk", {"zeroed_grain": True}, backing="longer"),
    Subject("vdi-static", "vdi", {"static": True}, size=2 * M + SECTOR),
    Subject("vpc", "vpc", size=63 * 4 * 17 * SECTOR),
    Subject("vpc-exact", "vpc", {"force_size": True}, size=5 * M + SECTOR),
    Subject("parallels", "parallels", size=3 * M + 5 * SECTOR),
    Subject("parallels-4k", "parallels", {"cluster_size": 4 * K}),
    Subject("parallels-63k", "parallels", {"cluster_size": 63 * K}),
    Subject("parallels-falloc", "parallels", {"cluster_size": 512}, size=200 * K, runtime={"prealloc-mode": "falloc", "prealloc-size": 8 * K}),
    Subject("vpc-fixed", "vpc", {"subformat": "fixed", "force_size": True}),
    Subject("vhdx", "vhdx", {"block_size": M}, size=5 * M + 3 * SECTOR),
    Subject("vhdx-large", "vhdx", {"log_size": 2 * M}, size=9 * M + SECTOR),
    Subject("vhdx-absent", "vhdx", {"block_size": M, "block_state_zero": False}, size=3 * M + SECTOR),
    Subject("vhdx-fixed", "vhdx", {"block_size": 2 * M, "subformat": "fixed"}, size=3 * M + 5 * SECTOR),
    Subject("vhdx-fixed-zero", "vhdx", {"block_size": M, "subformat": "fixed", "block_state_zero": True}, size=2 * M + SECTOR),
    Subject("qed", "qed"),
    Subject("qed-4k", "qed", {"cluster_size": 4 * K, "table_size": 2}),
    Subject("qed-4k-16", "qed", {"cluster_size": 4 * K, "table_size": 16}),
    Subject("qed-1M", "qed", {"cluster_size": M, "table_size": 2}, size=9 * M + SECTOR),
    *(Subject("qed-" + backing, "qed", {"cluster_size": 8 * K}, backing=backing) for backing in ("shorter", "equal", "longer")),
    Subject("qcow", "qcow"),
    Subject("qcow-aes", "qcow", AES, runtime=QCOW2_KEY),
    *(Subject("qcow-" + backing, "qcow", backing=backing) for backing in ("shorter", "equal", "longer")),
]

every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=[subject.name for subject in SUBJECTS])


class Image:
    """An image of a subject under a directory, and what it reads as when new."""

    def __init__(self, subject: Subject, directory: Path) -> None:
        self.subject = subject
        self.path = directory / "image"
        self.base = b""
        options: dict[str, Any] = {"size": subject.size, **subject.options}
        if subject.backing:
            length = {"shorter": subject.size // 2 + 300, "equal": subject.size, "longer": subject.size + 70 * K}[subject.backing]
            length = -(-length // SECTOR) * SECTOR
            self.base = patches(random.Random(subject.name), length)
            (directory / "base").write_bytes(self.base)
            options.update(backing_file="base", backing_fmt="raw")
            if subject.driver in OWN_BACKING:
                options["backing_fmt"] = subject.driver
                (directory / "base").rename(directory / "base.raw")
                line = ["qemu-img", "convert", "-f", "raw", "-O", subject.driver, directory / "base.raw", directory / "base"]
                subprocess.run(line, timeout=60, check=True)
        file_size = subject.size if subject.driver == "raw" else 0
        if subject.is_fixed():
            file_size += subject.runtime["offset"] + 7 * SECTOR
        extra = {"preallocation": options.pop("preallocation")} if subject.driver == "raw" and "preallocation" in options else {}
        File.create_file(str(self.path), File.create_options.from_mapping({"size": file_size, **extra}), OpenFlags())
        if subject.is_fixed():
            self.path.write_bytes(b"\xee" * file_size)  # what is around the window shall stay
        if "data_file" in options:
            options["data_file"] = str(directory / options["data_file"])
        record = subject.format.create_options.from_mapping(options).bind(OBJECTS)
        writable = OpenFlags(writable=True, resize=True)
        with ExitStack() as stack:
            children = {"file": stack.enter_context(Graph().open(str(self.path), "file", writable))}
            for role, name in subject.format.creation_files(record, str(self.path)).items():
                Path(name).write_bytes(b"")
                children[role] = stack.enter_context(Graph().open(name, "raw", writable))
            if subject.format.creation_needs_backing(record):
                children["backing"] = stack.enter_context(Graph().open(str(directory / "base"), subject.driver, OpenFlags()))
            subject.format.create_over(children, record)
        self.created_size = subject.format.created_size(record)
        self.new = self.below(subject.size) if not subject.is_fixed() else b"\xee" * subject.size
        if subject.driver == "luks":  # what was never written is noise
            with self.open(writable=False, resize=False) as node:
                self.new = node.pread(0, node.size)

    def below(self, size: int) -> bytes:
        """What `size` bytes read as that the image itself does not hold."""
        return self.base[:size].ljust(size, b"\0")

    def open(self, file: Optional[Node] = None, **flags: Any) -> Node:
        """Open the image, over `file` if given."""
        spec = {
            "driver": self.subject.driver,
            **self.subject.runtime,
            "file": file if file is not None else {"driver": "file", "filename": str(self.path)},
        }
        return Graph(objects=OBJECTS).open_spec(spec, OpenFlags(**{"writable": True, "resize": True, "unmap": True, **self.subject.flags, **flags}))

    def check(self) -> None:
        """Nothing is wrong with it: qemu-img and we agree."""
        if self.subject.driver not in CHECKED:
            return
        theirs = qemu_check(self.path, self.subject.driver, self.subject.runtime)
        assert theirs == 0, "qemu-img check: %d" % theirs
        with self.open(writable=False, resize=False, check=True) as node:
            result = node.check()
            assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.messages

    def read_by_qemu(self) -> bytes:
        """What qemu-img reads."""
        out = self.path.with_name("read")
        name = qemu_name(self.path, self.subject.driver, self.subject.runtime)
        line = ["qemu-img", "convert", "-O", "raw", "--object", SECRET, "--image-opts", name, str(out)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        found = out.read_bytes()
        out.unlink()
        return found


def qemu_name(path: Path, driver: str, runtime: dict[str, Any]) -> str:
    """What qemu-img opens the image by, with --image-opts."""
    return "driver=%s,file.driver=file,file.filename=%s" % (driver, path) + "".join(",%s=%s" % pair for pair in runtime.items())


def qemu_check(path: Path, driver: str = "qcow2", runtime: Optional[dict[str, Any]] = None) -> int:
    """The exit code of qemu-img check: 0 clean, 2 corrupt, 3 leaking."""
    line = ["qemu-img", "check", "-q", "--object", SECRET, "--image-opts", qemu_name(path, driver, runtime or {})]
    return subprocess.run(line, capture_output=True, timeout=60, check=False).returncode


def patches(chance: random.Random, length: int) -> bytes:
    """Bytes with runs of zeroes, of one value, and of noise."""
    parts = []
    while length > 0:
        count = min(length, chance.randrange(1, 40) * SECTOR + chance.choice((0, 0, 0, 100)))
        parts.append(chance.choice((bytes(count), bytes([chance.randrange(1, 256)]) * count, chance.randbytes(count))))
        length -= count
    return b"".join(parts)
