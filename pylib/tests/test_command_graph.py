# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`diskwright graph` and --blockdev on the command line: against qemu-storage-daemon, graphviz's grammar and an XML parser."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from diskwright import cli
from diskwright.commands.ui import UI
from diskwright.drawing import MAX_BOXES, Picture
from diskwright.drawing.svg import layout, rows_of
from diskwright.errors import OptionError

THROTTLED = [
    *("--object", "throttle-group,x-bps-total=10485760,id=tg0"),
    *("--blockdev", "file,filename=vm.qcow2,node-name=file0"),
    *("--blockdev", "qcow2,file=file0,node-name=qcow0"),
    *("--blockdev", "throttle,file=qcow0,throttle-group=tg0,node-name=drive0"),
]


def run(*args: str) -> tuple[int, str, str]:
    """Exit code, output and messages of one command."""
    out, err = io.StringIO(), io.StringIO()
    return cli.run(args, UI("diskwright", out, err)), out.getvalue(), err.getvalue()


def good(*args: str) -> str:
    status, out, err = run(*args)
    assert status == 0 and err == "", err
    return out


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """vm.qcow2 of 2 MiB, and over.qcow2 on top of it; the working directory is theirs."""
    monkeypatch.chdir(tmp_path)
    subprocess.run("qemu-img create -q -f qcow2 vm.qcow2 2M && qemu-io -c 'write -P 7 0 64k' vm.qcow2 >/dev/null", shell=True, check=True)
    subprocess.run("qemu-img create -q -f qcow2 -b vm.qcow2 -F qcow2 over.qcow2", shell=True, check=True)
    return tmp_path


def monitor(arguments: list[str], *commands: str) -> list[Any]:
    """What qemu-storage-daemon, started with `arguments`, returns to these commands."""
    lines = [json.dumps({"execute": command}) for command in ("qmp_capabilities", *commands, "quit")]
    argv = ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "m", *arguments]
    done = subprocess.run(argv, input="\n".join(lines), stdout=subprocess.PIPE, check=True, text=True, timeout=60)
    return [reply["return"] for reply in map(json.loads, done.stdout.splitlines()) if "return" in reply][1:-1]


def test_the_throttled_qcow2_runs_as_it_is_written() -> None:
    assert good("graph", *THROTTLED) == (
        "drive0 (throttle)\n|-- file: qcow0 (qcow2)\n|   `-- file: file0 (file, vm.qcow2)\n`-- throttle-group: tg0 (throttle-group)\n"
    )
    assert "file format: throttle\nvirtual size: 2 MiB" in good("info", *THROTTLED, "--image-opts", "drive0")
    good("convert", "-O", "raw", *THROTTLED, "--image-opts", "drive0", "copy.raw")
    assert good("compare", *THROTTLED, "--image-opts", "drive0", "driver=raw,file.filename=copy.raw") == "Images are identical.\n"
    good("convert", "-n", "-f", "raw", *THROTTLED, "copy.raw", "--target-image-opts", "drive0")
    good("check", "-q", *THROTTLED, "--image-opts", "qcow0")
    assert "Image resized" in good("resize", *THROTTLED, "--image-opts", "qcow0", "3M")
    assert "4 read requests" in good("bench", "-c", "4", *THROTTLED[2:6], "--image-opts", "qcow0")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--blockdev", "raw,fiel=f,node-name=q"], "--blockdev raw,fiel=f,node-name=q: Parameter 'file' is missing\nDid you mean 'file' where it says 'fiel'?"),
        (["--blockdev", "qcow2,file=f,node-name=q"], "Cannot find device='f' nor node-name='f'"),
        ([*THROTTLED, "--blockdev", "qcow2,file=file0,node-name=q"], "Permission conflict on node 'file0'"),
        ([*THROTTLED[2:]], "Throttle group 'tg0' does not exist"),
        ([*THROTTLED, "--blockdev", "raw,file=drive,node-name=q"], "nor node-name='drive'\nDid you mean 'drive0'?"),
    ],
)
def test_mistakes_are_named_before_anything_is_opened(args: list[str], message: str) -> None:
    for command in (["graph"], ["info", "--image-opts", "drive0"], ["resize", "--image-opts", "drive0", "9M"]):
        status, out, err = run(*command[:1], *args, *command[1:])
        assert (status, out) == (1, "") and message in err


def test_qemu_makes_the_same_graph_of_our_arguments() -> None:
    specs = [
        *THROTTLED,
        *("--blockdev", "quorum,node-name=v,vote-threshold=1,children.0.driver=null-co,children.1.driver=null-co"),
        *("--blockdev", '{"driver": "qcow2", "node-name": "bare", "read-only": true, "file": {"driver": "file", "filename": "over.qcow2"}, "backing": null}'),
    ]
    ours = shlex.split(good("graph", "--output", "qemu", *specs).replace("\\\n", ""))
    assert monitor(ours, "query-named-block-nodes") != [] and ours[0] == "--object"
    names = [[(node["node-name"], node["drv"]) for node in monitor(arguments, "query-named-block-nodes")[0]] for arguments in (ours, specs)]
    assert {pair for pair in names[0] if pair[0][0] != "#"} == {pair for pair in names[1] if pair[0][0] != "#"}


def plain(found: Any) -> list[str]:
    """Nodes as they can be compared: made-up names are all the same."""
    named = [{**node, "node-name": "#" if node["node-name"].startswith("#") else node["node-name"]} for node in found]
    return sorted(json.dumps(node, sort_keys=True) for node in named)


@pytest.mark.parametrize(
    "arguments",
    [
        THROTTLED,
        ["--blockdev", "qcow2,node-name=q,file.driver=file,file.filename=over.qcow2,file.cache.direct=on,cache.no-flush=on"],
        ["--blockdev", "raw,node-name=r,file.driver=file,file.filename=vm.qcow2,offset=512,read-only=on"],
        [*("--blockdev", "null-co,node-name=n"), *("--blockdev", "quorum,node-name=qu,vote-threshold=2,children.0=n,children.1.driver=null-co")],
        ["--blockdev", "copy-on-read,node-name=c,file.driver=qcow2,file.file.driver=file,file.file.filename=over.qcow2"],
    ],
    ids=["throttled", "overlay", "window", "quorum", "copy-on-read"],
)
def test_nodes_are_what_query_named_block_nodes_says(arguments: list[str]) -> None:
    ours = json.loads(good("graph", "--output", "nodes", *arguments))
    assert plain(ours) == plain(monitor(arguments, "query-named-block-nodes")[0])


def test_opened_graphs_show_what_images_name() -> None:
    assert good("graph", "--image", "over.qcow2") == (
        "qcow2 (2 MiB, read-only)\n"
        "|-- file: file (over.qcow2, 192 KiB, read-only)\n"
        "`-- backing: qcow2 (2 MiB, read-only)\n"
        "    `-- file: file (vm.qcow2, 384 KiB, read-only)\n"
    )
    text = good("graph", "--open", "--blockdev", "qcow2,node-name=q,file.driver=file,file.filename=over.qcow2")
    assert text.startswith("q (qcow2, 2 MiB)\n|-- file: file (over.qcow2, 192 KiB)\n`-- backing: qcow2 (2 MiB, read-only)\n")
    holder = subprocess.Popen(["qemu-io", "vm.qcow2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout
    holder.stdin.write(b"length\n")
    holder.stdin.flush()
    while b"MiB" not in holder.stdout.readline():
        pass
    status, _out, err = run("graph", "--open", *THROTTLED)
    assert status == 1 and "lock" in err
    assert "drive0 (throttle, 2 MiB, read-only)" in good("graph", "--open", "-U", *THROTTLED)
    holder.communicate(b"quit\n")


# The part of https://graphviz.org/doc/info/lang.html that is used.
QUOTED = r'"(?:[^"\\]|\\.)*"'
ATTRIBUTES = r"\[\w+=(?:%s|\w+)(?:, \w+=(?:%s|\w+))*\]" % (QUOTED, QUOTED)
DOT = re.compile(r"digraph \w+ \{\n(    (?:rankdir=TB|(?:node|edge|n\d+|n\d+ -> n\d+) %s);\n)*\}\n" % ATTRIBUTES)
MERMAID = re.compile(r'flowchart TD\n(    n\d+(?: -\.?-?>(?:\|"[^"\n]*"\|)? n\d+|[(\[/{]+"[^"\n]*"[)\]/}]+)\n)*')


def test_drawings_are_well_formed_whatever_files_are_called(images: Path) -> None:
    name = 'a"b\\c<d>&\n#e;.qcow2'
    (images / "vm.qcow2").rename(images / name)
    described = json.dumps({"driver": "file", "node-name": "f", "filename": name})
    args = ["--blockdev", described, "--blockdev", "qcow2,node-name=a,file=f,read-only=on", "--blockdev", "qcow2,node-name=b,file=f,read-only=on"]
    assert DOT.fullmatch(good("graph", "--output", "dot", *args))
    assert MERMAID.fullmatch(good("graph", "--output", "mermaid", *args))
    root = ElementTree.fromstring(good("graph", "--output", "svg", *args))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert 'a"b\\c<d>&?#e;.qcow2' in texts and texts.count("qcow2") == 2
    text = good("graph", *args)
    assert text.count('a"b') == 1 and "file: f (see above)" not in text.split("\n")[0]


def test_boxes_do_not_overlap_and_stand_below_their_users() -> None:
    picture = Picture()
    boxes = [picture.add("format", "box %d" % index, "x" * (index * 7 % 30)) for index in range(60)]
    for index in range(1, 60):
        picture.arrows.append((boxes[index // 3], boxes[index], "file"))
        picture.arrows.append((boxes[max(0, index - 7)], boxes[index], "other"))
    places = layout(picture)
    assert sum(len(row) for row in rows_of(picture)) == 60
    for source, target, _label in picture.arrows:
        assert places[source.number].y + places[source.number].height < places[target.number].y
    for left in places:
        assert left.x >= 0
        for right in places:
            assert left is right or left.row != right.row or left.x + left.width <= right.x or right.x + right.width <= left.x
    with pytest.raises(OptionError, match="at most 1000 boxes"):
        for _index in range(MAX_BOXES):
            picture.add("format", "one more")


def test_files_are_checked_translated_and_written_again(images: Path) -> None:
    text = good("graph", "--output", "yaml", *THROTTLED)
    (images / "vm.yaml").write_text("# mine\n" + text)
    assert good("graph", "-q", "vm.yaml") == "" and good("graph", "--output", "yaml", "vm.yaml") == text
    good("graph", "--rewrite", "vm.yaml")
    assert (images / "vm.yaml").read_text() == "# mine\n" + text
    (images / "vm.json").write_text(good("graph", "--output", "json", "vm.yaml"))
    assert good("graph", "--output", "qemu", "vm.json") == good("graph", "--output", "qemu", *THROTTLED)
    (images / "bad.yaml").write_text(text.replace("file: qcow0", "file: qcow"))
    assert run("graph", "bad.yaml") == (1, "", "diskwright: bad.yaml: Cannot find device='qcow' nor node-name='qcow'\nDid you mean 'qcow0'?\n")
    before = (images / "bad.yaml").read_text()
    assert run("graph", "--rewrite", "bad.yaml")[0] == 1 and (images / "bad.yaml").read_text() == before


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "Expecting a graph file, --blockdev, --drive or --image"),
        (["a", "b"], "Expecting one graph file"),
        (["--output", "png", "a"], "--output expects one of text, dot, mermaid, svg, json, yaml, qemu, nodes, not 'png'"),
        (["--image", "vm.qcow2", "a"], "--image excludes graph files, --blockdev and --drive"),
        (["--image", "vm.qcow2", "--output", "yaml"], "An image has no description"),
        (["--image", "nothing"], "Could not open 'nothing': No such file or directory"),
        (["nothing.yaml"], "nothing.yaml: No such file or directory"),
        (["--rewrite"], "Expecting names of graph files"),
        (["--drive", "file=x,formt=raw"], "--drive file=x,formt=raw: Parameter 'formt' is unexpected\nDid you mean 'format'?"),
    ],
)
def test_command_lines_that_cannot_be(args: list[str], message: str) -> None:
    status, out, err = run("graph", *args)
    assert status == 1 and out == "" and message in err


def test_a_child_is_no_place() -> None:
    text = good("graph", "--blockdev", "null-co,node-name=n", "--blockdev", "blkdebug,node-name=d,image=n,inject-error.0.event=read_aio")
    assert text == "d (blkdebug)\n`-- image: n (null-co)\n"


def test_drives_are_translated_and_the_rest_reported() -> None:
    status, out, err = run("graph", "--output", "qemu", "--drive", "file=vm.qcow2,format=qcow2,bps=5,werror=stop,if=virtio", "--drive", "file=over.qcow2,id=o")
    assert status == 0 and [line.split(",")[0] for line in out.splitlines()] == [
        "--object throttle-group",
        "--blockdev qcow2",
        "--blockdev throttle",
        "--blockdev raw",
    ]
    assert "drive=drive0-throttle,werror=stop" in err and "if=virtio: belongs to the device" in err and "taken for raw" in err
