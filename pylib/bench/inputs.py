# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The images that the benchmarks work on.

data        2 GiB, half of it used: an ext4 file system with files of /usr in it, an eighth of them random bytes
full        the same bytes without holes
sparse100g  100 GiB with 2000 pieces of 100 KiB
meta100g    qcow2 of 100 GiB with preallocated metadata (1 638 400 clusters)
512m        512 MiB, made as data is; raw, and in luks
"""

from __future__ import annotations

import base64
import os
import random
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

MIB = 1 << 20
RANDOM = 0.12  # of the data cannot be compressed


def make(name: str, folder: Path, size_mib: int) -> Path:
    """The input `name` in `folder`, made if it is not there yet; `size_mib` is the virtual size of data and full."""
    path = folder / (name if name in ("sparse100g", "meta100g.qcow2", "512m.raw", "512m.luks") else "%d-%s" % (size_mib, name))
    if path.exists():
        return path
    draft = path.with_name(path.name + ".part")
    if name == "data.raw":
        _make_data(draft, size_mib)
    elif name == "full.raw":
        with open(make("data.raw", folder, size_mib), "rb") as source, open(draft, "wb") as target:
            shutil.copyfileobj(source, target, MIB)
    elif name == "sparse100g":
        _make_sparse(draft)
    elif name == "meta100g.qcow2":
        _qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(draft), "100G")
    elif name == "512m.raw":
        _make_data(draft, 512)
    elif name == "stream.vmdk":
        source = make("data.raw", folder, size_mib)
        _qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", str(source), str(draft))
    elif name == "data.cloop":
        _make_cloop(make("data.raw", folder, size_mib), draft)
    elif name == "data.dmg":
        _make_dmg(make("data.raw", folder, size_mib), draft)
    elif name == "512m.luks":
        secret = ("--object", "secret,id=s,data=bench")
        source = make("512m.raw", folder, size_mib)
        _qemu_img("convert", *secret, "-f", "raw", "-O", "luks", "-o", "key-secret=s,iter-time=100", str(source), str(draft))
    else:
        source = make("data.raw", folder, size_mib)
        options = {"data.qcow2": (), "zlib.qcow2": ("-c", "-m", "16", "-W"), "zstd.qcow2": ("-c", "-o", "compression_type=zstd", "-m", "16", "-W")}[name]
        _qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, str(source), str(draft))
    os.rename(draft, path)
    return path


def _qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True)


def _make_cloop(source: Path, path: Path) -> None:
    """A cloop image with blocks of 64 KiB."""
    size = 64 << 10
    blocks = source.stat().st_size // size
    offsets = [136 + (blocks + 1) * 8]
    preamble = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
    with open(source, "rb") as raw, open(path, "wb") as cloop:
        cloop.seek(offsets[0])
        for _block in range(blocks):
            cloop.write(zlib.compress(raw.read(size), 6))
            offsets.append(cloop.tell())
        cloop.seek(0)
        cloop.write(preamble.ljust(128, b"\0") + struct.pack(">2I%dQ" % len(offsets), size, blocks, *offsets))


def _make_dmg(source: Path, path: Path) -> None:
    """A dmg image as hdiutil makes them: chunks of 256 KiB by zlib, no chunks for zeroes, one property list."""
    size, sectors = 256 << 10, os.path.getsize(source) // 512
    entries = []
    with open(source, "rb") as raw, open(path, "wb") as dmg:
        for first in range(0, sectors, size // 512):
            data = raw.read(size)
            place = dmg.tell()
            if data.strip(b"\0"):
                dmg.write(zlib.compress(data, 6))
            kind = 0x80000005 if dmg.tell() > place else 0
            entries.append(struct.pack(">IIQQQQ", kind, 0, first, len(data) // 512, place, dmg.tell() - place))
        place = dmg.tell()
        table = b"mish" + struct.pack(">IQQ", 1, 0, sectors) + bytes(176) + struct.pack(">I", len(entries)) + b"".join(entries)
        dmg.write(b"<plist><dict><data>" + base64.encodebytes(table) + b"</data></dict></plist>")
        trailer = struct.pack(">4sIII", b"koly", 4, 512, 1) + bytes(200) + struct.pack(">QQ", place, dmg.tell() - place)
        dmg.write(trailer + bytes(260) + struct.pack(">Q", sectors) + bytes(12))


def _make_data(path: Path, size_mib: int) -> None:
    """An ext4 file system whose files fill half of it. No root rights are needed: mke2fs copies a directory."""
    wanted = size_mib * MIB // 2
    rng = random.Random(2)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="staging.") as staging:
        taken = 0
        copy = 0
        noise = int(wanted * RANDOM)
        while taken < wanted - noise:
            before = taken
            for folder, names, files in os.walk("/usr"):
                names.sort()
                for name in sorted(files):
                    source = os.path.join(folder, name)
                    if taken >= wanted - noise or os.path.islink(source) or not os.path.isfile(source):
                        continue
                    target = os.path.join(staging, str(copy), os.path.relpath(folder, "/"))
                    os.makedirs(target, exist_ok=True)
                    try:
                        shutil.copyfile(source, os.path.join(target, name))
                    except OSError:
                        continue
                    taken += -(-os.path.getsize(source) // 4096) * 4096
            copy += 1
            if taken == before:
                raise SystemExit("there are no files in /usr to fill a file system with")
        with open(os.path.join(staging, "noise"), "wb") as file:
            for _number in range(noise // MIB):
                file.write(rng.randbytes(MIB))
        with open(path, "wb") as file:
            file.truncate(size_mib * MIB)
        mke2fs = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if mke2fs is None:
            raise SystemExit("mke2fs is missing: install e2fsprogs")
        subprocess.run([mke2fs, "-q", "-F", "-t", "ext4", "-m", "0", "-d", staging, str(path)], check=True)


def _make_sparse(path: Path) -> None:
    rng = random.Random(3)
    size = 100 << 30
    with open(path, "wb") as file:
        file.truncate(size)
        for number in range(2000):
            os.pwrite(file.fileno(), rng.randbytes(100 << 10), size // 2000 * number // 4096 * 4096)
