# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""check and check -r of damaged qcow2 images, beside qemu-img: exit codes, counts, messages and what is left."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys

import pytest
import qcow2_damage
from qcow2_check_oracle import ours, theirs, verdict
from qcow2_damage import DAMAGES, Editor

from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.node import OpenFlags

# (damage, mode): where qemu-img fails, or does harm, and we do not. Afterwards the image is clean.
BETTER = {
    ("snapshot_count_absurd", "all"),  # qemu-img cannot write the table that it mended
    ("refblock_unaligned", "all"),  # qemu-img marks the image corrupt while it looks, and then refuses to mend it
    ("refblock_reserved_bits", "all"),  # the same
    ("refblock_very_far", "all"),  # makes a file of 16 TiB, or never ends
    ("reftable_larger", "all"),  # never ends, or has no memory
}
# (damage, mode): only the exit code is the same.
OTHER = {
    ("snapshot_name_long", "leaks"),  # qemu-img discards what it takes for leaked: the snapshot table
    ("snapshot_name_long", "all"),
    ("dirty_bit_and_counts_of_tables_lost", "leaks"),  # the image stays dirty after a repair that failed; qemu-img clears the bit
    ("dirty_bit_and_refcounts_lost", "leaks"),  # the image stays dirty after a repair that failed; qemu-img clears the bit
}
# The same messages and exit code, but the end of the image is another, as is what is found later.
PLACES = {"file_cut", "file_cut_unaligned", "bitmap_table_behind_end_of_file", "bitmap_table_entry_data_far", "bitmap_table_entry_data"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where undamaged images are kept."""
    return str(tmp_path_factory.mktemp("undamaged"))


def without_name(lines, path):
    return [line.replace(str(path), "IMAGE") for line in lines]


# Clusters of 4 KiB tell little that is new beside those of 64 KiB.
CASES = [name for name in sorted(DAMAGES) if not name.endswith("-c4k") or name[:-3] + "v3" not in DAMAGES]


@pytest.mark.parametrize("name", CASES)
def test_damage(name, tmp_path, cache):
    damage = name.rpartition("-")[0]
    for mode in ("", "leaks", "all"):
        one, two = tmp_path / "one.qcow2", tmp_path / "two.qcow2"
        qcow2_damage.build(name, str(one), cache)
        shutil.copyfile(one, two)
        found = ours(two, mode)
        if (damage, mode) in BETTER:
            assert found[0] == 0 and verdict(two) == 0
            continue
        expected = theirs(one, mode)
        assert found[0] == expected[0]
        if (damage, mode) in OTHER:
            continue
        assert without_name(found[1], two) == without_name(expected[1], one)
        if damage in PLACES:
            continue
        assert found[2] == expected[2]
        if mode:
            assert verdict(two) == verdict(one)
            assert Editor(two).data[72:80] == Editor(one).data[72:80]  # dirty, corrupt


def test_snapshots_survive_beside_bitmaps(tmp_path):
    path = tmp_path / "both.qcow2"
    qcow2_damage.make(str(path), "v3", snapshots=True, bitmaps=True)
    image = Editor(path)
    image.set_refcount(image.append(), 1)
    image.save()
    before = subprocess.run(["qemu-img", "snapshot", "-l", path], capture_output=True, check=True).stdout
    assert ours(path, "leaks")[0] == 0
    assert subprocess.run(["qemu-img", "snapshot", "-l", path], capture_output=True, check=True).stdout == before
    assert verdict(path) == 0


def content(path):
    """What a guest would read."""
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, raw], stderr=subprocess.PIPE, check=True)
    return raw.read_bytes()


@pytest.mark.parametrize("name", ["refblock_missing-v3", "refblock_zeroed-r1", "data_refcount_zero-c512", "leak_at_end-v2", "data_refcount_too_high-r8"])
def test_content_is_left_alone(name, tmp_path, cache):
    path = tmp_path / "image.qcow2"
    qcow2_damage.build(name, str(path), cache)
    before = content(path)
    ours(path, "all")
    assert content(path) == before


@pytest.mark.parametrize("name", ["refblock_missing-v3", "refblock_missing-c512", "reftable_empty-c4k", "l2_entry_duplicate_plain-v3", "leak_at_end-c512"])
def test_prefixes_of_a_repair(name, tmp_path, cache, monkeypatch):
    """After each prefix of its writes a repair can be run again, and the content is there."""
    source = tmp_path / "source.qcow2"
    qcow2_damage.build(name, str(source), cache)
    writes = []
    path = tmp_path / "image.qcow2"
    shutil.copyfile(source, path)
    flags = OpenFlags(check=True, writable=True, resize=True, no_backing=True)
    with Graph().open(str(path), format="qcow2", flags=flags) as node:
        inner = node.file._pwrite
        monkeypatch.setattr(node.file, "_pwrite", lambda offset, view: (writes.append((offset, bytes(view))), inner(offset, view)))
        result = node.check("all")
    assert result.failure is None and writes
    original = bytearray(source.read_bytes())
    expected = None
    for stop in range(len(writes) + 1):
        data = bytearray(original)
        for offset, piece in writes[:stop]:
            data.extend(bytes(max(0, offset + len(piece) - len(data))))
            data[offset : offset + len(piece)] = piece
        path.write_bytes(data)
        if expected is None and "reftable_empty" not in name:
            expected = content(path)
        assert ours(path, "all")[0] == 0
        assert verdict(path) == 0
        assert expected is None or content(path) == expected


def test_dirty_image_is_repaired_when_opened_for_writing(tmp_path, cache):
    path = tmp_path / "image.qcow2"
    qcow2_damage.build("dirty_bit_and_refcounts_lost-lazy", str(path), cache)
    with Graph().open(str(path), format="qcow2", flags=OpenFlags(writable=True, no_backing=True)) as node:
        node.pwrite(0, b"x" * 5000)
    assert verdict(path) == 0
    assert not Editor(path).u64(72) & 1


def test_dirty_image_that_cannot_be_repaired(tmp_path, cache):
    path = tmp_path / "image.qcow2"
    qcow2_damage.build("dirty_bit-c4k", str(path), cache)
    image = Editor(path)
    at, entry = image.normal()[0]
    image.put64(at, entry + 512)
    image.save()
    with pytest.raises(Error, match="Could not repair dirty image"):
        Graph().open(str(path), format="qcow2", flags=OpenFlags(writable=True, no_backing=True))


def limited(code, path, seconds=20, bytes_more=160 << 20):
    """Run `code` with the image's name as argument under limits of CPU time and address space."""

    def limits():
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (bytes_more, bytes_more))

    program = "import sys\nsys.path.insert(0, %r)\nfrom qcow2_check_oracle import ours\n%s" % (os.path.dirname(__file__), code)
    return subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, preexec_fn=limits, check=False, timeout=60)


def test_absurd_length(tmp_path):
    path = tmp_path / "image.qcow2"
    qcow2_damage.make(str(path), "c512")
    os.truncate(path, (1 << 31) * 512 - 512)
    done = limited("print(ours(sys.argv[1], ''))", path)
    assert done.returncode == 0, done.stderr
    assert "'check-errors': 0" in done.stdout
    os.truncate(path, 1 << 42)
    done = limited("print(ours(sys.argv[1], ''))", path)
    assert done.returncode == 0 and "File too large" in done.stdout, done.stderr


def test_l1_table_that_names_one_l2_table_all_over(tmp_path):
    path = tmp_path / "image.qcow2"
    qcow2_damage.make(str(path), "c2m", snapshots=False)
    image = Editor(path)
    first = image.append(16)
    entry = image.l1()[0][1]
    for at in range(first << 21, (first << 21) + (32 << 20), 8):
        image.put64(at, entry)
    image.put64(40, first << 21)
    image.put32(36, 4 << 20)
    image.save()
    done = limited("code, lines, counts = ours(sys.argv[1], ''); print(code, lines[-1])", path, bytes_more=400 << 20)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 qemu-img: Check failed: L2 tables are in use too often\n"


def test_windows_of_the_tally(tmp_path, cache, monkeypatch):
    """An image whose counters do not fit into memory is counted in several passes, to the same end."""
    from diskwright import tally

    monkeypatch.setattr(tally, "_PAGE_BYTES", 64)
    monkeypatch.setattr(tally, "_PAGES_MAX", 2)
    for name in ("clean-c512", "several-c512", "refblock_missing-r64", "leak_high_refcount-r8", "shared_refcount_too_low-c4k", "refblock_zeroed-c4k"):
        for mode in ("", "leaks", "all"):
            one, two = tmp_path / "one.qcow2", tmp_path / "two.qcow2"
            qcow2_damage.build(name, str(one), cache)
            shutil.copyfile(one, two)
            found, expected = ours(two, mode), theirs(one, mode)
            assert found[0] == expected[0]
            places = {"image-end-offset"} if mode == "all" else set()  # several passes put new structures at the end
            assert {key: value for key, value in found[2].items() if key not in places} == {
                key: value for key, value in expected[2].items() if key not in places
            }
            if mode:
                assert verdict(two) == verdict(one)


def test_result_keeps_a_bounded_number_of_messages(monkeypatch):
    import diskwright.tally as check

    monkeypatch.setattr(check, "MESSAGES_MAX", 3)
    result = check.CheckResult()
    for number in range(5):
        result.say(str(number))
    assert result.messages == ["0", "1", "2"] and result.omitted == 2


def test_tally_against_a_list():
    import random

    from diskwright.tally import Tally

    generator = random.Random(7)
    for most in (1, 3, 15, 255, 65535, (1 << 32) - 1):
        tally, model = Tally(3000, most), [0] * 3100
        for _step in range(400):
            start = generator.randrange(3000)
            count = min(generator.choice((1, 1, 2, 40, 900)), 3100 - start)
            lost = tally.add(start, count)
            assert list(lost) == [at for at in range(start, start + count) if model[at] == most]
            for at in range(start, start + count):
                model[at] = min(most, model[at] + 1)
        assert [tally.count(at) for at in range(3100)] == model
