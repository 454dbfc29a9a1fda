# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Opening: every spelling of a description, chains and loops, relative names, and the open policy."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from samples import sample
from side_by_side import same

from diskwright.errors import Denied, Error, OptionError, Unsupported
from diskwright.graph import MAX_CHAIN, Graph, OpenPolicy, open_image, parse_filename, parse_image_opts, protocol_prefix
from diskwright.node import OpenFlags


def qemu(*argv: Any) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """top.q -> mid.q -> sub/base.raw, whose first bytes are "base"; the working directory is elsewhere."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.raw").write_bytes(b"base" + bytes(1 << 20))
    qemu("create", "-f", "qcow2", "-b", "sub/base.raw", "-F", "raw", tmp_path / "mid.q")
    qemu("create", "-f", "qcow2", "-b", "mid.q", "-F", "qcow2", tmp_path / "top.q")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


def test_every_spelling_opens_the_same_image(chain: Path) -> None:
    top = str(chain / "top.q")
    spellings: list[tuple[str, bool]] = [
        (top, False),
        ("file:" + top, False),
        (os.path.relpath(top), False),
        ("driver=qcow2,file.driver=file,file.filename=" + top, True),
        ("file.filename=" + top, True),
        ("json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": top}}), False),
        ("json:" + json.dumps({"driver": "qcow2", "file.filename": top}), False),
        ("json:" + json.dumps({"file": {"driver": "file", "filename": top}}), False),
    ]
    for name, image_opts in spellings:
        with open_image(name, image_opts=image_opts) as node:
            assert [layer.driver for layer in node.layers()] == ["qcow2", "qcow2", "raw"], name
            assert node.pread(0, 5) == b"base\0", name


def test_a_colon_makes_a_protocol_unless_a_slash_comes_first() -> None:
    assert protocol_prefix("./a:b") is None and protocol_prefix("/a:b") is None and protocol_prefix("a") is None
    assert protocol_prefix("nbd://host/x") == "nbd"
    assert parse_filename("file:a:b") == {"file": {"driver": "file", "filename": "a:b"}}
    with pytest.raises(OptionError, match="Unknown protocol 'a'"):
        parse_filename("a:b")
    assert parse_image_opts("driver=raw,file.filename=a,,b,offset=512") == {"driver": "raw", "file": {"filename": "a,b"}, "offset": "512"}


@pytest.mark.parametrize(
    "name, image_opts, message",
    [
        ("driver=nothing,file.filename=x", True, "Unknown driver 'nothing'"),
        ("driver=qcow2", True, 'A block device must be specified for "file"'),
        ("disk", True, "Cannot find device='disk' nor node-name='disk'"),
        ("json:[1]", False, "Invalid JSON object given"),
        ("json:" + "[" * 100_000, False, "Could not parse the JSON options"),
        ("json:" + '{"a":' * 100_000, False, "Could not parse the JSON options"),
        ("json:" + '"' + "x" * (1 << 21) + '"', False, "text is longer than"),
        ("driver=raw,file.driver=file,file.filename=x,colour=red", True, None),
        ("\0", False, None),
        ("x" * 5000, False, None),
    ],
    ids=range(10),
)
def test_bad_descriptions_are_errors_of_ours(chain: Path, name: str, image_opts: bool, message: Any) -> None:
    with pytest.raises(Error) as caught:
        open_image(name, image_opts=image_opts)
    assert str(caught.value).startswith("Could not open '")
    assert message is None or message in str(caught.value)


def test_a_missing_backing_file_says_whose_it_was(chain: Path) -> None:
    (chain / "sub" / "base.raw").unlink()
    with pytest.raises(Error) as caught:
        open_image(str(chain / "top.q"))
    top, mid, base = chain / "top.q", chain / "mid.q", chain / "sub" / "base.raw"
    real = subprocess.run(["qemu-img", "compare", str(top), str(top)], capture_output=True, text=True, check=False).stderr
    assert real == "qemu-img: %s\n" % caught.value
    assert str(mid) not in str(caught.value) or str(base) in str(caught.value)
    with open_image(str(top), flags=OpenFlags(no_backing=True)) as node:
        assert node.backing is None and node.backing_filename == "mid.q"


def test_a_backing_file_of_our_own_choice(chain: Path) -> None:
    other = chain / "other.raw"
    other.write_bytes(b"other" + bytes(1 << 20))
    text = "driver=qcow2,file.filename=%s,backing.driver=raw,backing.file.filename=%s" % (chain / "top.q", other)
    with open_image(text, image_opts=True) as node:
        assert node.pread(0, 5) == b"other"
    none = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "top.q")}, "backing": None})
    with open_image("json:" + none) as node:
        assert node.backing is None and node.pread(0, 5) == bytes(5)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_loops_are_errors_at_once(tmp_path: Path, length: int) -> None:
    names = ["image%d.q" % number for number in range(length)]
    for number, name in enumerate(names):
        qemu("create", "-f", "qcow2", "-u", "-b", "./" + names[(number + 1) % length], "-F", "qcow2", tmp_path / name, "1M")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Error, match="creates an infinite loop"):
        open_image(str(tmp_path / names[0]))
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_link_does_not_hide_a_loop(tmp_path: Path) -> None:
    os.symlink("image.q", tmp_path / "alias.q")
    qemu("create", "-f", "qcow2", "-u", "-b", "alias.q", "-F", "qcow2", tmp_path / "image.q", "1M")
    with pytest.raises(Error, match="creates an infinite loop"):
        open_image(str(tmp_path / "image.q"))


def test_chains_are_deep_but_not_endless(tmp_path: Path) -> None:
    previous = tmp_path / "0.raw"
    previous.write_bytes(b"deep" + bytes(508))
    template = tmp_path / "template.q"
    qemu("create", "-f", "qcow2", "-o", "cluster_size=512", "-u", "-b", "x" * 8, "-F", "qcow2", template, "512")
    content = template.read_bytes()
    for number in range(1, MAX_CHAIN + 1):
        backing = b"%07d." % (number - 1)
        (tmp_path / ("%07d." % number)).write_bytes(content.replace(b"x" * 8, backing))
    first = content.replace(b"x" * 8, b"./0.raw\0").replace(b"qcow2\0\0\0", b"raw\0\0\0\0\0").replace(b"\0\0\0\5raw", b"\0\0\0\3raw")
    (tmp_path / "0000000.").write_bytes(first.replace(b"\0\0\0\x08", b"\0\0\0\x07"))
    with open_image(str(tmp_path / ("%07d." % (MAX_CHAIN - 3)))) as node:
        assert node.pread(0, 4) == b"deep"
        assert len(list(node.layers())) == MAX_CHAIN - 1
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Error, match="deeper than 200"):
        open_image(str(tmp_path / ("%07d." % MAX_CHAIN)))
    assert len(os.listdir("/proc/self/fd")) == descriptors


POLICIES = [
    (OpenPolicy("any"), True, True, True),
    (OpenPolicy("none"), False, False, False),
    (OpenPolicy("same_directory"), True, False, False),
]


@pytest.mark.parametrize("policy, inside, outside, link", POLICIES, ids=["any", "none", "same_directory"])
def test_the_open_policy_decides_what_an_image_may_make_us_open(tmp_path: Path, policy: OpenPolicy, inside: bool, outside: bool, link: bool) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "sub" / "base.raw").write_bytes(bytes(512))
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" + bytes(506))
    os.symlink("../secret", images / "link")
    cases = {"sub/base.raw": inside, str(secret): outside, "../secret": outside, "link": link}
    for number, (name, allowed) in enumerate(cases.items()):
        image = images / ("%d.q" % number)
        qemu("create", "-f", "qcow2", "-u", "-b", name, "-F", "raw", image, "512")
        if allowed:
            with open_image(str(image), policy=policy) as node:
                assert node.backing is not None
        else:
            with pytest.raises(Denied) as caught:
                open_image(str(image), policy=policy)
            assert str(image) in str(caught.value) and name in str(caught.value)


def test_listed_places_json_names_and_protocols(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    base = shelf / "base.raw"
    base.write_bytes(bytes(512))
    (tmp_path / "shelf2").write_bytes(bytes(512))
    image = tmp_path / "image.q"
    described = "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(base)}})
    for name, policy, good in [
        (str(base), OpenPolicy("listed", [str(shelf)]), True),
        (str(base), OpenPolicy("listed", [str(base)]), True),
        (str(base), OpenPolicy("listed", []), False),
        (str(tmp_path / "shelf2"), OpenPolicy("listed", [str(shelf)]), False),
        (described, OpenPolicy("any"), True),
        (described, OpenPolicy("any", json=False), False),
        (described, OpenPolicy("listed", [str(shelf)]), True),
        ("null-co://", OpenPolicy("any", protocols=["file"]), False),
        ("null-co://", OpenPolicy("any"), True),
    ]:
        qemu("create", "-f", "qcow2", "-u", "-b", name, "-F", "raw", image, "512")
        if good:
            open_image(str(image), policy=policy).close()
        else:
            with pytest.raises(Denied):
                open_image(str(image), policy=policy)


def test_options_of_every_node_and_named_nodes(chain: Path) -> None:
    graph = Graph()
    spec = {
        "driver": "qcow2",
        "node-name": "disk",
        "read-only": "on",
        "discard": "unmap",
        "cache": {"direct": "off", "no-flush": "on"},
        "file": {"driver": "file", "filename": str(chain / "top.q"), "node-name": "file0"},
    }
    with graph.open_spec(spec, OpenFlags(writable=True)) as node:
        assert graph.named["disk"] is node and graph.named["file0"] is node.children["file"]
        assert node.read_only and node.flags.unmap and node.flags.no_flush and not node.flags.direct
    with pytest.raises(OptionError, match="Invalid discard option"):
        Graph().open_spec({"driver": "null-co", "discard": "perhaps"}, OpenFlags())
    with pytest.raises((OptionError, Unsupported)):
        Graph().open_spec({"driver": "null-co", "cache": {"direct": "perhaps"}}, OpenFlags())


def test_read_only_off_where_nothing_can_be_written(tmp_path: Path) -> None:
    """It is refused by drivers that cannot write, even if the command only reads; the bare file of such an image can be written."""
    for name, file in (("bochs", "empty.bochs"), ("cloop", "simple-pattern.cloop"), ("dmg", "simple-dmg.dmg")):
        sample(file, tmp_path)
        for driver in ("driver=%s,file.filename=%s" % (name, file), "driver=raw,file.driver=%s,file.file.filename=%s" % (name, file)):
            for words, refused in (("read-only=off", True), ("read-only=on", False), ("auto-read-only=off", False), ("read-only=off,auto-read-only=on", False)):
                outcome = same("map --output=json --image-opts %s,%s" % (driver, words), tmp_path)
                assert ("Image is read-only" in outcome.err) == refused
        assert same("map --output=json --image-opts driver=raw,read-only=off,file.filename=" + file, tmp_path).code == 0
    for name in ("empty.bochs", "simple-pattern.cloop"):
        assert "Image is read-only" in same("info --image-opts read-only=off,file.filename=" + name, tmp_path).err
    (tmp_path / "files").mkdir()
    for words in ("driver=vvfat,dir=files,read-only=off", "driver=raw,file.driver=vvfat,file.dir=files,read-only=off", "driver=vvfat,dir=files"):
        same("map --output=json --image-opts " + words, tmp_path)
