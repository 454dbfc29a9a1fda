# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Descriptions: what is read from keys, JSON, YAML and -drive, and what is said of those that cannot be right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diskwright import graph_file
from diskwright.description import MAX_NODES, check_blockdevs, in_order, parse_blockdev, read_node
from diskwright.drive import parse_drive
from diskwright.errors import Error, OptionError, Unsupported
from diskwright.graph_file import GraphDescription, load, rewrite
from diskwright.objects import parse_object

OBJECTS = {"tg0": parse_object("throttle-group,id=tg0"), "s": parse_object("secret,id=s,data=x")}


def checked(*texts: str, ordered: bool = True) -> list[dict[str, Any]]:
    specs = [parse_blockdev(text) for text in texts]
    check_blockdevs(specs, OBJECTS, ordered=ordered)
    return specs


def test_keys_and_json_are_the_same() -> None:
    text = "qcow2,node-name=q,read-only=on,cache.direct=off,l2-cache-size=1M,overlap-check=all,file.driver=file,file.filename=a,,b"
    typed = {
        "driver": "qcow2",
        "node-name": "q",
        "read-only": True,
        "cache": {"direct": False},
        "l2-cache-size": 1 << 20,
        "overlap-check": "all",
        "file": {"driver": "file", "filename": "a,b"},
    }
    assert parse_blockdev(text) == typed == parse_blockdev(json.dumps(typed)) == parse_blockdev("driver=" + text)
    assert parse_blockdev("quorum,vote-threshold=2,children.0=a,children.1.driver=null-co")["children"] == ["a", {"driver": "null-co"}]
    assert parse_blockdev('{"driver": "qcow2", "file": "f", "backing": null}') == {"driver": "qcow2", "file": "f", "backing": None}


@pytest.mark.parametrize(
    "text, message, hint",
    [
        ("qcwo2,file=f", "Parameter 'driver' does not accept value 'qcwo2'", "Did you mean 'qcow2'?"),
        ("file=f", "Parameter 'driver' is missing", None),
        ("raw,file=f,ofset=1", "Parameter 'ofset' is unexpected", "Did you mean 'offset'?"),
        ("raw,fiel=f", "Parameter 'file' is missing", "Did you mean 'file' where it says 'fiel'?"),
        ("raw,file.driver=file,file.filname=x", "Parameter 'file.filname' is unexpected", "Did you mean 'file.filename'?"),
        ("qcow2,file=f,encrypt.formt=luks", "Parameter 'encrypt.formt' is unexpected", "Did you mean 'encrypt.format'?"),
        ("raw,file=f,size=x", "Parameter 'size' expects integer", None),
        ("raw,file=f,read-only=maybe", "Parameter 'read-only' expects 'on' or 'off'", None),
        ("raw,file=f,discard=unmapp", "Parameter 'discard' does not accept value 'unmapp'", "Did you mean 'unmap'?"),
        ("raw,file=f,readonly", "Expected '=' after parameter 'readonly'", None),
        ("raw,node-name=1,file=f", "Invalid node-name: '1'", None),
        ("raw,node-name=" + "x" * 32 + ",file=f", "Node name too long", None),
        ('{"driver": "raw", "file": 5}', "Invalid parameter type for 'file', expected: BlockdevRef", None),
        ('{"driver": "raw", "file": null}', "Invalid parameter type for 'file', expected: BlockdevRef", None),
        ('{"driver": "raw", "file": "f", "size": "1"}', "Invalid parameter type for 'size', expected: integer", None),
        ('{"driver": "raw", "file": "f", "size": 1.5}', "Invalid parameter type for 'size', expected: integer", None),
        ('{"driver": "raw", "file": "f", "size": -1}', "Value '-1' is out of range for parameter 'size'", None),
        ('{"driver": "raw", "file": "f", "read-only": "on"}', "Invalid parameter type for 'read-only', expected: boolean", None),
        ('{"driver": "raw", "file": "f", "cache": {"x": 1}}', "Parameter 'cache.x' is unexpected", None),
        ('{"driver": "quorum", "children": [5]}', "Invalid parameter type for 'children[0]', expected: BlockdevRef", None),
        ('{"driver": "raw"', "JSON parse error", None),
    ],
)
def test_what_is_wrong_is_named_with_what_is_near(text: str, message: str, hint: Any) -> None:
    with pytest.raises(OptionError) as caught:
        parse_blockdev(text)
    assert message in str(caught.value) and caught.value.hint == hint


LATER = "It is described later; what a node refers to comes first."


@pytest.mark.parametrize(
    "texts, message, hint",
    [
        (["raw,file=f"], "'node-name' must be specified for the root node", None),
        (["null-co,node-name=a", "null-co,node-name=a"], "Duplicate nodes with node-name='a'", None),
        (["raw,node-name=a,file.driver=null-co,file.node-name=a"], "Duplicate nodes with node-name='a'", None),
        (["null-co,node-name=disk", "raw,node-name=r,file=dsk"], "Cannot find device='dsk' nor node-name='dsk'", "Did you mean 'disk'?"),
        (["raw,node-name=r,file=n", "null-co,node-name=n"], "Cannot find device='n' nor node-name='n'", LATER),
        (["raw,node-name=r,file=r"], "The nodes are in a cycle: r -> r", None),
        (["raw,node-name=a,file=b", "raw,node-name=b,file.driver=raw,file.file=c", "raw,node-name=c,file=a"], "in a cycle: a -> b -> c -> a", None),
        (["throttle,node-name=t,throttle-group=tg1,file.driver=null-co"], "Throttle group 'tg1' does not exist", "Did you mean 'tg0'?"),
        (["throttle,node-name=t,throttle-group=s,file.driver=null-co"], "Throttle group 's' does not exist", "Did you mean 's'?"),
        (["qcow2,node-name=q,encrypt.key-secret=no,file.driver=null-co"], "No secret with id 'no'", None),
        (
            ["null-co,node-name=n", "qcow2,node-name=a,file=n", "qcow2,node-name=b,file=n"],
            "Permission conflict on node 'n': permissions 'write, resize' are both required by node 'a' (uses node 'n' as 'file' child) and unshared by "
            "node 'b' (uses node 'n' as 'file' child).",
            None,
        ),
        (["null-co,node-name=n,read-only=on", "qcow2,node-name=q,file=n"], "Block node is read-only", None),
        (["raw,node-name=n%d,file=n%d" % (index, index + 1) for index in range(300)] + ["null-co,node-name=n300"], "deeper than 200 nodes", None),
    ],
)
def test_what_does_not_go_together_is_found_without_opening(texts: list[str], message: str, hint: Any) -> None:
    with pytest.raises(Error) as caught:
        checked(*texts, ordered=False if "n300" in texts[-1] else True)
    assert message in str(caught.value)
    if hint is None or "'s' does" not in message:
        assert caught.value.hint == hint


def test_what_goes_together_passes() -> None:
    checked("null-co,node-name=n", "raw,node-name=a,file=n", "raw,node-name=b,file=n")
    checked("null-co,node-name=n", "qcow2,node-name=a,file=n,read-only=on", "qcow2,node-name=b,file=n,read-only=on")
    checked("throttle,node-name=t,throttle-group=tg0,file.driver=qcow2,file.encrypt.key-secret=s,file.file.driver=null-co")
    specs = checked("raw,node-name=r,file=n", "raw,node-name=m,file=r", "null-co,node-name=n", ordered=False)
    assert [spec["node-name"] for spec in in_order(specs)] == ["n", "r", "m"]


def test_exports_are_users_too(tmp_path: Path) -> None:
    whole = {"blockdevs": [{"driver": "null-co", "node-name": "n"}, {"driver": "qcow2", "node-name": "q", "file": "n"}]}
    export = {"type": "nbd", "id": "e", "node-name": "n", "writable": True}
    with pytest.raises(Error, match="Permission conflict on node 'n'"):
        graph_file.parse({**whole, "exports": [export]}, "x").check()
    with pytest.raises(Error, match="two exports with the name 'q'"):
        graph_file.parse({**whole, "exports": [{**export, "node-name": "q"}, {**export, "id": "f", "node-name": "q"}]}, "x").check()
    with pytest.raises(OptionError, match="Cannot find device='no' nor node-name='no'"):
        graph_file.parse({**whole, "exports": [{**export, "node-name": "no"}]}, "x").check()
    graph_file.parse({**whole, "exports": [{**export, "node-name": "q"}]}, "x").check()


YAML = """\
# the whole
objects:
  - qom-type: throttle-group   # slow
    id: tg0
    x-bps-total: "10485760"    # ten a second
blockdevs:
  # the disk
  - driver: qcow2
    node-name: disk
    read-only: on
    cache.direct: "off"
    file: {driver: file, filename: a.q}  # beside
  - driver: throttle
    node-name: t
    throttle-group: tg0
    file: disk
"""


def test_a_yaml_file_is_written_again_with_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(YAML)
    with pytest.raises(OptionError) as caught:
        load(str(path))
    assert str(caught.value) == "%s: objects[0]: Invalid parameter type for 'x-bps-total', expected: integer" % path
    text = rewrite(str(path))
    for remark in ("# the whole", "# slow", "# ten a second", "# the disk", "# beside"):
        assert text.count(remark) == 1
    path.write_text(text)
    found = load(str(path))
    found.check()
    assert rewrite(str(path)) == text
    assert found.blockdevs[0] == {
        "driver": "qcow2",
        "node-name": "disk",
        "read-only": True,
        "cache": {"direct": False},
        "file": {"driver": "file", "filename": "a.q"},
    }
    assert found.objects["tg0"].properties == {"limits": {"bps-total": 10485760}}
    same = tmp_path / "g.json"
    same.write_text(graph_file.to_json(found.as_mapping()))
    assert load(str(same)).as_mapping() == found.as_mapping() == graph_file.parse(graph_file.load_yaml(text, "x"), "x").as_mapping()


def test_yaml_without_its_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)
    (tmp_path / "g.yaml").write_text("blockdevs: []\n")
    with pytest.raises(Unsupported, match=r"YAML needs the Python package 'ruamel\.yaml', which is not installed"):
        load(str(tmp_path / "g.yaml"))


LAUGHS = "".join("- &%s [%s]\n" % (new, ", ".join(["*" + old] * 9)) for old, new in zip("abcdefg", "bcdefgh"))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("g.yaml", "blockdevs: [", "g.yaml:1:13: "),
        ("g.yaml", "a: 1\n", "Parameter 'a' is unexpected"),
        ("g.yaml", "blockdev: []\n", "Parameter 'blockdev' is unexpected"),
        ("g.yaml", "[1]\n", "is a mapping with the keys objects, blockdevs, nbd-server, exports"),
        ("g.yaml", "", "is a mapping"),
        ("g.yaml", "blockdevs: 5\n", "Invalid parameter type for 'blockdevs', expected: array"),
        ("g.yaml", "blockdevs: [5]\n", "blockdevs[0]: expected a mapping"),
        ("g.yaml", "blockdevs: [{1: 2}]\n", "a key is not a text"),
        ("g.yaml", "blockdevs: []\nblockdevs: []\n", 'found duplicate key "blockdevs"'),
        ("g.yaml", "blockdevs: [!!python/object:os.system x]\n", "could not determine a constructor"),
        ("g.yaml", "blockdevs: " + "[" * 50_000, "nested too deeply"),
        ("g.yaml", "blockdevs: \n" + "- " * 50_000, "nested too deeply"),
        ("g.yaml", "objects:\n- &a [x, x, x, x]\n" + LAUGHS, "too many values"),
        ("g.yaml", "blockdevs: &a [*a]\n", "g.yaml: "),
        ("g.yaml", "#" * ((1 << 17) + 1), "at most 131072 bytes long"),
        ("g.yaml", "blockdevs: [{driver: raw, node-name: r, file: 2020-01-01}]\n", "Invalid parameter type for 'file', expected: BlockdevRef"),
        ("g.yaml", "blockdevs: [{driver: raw, node-name: r, file: f, read-only: on}]\n", "expected: boolean"),
        ("g.json", "{" * 100_000, "g.json: "),
        ("g.json", '{"blockdevs": [' + '{"driver":"raw","file":' * 150 + "}" * 150 + "]}", "g.json: "),
        ("g.json", "x" * ((1 << 20) + 1), "at most 1048576 bytes long"),
        ("g.json", "\xff", "not a text in UTF-8"),
        ("g.json", '{"exports": [{"type": "nbd", "id": "e", "node-name": "n", "writeable": true}]}', "exports[0]: Parameter 'writeable' is unexpected"),
        ("g.json", '{"nbd-server": {"addr": {"path": "x"}}}', "nbd-server: Parameter 'addr.type' is missing"),
        ("g.json", '{"nbd-server": {}}', "nbd-server: Parameter 'addr.type' is missing"),
    ],
    ids=range(24),
)
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(OptionError) as caught:
        load(str(path)).check()
    assert message in str(caught.value) and str(caught.value).startswith(str(path))


def test_as_many_nodes_as_there_may_be() -> None:
    specs = [read_node({"driver": "raw", "node-name": "n%d" % index, "file": "n0"}, True) for index in range(1, MAX_NODES)]
    base = read_node({"driver": "null-co", "node-name": "n0"}, True)
    check_blockdevs([base, *specs], {})
    with pytest.raises(OptionError, match="more than %d nodes" % MAX_NODES):
        check_blockdevs([base, *specs, read_node({"driver": "null-co", "node-name": "more"}, True)], {})


def test_arguments_say_the_same_as_the_description() -> None:
    whole = {
        "objects": [{"qom-type": "throttle-group", "id": "tg0", "limits": {"bps-total": 5}}],
        "blockdevs": [
            {"driver": "file", "node-name": "f", "filename": "a,b=c.q", "cache": {"direct": True}},
            {"driver": "qcow2", "node-name": "q", "file": "f", "backing": None},
            {"driver": "quorum", "node-name": "v", "vote-threshold": 1, "children": ["q", {"driver": "null-co"}]},
        ],
    }
    words = graph_file.to_arguments(graph_file.parse(whole, "x"))
    assert words[:4] == ["--object", "throttle-group,id=tg0,limits.bps-total=5", "--blockdev", "file,node-name=f,cache.direct=on,filename=a,,b=c.q"]
    again = [parse_blockdev(word) for word in words[3::2]]
    assert again == whole["blockdevs"] and GraphDescription({}, again).as_mapping() == {"blockdevs": whole["blockdevs"]}


def drive(text: str) -> tuple[list[str], dict[str, str]]:
    found = parse_drive(text)
    words = graph_file.to_arguments(GraphDescription(found.objects, found.blockdevs))
    return words[1::2], found.device


@pytest.mark.parametrize(
    "text, arguments, device",
    [
        ("file=d.q,format=qcow2", ["qcow2,node-name=drive0,file.driver=file,file.filename=d.q"], {}),
        ("file=d.raw,id=d,readonly=on,if=none", ["raw,node-name=d,read-only=on,file.driver=file,file.read-only=on,file.filename=d.raw"], {}),
        (
            "file=d.q,format=qcow2,cache=none,aio=native,discard=on,detect-zeroes=unmap",
            [
                "qcow2,node-name=drive0,discard=unmap,cache.direct=on,cache.no-flush=off,detect-zeroes=unmap,file.driver=file,file.discard=unmap,"
                "file.cache.direct=on,file.cache.no-flush=off,file.filename=d.q,file.aio=native"
            ],
            {},
        ),
        (
            "file=d.q,format=qcow2,cache=writethrough,werror=stop,rerror=report,serial=x",
            ["qcow2,node-name=drive0,cache.direct=off,cache.no-flush=off,file.driver=file,file.cache.direct=off,file.cache.no-flush=off,file.filename=d.q"],
            {"write-cache": "off", "werror": "stop", "rerror": "report", "serial": "x"},
        ),
        (
            "file=d.q,format=qcow2,copy-on-read=on,bps=1000,iops_rd=5,throttling.iops-read-max=50,throttling.group=g",
            [
                "throttle-group,id=g,limits.bps-total=1000,limits.iops-read=5,limits.iops-read-max=50",
                "qcow2,node-name=drive0,file.driver=file,file.filename=d.q",
                "copy-on-read,node-name=drive0-cor,file=drive0",
                "throttle,node-name=drive0-throttle,throttle-group=g,file=drive0-cor",
            ],
            {},
        ),
        (
            "driver=qcow2,file.driver=file,file.filename=x,l2-cache-size=1M",
            ["qcow2,node-name=drive0,file.driver=file,file.filename=x,l2-cache-size=1048576"],
            {},
        ),
        ('file=json:{"driver":"null-co"}', ["null-co,node-name=drive0"], {}),
    ],
)
def test_drives_become_nodes(text: str, arguments: list[str], device: dict[str, str]) -> None:
    assert drive(text) == (arguments, device)
    program = ["qemu-storage-daemon"]
    for word in arguments:
        if "file" not in word:
            program += ["--object" if word.startswith("throttle-group") else "--blockdev", word]
    subprocess.run([*program, "--help"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "text, message, hint",
    [
        ("file=x,cach=none", "Parameter 'cach' is unexpected", "Did you mean 'cache'?"),
        ("file=x,cache=non", "invalid cache option", "Did you mean 'none'?"),
        ("file=x,bps=fast", "Parameter 'bps' expects a number", None),
        ("file=x,bps=1,bps_rd=1", "total values and read/write values cannot be used at the same time", None),
        ("file=x,media=tape", "'tape' invalid media", None),
        ("file=x,discard=maybe", "Invalid discard option", None),
        ("file=x,snapshot=maybe", "Parameter 'snapshot' expects 'on' or 'off'", None),
        ("file=x,format=qcwo2", "does not accept value 'qcwo2'", "Did you mean 'qcow2'?"),
        ("file=x,id=1", "Invalid node-name: '1'", None),
    ],
)
def test_drives_that_cannot_be(text: str, message: str, hint: Any) -> None:
    with pytest.raises(OptionError) as caught:
        parse_drive(text)
    assert message in str(caught.value) and caught.value.hint == hint


def test_what_a_drive_says_besides() -> None:
    found = parse_drive("file=x,snapshot=on,if=virtio")
    assert found.snapshot and found.top == "drive0" and len(found.notes) == 3
