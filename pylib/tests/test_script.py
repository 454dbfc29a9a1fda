# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The script `diskwright` as it is installed: which interpreter and which package it finds, and under which names it goes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PYLIB = Path(__file__).parents[1]
PYTHON = "python%d.%d" % sys.version_info[:2]

# In the place of the library: says how it was called.
CLI = """\
import sys

def main():
    print(sys.argv[0], sys.argv[1:], "site" in sys.modules, bool(sys.flags.isolated), file=sys.stdout)
    return 7
"""


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """An installation: bin with the script and an interpreter, and a site-packages with what pip leaves of the library."""
    (tmp_path / "bin").mkdir()
    shutil.copy(PYLIB / "bin" / "diskwright", tmp_path / "bin")
    (tmp_path / "bin" / PYTHON).symlink_to(os.path.realpath(sys.executable))
    package = packages(tmp_path) / "diskwright"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(CLI)
    (packages(tmp_path) / "diskwright-0.1.0.dist-info").mkdir()
    return tmp_path


def packages(prefix: Path) -> Path:
    return prefix / "lib" / PYTHON / "site-packages"


def run(*args: object, path: str = "/usr/bin:/bin", cwd: object = None) -> tuple[int, str]:
    environment = {"PATH": path, "PYTHONPATH": "/nonexistent", "LC_ALL": "C.UTF-8"}
    directory = None if cwd is None else str(cwd)
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, env=environment, cwd=directory, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


def test_starts_isolated_without_site(prefix: Path) -> None:
    script = prefix / "bin" / "diskwright"
    assert run(script, "info", "a b", "") == (7, f"{script} ['info', 'a b', ''] False True")


def test_from_a_relative_path(prefix: Path) -> None:
    assert run("./diskwright", cwd=prefix / "bin") == (7, "./diskwright [] False True")
    assert run("bin/diskwright", cwd=prefix) == (7, "bin/diskwright [] False True")
    assert run("sh", "diskwright", cwd=prefix / "bin") == (7, "./diskwright [] False True")


def test_a_link_keeps_its_name(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "first").symlink_to(prefix / "bin" / "diskwright")
    (elsewhere / "qemu-img").symlink_to("first")
    assert run("qemu-img", "x", path=f"{elsewhere}:/usr/bin:/bin") == (7, f"{elsewhere}/qemu-img ['x'] False True")


def test_without_an_interpreter_beside_it(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """pip install --user: the interpreter is the one on PATH of the version that the package was installed for."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (prefix / "bin" / PYTHON).rename(elsewhere / PYTHON)
    script = prefix / "bin" / "diskwright"
    assert run(script, path=f"{elsewhere}:/usr/bin:/bin") == (7, f"{script} [] False True")


def test_an_editable_install(prefix: Path) -> None:
    """Only the .pth file knows where the package is, so site has to read it."""
    (prefix / "source").mkdir()
    (packages(prefix) / "diskwright").rename(prefix / "source" / "diskwright")
    (packages(prefix) / "_diskwright.pth").write_text(str(prefix / "source") + "\n")
    script = prefix / "bin" / "diskwright"
    assert run(script) == (7, f"{script} [] True True")


def test_an_error_inside_the_library_is_not_taken_for_its_absence(prefix: Path) -> None:
    (packages(prefix) / "diskwright" / "cli.py").write_text("import diskwright_is_broken\n")
    code, text = run(prefix / "bin" / "diskwright")
    assert code == 1 and "No module named 'diskwright_is_broken'" in text and text.count("Traceback") == 1


def test_output_that_cannot_be_written(prefix: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([str(prefix / "bin" / "diskwright")], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 120 and b"No space left" in done.stderr
