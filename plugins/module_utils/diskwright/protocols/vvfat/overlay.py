# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What is written to the disk, and how it gets into the directory: at each flush the file system is read again, and if it makes sense, files
and directories are made, replaced and removed accordingly (Microsoft's FAT32 File System Specification, version 1.03)."""

from __future__ import annotations

import errno
import os
import stat

from ...errors import Corrupt
from ...node import CHUNK
from .layout import MAX_DEPTH, MAX_DIRECTORY, MAX_ITEMS, SECTOR, Item
from .names import DELETED, DIRECTORY, ENTRY, LONG, LONG_MASK, VOLUME, DirectoryEntry, unpack_long

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Optional

    from . import Vvfat

SAME = slice(11, 36)  # of the boot sector: sizes, which must stay as they are


class Overlay:
    """The sectors that were written, in a temporary file, and the tree that the directory holds."""

    def __init__(self, disk: Vvfat) -> None:
        import tempfile

        self._disk = disk
        self._store = tempfile.TemporaryFile()  # noqa: SIM115 (closed by forget)
        sectors = disk.layout.geometry.total
        os.ftruncate(self._store.fileno(), sectors * SECTOR)
        self._written = bytearray(sectors)
        self._fresh = bytearray(sectors)  # written since the directory was last brought up to date
        self._tree = disk.layout.tree
        first = {item.path: list(range(item.first, item.first + item.count)) for item in _items(self._tree)}
        self._chains: dict[str, list[int]] = first

    def forget(self) -> None:
        """Give the temporary file up."""
        self._store.close()

    # -- sectors -------------------------------------------------------------------------------------------------

    def read(self, offset: int, view: memoryview) -> None:
        """A range of the disk as the guest sees it."""
        disk = self._disk
        with disk._lock:
            disk.read_host(offset, view)
            end = offset + len(view)
            for low, high in _runs(self._written, offset // SECTOR, -(-end // SECTOR)):
                start, stop = max(offset, low * SECTOR), min(end, high * SECTOR)
                os.preadv(self._store.fileno(), [view[start - offset : stop - offset]], start)

    def write(self, offset: int, view: memoryview) -> None:
        """Keep what is written."""
        first, last = offset // SECTOR, -(-(offset + len(view)) // SECTOR)
        with self._disk._lock:
            if offset % SECTOR or len(view) % SECTOR:
                whole = memoryview(bytearray((last - first) * SECTOR))
                self.read(first * SECTOR, whole)
                whole[offset - first * SECTOR : offset - first * SECTOR + len(view)] = view
                view = whole
            done = 0
            while done < len(view):
                done += os.pwrite(self._store.fileno(), view[done:], first * SECTOR + done)
            self._written[first:last] = self._fresh[first:last] = b"\1" * (last - first)

    def zero(self, offset: int, length: int) -> None:
        """Make whole sectors zero; those that were never written take no room for it."""
        first, last = offset // SECTOR, (offset + length) // SECTOR
        with self._disk._lock:
            for low, high in _runs(self._written, first, last):
                for start in range(low * SECTOR, high * SECTOR, CHUNK):
                    os.pwrite(self._store.fileno(), bytes(min(CHUNK, high * SECTOR - start)), start)
            self._written[first:last] = self._fresh[first:last] = b"\1" * (last - first)

    def _bytes(self, offset: int, length: int) -> bytes:
        found = bytearray(length)
        self.read(offset, memoryview(found))
        return bytes(found)

    # -- bringing the directory up to date -----------------------------------------------------------------------

    def flush(self) -> None:
        """Bring the directory up to date, unless the file system makes no sense for now: guests write it piece by piece."""
        try:
            self.finish()
        except Corrupt:
            pass

    def finish(self) -> None:
        """Bring the directory up to date. Raises Corrupt if what was written makes no sense, Error, OSError; the directory is as it was then,
        unless the host fails half-way."""
        if 1 not in self._fresh:
            return
        with self._disk._lock:
            tree, chains = Parser(self).parse()
            self._apply(tree, chains)

    def refusal(self, why: str) -> Corrupt:
        directory = self._tree.path
        text = "vvfat: what was written is not brought into the directory %s: %s" % (directory, why)
        return Corrupt(text, filename=self._disk.filename, errno=errno.EIO)

    def _apply(self, tree: Item, chains: dict[str, list[int]]) -> None:
        old = {item.path: item for item in _items(self._tree)}
        new = {item.path: item for item in _items(tree)}
        for path, item in new.items():
            before = old.get(path)
            if before is None and os.path.lexists(path):
                raise self.refusal("somebody else made %s" % path)
            if before is not None and (before.children is None) != (item.children is None) and os.path.islink(path):
                raise self.refusal("%s is a link" % path)
        changed = [item for path, item in new.items() if item.children is None and not self._is_same(item, old.get(path), chains[path])]
        made: list[tuple[str, Item]] = []
        try:
            for item in changed:
                made.append((self._write_file(item, chains[item.path], old.get(item.path), len(made)), item))
        except BaseException:
            for name, _item in made:
                os.unlink(name)
            raise
        gone = [item for path, item in old.items() if path not in new or (new[path].children is None) != (item.children is None)]
        for item in sorted(gone, key=lambda item: item.path, reverse=True):  # what is inside a directory comes before it
            if item.children is None:
                os.unlink(item.path)
            else:
                os.rmdir(item.path)
        for path, item in new.items():  # directories come before what is in them
            if item.children is not None and not os.path.isdir(path):
                os.mkdir(path)
        for name, item in made:
            os.replace(name, item.path)
        self._tree, self._chains = tree, chains
        self._fresh = bytearray(len(self._fresh))
        self._disk.set_regions(self._regions(tree, chains))

    def _is_same(self, item: Item, before: Optional[Item], chain: list[int]) -> bool:
        """Whether a file needs not be written: it lies where it lay, and nothing of it was written; or it has the same content all the same."""
        if before is None or before.children is not None or before.size != item.size:
            return False
        if self._chains[item.path] == chain and not any(self._is_fresh(cluster) for cluster in chain):
            return True
        with open(before.path, "rb") as stream:
            for _offset, length, place in self._pieces(chain, item.size):
                if stream.read(length) != self._bytes(place, length):
                    return False
        return True

    def _is_fresh(self, cluster: int) -> bool:
        geometry = self._disk.layout.geometry
        first = geometry.place(cluster) // SECTOR
        return self._fresh.find(1, first, first + geometry.cluster) >= 0

    def _write_file(self, item: Item, chain: list[int], before: Optional[Item], number: int) -> str:
        """Write the content of a file under a name that it does not keep."""
        name = os.path.join(self._tree.path, ".vvfat-%d-%d" % (os.getpid(), number))
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if before is not None and before.children is None:
                os.fchmod(descriptor, stat.S_IMODE(os.stat(before.path).st_mode))
            for offset, length, place in self._pieces(chain, item.size):
                data = memoryview(self._bytes(place, length))
                done = 0
                while done < length:
                    done += os.pwrite(descriptor, data[done:], offset + done)
            os.fsync(descriptor)
        except BaseException:
            os.unlink(name)
            raise
        finally:
            os.close(descriptor)
        return name

    def _pieces(self, chain: list[int], size: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the file, length, place on the disk) of parts of a file that lie in a row."""
        geometry = self._disk.layout.geometry
        unit = geometry.cluster_size
        most = max(1, CHUNK // unit)
        at = 0
        while at < len(chain) and at * unit < size:
            stop = at + 1
            while stop < len(chain) and stop - at < most and chain[stop] == chain[stop - 1] + 1:
                stop += 1
            yield at * unit, min(stop * unit, size) - at * unit, geometry.place(chain[at])
            at = stop

    def _regions(self, tree: Item, chains: dict[str, list[int]]) -> list[tuple[int, int, bytes | Item, int]]:
        """What the disk is made of now: the tables as they were, under what was written, and the files where they are."""
        regions = [region for region in self._disk.layout.regions if isinstance(region[2], bytes)]
        for item in _items(tree):
            if item.children is None:
                regions += [(place, length, item, offset) for offset, length, place in self._pieces(chains[item.path], item.size)]
        return sorted(regions, key=lambda region: region[0])


class Parser:
    """Reads the file system that the guest has written. Nothing in it is trusted."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self._geometry = geometry = overlay._disk.layout.geometry
        boot = overlay._bytes(geometry.hidden * SECTOR, SECTOR)
        if boot[SAME] != geometry.boot_sector(b"")[SAME]:
            raise overlay.refusal("the boot sector is another one")
        self._fat = geometry.unpack_fat(overlay._bytes(geometry.fat_start * SECTOR, geometry.fat * SECTOR))
        self._used = bytearray(geometry.clusters + 2)
        self._chains: dict[str, list[int]] = {}

    def parse(self) -> tuple[Item, dict[str, list[int]]]:
        """The tree, with paths of the host, and the clusters of everything by path. Raises Corrupt."""
        geometry, old = self._geometry, self._overlay._tree
        root = Item("", old.path, 0, 0, [])
        if geometry.root:
            self._chains[root.path] = []
            data = self._overlay._bytes(geometry.root_start * SECTOR, geometry.root * SECTOR)
        else:
            self._chains[root.path] = self._chain(2)
            data = self._content(self._chains[root.path])
        self._children(root, data, old, 0)
        return root, self._chains

    def _chain(self, cluster: int) -> list[int]:
        geometry = self._geometry
        found = []
        while True:
            if not 2 <= cluster < geometry.clusters + 2:
                raise self._overlay.refusal("a chain leads to cluster %d, which is not there" % cluster)
            if self._used[cluster]:
                raise self._overlay.refusal("cluster %d used more than once" % cluster)
            self._used[cluster] = 1
            found.append(cluster)
            cluster = self._fat[cluster]
            if cluster >= geometry.end_mark & ~7:
                return found

    def _content(self, chain: list[int]) -> bytes:
        """The entries of a directory."""
        geometry = self._geometry
        if (len(chain) - 1) * geometry.cluster_size > MAX_DIRECTORY * ENTRY:
            raise self._overlay.refusal("a directory has more than %d entries" % MAX_DIRECTORY)
        return b"".join([self._overlay._bytes(geometry.place(cluster), geometry.cluster_size) for cluster in chain])

    def _children(self, parent: Item, data: bytes, old: Optional[Item], depth: int) -> None:
        """Fill in what a directory of these entries has; `old` is the directory that it was, if it was one."""
        known = {child.name: child for child in (old.children or ())} if old is not None else {}
        pieces: list[bytes] = []
        for at in range(0, len(data), ENTRY):
            raw = data[at : at + ENTRY]
            if not raw[0]:
                break
            if raw[0] == DELETED:
                pieces = []
            elif raw[11] & LONG_MASK == LONG:
                pieces.append(raw)
            else:
                entry = DirectoryEntry.unpack(raw)
                name = (unpack_long(pieces, raw[:11]) if pieces else "") or entry.name()
                pieces = []
                if not entry.attributes & VOLUME and entry.short.rstrip() not in (b".", b".."):
                    self._add(parent, name, entry, known.get(name), depth)

    def _add(self, parent: Item, name: str, entry: DirectoryEntry, before: Optional[Item], depth: int) -> None:
        refusal = self._overlay.refusal
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise refusal("a name that no file can have: %r" % name)
        if depth > MAX_DEPTH:
            raise refusal("directories are nested too deep")
        if len(self._chains) > MAX_ITEMS:
            raise refusal("there are more than %d files" % MAX_ITEMS)
        path = before.path if before is not None else os.path.join(parent.path, name)
        if path in self._chains:
            raise refusal("there are two of %s" % path)
        is_directory = bool(entry.attributes & DIRECTORY)
        chain = self._chain(entry.cluster) if entry.cluster else []
        if not is_directory and entry.size > len(chain) * self._geometry.cluster_size:
            raise refusal("%s is longer than its clusters" % path)
        self._chains[path] = chain
        item = Item(name, path, 0 if is_directory else entry.size, 0, [] if is_directory else None)
        if parent.children is not None:
            parent.children.append(item)
        if is_directory:
            self._children(item, self._content(chain), before, depth + 1)


def _items(tree: Item) -> Iterator[Item]:
    """All items of a tree, directories before what is in them."""
    yield tree
    for child in tree.children or ():
        yield from _items(child)


def _runs(flags: bytearray, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of set flags."""
    while start < end:
        first = flags.find(1, start, end)
        if first < 0:
            return
        stop = flags.find(0, first, end)
        start = end if stop < 0 else stop
        yield first, start
