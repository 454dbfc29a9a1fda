# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Mutated qcow2 images: nothing but Error and OSError leaves the library, in bounded time and memory, and it reads what qemu-img reads.

    python fuzz.py [--count N] [--seed N] [--differ N] [--case SEED] [--directory DIR]

runs N cases from a seed on; every N-th is compared with qemu-img too. --case repeats one of them and says what was mutated.
tests/test_hostile_fuzz.py runs a small number of them.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import diskwright
from diskwright.graph import open_image
from diskwright.json_text import dumps
from diskwright.node import OpenFlags
from qcow2_damage import COMPRESSED, COPIED, OFFSET, Editor, make, run

SECONDS = 10  # of the processor, for one case
MEMORY = 64 << 20  # bytes that one case may add to the peak
READ_MOST = 4 << 20  # bytes read of one image

# (variant of qcow2_damage, snapshots, bitmaps)
BASES = {
    "v3": ("v3", True, False),
    "v2": ("v2", True, False),
    "c512": ("c512", True, False),
    "c4k": ("c4k", False, False),
    "bitmaps": ("c4k", False, True),
    "r1": ("r1", False, False),
    "r64": ("r64", True, False),
    "ext": ("ext", True, False),
    "meta": ("meta", False, False),
    "lazy": ("lazy", False, False),
}

# Fields of the header: (offset, bytes).
FIELDS = [(0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)]
FIELDS_V3 = [*FIELDS, (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1), (105, 7)]


class Hang(BaseException):
    """A case takes too long."""


class Base:
    """An image to mutate, and where its metadata is."""

    def __init__(self, name: str, directory: Path) -> None:
        self.path = directory / ("base-%s.qcow2" % name)
        variant, snapshots, bitmaps = BASES[name]
        make(str(self.path), variant, snapshots, bitmaps)
        if name == "c4k":
            run("qemu-img", "create", "-q", "-f", "raw", str(directory / "backing.raw"), "300k")
            run("qemu-io", "-f", "raw", "-c", "write -P 77 0 300k", str(directory / "backing.raw"))
            run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "backing.raw", str(self.path))
        self.data = self.path.read_bytes()
        image = Editor(str(self.path))
        self.cluster = image.cluster
        self.fields = FIELDS if image.version == 2 else FIELDS_V3
        self.tables = [(image.l1_offset, image.l1_size * 8), (image.reftable, min(64, image.reftable_clusters * image.cluster))]
        self.tables += [(entry & OFFSET, image.cluster) for _at, entry in image.l1()]
        self.tables += [(offset, image.cluster) for _index, offset in image.refblocks()]
        if image.snapshots:
            self.tables.append((image.snapshots_offset, 200))
            table, size = image.snapshot_l1()
            self.tables += [(table, size * 8)] + [(entry & OFFSET, image.cluster) for _at, entry in image.l1(table, size)]
        if bitmaps:
            directory_at = image.bitmap_directory
            self.tables += [(directory_at, 100), (image.bitmaps, 24), (image.u64(directory_at), 64)]
        start = 72 if image.version == 2 else 112
        self.tables.append((start, 400))  # the extensions
        # places where something is: the entries of all tables that are not zero
        self.entries = [
            at for offset, length in self.tables for at in range(offset, min(offset + length, len(self.data) - 7), 8) if any(self.data[at : at + 8])
        ]
        self.boundaries = sorted({offset + size for offset, size in self.fields} | {end for offset, length in self.tables for end in (offset, offset + length)})


def number(chance: random.Random, width: int, base: Base) -> int:
    """A value for a field of `width` bytes that somebody might not have thought of."""
    top = (1 << 8 * width) - 1
    value = chance.choice((0, 1, 2, top, top - 1, top >> 1, (top >> 1) + 1, chance.randrange(top + 1), 1 << chance.randrange(8 * width), chance.randrange(256)))
    if width == 8 and chance.random() < 0.6:
        offset = chance.choice(base.tables)[0] if chance.random() < 0.5 else chance.randrange(len(base.data) * 2)
        value = offset & ~(base.cluster - 1) if chance.random() < 0.8 else offset
        value |= chance.choice((0, 0, COPIED, COPIED, COMPRESSED, COMPRESSED | chance.randrange(1 << 62), 1, 1 << 55, 1 << 56, 0x1FF))
    return value & top


def mutate(base: Base, chance: random.Random) -> tuple[bytes, list[str]]:
    """A damaged copy of an image, and what was done to it."""
    data = bytearray(base.data)
    done = []
    for _time in range(chance.choice((1, 1, 1, 2, 3, 6))):
        kind = chance.randrange(8)
        if kind < 2:
            offset, width = chance.choice(base.fields)
            old = int.from_bytes(data[offset : offset + width], "big")
            value = chance.choice((number(chance, width, base), old ^ 1 << chance.randrange(8 * width), (old + 1) % (1 << 8 * width), old - 1 if old else 0))
            data[offset : offset + width] = value.to_bytes(width, "big")
            done.append("field at %d of %d bytes: %#x -> %#x" % (offset, width, old, value))
        elif kind < 6:
            offset, length = chance.choice(base.tables)
            at = chance.choice(base.entries) if chance.random() < 0.6 else offset + chance.randrange(max(1, length // 8)) * 8
            if at + 8 > len(data):
                continue
            old = int.from_bytes(data[at : at + 8], "big")
            if chance.random() < 0.3:
                value = old ^ 1 << chance.randrange(64)
            else:
                value = number(chance, 8, base)
            struct.pack_into(">Q", data, at, value)
            done.append("entry at %#x: %#x -> %#x" % (at, old, value))
        elif kind == 6:
            offset, length = chance.choice(base.tables)
            at = offset + chance.randrange(max(1, length))
            if at < len(data):
                data[at] = chance.randrange(256)
                done.append("byte at %#x: %#x" % (at, data[at]))
        elif chance.random() < 0.5:
            end = chance.choice(base.boundaries) + chance.choice((0, 0, -1, 1))
            end = max(0, end if chance.random() < 0.5 else chance.randrange(len(data) + 1))
            if end < len(data):
                del data[end:]
                data.extend(bytes(0))
                done.append("cut at %#x" % end)
                if end < 120:
                    break
    return bytes(data), done


def windows(size: int) -> list[tuple[int, int]]:
    """(offset, length) that cover a small disk, and the ends of a large one."""
    step = 256 << 10
    if size <= READ_MOST:
        return [(offset, min(step, size - offset)) for offset in range(0, size, step)]
    places = [0, step, size // 2, size - step, (1 << 32) - step, 1 << 40]
    return [(offset, step) for offset in places if offset + step <= size]


def look(path: Path) -> None:
    """Everything that reads."""
    with diskwright.open(path, format="qcow2") as node:
        node.snapshots()
        node.format_specific()
        node.disk_size()
        for offset, length in windows(node.size):
            for call in (node.pread, node.block_status, node.resolve):
                try:
                    call(offset, length)
                except (diskwright.Error, OSError):
                    pass
        node.resolve(0, node.size, want_zero=True, limit=1000)
    diskwright.info(str(path), backing_chain=True)


def change(path: Path, chance: random.Random) -> None:
    """Everything that writes."""
    with diskwright.open(path, "r+", format="qcow2") as node:
        for _time in range(6):
            if not node.size:
                return
            offset = chance.randrange(min(node.size, 8 << 20))
            length = chance.randrange(1, 1 + min(node.size - offset, chance.choice((512, 5000, 200000))))
            try:
                kind = chance.randrange(5)
                if kind < 3:
                    node.pwrite(offset, bytes((chance.randrange(256),)) * length)
                elif kind == 3:
                    node.pwrite_zeroes(offset, length, unmap=chance.random() < 0.5)
                else:
                    node.pdiscard(offset, length)
            except (diskwright.Error, OSError):
                pass
        if chance.random() < 0.3:
            node.truncate(max(0, min(node.size, 1 << 30) + chance.choice((-70000, 512, 100000, 5 << 20))) & ~511)


def examine(path: Path, repair: str) -> int:
    """Check; the exit code that qemu-img has for it."""
    flags = OpenFlags(writable=bool(repair), resize=bool(repair), check=True)
    with open_image(str(path), "qcow2", flags) as node:
        result = node.check(repair)
        if result.failure is not None:
            raise result.failure
        if result.check_errors:
            return 1
        return 2 if result.corruptions else 3 if result.leaks else 0


def attempt(call: object, *args: object) -> object:
    """What a call returns, or the Error or OSError that it raises; everything else leaves."""
    try:
        return call(*args)  # type: ignore[operator]
    except (diskwright.Error, OSError) as exc:
        return exc


def alarm(_number: int, _frame: object) -> None:
    raise Hang("more than %d seconds" % SECONDS)


class Fuzzer:
    """Runs cases by number; each depends on its number alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bases = [Base(name, directory) for name in BASES]
        self.path = directory / "case.qcow2"
        self.copy = directory / "copy.qcow2"
        self.single = True  # whether the image has one damage: with more, which one is told of is a matter of taste

    def mutated(self, seed: int) -> tuple[list[str], random.Random]:
        """Write the image of a case; what was mutated, and the chance for what is done with it."""
        chance = random.Random(seed)
        base = chance.choice(self.bases)
        data, done = mutate(base, chance)
        self.path.write_bytes(data)
        self.single = len(done) == 1
        return [base.path.name, *done], chance

    def case(self, seed: int, differ: bool = False) -> list[str]:
        """Run a case; what is wrong, empty where nothing is."""
        done, chance = self.mutated(seed)
        if not done[1:]:
            return []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        found: list[str] = []
        signal.signal(signal.SIGVTALRM, alarm)
        for what in (self._look, self._check, self._repair, self._change):
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                what(chance)
            except (Exception, Hang):
                found.append(traceback.format_exc())
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        if more > MEMORY:
            found.append("memory: %d MiB more" % (more >> 20))
        if differ and not found:
            found += self.differences()
        return ["case %d (%s): %s" % (seed, "; ".join(done), text) for text in found]

    def _look(self, _chance: random.Random) -> None:
        before = self.path.read_bytes()
        attempt(look, self.path)
        if self.path.read_bytes() != before:
            raise RuntimeError("reading changed the image")

    def _check(self, _chance: random.Random) -> None:
        attempt(examine, self.path, "")

    def _repair(self, chance: random.Random) -> None:
        shutil.copyfile(self.path, self.copy)
        attempt(examine, self.copy, chance.choice(("all", "all", "leaks")))
        attempt(examine, self.copy, "")

    def _change(self, chance: random.Random) -> None:
        shutil.copyfile(self.path, self.copy)
        attempt(change, self.copy, chance)
        attempt(look, self.copy)

    def differences(self) -> list[str]:
        """Where qemu-img has another outcome: in what it reads, and in its exit codes of info and check."""
        found = []
        ours = attempt(info, self.path)
        theirs = oracle("info", "-f", "qcow2", "--output=json", self.path)
        if isinstance(ours, Exception) != bool(theirs[0]):
            found.append("info: %s, but qemu-img %s" % (ours if isinstance(ours, Exception) else "opens it", theirs))
        elif isinstance(ours, Exception):
            if "qemu-img: %s\n%s" % (ours, hint(ours)) != theirs[1] and self.single:
                found.append("info says %r, qemu-img %r" % (str(ours), theirs[1]))
        elif ours != theirs[2]:
            found.append("info: %s, but qemu-img %s" % (ours, theirs[2]))
        code = attempt(examine, self.path, "")
        theirs = oracle("check", "-f", "qcow2", self.path)
        if theirs[0] != (1 if isinstance(code, Exception) else code) and theirs[0] >= 0 and "in use too often" not in str(code):
            found.append("check: %s, but qemu-img %s" % (code, theirs[:2]))
        size = attempt(virtual_size, self.path)
        if isinstance(size, int) and 0 < size <= 16 << 20:
            found += self._content()
        return found

    def _content(self) -> list[str]:
        target = self.directory / "case.raw"
        ours = attempt(content, self.path)
        theirs = oracle("convert", "-f", "qcow2", "-O", "raw", self.path, target)
        if theirs[0] < 0:
            return []
        if isinstance(ours, Exception) != bool(theirs[0]):
            return ["convert: %s, but qemu-img %s" % (ours if isinstance(ours, Exception) else "reads it", theirs)]
        if not isinstance(ours, Exception) and target.read_bytes() != ours:
            return ["the content is not what qemu-img reads"]
        return []


def info(path: Path) -> str:
    return dumps(diskwright.info(str(path), format="qcow2")[0].as_dict(), 0) + "\n"


def hint(error: Exception) -> str:
    text = getattr(error, "hint", None)
    return "%s\n" % text if text else ""


def virtual_size(path: Path) -> int:
    with diskwright.open(path, format="qcow2") as node:
        return node.size


def content(path: Path) -> bytes:
    with diskwright.open(path, format="qcow2") as node:
        return node.pread(0, node.size)


def oracle(*args: object) -> tuple[int, str, str]:
    """Exit code, messages and output of qemu-img; code -1 where it does not end in time."""
    try:
        done = subprocess.run(["qemu-img", *map(str, args)], capture_output=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return -1, "", ""
    return done.returncode, done.stderr.decode("utf-8", "replace"), done.stdout.decode("utf-8", "replace")


def main() -> int:
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--differ", type=int, default=0, metavar="N", help="compare every N-th case with qemu-img")
    parser.add_argument("--case", type=int, help="repeat one case, and keep its image")
    parser.add_argument("--directory", type=Path)
    given = parser.parse_args()
    directory = given.directory or Path(tempfile.mkdtemp(prefix="fuzz-"))
    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    fuzzer = Fuzzer(directory)
    if given.case is not None:
        print("\n".join(fuzzer.case(given.case, bool(given.differ)) or ["nothing"]), "\n", fuzzer.mutated(given.case)[0])
        print(fuzzer.path)
        return 0
    failures = 0
    for seed in range(given.seed, given.seed + given.count):
        found = fuzzer.case(seed, bool(given.differ) and seed % given.differ == 0)
        failures += len(found)
        for text in found:
            print(text, flush=True)
    print("%d cases, %d findings" % (given.count, failures))
    if given.directory is None:
        shutil.rmtree(directory)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
