# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The codecs: round trips, damage, bounds, the choice of a zstd library, and that qemu-img writes and reads the same streams."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import diskwright
from diskwright import compression, kernels
from diskwright.errors import Corrupt, Unsupported

CLUSTER = 65536
CODECS = {"deflate": (compression.deflate, compression.inflate)}
try:
    compression.zstd_compress(b"")
except Unsupported:
    assert kernels.native() is None
else:
    CODECS["zstd"] = (compression.zstd_compress, compression.zstd_decompress)


def sample(seed, size=CLUSTER):
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(3, 40)) for word in range(200)]
    data = b""
    while len(data) < size:
        data += b"".join(rng.choice(words) for word in range(100)) + bytes(rng.randrange(2000))
    return data[:size]


@pytest.fixture(params=sorted(CODECS))
def codec(request):
    return CODECS[request.param]


def test_round_trip(codec):
    encode, decode = codec
    for data in (b"x", bytes(CLUSTER), random.Random(1).randbytes(CLUSTER), sample(2), sample(3, 2 << 20)):
        for given in (data, bytearray(data), memoryview(bytearray(b"1" + data))[1:]):
            stream = encode(given)
            assert isinstance(stream, bytes)
            for stored in (stream, memoryview(stream), bytearray(stream) + b"\xff" * 600, stream + stream):
                found = decode(stored, len(data))
                assert isinstance(found, bytes) and found == data


def test_decoder_stops_at_the_length(codec):
    encode, decode = codec
    bomb = encode(bytes(64 << 20))
    assert decode(bomb, CLUSTER) == bytes(CLUSTER)
    assert decode(bomb, 1) == b"\0"
    assert decode(bomb, 0) == b""


def test_decoder_wants_the_whole_length(codec):
    encode, decode = codec
    data = sample(4)
    with pytest.raises(Corrupt, match="yields 65536 bytes instead of 65537"):
        decode(encode(data), CLUSTER + 1)


def test_codecs_in_threads(codec):
    encode, decode = codec
    samples = [sample(40 + number) for number in range(8)]
    expected = [encode(data) for data in samples]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encode, samples * 10)) == expected * 10
        assert list(pool.map(decode, expected * 10, [CLUSTER] * 80)) == samples * 10


def test_damaged_streams(codec):
    encode, decode = codec
    data = sample(5)
    stream = encode(data)
    for broken in (b"", b"\xff" * 100, b"junk" * 100, stream[: len(stream) // 2], stream[:1], stream[:-60]):
        with pytest.raises(Corrupt):
            decode(broken, CLUSTER)
    rng = random.Random(6)
    for attempt in range(300):
        flawed = bytearray(stream)
        flawed[rng.randrange(len(flawed))] ^= 1 << rng.randrange(8)
        try:
            assert len(decode(flawed, CLUSTER)) == CLUSTER
        except Corrupt:
            pass


def test_deflate_keeps_to_a_window_of_4_kib():
    data = sample(7) * 4
    assert zlib.decompressobj(-12).decompress(compression.deflate(data)) == data
    far = random.Random(8).randbytes(4096)
    assert len(compression.deflate(far * 4)) > 4 * 4096  # an encoder that looked further back would halve this


def test_deflate_is_nearly_as_small_as_zlib():
    """Over programs and text, within 3 % of zlib at level 6 with the same window."""
    data = Path(os.path.realpath(sys.executable)).read_bytes()[: 3 << 20] + Path(random.__file__).read_bytes() * 2
    own = zlibs = 0
    for at in range(0, len(data), CLUSTER):
        cluster = data[at : at + CLUSTER]
        encoder = zlib.compressobj(6, zlib.DEFLATED, -12, 9)
        own += len(compression.deflate(cluster))
        zlibs += len(encoder.compress(cluster) + encoder.flush())
    assert own <= 1.03 * zlibs


def check_native_deflate():
    """The forms of zlib's window_bits; streams that outgrow their input; arguments out of range."""
    twin = kernels.native()
    noise = random.Random(10).randbytes(300000)
    for data in (b"", b"x", noise, sample(11, 1 << 20)):
        for level in (0, 1, 6, 9):
            for bits in (-15, -12, -9, 9, 12, 15):
                stream = twin.deflate(data, level, bits)
                assert zlib.decompressobj(bits).decompress(stream) == data
                assert twin.inflate(stream, len(data) + 1, bits) == data
    for args in ((b"", 10, -15), (b"", -1, -15), (b"", 6, 8), (b"", 6, -16), (b"", 6, 31)):
        with pytest.raises(ValueError, match="is out of range"):
            twin.deflate(*args)
    wrapped = bytearray(zlib.compress(sample(12)))
    wrapped[-1] ^= 1  # its checksum
    with pytest.raises(ValueError):
        twin.inflate(wrapped, 1 << 20, 15)


if kernels.native() is not None:
    test_native_deflate = check_native_deflate


def test_inflate_reads_wider_windows():
    data = random.Random(9).randbytes(20000) * 3
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert compression.inflate(encoder.compress(data) + encoder.flush(), len(data)) == data


def clusters_of(path, kind):
    """(guest offset, stored bytes up to the end of the last sector) of all compressed clusters of a small qcow2 image."""
    image = Path(path).read_bytes()
    (l1_size,) = struct.unpack_from(">I", image, 36)
    (l1_offset,) = struct.unpack_from(">Q", image, 40)
    cluster_bits = struct.unpack_from(">I", image, 20)[0]
    size_shift = 62 - (cluster_bits - 8)
    found = []
    for index in range(l1_size):
        l2_offset = struct.unpack_from(">Q", image, l1_offset + 8 * index)[0] & 0x00FFFFFFFFFFFE00
        table = image[l2_offset : l2_offset + (1 << cluster_bits)] if l2_offset else b""
        for run_index, count, run_kind, value in kernels.l2_runs(table, 0, len(table) // 8, 1 << cluster_bits, False, 1 << 20):
            if run_kind == kind:
                host = value & ((1 << size_shift) - 1)
                end = (host | 511) + 1 + 512 * (value >> size_shift)
                found.append(((index * len(table) // 8 + run_index) << cluster_bits, image[host:end]))
    return found


@pytest.mark.parametrize("name", ["zlib", "zstd"])
def test_streams_of_qemu_img(tmp_path, name):
    if name == "zstd" and "zstd" not in CODECS:
        with pytest.raises(Unsupported, match="zstandard"):
            compression.zstd_decompress(b"x", 1)
        return
    encode, decode = CODECS["zstd" if name == "zstd" else "deflate"]
    qemu_img = shutil.which("qemu-img")
    assert qemu_img, "qemu-img is needed"
    raw, image = tmp_path / "raw", tmp_path / "qcow2"
    data = b"".join(sample(seed) for seed in range(10, 26))
    raw.write_bytes(data)
    subprocess.run(
        [qemu_img, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=" + name, str(raw), str(image)], check=True
    )
    from diskwright.kernels.contract import COMPRESSED

    found = clusters_of(image, COMPRESSED)
    assert len(found) == 16
    for offset, stored in found:
        assert decode(stored, CLUSTER) == data[offset : offset + CLUSTER]
    if name == "zlib" and kernels.native() is None:  # with the same zlib, the very same bytes
        same = [stored.startswith(encode(data[offset : offset + CLUSTER])) for offset, stored in found]
        assert all(same) or "ng" in zlib.ZLIB_RUNTIME_VERSION
        return
    # Put our own frames in place of qemu's: the first one that fits does for all.
    content = bytearray(image.read_bytes())
    for offset, stored in found:
        ours = encode(data[offset : offset + CLUSTER])
        if len(ours) <= len(stored):
            at = content.find(stored)
            content[at : at + len(ours)] = ours
            break
    else:
        pytest.fail("none of our frames fits where qemu's was")
    image.write_bytes(content)
    subprocess.run([qemu_img, "compare", "-f", "raw", "-F", "qcow2", str(raw), str(image)], check=True, stdout=subprocess.DEVNULL)


def frame_with_window(bits):
    """A zstd frame with one raw block that claims a window of 2**bits bytes for its decoder."""
    return b"\x28\xb5\x2f\xfd" + bytes([0, (bits - 10) << 3]) + (len(b"hello") << 3 | 1).to_bytes(3, "little") + b"hello"


def test_zstd_comes_from_a_package(monkeypatch):
    """Each package's interface is used as it is: a package that is not there is stood in for by none."""
    for choose in (compression._standard_zstd, compression._zstandard, compression._pyzstd, compression._native_zstd):
        codec = choose()
        if codec is not None:
            data = sample(30)
            frame = codec[0](memoryview(data))
            assert codec[1](memoryview(frame + b"rest"), CLUSTER) == data
            assert codec[1](frame, 10) == data[:10]
            with pytest.raises(Corrupt, match="zstd stream is damaged"):
                codec[1](b"junk" * 20, CLUSTER)
            assert codec[1](frame_with_window(23), 5) == b"hello"
            with pytest.raises(Corrupt, match="zstd stream is damaged"):
                codec[1](frame_with_window(24), 5)


def test_native_zstd_arguments():
    module = kernels.native()
    if module is None:
        assert os.environ.get("DISKWRIGHT_ACCEL") != "require"
        return
    for level in (-(1 << 40), 100, 1 << 70):
        with pytest.raises(ValueError, match="level is out of range"):
            module.zstd_compress(b"", level)
    with pytest.raises(ValueError, match="limit is negative"):
        module.zstd_decompress(b"", -1)
    frame = module.zstd_compress(bytes(9 << 20), 1)
    assert module.zstd_decompress(frame, 1 << 62) == bytes(9 << 20)
    assert module.zstd_decompress(frame + frame, 1 << 62) == bytes(9 << 20)
    assert module.zstd_decompress(module.zstd_compress(b"", 3), 9) == b""


def test_without_any_zstd_library(tmp_path):
    for name in ("zstandard", "pyzstd", "diskwright_accel"):
        (tmp_path / (name + ".py")).write_text("raise ImportError('absent')\n")
    (tmp_path / "compression").mkdir()
    (tmp_path / "compression" / "__init__.py").write_text("")
    environment = dict(os.environ, DISKWRIGHT_ACCEL="off")
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(diskwright.__file__).parent.parent)])
    code = (
        "from diskwright import compression, errors\n"
        "try:\n    compression.zstd_compress(b'x')\nexcept errors.Unsupported as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert "zstandard" in done.stdout and "diskwright-accel" in done.stdout


def test_the_standard_package_is_not_shadowed():
    assert isinstance(compression, types.ModuleType) and compression.__name__ == "diskwright.compression"
    if sys.version_info >= (3, 14):
        assert compression._standard_zstd() is not None
