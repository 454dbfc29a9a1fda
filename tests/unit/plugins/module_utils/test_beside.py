# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nothing half made ever has its final name, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ansible_collections.diskwright.images.plugins.module_utils import _record
from ansible_collections.diskwright.images.plugins.module_utils.diskwright import beside as _beside
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.errors import Error, Locked


@pytest.mark.parametrize("name", ["disk", "a, b=c", "\u00e4" * 120, "x" * 255, "-n", "json:{}"])
def test_a_file_that_is_made_and_one_that_is_replaced(tmp_path, name):
    path = str(tmp_path / name)
    for content in ("first", "second"):
        with _beside.beside(path) as temporary:
            assert os.path.dirname(temporary) == str(tmp_path) and temporary != path
            with open(temporary, "w") as file:
                file.write(content)
        with open(path) as file:
            assert file.read() == content
        assert os.listdir(tmp_path) == [name]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "disk"
    path.write_text("old")
    with pytest.raises(Error, match="^%s: broken$" % path) as caught, _beside.beside(str(path)) as temporary:
        raise Error("%s: broken" % temporary, filename=temporary)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["disk"]


def test_permissions(tmp_path):
    path = tmp_path / "disk"
    mask = os.umask(0o027)
    try:
        for private, wanted in ((False, 0o640), (True, 0o600)):
            with _beside.beside(str(path), private):
                pass
            assert path.stat().st_mode & 0o7777 == wanted
            path.unlink()
        path.touch()
        path.chmod(0o751)
        with _beside.beside(str(path), True):
            pass
        assert path.stat().st_mode & 0o7777 == 0o751
    finally:
        os.umask(mask)


def test_a_link_stays_a_link_and_a_device_is_written_in_place(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/disk")
    for content in ("first", "second"):
        with _beside.beside(str(link)) as temporary, open(temporary, "w") as file:
            file.write(content)
        assert link.is_symlink() and (tmp_path / "there/disk").read_text() == content
    with _beside.beside("/dev/null") as temporary:
        assert temporary == "/dev/null"


def test_an_image_in_use_is_neither_replaced_nor_removed(tmp_path):
    path = str(tmp_path / "disk")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    with subprocess.Popen(["qemu-io", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        try:
            user.stdin.write("read 0 512\n")
            user.stdin.flush()
            user.stdout.readline()
            with pytest.raises(Locked), _beside.beside(path):
                pass
            with pytest.raises(Locked):
                _record.remove(path)
        finally:
            user.kill()
    assert os.listdir(tmp_path) == ["disk"]
    _record.remove(path)
    assert os.listdir(tmp_path) == []


KILLED = """
import os, sys, time
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.beside import beside
with beside(sys.argv[1]) as temporary:
    with open(temporary, "w") as file:
        file.write("half")
    sys.stdout.write("ready")
    sys.stdout.flush()
    time.sleep(60)
"""


def test_what_a_killed_run_leaves_is_taken_over_and_one_that_still_runs_is_not(tmp_path):
    path = str(tmp_path / "disk")
    with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.read(5) == "ready"
        with pytest.raises(Locked, match="another process is making it"), _beside.beside(path):
            pass
        other.send_signal(signal.SIGKILL)
    assert [name[0] for name in os.listdir(tmp_path)] == ["."]
    with _beside.beside(path) as temporary:
        assert os.path.getsize(temporary) == 0
    assert os.listdir(tmp_path) == ["disk"]


CONVERTED = """
import sys
from collections import defaultdict
from ansible_collections.diskwright.images.plugins.module_utils import _conversion
want = _conversion.wanted(defaultdict(type(None), {"src": [sys.argv[1]], "dest": sys.argv[2], "src_format": "raw", "format": "qcow2", "compress": True,
    "up_to_date": "source", "replace": True, "backing_file": None, "backing_format": None, "options": {}, "size": None, "checksum": None, "mode": None,
    "encryption": None}))
for step in _conversion.plan(want, _conversion.observe(want)):
    step.run()
"""


def test_a_conversion_that_is_killed_at_any_time_leaves_the_old_image_or_the_new_one(tmp_path):
    source, path = str(tmp_path / "source"), str(tmp_path / "disk")
    with open(source, "wb") as file:
        for number in range(64):
            file.write(bytes((number,)) * (1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", path, "1M"], check=True)
    old = os.stat(path).st_ino
    killed = 0
    for delay in (0.1, 0.2, 0.3, 0.5):
        with subprocess.Popen([sys.executable, "-c", CONVERTED, source, path]) as run:
            time.sleep(delay)
            run.kill()
        killed += run.returncode != 0
        if os.stat(path).st_ino == old:
            assert os.path.getsize(path) == 1 << 20
        else:
            subprocess.run(["qemu-img", "compare", "-q", source, path], check=True)
    assert killed
    for _turn in range(2):
        subprocess.run([sys.executable, "-c", CONVERTED, source, path], check=True)
        subprocess.run(["qemu-img", "compare", "-q", source, path], check=True)
        assert sorted(os.listdir(tmp_path)) in (["disk", "source"], [".disk.source.json", "disk", "source"])
        left = os.stat(path).st_ino
    assert os.stat(path).st_ino == left


def test_records_follow_the_image_with_attributes_and_without(tmp_path, monkeypatch):
    for attributes in (True, False):
        path, temporary = str(tmp_path / "disk"), str(tmp_path / "new")
        if not attributes:
            monkeypatch.setattr(_record, "ATTRIBUTE", "nonsense.diskwright")  # which no file system knows
        for value in ("1", "2"):
            with open(temporary, "w"):
                pass
            _record.write(path, temporary, {"request": value})
            os.rename(temporary, path)
            assert _record.read(path)["request"] == value
        with open(temporary, "w"):
            pass
        os.rename(temporary, path)
        assert _record.read(path) is None  # another image under the same name
        _record.remove(path)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"inode": "x"}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, text):
    path = tmp_path / "disk"
    path.touch()
    (tmp_path / ".disk.source.json").write_text(text)
    assert _record.read(str(path)) is None
