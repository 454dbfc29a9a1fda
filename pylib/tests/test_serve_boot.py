# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A virtual machine (qemu-system-x86_64, without hardware's help) boots from our export, reads a sector of it and writes one.

Its operating system is a boot sector: https://wiki.osdev.org/MBR_(x86), and the BIOS calls of
https://en.wikipedia.org/wiki/INT_13H (extended read and write, 42h and 43h).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from serving import PATIENCE, command, run

SECTOR = 512
BUFFER = 0x8000  # where the guest has the sector that it reads, and writes back
GREETING = b"Hello from sector 1"
ANSWER = b"The guest was here."


def boot_sector() -> bytes:
    """Reads sector 1, prints it to the port E9h, writes ANSWER to sector 2, prints OK (or E), and switches the machine off."""
    code = bytearray()
    labels: dict[str, int] = {}
    fixes: list[tuple[int, str, int]] = []

    def emit(text: str) -> None:
        code.extend(bytes.fromhex(text))

    def to(label: str, size: int, relative: bool) -> None:
        """A place that is filled in once it is known where `label` is."""
        fixes.append((len(code), label, size if relative else -size))
        code.extend(bytes(size))

    emit("31 c0")  # xor ax, ax
    emit("8e d8 8e c0 8e d0")  # mov ds, ax; mov es, ax; mov ss, ax
    emit("bc 00 7c")  # mov sp, 0x7c00; dl is the BIOS's number of the disk, all the way
    emit("be")  # mov si, packet: where int 13h finds what to read
    to("packet", 2, False)
    emit("b4 42 cd 13")  # mov ah, 0x42; int 0x13: read sector 1
    emit("0f 82")  # jc failed
    to("failed", 2, True)
    emit("be 00 80")  # mov si, BUFFER
    labels["print"] = len(code)
    emit("ac 84 c0 74 04 e6 e9 eb f7")  # lodsb; test al, al; jz +4; out 0xe9, al; jmp print
    emit("be")  # mov si, answer
    to("answer", 2, False)
    emit("bf 00 80")  # mov di, BUFFER
    emit("b9 14 00 f3 a4")  # mov cx, 20; rep movsb
    emit("be")  # mov si, packet
    to("packet", 2, False)
    emit("c6 44 08 02")  # mov byte [si + 8], 2: the number of the sector
    emit("b8 00 43 cd 13")  # mov ax, 0x4300; int 0x13: write sector 2, without verifying
    emit("0f 82")  # jc failed
    to("failed", 2, True)
    emit("b0 4f e6 e9 b0 4b e6 e9")  # mov al, 'O'; out 0xe9, al; mov al, 'K'; out 0xe9, al
    labels["end"] = len(code)
    emit("b0 00 ba 01 05 ee")  # mov al, 0; mov dx, 0x501; out dx, al: isa-debug-exit, which ends QEMU with the code 1
    emit("f4 eb fd")  # hlt; jmp back to it
    labels["failed"] = len(code)
    emit("b0 45 e6 e9")  # mov al, 'E'; out 0xe9, al
    emit("eb")  # jmp end
    to("end", 1, True)
    labels["packet"] = len(code)
    emit("10 00 01 00")  # 16 bytes; one sector
    emit("00 80 00 00")  # to and from BUFFER (offset, segment)
    emit("01 00 00 00 00 00 00 00")  # sector 1
    labels["answer"] = len(code)
    code.extend(ANSWER + b"\0")
    for at, label, size in fixes:
        value = labels[label] - (at + size) if size > 0 else labels[label] + 0x7C00
        code[at : at + abs(size)] = (value % (1 << 8 * abs(size))).to_bytes(abs(size), "little")
    assert len(code) <= 510
    return bytes(code) + bytes(510 - len(code)) + b"\x55\xaa"


def test_a_guest_boots_reads_and_writes(tmp_path: Path) -> None:
    disk = bytearray(1 << 20)
    disk[:SECTOR] = boot_sector()
    disk[SECTOR : SECTOR + len(GREETING)] = GREETING
    (tmp_path / "disk.raw").write_bytes(disk)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(tmp_path / "disk.raw"), str(tmp_path / "disk.qcow2"))
    words = ["-machine", "pc,accel=tcg", "-m", "16", "-nodefaults", "-display", "none", "-no-reboot"]
    words += ["-device", "isa-debug-exit,iobase=0x501,iosize=1", "-debugcon", "file:%s" % (tmp_path / "console")]
    with command("-k", str(tmp_path / "s.sock"), "-x", "boot", "disk.qcow2", place=tmp_path) as (_process, uris):
        words += ["-blockdev", "driver=nbd,node-name=disk,export=boot,server.type=unix,server.path=%s/s.sock" % tmp_path]
        words += ["-device", "virtio-blk-pci,drive=disk,bootindex=1"]
        assert uris == ["nbd+unix:///boot?socket=%s/s.sock" % tmp_path]
        done = subprocess.run(["qemu-system-x86_64", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE * 3, check=False)
        assert done.returncode == 1, done.stderr.decode()
    said = (tmp_path / "console").read_bytes()
    assert said.endswith(GREETING + b"OK"), said
    disk[2 * SECTOR : 2 * SECTOR + len(ANSWER)] = ANSWER
    disk[2 * SECTOR + len(ANSWER) : 3 * SECTOR] = bytes(SECTOR - len(ANSWER))
    run("qemu-img", "convert", "-O", "raw", str(tmp_path / "disk.qcow2"), str(tmp_path / "after.raw"))
    assert (tmp_path / "after.raw").read_bytes() == disk
