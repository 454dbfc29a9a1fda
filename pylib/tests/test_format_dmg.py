# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""dmg beside qemu-img: every kind of chunk, both kinds of tables, words, probing, damaged images and bombs."""

from __future__ import annotations

import base64
import bz2
import lzma
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from damage import attempt, edges, little_memory, with_field
from samples import sample
from side_by_side import Outcome, ours, same, theirs

from diskwright.errors import Error
from diskwright.formats.dmg import codecs
from diskwright.formats.dmg.layout import ADC, BZIP2, LZFSE, LZMA, ZLIB, BlockEntry, BlockTable, Koly
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags

K = 1 << 10
M = 1 << 20
SECTOR = 512
ZERO, RAW, IGNORED, COMMENT, END = 0, 1, 2, 0x7FFFFFFE, 0xFFFFFFFF
CODES = {"u32": ">I", "u64": ">Q"}

# "hello world " 1000 times, as the LZFSE library of Apple compresses it
LZFSE_HELLO = (
    "62767832e02e00001400800000070010682d751c68130050910000003a7c900e6f010070015c000017000000005cbc05efc9370000df000000000000"
    "00000000000000000000000000000000f0b60000000000000000000000000000000000efc46f00bf01f0b5c0d702ef04c03b01000000000000000000"
    "000000000000000000000000000000000000000000000000000088ec68ac1e1e000000000000000000c0c0ffdffffbbfffc3ff2f62767824"
)


def plain_lzfse(data: bytes) -> bytes:
    """LZFSE without compression, in blocks of any length."""
    blocks = [data[at : at + 30000] for at in range(0, len(data), 30000)]
    return b"".join(b"bvx-" + struct.pack("<I", len(block)) + block for block in blocks) + b"bvx$"


def adc(data: bytes) -> bytes:
    """ADC: copies of either form where the bytes before repeat, and literals."""
    found = bytearray()
    at = 0
    literals = b""
    while at < len(data):
        for distance in (1, 4, 512, 1000, 1025, 5000):
            count = 0
            if distance <= at:
                while count < 67 and at + count < len(data) and data[at + count] == data[at + count - distance]:
                    count += 1
            if count >= 4:
                break
        if count < 4:
            literals += data[at : at + 1]
            at += 1
        if literals and (count >= 4 or len(literals) == 128 or at == len(data)):
            found += bytes((0x80 | len(literals) - 1,)) + literals
            literals = b""
        if count >= 4:
            if distance <= 1024 and count <= 18:
                found += bytes((count - 3 << 2 | distance - 1 >> 8, distance - 1 & 0xFF))
            else:
                found += bytes((0x40 | count - 4,)) + struct.pack(">H", distance - 1)
            at += count
    return bytes(found)


ENCODERS: dict[int, Callable[[bytes], bytes]] = {RAW: bytes, ADC: adc, ZLIB: zlib.compress, BZIP2: bz2.compress, LZMA: lzma.compress, LZFSE: plain_lzfse}


def table(entries: list[tuple[int, int, int, int, int]], first: int = 0, data_offset: int = 0, signature: bytes = b"mish") -> bytes:
    """A block table of entries (kind, sector, count, offset, length)."""
    head = struct.pack(">4sIQQQII", signature, 1, first, sum(entry[2] for entry in entries) % (1 << 64), data_offset, 2056, 0)
    return head + bytes(160) + struct.pack(">I", len(entries)) + b"".join(struct.pack(">IIQQQQ", entry[0], 0, *entry[1:]) for entry in entries)


def plist(tables: list[bytes]) -> bytes:
    data = b"".join(b"<dict><key>Data</key><data>\n\t" + base64.encodebytes(one) + b"\t</data></dict>" for one in tables)
    return b'<?xml version="1.0"?><plist><dict><key>resource-fork</key><dict><key>blkx</key><array>' + data + b"</array></dict></dict></plist>"


def fork(tables: list[bytes]) -> bytes:
    """A resource fork: the resources, and a map of them that nobody looks at."""
    data = b"".join(struct.pack(">I", len(one)) + one for one in tables)
    return struct.pack(">IIII", 256, 256 + len(data), len(data), 50).ljust(256, b"\0") + data + b"map" * 20


def image(data: bytes, tables: list[bytes], sectors: int, as_fork: bool = False, metadata: bytes | None = None, **fields: int) -> bytes:
    """An image: the data fork, the tables, the trailer."""
    middle = metadata if metadata is not None else fork(tables) if as_fork else plist(tables)
    place = {"rsrc_fork_offset" if as_fork else "xml_offset": len(data), "rsrc_fork_length" if as_fork else "xml_length": len(middle)}
    trailer = b"koly" + bytes(Koly.SIZE - 4)
    for name, value in {"version": 4, "header_size": 512, "sector_count": sectors, **place, **fields}.items():
        trailer = with_field(trailer, Koly.OFFSETS[name], CODES[Koly.__annotations__[name]], value)
    return data + middle + trailer.ljust(SECTOR, b"\0")


def packed(kinds: list[int], chunks: list[bytes], as_fork: bool = False) -> bytes:
    """An image of chunks of such kinds, in two tables."""
    data = b""
    entries: list[list[tuple[int, int, int, int, int]]] = [[(COMMENT, 0, 0, 0, 0)], []]
    sector = 0
    half = sum(map(len, chunks[: len(chunks) // 2])) // SECTOR
    for number, (kind, chunk) in enumerate(zip(kinds, chunks)):
        stored = ENCODERS[kind](chunk) if kind in ENCODERS else b""
        second = number >= len(chunks) // 2
        entries[second].append((kind, sector - half * second, len(chunk) // SECTOR, len(data), len(stored)))
        data += stored
        sector += len(chunk) // SECTOR
    return image(data, [table([*entries[0], (END, half, 0, 0, 0)]), table([*entries[1], (END, 0, 0, 0, 0)], half), b"other"], sector, as_fork)


def mixed(seed: int, sizes: list[int]) -> list[bytes]:
    """Chunks of noise, repetitions and text."""
    chance = random.Random(seed)
    found = []
    for size in sizes:
        part = chance.randbytes(chance.randrange(1, 3000))
        found.append((chance.randbytes(size // 4) + b"abc " * 300 + part * (size // len(part) + 1))[:size])
    return found


def known(outcome: Outcome) -> Outcome:
    """An outcome without what we say beyond QEMU, and without what QEMU says before it refuses to open an image."""
    lines = [line for line in outcome.err.split("\n") if not line.startswith(("dmg: ", "image.dmg: ")) and " is larger than max " not in line]
    return outcome._replace(err="\n".join(lines))


def refuses(path: Path, data: bytes) -> bool:
    """Try all that can be tried on an image; whether something of it failed, but for writing."""
    return attempt(path, "dmg", data) != "Could not open '%s': Image is read-only" % path


@pytest.mark.parametrize("as_fork", [False, True])
def test_what_qemu_reads_too(tmp_path: Path, as_fork: bool) -> None:
    chunks = mixed(1, [256 * K, 1 * K, 256 * K, 300 * K + SECTOR, 5 * K, 256 * K, 700 * K, 512])
    kinds = [ZLIB, RAW, ZERO, ZLIB, IGNORED, RAW, ZLIB, ZLIB]
    (tmp_path / "image.dmg").write_bytes(packed(kinds, chunks, as_fork))
    content = b"".join(bytes(len(chunk)) if kind in (ZERO, IGNORED) else chunk for kind, chunk in zip(kinds, chunks))
    for line in ("info image.dmg", "info --output=json image.dmg", "map --output=json image.dmg", "check image.dmg", "measure image.dmg"):
        same(line, tmp_path)
    for run in (ours, theirs):
        assert run(["convert", "-O", "raw", "image.dmg", "raw"], tmp_path) == (0, "", "")
        assert (tmp_path / "raw").read_bytes() == content
    same("compare -F raw image.dmg raw", tmp_path)
    with Graph().open(str(tmp_path / "image.dmg")) as node:
        chance = random.Random(2)
        for _time in range(100):
            offset = chance.randrange(len(content))
            length = chance.randrange(min(400 * K, len(content) - offset))
            assert node.pread(offset, length) == content[offset : offset + length]


@pytest.mark.parametrize("kind", [ADC, BZIP2, LZMA, LZFSE])
def test_kinds_beyond_qemus(tmp_path: Path, kind: int) -> None:
    chunks = mixed(kind, [256 * K, 20 * K, 256 * K, 90 * K + SECTOR])
    (tmp_path / "image.dmg").write_bytes(packed([kind, ZERO, kind, kind], chunks))
    content = chunks[0] + bytes(20 * K) + b"".join(chunks[2:])
    assert ours(["convert", "-O", "raw", "image.dmg", "raw"], tmp_path) == (0, "", "")
    assert (tmp_path / "raw").read_bytes() == content
    assert ours(["convert", "-O", "qcow2", "image.dmg", "qcow2"], tmp_path).code == 0
    assert theirs(["compare", "-f", "raw", "raw", "qcow2"], tmp_path).code == 0


def test_lzma_without_its_container() -> None:
    data = mixed(3, [100 * K])[0]
    stored = lzma.compress(data, format=lzma.FORMAT_ALONE)
    assert b"".join(codecs.decompress(LZMA, iter([stored]), len(data))) == data


def test_adc() -> None:
    """Four literals, three bytes from one before, four from seven before, put together by hand; and what cannot be."""
    stored, expected = bytes.fromhex("83feedface000040 0006"), bytes.fromhex("feedfacecececefeedface")
    assert b"".join(codecs.decompress(ADC, iter([stored[:3], stored[3:]]), len(expected))) == expected
    for broken, size in ((stored, 10), (stored, 12), (stored[:-1], 11), (b"\x00\x00", 3), (b"\x40", 4), (b"", 1), (stored * 200000, 11), (stored, 5 << 20)):
        with pytest.raises(Error):
            list(codecs.decompress(ADC, iter([broken]), size))


def test_lzfse() -> None:
    """With a library at hand it decompresses; without, the error names the packages."""
    expected = b"hello world " * 1000
    stored = bytes.fromhex(LZFSE_HELLO)
    try:
        found = b"".join(codecs.decompress(LZFSE, iter([stored]), len(expected)))
    except Error as exc:
        assert str(exc) == "LZFSE compression needs the Python package pyliblzfse or lzfse"
    else:
        assert found == expected
    for size in (0, len(expected) - 1, len(expected) + 1, 17 << 20):
        with pytest.raises(Error, match="damaged|as long as|larger than"):
            list(codecs.decompress(LZFSE, iter([stored]), size))
    for at in range(0, len(stored) - 4, 7):
        with pytest.raises(Error):
            list(codecs.decompress(LZFSE, iter([stored[:at]]), len(expected)))
    with pytest.raises(Error, match="too many blocks"):
        list(codecs.decompress(LZFSE, iter([b"bvx-\1\0\0\0x" * 70000]), 1 << 20))


def test_chunks_of_every_size(tmp_path: Path) -> None:
    """Some too large to be kept, read in any order, by several threads."""
    sizes = [20 * M, 512, 9 * M + SECTOR, 3 * M]
    chunks = [(bytes((number + 1,)) * 3000 + random.Random(number).randbytes(1000)) * (size // 4000 + 1) for number, size in enumerate(sizes)]
    chunks = [chunk[:size] for chunk, size in zip(chunks, sizes)]
    content = b"".join(chunks)
    path = tmp_path / "image.dmg"
    path.write_bytes(packed([ZLIB, ZLIB, BZIP2, LZMA], chunks))
    with Graph().open(str(path)) as node:
        for offset in (19 * M, 0, 5 * M, 20 * M - 5, 21 * M, 28 * M, 20 * M + 600, 3):
            assert node.pread(offset, 70 * K) == content[offset : offset + 70 * K]
    assert ours(["convert", "-O", "raw", "image.dmg", "raw"], tmp_path) == (0, "", "")
    assert (tmp_path / "raw").read_bytes() == content


def test_an_image_of_apple(tmp_path: Path) -> None:
    name = "simple-dmg.dmg"
    path = sample(name, tmp_path)
    for line in ("info %s", "info --output=json %s", "map --output=json %s", "map %s", "check %s"):
        same(line % name, tmp_path)
    for run, out in ((ours, "ours"), (theirs, "theirs")):
        assert run(["convert", "-O", "raw", name, out], tmp_path).code == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    path.rename(tmp_path / "image")
    assert "file format: dmg" in ours(["info", "image"], tmp_path).out


def test_probing(tmp_path: Path) -> None:
    whole = packed([ZLIB], mixed(1, [10 * K]))
    disk = bytearray(bytes(M) + whole)
    cases = [
        ("image.dmg", whole, "dmg"),
        ("image.dmg", b"x" * 5000, "Could not locate UDIF trailer"),
        ("image.dmg", b"", "raw"),
        ("image.img", whole, "dmg"),
        ("image.img", whole + b"x", "raw"),
        ("image.img", whole[:-4] + b"xxxx", "dmg"),
        ("image.img", whole[-512:], "raw"),
        ("image.img", image(b"", [], 0), "raw"),
        ("image.img", with_field(whole, len(whole) - 512 + Koly.OFFSETS["version"], ">I", 5), "raw"),
        ("image.img", with_field(whole, len(whole) - 512 + Koly.OFFSETS["xml_length"], ">Q", 1 << 20), "raw"),
    ]
    for name, data, expected in cases:
        (tmp_path / name).write_bytes(data)
        found = ours(["info", name], tmp_path)
        assert expected in found.out + found.err, (name, len(data), found)
        if name.endswith(".dmg"):
            same("info " + name, tmp_path)
    (tmp_path / "image.img").write_bytes(disk)
    assert "file format: dmg" in ours(["info", "image.img"], tmp_path).out
    disk[510:512] = b"\x55\xaa"  # a disk with partitions stays one, whatever its guest writes at its end
    (tmp_path / "image.img").write_bytes(disk)
    same("info image.img", tmp_path)
    assert ours(["create", "-q", "-f", "qcow2", "image.dmg", "1M"], tmp_path).code == 0
    same("info image.dmg", tmp_path)


WORDS = [
    "check image.dmg",
    "check -r all image.dmg",
    "map image.dmg",
    "resize -f dmg image.dmg +1M",
    "create -f dmg new.dmg 1M",
    "create -f dmg -o help new",
    "convert -O dmg image.dmg new.dmg",
    "measure -O dmg --size 1M",
    "commit image.dmg",
    "snapshot -l image.dmg",
    "snapshot -c x image.dmg",
    "amend -f dmg -o size=1 image.dmg",
    "info --image-opts driver=dmg,file.filename=image.dmg,x=1",
    "convert -n -O dmg raw image.dmg",
    "info -f dmg raw",
]


def test_words(tmp_path: Path) -> None:
    (tmp_path / "image.dmg").write_bytes(packed([ZLIB], mixed(1, [10 * K])))
    (tmp_path / "raw").write_bytes(bytes(10 * K))
    for line in WORDS:
        same(line, tmp_path)


def test_warnings(tmp_path: Path) -> None:
    """Every command that reads an image tells of chunks that it does not know, in qemu-img's words and its order; -q silences that."""
    (tmp_path / "image.dmg").write_bytes(image(bytes(5120), [table([(RAW, 0, 10, 0, 5120), (0x80000099, 10, 10, 0, 0), (END, 20, 0, 0, 0)])], 20))
    (tmp_path / "raw").write_bytes(bytes(10240))
    text = "qemu-img: warning: Image contains chunks of unknown type 80000099, accessing them will result in I/O errors\n"
    for line in ("info image.dmg", "convert image.dmg out", "compare image.dmg raw", "dd if=image.dmg of=out", "dd if=image.dmg of=out skip=99"):
        expected, found = theirs(line.split(), tmp_path), ours(line.split(), tmp_path)
        assert (found.code, found.out) == (expected.code, expected.out)
        assert expected.err.startswith(text) and found.err.startswith(text) and found.err.count(text) == 1
    for line in ("convert -q image.dmg out", "compare -q image.dmg raw"):
        assert "unknown" not in ours(line.split(), tmp_path).err


DEFLATED = zlib.compress(b"z" * 5120)
GOOD = (ZLIB, 0, 10, 0, len(DEFLATED))
REST = (ZERO, 10, 10, 0, 0)


def damaged() -> Iterator[tuple[str, bytes]]:
    """Images that are not as they should be, of which QEMU says what we say."""
    data = DEFLATED + b"r" * SECTOR
    whole = image(data, [table([GOOD, REST])], 20)
    for length in (0, 1, 100, 511, 512, 600):
        yield "%d bytes behind" % length, whole + b"x" * length
    for name in ("xml_offset", "xml_length", "rsrc_fork_offset", "rsrc_fork_length", "data_fork_offset", "data_fork_length"):
        for value in (0, 1, 1 << 20, 1 << 40, (1 << 64) - 1):
            if (name, value) not in (("xml_offset", 0), ("xml_offset", 1), ("xml_length", 1)):  # no tables: qemu-img crashes
                yield "%s %d" % (name, value), image(data, [table([GOOD, REST])], 20, **{name: value})
    for sectors in (0, 5, 1 << 54, 1 << 63):
        yield "%d sectors" % sectors, image(data, [table([GOOD, REST])], sectors)
    yield "no end", image(data, [], 20, metadata=b"<data>bWlz")
    yield "no trailer", b"x" * 2000
    for count in (131072, 131073, 1 << 63):
        yield "%d sectors in a chunk" % count, image(data, [table([(ZLIB, 0, count, 0, 10)])], 9)
    for length in (64 << 20, (64 << 20) + 1, 1 << 63):
        yield "%d bytes in a chunk" % length, image(data, [table([(ZLIB, 0, 10, 0, length), REST])], 20)
    for offset in (1, 1 << 20, 1 << 62, 1 << 63, (1 << 64) - 1):
        yield "chunk at %d" % offset, image(data, [table([(ZLIB, 0, 10, offset, len(DEFLATED)), REST])], 20)
    for count in (9, 11):
        yield "%d sectors of 10" % count, image(data, [table([(ZLIB, 0, count, 0, len(DEFLATED)), (ZERO, count, 20 - count, 0, 0)])], 20)
    yield "short", image(data, [table([(ZLIB, 0, 10, 0, len(DEFLATED) - 4), REST])], 20)
    yield "more behind", image(data, [table([(ZLIB, 0, 10, 0, len(DEFLATED) + 10), REST])], 20)
    yield "data offset", b"x" * 9 + image(data, [table([GOOD, REST], data_offset=9)], 20, xml_offset=9 + len(data))
    yield "data fork", b"x" * 9 + image(data, [table([GOOD, REST])], 20, xml_offset=9 + len(data), data_fork_offset=9)
    yield "nothing at all", image(data, [table([(0x123, 0, 20, 0, 0), (ZERO, 19, 1, 0, 0)])], 20)
    for at, value in ((0, 0), (0, 1 << 20), (0, 0xFFFFFFFF), (8, 0), (8, 0xFFFFFFFF), (256, 0), (256, 1 << 20), (256, 0xFFFFFFFF), (4, 5), (12, 9)):
        middle = with_field(fork([table([GOOD]), table([REST])]), at, ">I", value)
        yield "fork %d %d" % (at, value), image(data, [], 20, True, middle)


def test_damaged_images_in_qemus_words(tmp_path: Path) -> None:
    for name, data in damaged():
        (tmp_path / "image.dmg").write_bytes(data)
        for line in (["info image.dmg"] if name == "nothing at all" else []) + ["convert -f dmg -O raw image.dmg raw"]:
            found, expected = known(ours(line.split(), tmp_path)), known(theirs(line.split(), tmp_path))
            assert found == expected, (name, line)
            if "convert" in line and not found.code:
                same("compare -f dmg -F raw image.dmg raw", tmp_path)


def test_chunks_that_overlap(tmp_path: Path) -> None:
    for tables in ([table([GOOD, (ZERO, 9, 11, 0, 0)])], [table([GOOD]), table([GOOD])]):
        (tmp_path / "image.dmg").write_bytes(image(DEFLATED, tables, 20))
        found = ours(["info", "image.dmg"], tmp_path)
        assert found.code == 1 and "dmg: two chunks hold sector" in found.err
    (tmp_path / "image.dmg").write_bytes(image(DEFLATED, [table([REST, GOOD])], 20))  # in any order
    with Graph().open(str(tmp_path / "image.dmg")) as node:
        assert node.pread(0, node.size) == b"z" * 5120 + bytes(5120)


def test_hostile_images(tmp_path: Path) -> None:
    path = tmp_path / "image.dmg"
    refused = set()
    entries = [GOOD, (RAW, 10, 1, len(DEFLATED), SECTOR), (ZERO, 11, 9, 0, 0)]
    data = DEFLATED + b"r" * SECTOR
    for as_fork in (False, True):
        whole = image(data, [table(entries)], 20, as_fork)
        with little_memory():
            for name, kind in Koly.__annotations__.items():
                if kind in CODES:
                    offset = len(whole) - SECTOR + Koly.OFFSETS[name]
                    for value in edges(CODES[kind], struct.unpack_from(CODES[kind], whole, offset)[0]):
                        if refuses(path, with_field(whole, offset, CODES[kind], value)):
                            refused.add(name)
            for length in [*range(0, len(whole), 40), *range(len(whole) - 520, len(whole))]:
                refuses(path, whole[:length])
    one = table(entries)
    with little_memory():
        for cls, start in ((BlockTable, 0), *((BlockEntry, BlockTable.SIZE + number * BlockEntry.SIZE) for number in range(3))):
            for name, kind in cls.__annotations__.items():
                if kind in CODES:
                    offset = start + cls.OFFSETS[name]
                    for value in edges(CODES[kind], struct.unpack_from(CODES[kind], one, offset)[0]):
                        if refuses(path, image(data, [with_field(one, offset, CODES[kind], value)], 20)):
                            refused.add(name)
    assert refused >= {"xml_offset", "sector_count", "data_fork_offset", "entry_type", "compressed_offset", "compressed_length", "sector_number"}


def test_bombs(tmp_path: Path) -> None:
    """64 MiB a chunk, as often as one likes: decompressed as far as it is asked for, and only the end of it is kept."""
    path = tmp_path / "image.dmg"
    size = 64 * M
    inflated = zlib.compressobj(9)
    small = b"".join(inflated.compress(bytes(M)) for _piece in range(64)) + inflated.flush()
    bombs = {
        ZLIB: small,
        BZIP2: bz2.compress(bytes(size)),
        LZMA: lzma.compress(bytes(size), preset=0),
        LZFSE: b"bvx2" + struct.pack("<IQQQ", 0xFFFFFFFF, 0, 0, 32) + b"bvx$",
        ADC: b"\x80\0" + b"\x7f\0\0" * 100000,
    }
    for kind, stored in bombs.items():
        for claimed in (size, size - SECTOR, 4 * M, SECTOR):
            count = claimed // SECTOR
            data = image(stored, [table([(kind, number * count, count, 0, len(stored)) for number in range(50)])], 50 * count)
            path.write_bytes(data)
            with little_memory(), Graph().open(str(path)) as node:
                for offset in (0, 5 * M):
                    try:
                        assert node.pread(offset % claimed, SECTOR) == bytes(SECTOR)
                    except Error as exc:
                        assert "chunk at sector 0 cannot be read: " in str(exc)
    noise = random.Random(1).randbytes(3 * M)
    with little_memory():
        assert refuses(path, image(noise, [table([(LZMA, 0, 10, 0, len(noise)), (ADC, 10, 8192, 0, len(noise))])], 9000))
        window = b"\x5d" + struct.pack("<IQ", 0xFFFFFFFF, 1 << 40) + noise[:1000]
        assert refuses(path, image(window, [table([(LZMA, 0, 10, 0, len(window))])], 10))


def test_many_tables_and_chunks(tmp_path: Path) -> None:
    """As many as fit into what is read of them."""
    most = (15 << 20) // BlockEntry.SIZE
    entries = [struct.pack(">IIQQQQ", ZERO, 0, number, 1, 0, 0) for number in range(most)]
    head = table([])
    tables = ([head + b"".join(entries)], [head + b"".join(reversed(entries))], [head + entries[5] * most])
    cases = [(image(b"", one, most, True), number == 2) for number, one in enumerate(tables)]
    cases += [(image(b"", [], 5, metadata=text), True) for text in (b"<data></data>" * 300000, b" " * ((16 << 20) + 1))]
    for data, expected in cases:
        with little_memory():
            assert refuses(tmp_path / "image.dmg", data) == expected


def test_nobody_writes(tmp_path: Path) -> None:
    (tmp_path / "image.dmg").write_bytes(packed([ZLIB], mixed(1, [10 * K])))
    with pytest.raises(Error, match="Image is read-only"):
        Graph().open(str(tmp_path / "image.dmg"), flags=OpenFlags(writable=True))
