# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a machine can hold: which way imports run, what no file does, and what start-up may load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from diskwright import drivers
from diskwright.errors import Unsupported
from diskwright.node import Format, Node

SOURCE = Path(__file__).parents[1] / "src"
LIBRARY = SOURCE / "diskwright"
FILES = sorted(path.relative_to(LIBRARY).as_posix() for path in LIBRARY.rglob("*.py"))

# Imports run downwards only: a module may import from lower floors, and from its own part of the house.
FLOORS = {
    "__init__": 0,  # it loads the public names on first use, and imports nothing before
    "errors": 0,
    "units": 1,
    "getopt": 1,
    "json_parser": 1,
    "json_text": 1,
    "parts": 1,
    "kernels": 2,
    "compression": 3,
    "bitmaps": 3,
    "extent": 2,
    "ondisk": 2,
    "options": 2,
    "progress": 2,
    "tally": 3,
    "uring": 2,
    "trace": 12,
    "crypto": 3,
    "objects": 4,
    "hooks": 2,
    "edges": 3,
    "node": 4,
    "cache": 5,
    "encrypted": 5,
    "filter": 5,
    "moment": 5,
    "blockmap": 6,
    "formats": 7,
    "protocols": 7,
    "filters": 7,
    "drivers": 8,
    "probe": 9,
    "names": 9,
    "root": 9,
    "copy": 10,
    "graph": 10,
    "description": 11,
    "drive": 12,
    "drawing": 12,
    "graph_file": 12,
    "graph_schema": 13,
    "server": 13,
    "beside": 11,
    "describe": 11,
    "temporary": 11,
    "image": 12,
    "jobs": 14,
    "qmp": 15,
    "commands": 14,
    "cli": 15,
    "__main__": 16,
}
DRIVERS = ("formats", "protocols", "filters")

# What costs milliseconds to import. The way from the command line to an image's header does without.
HEAVY = (
    "typing dataclasses enum re collections json argparse logging threading pathlib contextlib functools shutil tempfile subprocess "
    "inspect importlib.util ctypes socket ssl urllib http hashlib zlib random datetime"
).split()


class Import(NamedTuple):
    """A module of the library that another one imports."""

    module: str  # its path from the library's root, with dots; "" for the root
    line: int
    types_only: bool  # under `if TYPE_CHECKING`


def tree(path: str) -> ast.Module:
    return ast.parse((LIBRARY / path).read_text(encoding="utf-8"), path)


def is_module(dotted: str) -> bool:
    base = LIBRARY.joinpath(*dotted.split("."))
    return base.with_suffix(".py").exists() or base.is_dir()


def imports(path: str) -> Iterator[Import]:
    """The imports of the library's own modules in one of its files, those inside functions included."""
    package = path.split("/")[:-1]

    def walk(node: ast.AST, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, types_only)
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            home = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                dotted = ".".join([*home, alias.name])
                yield Import(dotted if is_module(dotted) else ".".join(home), node.lineno, types_only)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, types_only)

    yield from walk(tree(path), False)


def place(module: str) -> str:
    """The part of the house that a module belongs to: the first word of its path."""
    return module.split(".")[0] or "__init__"


def own(path: str) -> str:
    return place(path[: -len(".py")].replace("/", "."))


def test_the_library_is_here() -> None:
    assert "__init__.py" in FILES and len(FILES) > 5


@pytest.mark.parametrize("path", FILES)
def test_imports_run_downwards(path: str) -> None:
    here = own(path)
    assert here in FLOORS, f"{path}: give {here} a floor in FLOORS"
    for imported in imports(path):
        there = place(imported.module)
        assert there in FLOORS, f"{path}:{imported.line}: give {there} a floor in FLOORS"
        # A name that only type checkers see may point anywhere; the code that runs may not.
        if there != here and not imported.types_only:
            assert FLOORS[there] < FLOORS[here], f"{path}:{imported.line}: {here} imports {there}"


# Modules of protocols/ that are no drivers, and know none.
SHARED = ("clibrary", "connections", "existing", "numbered", "vfio")


@pytest.mark.parametrize("path", [path for path in FILES if own(path) in DRIVERS])
def test_drivers_know_no_other_driver(path: str) -> None:
    words = path[: -len(".py")].split("/")
    for imported in imports(path):
        there = imported.module.split(".")
        assert there[0] not in ("copy", "graph", "cli", "commands", "drivers"), f"{path}:{imported.line}: imports {imported.module}"
        if there[0] in DRIVERS and there[1:2] not in [[name] for name in SHARED]:
            assert there[:2] == words[:2] and len(there) > 1, f"{path}:{imported.line}: imports another driver, {imported.module}"


@pytest.mark.parametrize("path", FILES)
def test_imports_are_relative_and_static(path: str) -> None:
    """What the payload builder of Ansible does not see does not reach the managed node."""
    blocks = [node for node in tree(path).body if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"]
    types_only = {line for block in blocks for line in range(block.lineno, (block.end_lineno or 0) + 1)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] not in ("diskwright", "ansible_collections", "ansible"), f"{path}:{node.lineno}: {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # Type checkers read the absolute ones too, and Ansible does not follow them: they are for what `part` imports.
            own = "" if node.lineno in types_only else "diskwright"
            assert (node.module or "").split(".")[0] not in (own, "ansible_collections", "ansible"), f"{path}:{node.lineno}: {node.module}"
            # The root loads its public names on first use; a static import there would ship everything with every module.
            assert node.module != "importlib" or path == "__init__.py", f"{path}:{node.lineno}: importlib"
        elif isinstance(node, ast.Name):
            # What not every module carries is loaded by name, for the same reason; see docs/adding-a-format.md.
            assert node.id != "__import__" or path == "parts.py", f"{path}:{node.lineno}: __import__"


TABLE = {**{name: place for name, (place, _magics) in drivers.FORMATS.items()}, **drivers.PROTOCOLS, **drivers.FILTERS}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_table_of_drivers_says_where_they_are(name: str) -> None:
    """No type checker follows the strings in the table."""
    found = drivers.lookup(name)
    assert issubclass(found, Node) and found.driver == name
    assert issubclass(found, Format) == (name in drivers.FORMATS)


def test_a_driver_that_was_left_at_home() -> None:
    with pytest.raises(Unsupported, match="driver 'away' is not part of this module's payload"):
        drivers.load("away", "formats.away:Away")


@pytest.mark.parametrize("path", FILES)
def test_only_the_switch_and_the_command_line_read_the_environment(path: str) -> None:
    if path == "cli.py" or path.startswith("kernels/"):
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Attribute, ast.Name, ast.alias)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else node.name
            assert name not in ("environ", "environb", "getenv", "getenvb"), f"{path}: {name}"


@pytest.mark.parametrize("path", FILES)
def test_no_file_does_what_none_may(path: str) -> None:
    text = (LIBRARY / path).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0].startswith("# Copyright (c)") and lines[1] == "# SPDX-License-Identifier: Apache-2.0", path
    assert len(lines) <= 650, f"{path} has {len(lines)} lines"
    for node in ast.walk(tree(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: assert"
        if isinstance(node, ast.Name):
            assert node.id not in ("print", "exit", "quit", "_", "foo", "bar", "eval", "exec"), f"{where}: {node.id}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("sys", "exit"), f"{where}: sys.exit"
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            words = node.name.lower().strip("_")
            assert not any(word in words for word in ("manager", "helper", "util", "handler")), f"{where}: {node.name}"


@pytest.mark.parametrize("command", ["info", "check"])
def test_start_up_loads_little(command: str, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    program = (
        "import sys; before = set(sys.modules); sys.path.append(sys.argv.pop(1)); sys.argv[0] = 'diskwright'; from diskwright.cli import main; code = main(); "
        "sys.stdout.write('\\n' + ' '.join(sorted(set(sys.modules) - before))); raise SystemExit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(SOURCE), command, str(image)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "DISKWRIGHT_ACCEL": "auto"},  # without site there is no accelerator to demand
    )
    loaded = run.stdout.rsplit("\n", 1)[1].split()
    assert "diskwright.cli" in loaded
    too_much = [name for name in loaded if name in HEAVY or name.split(".")[0] in HEAVY]
    assert not too_much, f"{command} loads {' '.join(too_much)}"
    writers = [name for name in loaded if name in ("diskwright.copy",) or name.startswith("diskwright.commands.convert")]
    assert not writers, f"{command} loads the writing path: {' '.join(writers)}"
