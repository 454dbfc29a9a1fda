# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Packages of virtual machines: disks in place, by number, id and name; checksums; what is no package, and what means harm."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from pathlib import Path
from typing import Optional

import pytest
from damage import attempt, little_memory
from side_by_side import ours, setup, theirs
from vmdk_images import descriptor

from diskwright.errors import Denied, Error
from diskwright.graph import Graph, OpenPolicy
from diskwright.hooks import OpenFlags
from diskwright.node import Node

M = 1 << 20
VMDK = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
NAMES = ("first.vmdk", "second disk.vmdk")


def content(number: int) -> bytes:
    data = bytearray(2 * M)
    data[100000 * number : 100000 * number + 300000] = random.Random(number).randbytes(300000)
    return bytes(data)


def envelope(files: str = "", disks: str = "", head: str = "") -> bytes:
    """An envelope of two disks, unless others are given."""
    files = files or '<File ovf:id="f1" ovf:href="first.vmdk"/><File ovf:id="iso" ovf:href="x.iso"/><File ovf:id="f2" ovf:href="second%20disk.vmdk"/>'
    disks = disks or (
        '<Disk ovf:diskId="vmdisk1" ovf:fileRef="f1" ovf:capacity="2" ovf:capacityAllocationUnits="byte * 2^20" ovf:format="%s"/>'
        '<Disk ovf:diskId="vmdisk2" ovf:fileRef="f2" ovf:capacity="2097152"/>' % VMDK
    )
    text = '<?xml version="1.0" encoding="UTF-8"?>\n%s<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" ' % head
    text += 'xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>%s</References><DiskSection>%s</DiskSection></Envelope>' % (files, disks)
    return text.encode()


def package(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of a package, made by qemu-img."""
    place = tmp_path_factory.mktemp("disks")
    found = {"machine.ovf": envelope()}
    for number, name in enumerate(NAMES, 1):
        (place / "raw").write_bytes(content(number))
        setup("qemu-img convert -f raw -O vmdk -o subformat=streamOptimized raw image", place)
        found[name] = (place / "image").read_bytes()
    lines = ["SHA256(%s)= %s" % (name, hashlib.sha256(data).hexdigest()) for name, data in found.items()]
    found["machine.mf"] = "\n".join(lines).encode() + b"\r\n"
    return found


def open_disk(path: Path, disk: Optional[str] = None, policy: Optional[OpenPolicy] = None, **options: str) -> Node:
    spec = {"file": {"driver": "file", "filename": str(path)}, **options}
    if disk is not None:
        spec["disk"] = disk
    return Graph(policy).open_spec({"driver": "ova" if path.suffix == ".ova" else "ovf", **spec}, OpenFlags())


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_disks_of_a_package(tmp_path: Path, disks: dict[str, bytes], format: int) -> None:
    path = tmp_path / "machine.ova"
    long = "d" * 120 + "/" if format != tarfile.USTAR_FORMAT else ""
    members = {name: data for name, data in disks.items() if not long or name != NAMES[1]}
    if long:
        members["machine.ovf"] = envelope().replace(b"second%20disk", long.encode() + b"second%20disk")
        members[long + NAMES[1]] = disks[NAMES[1]]
    package(path, members, format)
    for disk, number in ((None, 1), ("0", 1), ("1", 2), ("vmdisk1", 1), ("vmdisk2", 2), (NAMES[0], 1), (long + NAMES[1], 2)):
        with open_disk(path, disk) as node:
            assert node.pread(0, node.size) == content(number)
            assert bool(node.warnings) == (disk is None)
            assert node.format_specific()["disk"] == number - 1  # type: ignore[index]
    for line in ("info machine.ova", "info --output=json machine.ova", "measure -O qcow2 machine.ova", "check machine.ova"):
        outcome = ours(line.split(), tmp_path)
        assert (outcome.code, "The package has 2 disks" in outcome.err) == (0 if not long or "check" not in line else 2, True)
    assert ours(["convert", "-O", "qcow2", "machine.ova", "out"], tmp_path).code == 0
    (tmp_path / "raw").write_bytes(content(1))
    assert theirs(["compare", "-f", "raw", "raw", "out"], tmp_path).out == "Images are identical.\n"


def test_a_package_that_is_a_directory(tmp_path: Path, disks: dict[str, bytes]) -> None:
    for name, data in disks.items():
        (tmp_path / name).write_bytes(data)
    for policy in (None, OpenPolicy("same_directory")):
        for disk, number in (("0", 1), ("vmdisk2", 2)):
            with open_disk(tmp_path / "machine.ovf", disk, policy) as node:
                assert node.pread(0, node.size) == content(number)
    assert "file format: ovf" in ours(["info", "machine.ovf"], tmp_path).out
    for name in ("/etc/passwd", "../secret", "a/../../secret", "http://example.org/x.vmdk", "nbd:localhost", "nothing.vmdk"):
        text = envelope('<File ovf:id="f1" ovf:href="%s"/>' % name, '<Disk ovf:diskId="d" ovf:fileRef="f1"/>')
        (tmp_path / "machine.ovf").write_bytes(text)
        with pytest.raises(Error):
            open_disk(tmp_path / "machine.ovf")


def test_checksums(tmp_path: Path, disks: dict[str, bytes]) -> None:
    path = tmp_path / "machine.ova"
    package(path, disks)
    open_disk(path, "0", verify="on").close()
    assert ours(["check", "machine.ova"], tmp_path).code == 0
    for change, text in (
        ({NAMES[1]: disks[NAMES[1]][:-512] + b"x" * 512}, "SHA256 checksum of 'second disk.vmdk' is not that of the manifest"),
        ({"machine.mf": disks["machine.mf"].replace(b"first", b"third")}, "names 'third.vmdk', which is not there"),
        ({"machine.mf": disks["machine.mf"].replace(b"SHA256", b"MD4")}, "no checksum"),
    ):
        package(path, {**disks, **change})
        open_disk(path, "0").close()
        with pytest.raises(Error, match=text):
            open_disk(path, "0", verify="on")
        assert ours(["check", "machine.ova"], tmp_path).code == (2 if "no checksum" not in text else 1)


def test_checksums_of_a_directory(tmp_path: Path, disks: dict[str, bytes]) -> None:
    place = tmp_path / "package"
    place.mkdir()
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    (place / "link").symlink_to(outside)
    path = place / "machine.ovf"
    for name, data in disks.items():
        (place / name).write_bytes(data)

    def manifest(kind: str, *names: str) -> None:
        lines = ["%s(%s)= %s\n" % (kind, name, hashlib.new(kind.replace("-", ""), (place / name).read_bytes()).hexdigest()) for name in names]
        (place / "machine.mf").write_text("".join(lines))

    for kind in ("SHA1", "SHA256", "SHA512", "sha-256"):
        manifest(kind, "machine.ovf", *NAMES)
        for policy in (None, OpenPolicy("same_directory"), OpenPolicy("listed", [str(place)])):
            open_disk(path, "0", policy, verify="on").close()
        assert ours(["check", "machine.ovf"], place).code == 0
        assert ours(["info", "--image-opts", "driver=ovf,verify=on,disk=1,file.driver=raw,file.file.filename=machine.ovf"], place).err == ""
    assert '"manifest": true' in ours(["info", "--output=json", "machine.ovf"], place).out

    whole = (place / "machine.mf").read_bytes()
    for text, message, code in (
        (whole.replace(b"first", b"third"), "The manifest names 'third.vmdk', which is not there", 2),
        (whole[:-65] + b"0" * 64, "The SHA256 checksum of 'second disk.vmdk' is not that of the manifest", 2),
        (whole + whole, "has a file twice", 1),
        (whole.replace(b"sha-256", b"MD4"), "no checksum", 1),
        (b"x" * (1 << 20) + whole, "larger than", 1),
        *(
            (b"SHA256(%s)= 00" % name, "is not in the directory", 1)
            for name in (b"../outside", str(outside).encode(), b"link", b"a/../../outside", b"", b"a\0b")
        ),
    ):
        (place / "machine.mf").write_bytes(text)
        open_disk(path, "0").close()
        with pytest.raises(Error, match=message):
            open_disk(path, "0", verify="on")
        outcome = ours(["check", "machine.ovf"], place)
        assert (outcome.code, message in outcome.out + outcome.err) == (code, True), outcome
    (place / "machine.mf").write_bytes(whole)
    with pytest.raises(Denied):  # the policy is asked too
        open_disk(path, "0", OpenPolicy("listed", [str(place / NAMES[0])]), verify="on")
    (place / "machine.mf").unlink()
    assert "no manifest" in ours(["info", "--image-opts", "driver=ovf,verify=on,disk=1,file.filename=machine.ovf"], place).err


def test_disks_that_cannot_be_read_in_place(tmp_path: Path, disks: dict[str, bytes]) -> None:
    path = tmp_path / "machine.ova"
    for file, disk, text in (
        ('ovf:compression="gzip"', "", "compressed \\(gzip\\)"),
        ('ovf:chunkSize="5"', "", "chunks"),
        ("", 'ovf:parentRef="other"', "overlay of the disk 'other'"),
    ):
        files = '<File ovf:id="f1" ovf:href="first.vmdk" %s/>' % file
        package(path, {**disks, "machine.ovf": envelope(files, '<Disk ovf:diskId="d" ovf:fileRef="f1" %s/>' % disk)})
        with pytest.raises(Error, match=text):
            open_disk(path)
    for disk, text in (('<Disk ovf:diskId="d"/>', "has no file"), ('<Disk ovf:diskId="d" ovf:fileRef="zz"/>', "no file 'zz'"), ("<x/>", "no disk")):
        package(path, {**disks, "machine.ovf": envelope("<x/>", disk)})
        with pytest.raises(Error, match=text):
            open_disk(path)
    package(path, disks)
    with pytest.raises(Error, match="no disk '7'; it has 0 \\(first.vmdk\\), 1 \\(second disk.vmdk\\)"):
        open_disk(path, "7")
    assert "can only be read" in ours(["resize", "-f", "ova", "machine.ova", "+1M"], tmp_path).err
    assert ours(["create", "-f", "ova", "new", "1M"], tmp_path).err == "qemu-img: new: Format driver 'ova' does not support image creation\n"


def test_a_disk_names_nothing_outside_of_the_package(tmp_path: Path, disks: dict[str, bytes]) -> None:
    (tmp_path / "secret").write_bytes(bytes(M))
    path = tmp_path / "machine.ova"
    for text in (
        descriptor('RW 2048 FLAT "%s" 0' % (tmp_path / "secret"), "monolithicFlat"),
        descriptor('RW 2048 FLAT "secret" 0', "monolithicFlat"),
    ):
        package(path, {**disks, NAMES[0]: text.encode()})
        with pytest.raises(Denied):
            open_disk(path, "0")


def test_packages_that_mean_harm(tmp_path: Path, disks: dict[str, bytes]) -> None:
    path = tmp_path / "machine.ova"
    entities = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">%s]>\n' % "".join('<!ENTITY %s "%s">' % (chr(98 + i), "&%s;" % chr(97 + i) * 10) for i in range(9))
    envelopes = (
        envelope(head=entities),
        envelope(head='<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>\n'),
        envelope(files="<x>" * 100000),
        envelope(files="".join('<File ovf:id="%d" ovf:href="x"/>' % number for number in range(5000))),
        b"<?xml version='1.0' encoding='none-such'?><Envelope/>",
        b"<?xml version='1.0'?><!--" + b"x" * (5 << 20) + b"-->",
        b"",
        b"\0" * 1000,
        envelope(disks='<Disk ovf:diskId="d" ovf:fileRef="f1" ovf:capacity="9" ovf:capacityAllocationUnits="byte * 2^99999999999"/>'),
    )
    with little_memory():
        for text in envelopes:
            package(path, {**disks, "machine.ovf": text})
            attempt(path, "ova")
            (tmp_path / "machine.ovf").write_bytes(text)
            attempt(tmp_path / "machine.ovf", "ovf")
        package(path, {"machine.ovf": envelope(), **{"%d" % number: b"" for number in range(1100)}})
        assert attempt(path, "ova")
        package(path, disks, tarfile.PAX_FORMAT)
        whole = path.read_bytes()
        for offset in (0, 99, 124, 130, 135, 148, 156, 257, 345, 1024 + 124):
            for byte in (0, 0x20, 0x39, 0x80, 0xFF):
                attempt(path, "ova", whole[:offset] + bytes((byte,)) + whole[offset + 1 :])
        for length in (*range(0, 4096, 171), *range(4096, len(whole), 65537)):
            attempt(path, "ova", whole[:length])


def test_what_is_taken_for_a_package(tmp_path: Path, disks: dict[str, bytes]) -> None:
    for members, expected in ((disks, "ova"), ({"./machine.ovf": envelope()}, "ova"), ({NAMES[0]: disks[NAMES[0]], **disks}, "raw"), ({"a": b"b"}, "raw")):
        package(tmp_path / "image", dict(members))
        with Graph().open(str(tmp_path / "image"), "file") as file:
            from diskwright.probe import probe

            assert probe(file, "image") == expected
    (tmp_path / "image").write_text("<?xml version='1.0'?><svg/>")
    assert "file format: raw" in ours(["info", "image"], tmp_path).out
