# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blkdebug: rules are read, and requests fail and stop, as with qemu-io; and no failure corrupts an image."""

from __future__ import annotations

import random
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import diskwright
from diskwright.errors import Denied, Error
from diskwright.filters.blkdebug.rules import EVENTS
from diskwright.graph import Graph
from diskwright.hooks import CONSISTENT_READ, WRITE, OpenFlags
from diskwright.node import Node
from diskwright.root import Root
from effort import BRIEF
from io_side_by_side import same_io
from side_by_side import same, setup, theirs
from test_filters import exercise

K = 1024
SIZE = 2 << 20
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)

GALLERY = r"""
qemu-img create -q -f qcow2 img 1M; qemu-io -c 'write -P 1 0 512k' img > /dev/null
qemu-img create -q -f qcow2 -b img -F qcow2 overlay 3M
qemu-img create -q -f raw raw 1M
cat > once <<END
# a comment
[inject-error]
event = "write_aio"
errno = "28"
once = "on"
END
cat > states <<END
[set-state "a-name"]
state = "1"
event = "write_aio"
new_state = "2"

[inject-error]
event = "read_aio"
state = "2"
errno = "5"
sector = "641"
END
"""


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("blkdebug") / "gallery"
    place.mkdir()
    setup(GALLERY, place)
    return place


RULES = {
    "unknown-group": '[nope]\na = "1"',
    "no-event": '[inject-error]\nerrno = "5"',
    "unknown-event": '[inject-error]\nevent = "nope"',
    "unknown-key": '[inject-error]\nevent = "read_aio"\nbogus = "1"',
    "no-group": "x",
    "no-number": '[inject-error]\nevent = "read_aio"\nerrno = "x"',
    "unknown-iotype": '[inject-error]\nevent = "read_aio"\niotype = "nope"',
    "no-state": '[set-state]\nevent = "read_aio"',
    "negative-state": '[set-state]\nevent = "read_aio"\nnew_state = "-1"',
    "unquoted": "[inject-error]\nevent = read_aio",
    "without-blanks": '# c\n[inject-error]\n\n  event = "read_aio"\nerrno="5"',
    "no-name": '[inject-error "a name"]\nevent = "read_aio"',
    "named": '[inject-error "name"]\nevent = "read_aio"',
    "no-error": '[inject-error]\nevent = "read_aio"\nerrno = "0"',
    "negative-error": '[inject-error]\nevent = "read_aio"\nerrno = "-5"',
    "no-bool": '[inject-error]\nevent = "read_aio"\nonce = "maybe"',
    "state-without-event": '[set-state]\nnew_state = "2"',
}


@pytest.mark.parametrize("name", list(RULES))
def test_files_of_rules(gallery: Path, name: str) -> None:
    (gallery / "rules").write_text(RULES[name] + "\n")
    same_io(gallery, "-f raw blkdebug:rules:raw", "read 0 4k")


IMAGE = "driver=blkdebug,image.driver=file,image.filename=raw,"
OPTIONS = (
    "align=512 align=3 align=0 align=4096 align=4G align=2G align=x max-transfer=512 max-transfer=3 max-transfer=4G align=4096,max-transfer=512 "
    "opt-write-zero=4096 opt-write-zero=3 max-write-zero=100 max-write-zero=512,opt-write-zero=1024 max-write-zero=4096,opt-write-zero=512 "
    "opt-discard=3 max-discard=3 "
    "opt-discard=4096,max-discard=512 max-transfer=1k,align=1k bogus=1 inject-error.0.event=nope inject-error.0.errno=5 "
    "inject-error.0.event=read_aio,inject-error.0.bogus=1 inject-error.0.event=read_aio,inject-error.0.iotype=nope "
    "inject-error.0.event=read_aio,inject-error.0.errno=x set-state.0.event=read_aio set-state.0.event=read_aio,set-state.0.new_state=2 "
    "config=nope config=once take-child-perms.0=write take-child-perms.0=resize,take-child-perms.1=write-unchanged take-child-perms.0=nope "
    "unshare-child-perms.0=nope "
    "unshare-child-perms.0=resize inject-error.event=read_aio inject-error.1.event=read_aio set-state.0.new_state=2 "
    "inject-error.0.event=none,inject-error.0.iotype=read"
).split()


@pytest.mark.parametrize("options", OPTIONS[:: 3 if BRIEF else 1])
def test_options(gallery: Path, options: str) -> None:
    same_io(gallery, "--image-opts " + IMAGE + options, "read 0 4k", "info")


@pytest.mark.parametrize(
    "line",
    (
        "-f qcow2 blkdebug:once:img|blkdebug::img|-f raw blkdebug:once:null-co://|-f qcow2 blkdebug:nope:img|-f qcow2 blkdebug:img|-f qcow2 blkdebug:|"
        "-f raw blkdebug:states:img"
    ).split("|"),
)
def test_names(gallery: Path, line: str) -> None:
    same_io(gallery, line, "info", "length", "write 320k 4k", "write 320k 4k", "read 320k 4k", "read 0 4k")
    same("info " + line, gallery)
    same("info --output=json " + line, gallery)


# where the same requests are made at the same events; what else there is comes below
SAME_EVENTS = (
    "l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio "
    "read_compressed write_aio vmstate_load vmstate_save cow_read cow_write reftable_grow reftable_update refblock_load refblock_update "
    "refblock_update_part refblock_alloc refblock_alloc_hookup refblock_alloc_write cluster_alloc cluster_free pwritev cluster_alloc_space none"
).split()
DEBUGGED = "--image-opts driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=%s"
INJECT = ",file.inject-error.0.event=%s,file.inject-error.0.errno=28,file.inject-error.0.once=on"


@pytest.mark.parametrize("event", SAME_EVENTS[:: 5 if BRIEF else 1])
def test_errors_at_events(gallery: Path, event: str) -> None:
    commands = ["read 0 64k", "write 0 64k", "read 0 64k", "write 70k 1k", "write -z 256k 64k", "flush", "write 512k 64k", "write -c 640k 64k", "read 640k 64k"]
    same_io(gallery, DEBUGGED % "overlay" + INJECT % event, *commands)


@pytest.mark.parametrize("iotype", ["read", "write", "write-zeroes", "discard", "block-status"])
def test_types_of_requests(gallery: Path, iotype: str) -> None:
    rule = "inject-error.0.event=none,inject-error.0.iotype=%s" % iotype
    commands = ["read 0 4k", "write 0 4k", "write -z 0 4k", "discard 0 4k", "flush", "read 0 4k"]
    same_io(gallery, "--image-opts " + IMAGE + rule, *commands)


BREAKS = [
    ["break nope A", "break write_aio A", "aio_write 0 64k", "wait_break A", "resume A", "aio_flush", "resume A", "remove_break A", "remove_break B"],
    ["break write_aio A", "aio_write 0 64k", "wait_break A", "remove_break A", "aio_flush"],
    ["break cluster_alloc A", "break l2_update B", "aio_write 512k 64k", "wait_break A", "resume A", "wait_break B", "resume B", "aio_flush"],
    ["break write_aio A", "aio_write 0 64k", "wait_break A", "read 0 4k", "write 640k 64k", "resume A", "aio_flush", "read -P 0xcd 0 64k"],
    ["break read_aio A", "break read_aio B", "aio_read 0 64k", "wait_break A", "resume A", "wait_break B", "resume B", "aio_flush"],
]


@pytest.mark.parametrize("commands", BREAKS)
def test_breakpoints(gallery: Path, commands: list[str]) -> None:
    same_io(gallery, "-f qcow2 blkdebug::img", *commands)


def test_requests_that_stop_meet_their_fate(gallery: Path) -> None:
    """Where qemu-io would wait for ever: a breakpoint that nobody comes to, and an image that is closed while a request has stopped."""
    from io_side_by_side import our_io

    found = our_io(["-c", "break l1_grow_alloc_table A", "-c", "aio_read 0 4k", "-c", "wait_break A", "-f", "qcow2", "blkdebug::img"], gallery)
    assert found.code == 1 and "no request is under way that could stop there" in found.out
    found = our_io(["-c", "break read_aio A", "-c", "aio_read 0 4k", "-c", "wait_break A", "-f", "qcow2", "blkdebug::img"], gallery)
    assert found.code == 0 and found.out.startswith("blkdebug: Suspended request 'A'\nread 4096/4096")


def test_an_image_cannot_make_us_read_rules_from_anywhere(tmp_path: Path) -> None:
    (tmp_path.parent / "rules").write_text("secret\n")
    (tmp_path / "inside").write_text("")
    setup("qemu-img create -q -f raw base 1M", tmp_path)
    for config, refused in ((str(tmp_path.parent / "rules"), True), (str(tmp_path / "inside"), False)):
        described = 'json:{"file": {"driver": "blkdebug", "config": "%s", "image": {"driver": "file", "filename": "%s/base"}}}' % (config, tmp_path)
        for name in ("blkdebug:%s:%s/base" % (config, tmp_path), described):
            setup("qemu-img create -q -u -f qcow2 -b '%s' -F raw overlay 1M" % name, tmp_path)
            try:
                diskwright.open(tmp_path / "overlay", policy="same_directory").close()
            except Error as exc:
                assert refused and isinstance(exc, Denied) and "secret" not in str(exc)
            else:
                assert not refused


def debugged(image: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"driver": "blkdebug", "image": image, **{key.replace("_", "-"): value for key, value in options.items()}}


def open_spec(spec: dict[str, Any], flags: OpenFlags = WRITABLE) -> Node:
    return Graph().open_spec(spec, flags)


def test_other_threads_go_on_while_a_request_has_stopped(gallery: Path) -> None:
    file = {"driver": "file", "filename": str(gallery / "raw")}
    with open_spec({"driver": "raw", "file": debugged(file)}) as node:
        below: Any = node.children["file"]
        below.breakpoint("write_aio", "A")
        writer = Thread(target=node.pwrite, args=(0, b"x"))
        writer.start()
        assert below.wait_suspended("A", 10)
        node.pwrite(1, b"y")
        assert node.pread(0, 2) == b"\0y"
        below.resume("A")
        writer.join()
        assert node.pread(0, 2) == b"xy"
        with pytest.raises(Error):
            below.resume("A")


@pytest.mark.parametrize("denied,perm", [("write", WRITE), ("consistent-read", CONSISTENT_READ)])
def test_permissions_that_are_taken_from_others(gallery: Path, denied: str, perm: int) -> None:
    graph = Graph()
    graph.add({"driver": "file", "node-name": "file", "filename": str(gallery / "raw")})
    graph.add({"driver": "blkdebug", "node-name": "debug", "image": "file", "unshare-child-perms": [denied]})
    try:
        with pytest.raises(Error, match="permissions '%s' are both required by .* and unshared by node 'debug'" % denied.replace("-", " ")):
            Root(graph, "file", perm)
        Root(graph, "file", (WRITE | CONSISTENT_READ) & ~perm).close()
    finally:
        graph.close()


LIMITS = [
    {"align": 512},
    {"align": 4096, "max_transfer": 8192},
    {"max_transfer": 512, "max_write_zero": 4096, "max_discard": 512},
    {"opt_write_zero": 64 * K, "max_write_zero": 128 * K, "opt_discard": 32 * K, "max_discard": 64 * K},
]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_limits_change_nothing_of_the_content(tmp_path: Path, driver: str, limits: dict[str, int]) -> None:
    setup("qemu-img create -q -f %s image 2M" % driver, tmp_path)
    model = bytearray(SIZE)
    with open_spec({"driver": driver, "file": debugged({"driver": "file", "filename": str(tmp_path / "image")}, **limits)}) as node:
        exercise(node, model, random.Random(driver))
        assert node.pread(0, SIZE) == model
    (tmp_path / "expected").write_bytes(model)
    assert theirs(["compare", "-f", "raw", "-F", driver, "expected", "image"], tmp_path).code == 0


@pytest.mark.parametrize(
    "event,once", [(event, once) for once in (True, False) for event in sorted(EVENTS - {"none"})[:: (5 if BRIEF else 1) if once else (12 if BRIEF else 3)]]
)
def test_no_failure_corrupts_an_image(tmp_path: Path, event: str, once: bool) -> None:
    """Whatever fails: what was flushed before stays, and qemu-img finds nothing worse than leaks."""
    setup("qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 image 2M", tmp_path)
    image = {"driver": "file", "filename": str(tmp_path / "image")}
    chance = random.Random(event)
    content = bytearray(SIZE)
    with open_spec({"driver": "qcow2", "file": image}) as node:
        exercise(node, content, chance, 20)
        node.create_snapshot("s")
    rule = {"event": event, "errno": 28, "once": once, "state": 2}
    start = {"event": "flush_to_disk", "state": 1, "new_state": 2}
    node = open_spec({"driver": "qcow2", "file": debugged(image, inject_error=[rule], set_state=[start])})
    touched = bytearray(SIZE)
    try:
        node.flush()
        for _number in range(30):
            offset, length = chance.randrange(SIZE - 70 * K), chance.choice((1, 4096, 70 * K))
            touched[offset : offset + length] = b"\1" * length
            try:
                chance.choice((lambda: node.pwrite(offset, b"z" * length), lambda: node.pwrite_zeroes(offset, length), lambda: node.pread(offset, length)))()
            except (Error, OSError):
                pass
        node.close()
    except (Error, OSError):
        node.abandon()
    assert theirs(["check", "-q", "image"], tmp_path).code in (0, 3)
    with open_spec({"driver": "qcow2", "file": image}, OpenFlags()) as node:
        found = node.pread(0, SIZE)
    assert all(found[at] == content[at] for at in range(0, SIZE, 256) if not touched[at])
