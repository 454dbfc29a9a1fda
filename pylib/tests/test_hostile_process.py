# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The program as a whole where things go wrong around it: signals, streams, disks, permissions, locks, names, options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.graph import OpenPolicy
from hostile_images import Draft

LAUNCH = "import sys; sys.path[:0] = %r; sys.argv[0] = 'qemu-img'; from diskwright.cli import main; sys.exit(main())" % (
    [str(Path(diskwright.__file__).parents[1]), *filter(None, sys.path)],
)
PROGRAM = [sys.executable, "-c", LAUNCH]
SLOW = "json:" + json.dumps({"driver": "null-co", "size": 64 << 30, "latency-ns": 20000000, "read-zeroes": True})


def run(*args: Any, **options: Any) -> tuple[int, str, str]:
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
    done = subprocess.run([*PROGRAM, *map(str, args)], check=False, **options)
    out, err = (stream.decode("utf-8", "surrogateescape") if stream else "" for stream in (done.stdout, done.stderr))
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return done.returncode, out, err


def shell(line: str, *args: Any, **options: Any) -> tuple[int, str, str]:
    """Run the program by a shell, as "$@" in `line`."""
    options = {"stdin": subprocess.DEVNULL, "timeout": 60, **options}
    done = subprocess.run(["sh", "-c", line, "sh", *PROGRAM, *map(str, args)], capture_output=True, check=False, **options)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small image with data."""
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 3M", path], check=True, stdout=subprocess.DEVNULL)
    return path


# -- signals ----------------------------------------------------------------------------------------------------------


def interrupt(number: int, target: Path | None, *args: Any) -> tuple[int, str]:
    """Start the program, send it a signal once it has made `target` (or has had time to start), and wait for it."""
    process = subprocess.Popen([*PROGRAM, *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _wait in range(1000 if target is not None else 0):
            if process.poll() is not None or target is not None and target.exists():
                break
            time.sleep(0.02)
        if target is None:
            time.sleep(1)
        process.send_signal(number)
        message = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
        process.wait()
    return process.returncode, message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_interrupted_convert(number: signal.Signals, format: str, tmp_path: Path) -> None:
    code, message = interrupt(number, tmp_path / "target", "convert", "-S", "0", "-O", format, SLOW, tmp_path / "target")
    assert (code, message) == (-number, "qemu-img: convert was interrupted by %s\n" % number.name)


def test_an_interrupted_compare() -> None:
    other = SLOW.replace("true", "false")
    code, message = interrupt(signal.SIGINT, None, "compare", SLOW, other)
    assert (code, message) == (-signal.SIGINT, "qemu-img: compare was interrupted by SIGINT\n")


# -- streams ----------------------------------------------------------------------------------------------------------


def test_closed_and_broken_streams(image: Path, tmp_path: Path) -> None:
    assert shell('"$@" >&-', "info", image)[0] == 0
    assert shell('"$@" 2>&-', "info", image)[0] == 0
    assert shell('"$@" <&- >&- 2>&-', "convert", "-O", "raw", image, tmp_path / "raw")[0] == 0
    assert (tmp_path / "raw").read_bytes() == b"\7" * (3 << 20) + bytes(5 << 20)
    assert shell('"$@" <&- >&- 2>&-', "check", "-r", "all", image)[0] == 0
    for command in ("info", "check", "map", "measure -O raw", "compare %s" % image):
        verb, *rest = command.split()
        assert shell('{ "$@"; echo $? >&2; } | head -c 0', verb, *rest, image)[2].strip() == "0"
        assert shell('"$@" > /dev/full', verb, *rest, image)[0] == 0
        assert shell('"$@" 2> /dev/full', verb, *rest, tmp_path / "nothing")[0] != 0


def test_progress_into_a_closed_pipe(image: Path, tmp_path: Path) -> None:
    assert shell('{ "$@"; echo $? >&2; } | head -c 0', "convert", "-p", "-O", "raw", image, tmp_path / "raw")[2].strip() == "0"


# -- disks, permissions, locks ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_no_space_left(image: Path, small_disk: Path) -> None:
    before = image.read_bytes()
    for format in ("raw", "qcow2"):
        code, _out, err = run("convert", "-O", format, image, small_disk / "target")
        assert code == 1 and err.startswith("qemu-img: ") and err.endswith("No space left on device\n")
        (small_disk / "target").unlink(missing_ok=True)
    code, _out, err = run("create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", small_disk / "new", "64M")
    assert code == 1 and "No space left on device" in err and err.startswith("qemu-img: ")
    (small_disk / "new").unlink(missing_ok=True)
    code, _out, err = run("dd", "bs=1M", "if=%s" % image, "of=%s" % (small_disk / "dd"))
    assert code == 1 and "No space left on device" in err
    assert image.read_bytes() == before


def test_no_permission(image: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:-2]:
        if parent.owner() == "root" and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o011)
    image.chmod(0o400)
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    # an interpreter below /root is nobody's; the system's serves as well
    pythons = (sys.executable, "/usr/bin/python3")
    python = next(name for name in pythons if subprocess.run([*drop, name, "-c", ""], capture_output=True, check=False).returncode == 0)
    nobody = 'shift; exec %s %s "$@"' % (" ".join(drop), python)
    code, _out, err = shell(nobody, "info", image)
    assert (code, err) == (1, f"qemu-img: Could not open '{image}': Could not open '{image}': Permission denied\n")
    image.chmod(0o444)
    assert shell(nobody, "info", image)[0] == 0
    code, _out, err = shell(nobody, "resize", image, "9M")
    assert (code, err) == (1, f"qemu-img: Could not open '{image}': Could not open '{image}': Permission denied\n")
    code, _out, err = shell(nobody, "convert", "-O", "raw", image, tmp_path / "new")
    assert code == 1 and err.startswith("qemu-img: ") and err.endswith("Permission denied\n")
    assert not (tmp_path / "new").exists()


def test_read_only_target(image: Path, tmp_path: Path) -> None:
    code, _out, err = run("convert", "-O", "raw", image, "/proc/version")
    assert code == 1 and err.startswith("qemu-img: ")
    code, _out, err = run("convert", "-O", "raw", image, tmp_path)
    assert code == 1 and err.startswith("qemu-img: ") and "directory" in err.lower()
    code, _out, err = run("convert", "-O", "raw", image, tmp_path / "no" / "such")
    assert code == 1 and err.endswith("No such file or directory\n")


def test_a_locked_image(image: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        for args in (["check"], ["check", "-r", "all"], ["resize", "-f", "qcow2"], ["convert", "-O", "raw"], ["map"]):
            line = [*args, image, *{"resize": ["9M"], "convert": [tmp_path / "out"]}.get(args[0], [])]
            code, _out, err = run(*line)
            theirs = subprocess.run(["qemu-img", *map(str, line)], capture_output=True, text=True, check=False)
            assert (code, err) == (theirs.returncode, theirs.stderr), args
        assert run("info", "-U", image)[0] == 0
    finally:
        holder.communicate(timeout=60)


def test_no_working_directory(image: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    assert shell('cd "$0" && rmdir "$0" && shift 0; exec "$@"'.replace("$0", str(gone)), "info", image)[0] == 0
    gone.mkdir()
    assert shell('cd "$0" && rmdir "$0"; exec "$@"'.replace("$0", str(gone)), "info", "image")[0] == 1


def test_umask(tmp_path: Path) -> None:
    for mask, mode in ((0o077, 0o600), (0o022, 0o644), (0o000, 0o644)):
        path = tmp_path / oct(mask)
        assert shell('umask %o; exec "$@"' % mask, "create", "-q", "-f", "qcow2", path, "1M")[0] == 0
        assert path.stat().st_mode & 0o777 == mode


# -- names and options ------------------------------------------------------------------------------------------------

NAMES = [b"\xff\xfe.img", b"new\nline", b"\x1b[2Jescape", b"\xc3\xa9t\xc3\xa9", b" ", b"-", b"a,b=c", b"%s%n", b"{}", b"*"]


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(name: bytes, locale: str, tmp_path: Path) -> None:
    """What qemu-img prints, byte for byte, in any locale."""
    path = os.path.join(os.fsencode(tmp_path), name)
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def ours(*args: str | bytes) -> tuple[int, bytes, bytes]:
        done = subprocess.run([*PROGRAM, *args], capture_output=True, env=environment, check=False, timeout=60)
        return done.returncode, done.stdout, done.stderr

    def theirs(*args: str | bytes) -> tuple[int, bytes, bytes]:
        done = subprocess.run(["qemu-img", *args], capture_output=True, check=False, timeout=60)
        return done.returncode, done.stdout, done.stderr

    assert ours("info", path) == theirs("info", path)  # missing
    assert ours("create", "-f", "qcow2", path, "1M")[::2] == (0, b"")
    assert ours("info", path) == theirs("info", path)
    assert ours("info", "--output=json", path) == theirs("info", "--output=json", path)
    assert ours("map", path) == theirs("map", path)
    overlay = os.path.join(os.fsencode(tmp_path), b"overlay")
    assert ours("create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", overlay) == (0, b"", b"")
    assert ours("info", "--backing-chain", overlay) == theirs("info", "--backing-chain", overlay)
    assert ours("check", overlay) == theirs("check", overlay)


LINES = [
    ["info", ""],
    ["info", "x" * 256],
    ["info", "x/" * 3000],
    ["info", "json:"],
    ["info", "json:{"],
    ["info", "json:" + "[" * 100000],
    ["info", "json:" + "{" * 100000],
    ["info", 'json:{"driver":"raw","file":' + '{"driver":"raw","file":' * 120 + "1" + "}" * 121],
    ["info", 'json:{"' + "file." * 20000 + 'x":1}'],
    ["info", "--image-opts", "file." * 20000 + "x=1"],
    ["info", "--image-opts", "driver=qcow2,file=a,file.filename=b"],
    ["info", "--image-opts", "=,=,,,=,"],
    ["info", "--image-opts", ""],
    ["info", "--image-opts", "driver"],
    ["info", "--image-opts", "driver.x=1"],
    ["info", "--image-opts", "driver=file,filename.x=1"],
    ["info", "--image-opts", "file.0=a,file.1=b"],
    ["info", "--image-opts", "driver=qcow2,file.driver=file,file.filename=/dev/null,cache-size=99999999999999999999"],
    ["info", "--image-opts", "driver=raw,file.driver=null-co,file.size=16E"],
    ["info", "--image-opts", "driver=raw,size=-1,file.driver=null-co"],
    ["info", "--image-opts", "driver=raw,offset=16E,file.driver=null-co"],
    ["create", "-f", "qcow2", "out", "99999999999999999999E"],
    ["create", "-f", "qcow2", "out", "-1"],
    ["create", "-f", "qcow2", "-o", "cluster_size=1", "out", "1M"],
    ["create", "-f", "qcow2", "-o", "cluster_size=18446744073709551615", "out", "1M"],
    ["create", "-f", "qcow2", "-o", "refcount_bits=18446744073709551615", "out", "1M"],
    ["create", "-f", "qcow2", "-o", "size=16E", "out"],
    ["create", "-f", "qcow2", "-o", "x" * 100000, "out", "1M"],
    ["create", "-f", "qcow2", "-o", "," * 1000, "out", "1M"],
    ["create", "-f", "qcow2", "-b", "x" * 5000, "-F", "raw", "out", "1M"],
    ["create", "-f", "qcow2", "-u", "-b", "x" * 1024, "-F", "raw", "out", "1M"],
    ["create", "-f", "qcow2", "-u", "-b", "a", "-F", "y" * 100, "out", "1M"],
    ["dd", "bs=0", "if=a", "of=b"],
    ["dd", "bs=16E", "if=a", "of=b"],
    ["dd", "count=99999999999999999999", "if=a", "of=b"],
    ["map", "-s", "16E", "a"],
    ["resize", "a", "+16E"],
    ["resize", "a", "-16E"],
    ["--object", "x"],
    ["info", "--object", "secret,id=a,data=" + "x" * 100000, "a"],
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_hostile_arguments(line: list[str], tmp_path: Path) -> None:
    """qemu-img's exit code, and a message."""
    (tmp_path / "a").write_bytes(bytes(65536))
    code, _out, err = run(*line, cwd=tmp_path)
    theirs = subprocess.run(["qemu-img", *line], cwd=tmp_path, capture_output=True, check=False, timeout=60, stdin=subprocess.DEVNULL)
    assert code == theirs.returncode or theirs.returncode == -signal.SIGABRT, (err[-500:], theirs.stderr[-500:])
    assert not code or err.startswith("qemu-img"), err[-500:]


# -- what the open policy refuses -------------------------------------------------------------------------------------

OUTSIDE = "/etc/hostname"
BACKINGS = [
    OUTSIDE,
    "file:" + OUTSIDE,
    "../" * 20 + OUTSIDE,
    'json:{"driver":"raw","file":{"driver":"file","filename":"%s"}}' % OUTSIDE,
    'json:{"driver":"raw","file.filename":"%s"}' % OUTSIDE,
    'json:{"driver":"file","filename":"%s"}' % OUTSIDE,
    'json:{"driver":"qcow2","file.filename":"base","backing":{"driver":"raw","file.filename":"%s"}}' % OUTSIDE,
    'json:{"driver":"qcow2","file.filename":"base","backing.driver":"raw","backing.file.filename":"%s"}' % OUTSIDE,
    'json:{"driver":"raw","file":{"driver":"raw","file":{"driver":"file","filename":"%s"}}}' % OUTSIDE,
    'json:{"driver":"raw","file":[1,2]}',
    'json:{"driver":"raw","file":{"driver":"file","filename":{"a":1}}}',
    'json:{"driver":"raw","file":{"filename":"nbd://127.0.0.1:1/x"}}',
    'json:{"driver":"raw","file":{"filename":7}}',
    'json:{"driver":["raw"],"file":{"filename":"base"}}',
]


@pytest.mark.parametrize("backing", BACKINGS, ids=range(len(BACKINGS)))
def test_no_stored_name_leads_out_of_the_directory(backing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Draft().save(tmp_path / "base")
    draft = Draft()
    draft.backing(backing)
    draft.save(tmp_path / "image")
    for policy in (OpenPolicy("same_directory"), OpenPolicy("none"), OpenPolicy("listed", [str(tmp_path)])):
        with pytest.raises(diskwright.Error):
            diskwright.open("image", policy=policy)
