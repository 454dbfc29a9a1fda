# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Many command lines by qemu-img and by us, on copies of the same images: what both say, and every file afterwards, must be the same."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Callable, Optional, Sequence

from side_by_side import Outcome, difference, ours, setup, theirs, twins

# Of an image: how much longer ours may be. What is changed in one step, for the sake of a crash, is written to new places.
SLACK = 512 << 10

PROGRESS = re.compile(r"( *\(\d+\.\d\d/100%\)\r)+")  # the percentages themselves may differ
OPTION = re.compile(r"(?m)^(  \S+<.*?>) +- .*$")  # what help says of an option is our own
NODE = re.compile(r"#block\d+")  # a node that nobody can know
SECONDS = re.compile(r"in \d+\.\d{3} seconds")
PROGRESS_OF_REFUSAL = re.compile(r"Could not change the backing file|\(N/100%\)")

GALLERY = r"""
qemu-img create -f raw base 1M; qemu-io -f raw -c 'write -P 1 0 1M' base
qemu-img create -f raw r 1M; qemu-io -f raw -c 'write -P 5 0 100k' r
c() { qemu-img create -f qcow2 -o cluster_size=${3:-4k}$4 $5 $1 $2; }
c q 2M; qemu-io -c 'write -P 3 1M 64k' -c 'write -z 200k 300k' q
c over 2M 4k '' '-b base -F raw'; qemu-io -c 'write -P 3 1M 64k' -c 'write -z 200k 300k' over
c top 2M 64k '' '-b over -F qcow2'; qemu-io -c 'write -P 6 500k 64k' top
c snap 1M; qemu-io -c 'write -P 3 100k 64k' snap; qemu-img snapshot -c one snap; qemu-io -c 'write -P 4 100k 164k' snap
qemu-img snapshot -c two snap; qemu-io -c 'write -P 5 10k 64k' snap; cp snap both; qemu-img bitmap --add both x
c bm 2M; qemu-img bitmap --add bm a; qemu-img bitmap --add --disable -g 8k bm b; qemu-io -c 'write 100k 64k' bm
cp bm broken; printf '\1' | dd of=broken bs=1 seek=$(grep -obUa 'a' broken | tail -1 | cut -d: -f1) count=0 conv=notrunc
c v2 1M 4k ,compat=0.10; qemu-io -c 'write -P 3 100k 64k' v2
c ext 1M 16k ,extended_l2=on; qemu-io -c 'write -P 3 100k 64k' -c 'write -z 300k 5k' ext
c df 1M 4k ,data_file=df.raw; qemu-io -c 'write -P 3 100k 64k' df
c dr 1M 4k ,data_file=dr.raw,data_file_raw=on; qemu-io -c 'write -P 3 100k 64k' dr
c lost 1M 4k '' '-u -b nowhere -F qcow2'
c comp 1M; qemu-io -c 'write -P 3 0 128k' -c 'write -c -P 4 128k 4k' comp
c lazy 1M 4k ,lazy_refcounts=on; qemu-io -c 'write -P 3 100k 64k' lazy
cp q corrupt; printf '\x02' | dd of=corrupt bs=1 seek=79 conv=notrunc status=none
mkdir sub
"""


def plain(outcome: Outcome) -> Outcome:
    """An outcome without what is different on purpose, or by chance."""
    out = SECONDS.sub("in N seconds", OPTION.sub(r"\1", PROGRESS.sub("    (N/100%)\r", outcome.out)))
    return Outcome(outcome.code, out, NODE.sub("#block", outcome.err))


def known(line: str, expected: Outcome, found: Outcome) -> bool:
    """Whether two outcomes may differ: docs/differences.md says why."""
    words = shlex.split(line)
    silent = any(word in ("-q", "--quiet") for word in words)
    return (
        words[0] == "bench" and silent and expected.code == found.code and not found.out
        or words[0] == "bitmap" and "#block" in expected.err and expected.code == found.code
        or words[0] == "bitmap" and "-b bm" in line and line.endswith(("bm z", "bm a"))
        or words[0] == "bitmap" and "-b both both" in line
        or words[0] == "rebase" and "Assertion" in expected.err
        or "--salvage" in words and silent and expected.code == found.code and not found.err
        or "--target-is-zero" in words and expected.err == found.err
        or words[0] == "rebase" and "could not get block driver info" in expected.err
        or words[:2] == ["snapshot", "-a"] and expected.err.count("WARNING") == 2 and found.err.count("WARNING") == 1
        or words[0] == "rebase" and PROGRESS_OF_REFUSAL.search(expected.out + expected.err) is not None and found.err == expected.err
    )


class Matrix:
    """A gallery of images, which is made in `place` by lines of shell, then by command lines of ours, and two copies of it.

    Files behind whose content nobody looks (headers with random salts) are in `opaque`.
    """

    def __init__(self, place: Path, gallery: str, made: Sequence[str] = (), opaque: tuple[str, ...] = ()) -> None:
        self.source = place / "gallery"
        self.source.mkdir()
        setup(gallery, self.source)
        for line in made:
            assert ours(shlex.split(line), self.source) == Outcome(0, "", "")
        self.left, self.right = twins(self.source)
        self.opaque = opaque
        self._stored = {name: (self.source / name).read_bytes() for name in self._files(self.source)}

    @staticmethod
    def _files(place: Path) -> list[str]:
        found = []
        for folder, _folders, names in os.walk(place):
            found += [os.path.relpath(os.path.join(folder, name), place) for name in names]
        return sorted(found)

    def failures(self, lines: list[str], known: Optional[Callable[[str, Outcome, Outcome], bool]] = None) -> list[str]:
        """What differs, line by line; `known` tells which differences of outcomes are on purpose."""
        found = []
        for line in lines:
            args = shlex.split(line)
            expected, own = plain(theirs(args, self.left)), plain(ours(args, self.right))
            if own != expected and (known is None or not known(line, expected, own)):
                found.append(difference(line, own, expected))
            elif own.code == expected.code:
                found += ["%s: %s" % (line, text) for text in self.differences()]
            self._restore()
        return found

    def _changed(self, name: str) -> bool:
        """Whether either side has touched a file of the gallery."""
        times = {(place / name).stat().st_mtime_ns for place in (self.source, self.left, self.right)}
        return len(times) > 1

    def differences(self) -> list[str]:
        """What differs between the files of the two copies."""
        left, right = self._files(self.left), self._files(self.right)
        found = [] if left == right else ["files: %s, ours: %s" % (set(left) - set(right), set(right) - set(left))]
        for name in sorted(set(left) & set(right)):
            if name in self._stored and not self._changed(name) or name in self.opaque:
                continue
            images = (self.left / name).read_bytes(), (self.right / name).read_bytes()
            if images[0] != images[1]:
                if all(image[:4] == b"QFI\xfb" for image in images):
                    found += self._qcow2(name)
                else:
                    found.append("%s: the content is another" % name)
        return found

    def _qcow2(self, name: str) -> list[str]:
        """Differences of two qcow2 images in what counts: what they say of themselves, what they hold, and that nothing is wrong with ours."""
        found = []
        described = [self._described(place, name) for place in (self.left, self.right)]
        if described[0] != described[1]:
            found.append("%s: info says %s, of ours %s" % (name, *described))
        if theirs(["check", "-q", "-f", "qcow2", name], self.right).code and not theirs(["check", "-q", "-f", "qcow2", name], self.left).code:
            found.append("%s: check finds something" % name)
        paths = [str(place / name) for place in (self.left, self.right)]
        if "encrypted" not in described[0]:
            compared = theirs(["compare", "-f", "qcow2", "-F", "qcow2", *paths], self.left)
            if compared.code == 1:
                found.append("%s: %s" % (name, compared.out.strip()))
        sizes = [os.path.getsize(path) for path in paths]
        if sizes[1] > sizes[0] + SLACK:
            found.append("%s: %d bytes, ours %d" % (name, *sizes))
        return found

    @staticmethod
    def _described(place: Path, name: str) -> dict[str, object]:
        """What qemu-img says of an image, without what depends on the time."""
        found: dict[str, object] = json.loads(theirs(["info", "--output=json", "-f", "qcow2", name], place).out)
        for key in ("actual-size", "children"):
            found.pop(key, None)
        for snapshot in found.get("snapshots", ()):  # type: ignore[attr-defined]
            del snapshot["date-sec"], snapshot["date-nsec"]
        return found

    def _restore(self) -> None:
        for place in (self.left, self.right):
            for name in self._files(place):
                if name not in self._stored:
                    (place / name).unlink()
                elif (place / name).stat().st_mtime_ns != (self.source / name).stat().st_mtime_ns:
                    subprocess.run(["cp", "-a", "--sparse=always", str(self.source / name), str(place / name)], check=True)
            for name in self._stored:
                if not (place / name).exists():
                    subprocess.run(["cp", "-a", "--sparse=always", str(self.source / name), str(place / name)], check=True)
