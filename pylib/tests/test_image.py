# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The Python API: lazy names, open, and the file-like view against a bytearray."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import diskwright


def test_every_public_name_loads_and_the_stub_names_the_same() -> None:
    for name in diskwright.__all__:
        assert getattr(diskwright, name) is not None
    stub = Path(diskwright.__file__).with_suffix(".pyi").read_text()
    named = {line.split(" as ")[1] for line in stub.splitlines() if " as " in line} | {"__version__"}
    assert named == set(diskwright.__all__)
    with pytest.raises(AttributeError):
        diskwright.nothing  # type: ignore[attr-defined]


def test_importing_the_package_loads_none_of_it() -> None:
    code = "import sys, diskwright; print([m for m in sys.modules if m.startswith('diskwright.')])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=dict(os.environ)).stdout
    assert out.strip() == "[]"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(4).randbytes(200_192))
    return path


def test_bad_arguments(raw: Path) -> None:
    with pytest.raises(diskwright.OptionError, match="mode must be"):
        diskwright.open(raw, "w")
    with pytest.raises(diskwright.OptionError, match="Invalid cache option: fast"):
        diskwright.open(raw, cache="fast")
    with pytest.raises(diskwright.OptionError, match="Unknown open policy"):
        diskwright.open(raw, policy="some")
    with pytest.raises(diskwright.Error, match="No such file") as caught:
        diskwright.open(raw.with_name("missing"))
    assert caught.value.errno == errno.ENOENT


def test_file_view_behaves_like_a_file(raw: Path) -> None:
    model = io.BytesIO(raw.read_bytes())
    size = raw.stat().st_size
    rng = random.Random(5)
    with diskwright.open_file(raw, "r+", format="raw") as image:
        assert image.readable() and image.writable() and image.seekable()
        for _number in range(400):
            step = rng.randrange(4)
            if step == 0:
                where, whence = rng.choice([(rng.randrange(size), 0), (-rng.randrange(1, size), 2), (0, 1)])
                assert image.seek(where, whence) == model.seek(where, whence)
            elif step == 1:
                count = rng.choice([0, 1, 511, 4096, 70_000, -1])
                assert image.read(count) == model.read(count)
            elif step == 2 and model.tell() < size:
                data = rng.randbytes(rng.randrange(1, min(9000, size - model.tell()) + 1))
                assert image.write(data) == model.write(data)
            assert image.tell() == model.tell()
    assert raw.read_bytes() == model.getvalue()
    assert image.closed and image.node._closed
    with pytest.raises(ValueError):
        image.read(1)


def test_writes_end_at_the_virtual_size_and_need_permission(raw: Path) -> None:
    size = raw.stat().st_size
    before = raw.read_bytes()
    with diskwright.open_file(raw, format="raw") as image:
        assert not image.writable()
        with pytest.raises(io.UnsupportedOperation):
            image.write(b"x")
    assert raw.read_bytes() == before
    with diskwright.open_file(raw, "r+", format="raw") as image:
        image.seek(size - 3)
        assert image.write(b"abcdef") == 3
        with pytest.raises(OSError) as caught:
            image.write(b"x")
        assert caught.value.errno == errno.ENOSPC
    assert raw.read_bytes() == before[:-3] + b"abc"


def test_a_library_reads_through_it(tmp_path: Path) -> None:
    plain = tmp_path / "archive.zip"
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("greeting", "hello" * 1000)
    with open(plain, "ab") as tail:  # a raw image is a whole number of sectors; zip tolerates what follows
        tail.write(bytes(-plain.stat().st_size % 512))
    with diskwright.open_file(plain, format="raw") as image, zipfile.ZipFile(io.BufferedReader(image)) as archive:
        assert archive.read("greeting") == b"hello" * 1000


def test_seek_data_and_hole(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"x" * (1 << 20))
    with diskwright.open_file(path, format="raw") as image:
        assert image.seek(0, os.SEEK_HOLE) == 0
        assert image.seek(0, os.SEEK_DATA) == 1 << 20
        assert image.seek(1 << 20, os.SEEK_HOLE) == 2 << 20
        with pytest.raises(OSError):
            image.seek(2 << 20, os.SEEK_DATA)


def test_truncate_resizes_the_image(raw: Path) -> None:
    with diskwright.open_file(raw, "r+", format="raw") as image:
        assert image.truncate(1 << 20) == 1 << 20
    assert raw.stat().st_size == 1 << 20


def test_no_module_hides_a_public_name() -> None:
    """The import of a submodule binds its name in the package, in place of whatever had it."""
    package = Path(diskwright.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} | {path.name for path in package.iterdir() if path.is_dir()}
    assert not modules & set(diskwright.__all__)
