# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a Parallels image, and its repair (https://www.qemu.org/docs/master/interop/parallels.html)."""

from __future__ import annotations

from ...tally import CheckResult, Tally

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator

    from .image import Parallels

COPY = 1 << 20  # bytes that are copied at a time


def check(image: Parallels, repair: str) -> CheckResult:
    """Look for everything in the order in which QEMU does; `repair` is "", "leaks" or "all"."""
    result = CheckResult()
    fix = repair == "all"
    with image._lock:
        if image.unclean:
            _tell(result, fix, "image was not closed correctly")
            if fix:
                image.begin_change()
                image.unclean = False
        if image.data_off_wrong:
            _tell(result, fix, "data_off field has incorrect value")
            if fix:
                image.header.data_off = image.data_start // 512
                image.data_off_wrong = False
                image._changing = False
                image.begin_change()
        _check_outside(image, fix, result)
        _check_end(image, bool(repair), result)
        _check_duplicates(image, fix, result)
        if repair:
            image._flush()
    _count(image, result)
    return result


def _tell(result: CheckResult, fix: bool, what: str) -> None:
    """Note one corruption, which is mended if `fix`."""
    result.say("%s %s" % ("Repairing" if fix else "ERROR", what))
    result.corruptions += 1
    result.corruptions_fixed += fix


def first_place(image: Parallels) -> int:
    """Where the first cluster of an empty image comes: behind one that the header has for itself."""
    return max(image.data_start, image.block_size)


def find_end(image: Parallels, limit: int = 1 << 63) -> int:
    """Where the last cluster ends, or the first one may be; clusters that end behind `limit` do not count."""
    size = image.block_size
    end = first_place(image)
    for _index, length, value, step in image.blocks.runs(0, image.blocks.count, image.step):
        last = value + (length - 1) * step
        if last and last * image.unit + size > limit and step:
            last = min(last, value + max(0, (limit - size) // image.unit - value) // step * step)
        if last and last * image.unit + size <= limit:
            end = max(end, last * image.unit + size)
    return end


def _is_inside(image: Parallels, place: int, end: int) -> bool:
    return place >= image.table_end and place + image.block_size <= end


def _check_outside(image: Parallels, fix: bool, result: CheckResult) -> None:
    """Clusters must lie behind the table and before the end of the file."""
    end = image.file_end
    for first, length, value, step in image.blocks.runs(0, image.blocks.count, image.step):
        if not value and not step:
            continue
        last = value + (length - 1) * step
        if value and value * image.unit >= image.table_end and last * image.unit + image.block_size <= end:
            continue
        for at in range(length):
            entry = value + at * step
            if entry and not _is_inside(image, entry * image.unit, end):
                _tell(result, fix, "cluster %d is outside image" % (first + at))
                if fix:
                    image.begin_change()
                    image.blocks.set(first + at, 0)


def _check_end(image: Parallels, fix: bool, result: CheckResult) -> None:
    """What follows the last cluster belongs to nothing."""
    length = image.file_end
    end = find_end(image, length)
    if end == first_place(image):  # nothing is inside the file
        end = find_end(image)
    image.end = end
    result.image_end_offset = end
    if length > end:
        leaks = -(-(length - end) // image.block_size)
        result.say("%s space leaked at the end of the image %d" % ("Repairing" if fix else "ERROR", length - end))
        result.leaks += leaks
        if fix:
            image.begin_change()
            image._flush()
            image.file.truncate(end, exact=False)
            image._untouched = min(image._untouched, end)
            result.leaks_fixed += leaks


def has_duplicates(image: Parallels) -> bool:
    """Whether a cluster is in use twice."""
    return any(True for _index, _place in _duplicates(image))


def _duplicates(image: Parallels) -> Iterator[tuple[int, int]]:
    """(index, place) of the clusters that an earlier entry has already."""
    size = image.block_size
    end = image.file_end
    start = image.data_start
    base = start // size + 1  # so that no number is negative
    tally = Tally(end // size + 2, 1)
    while True:
        for first, length, value, step in image.blocks.runs(0, image.blocks.count, image.step):
            place = value * image.unit
            if value and step and place >= start and place + length * size <= end:
                low = base + (place - start) // size
                for lost in tally.add(low, length):
                    yield first + lost - low, place + (lost - low) * size
                continue
            for at in range(length) if value or step else ():
                entry = (value + at * step) * image.unit
                if entry and _is_inside(image, entry, end):
                    number = base + (entry - start) // size if entry >= start else base - (start - entry) // size
                    if tally.inside(number) and len(tally.add(number, 1)):
                        yield first + at, entry
        if not tally.advance():
            return


def _check_duplicates(image: Parallels, fix: bool, result: CheckResult) -> None:
    """No two entries may name one cluster: the second one gets a copy."""
    if not fix:
        for index, _place in _duplicates(image):
            _tell(result, False, "duplicate offset in BAT entry %d" % index)
        return
    found = list(_duplicates(image))
    if not found:
        return
    image.begin_change()
    image.find_room()
    for index, place in found:
        _tell(result, True, "duplicate offset in BAT entry %d" % index)
        image.blocks.set(index, 0)
        copy = image._take(index)
        for at in range(0, image.block_size, COPY):
            count = min(COPY, image.block_size - at)
            inside = max(0, min(count, image.file.size - place - at))
            if inside:
                image.file.write_hosted(copy + at, memoryview(image.file.pread(place + at, inside)))
    result.image_end_offset = image.end


def _count(image: Parallels, result: CheckResult) -> None:
    """How many clusters there are, and how many do not follow the one before."""
    result.total_clusters = image.blocks.count
    expected = 0
    for _index, length, value, step in image.blocks.runs(0, image.blocks.count, image.step):
        if not value and not step:
            expected = 0
            continue
        if not value:  # an ascending run from 0 on
            value, length, expected = step, length - 1, 0
        result.allocated_clusters += length
        result.fragmented_clusters += (expected not in (0, value)) + (length - 1 if not step else 0)
        expected = value + (length - 1) * step + image.step
