# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""qcow2 images made by us and by the real tools, for the tests of the driver."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from diskwright.formats.qcow2 import Qcow2
from diskwright.formats.qcow2.options import Qcow2Options
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from diskwright.node import Node
from diskwright.protocols.file import File, FileOptions

RW = OpenFlags(writable=True, resize=True)


def tool(*args: object, fails: bool = False) -> str:
    """Run qemu-img or qemu-io; standard output, or standard error if it is to fail."""
    done = subprocess.run([str(arg) for arg in args], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode != 0) == fails, "%s: %s%s" % (args, done.stdout, done.stderr)
    return done.stderr if fails else done.stdout


def qemu_io(path: Path, *commands: str, **options: str) -> None:
    """Run commands of qemu-io on an image."""
    extra = ["--image-opts", "driver=qcow2,file.filename=%s%s" % (path, "".join(",%s=%s" % pair for pair in options.items()))]
    done = subprocess.run(["qemu-io", *(arg for c in commands for arg in ("-c", c)), *extra], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


def make(path: Path, size: int, options: str = "") -> None:
    """Make an image with our driver. Raises what that raises."""
    path.write_bytes(b"")
    record = Qcow2.create_options.from_string(options)
    record.size = size
    with File(FileOptions.from_mapping({"filename": str(path)}), RW) as file:
        Qcow2.create(file, record)


def make_theirs(path: Path, size: int, options: str = "", fails: bool = False) -> str:
    """Make an image with qemu-img; what it says if it is to fail."""
    said = tool("qemu-img", "create", "-q", "-u", "-f", "qcow2", *(("-o", options) if options else ()), path, size, fails=fails)
    return said.strip().replace("qemu-img: %s: " % path, "")


def open_image(path: Path, writable: bool = True, **options: Any) -> Qcow2:
    """Open an image with its backing chain."""
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **options}
    node = Graph().open_spec(spec, RW if writable else OpenFlags())
    assert isinstance(node, Qcow2)
    return node


def open_over(file: Node, **options: Any) -> Qcow2:
    """Open an image without its backing file over a file node."""
    return Qcow2(Qcow2Options.from_mapping({"file": file, **options}), RW)


def check_theirs(path: Path) -> int:
    """The exit code of qemu-img check."""
    return subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], capture_output=True, timeout=120, check=False).returncode


def read_theirs(path: Path) -> bytes:
    """What qemu-img reads."""
    out = path.with_name(path.name + ".raw")
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
    content = out.read_bytes()
    out.unlink()
    return content
