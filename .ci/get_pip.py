# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes pip's bootstrap script where ansible-test looks for a cached one, out of the pip wheel of the package index.

ansible-test downloads that script from a host of its own, which a machine with only a package mirror does not reach."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import tempfile

SCRIPT = '''\
"""Installs pip from the wheel inside this file."""
import base64, os, sys, tempfile

WHEEL = """{wheel}"""


def main():
    directory = tempfile.mkdtemp()
    path = os.path.join(directory, "{name}")
    with open(path, "wb") as stream:
        stream.write(base64.b64decode(WHEEL))
    sys.path.insert(0, path)
    from pip._internal.cli.main import main as pip
    wanted = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
    return pip(["install", "--no-index", "--find-links", directory] + wanted + ["pip"])


if __name__ == "__main__":
    sys.exit(main())
'''


def main() -> int:
    import ansible_test

    path = os.path.join(os.path.dirname(ansible_test.__file__), "_internal", "python_requirements.py")
    with open(path, encoding="utf-8") as stream:
        version = re.search(r"pip='([0-9.]+)'", stream.read())
    if version is None:
        sys.stderr.write(f"{path} no longer says which pip it wants.\n")
        return 1
    cached = os.path.expanduser(f"~/.ansible/test/cache/get_pip_{version[1].replace('.', '_')}.py")
    if os.path.exists(cached):
        return 0
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps", "--dest", directory]
        subprocess.run([*command, f"pip=={version[1]}"], check=True)
        (name,) = os.listdir(directory)
        with open(os.path.join(directory, name), "rb") as stream:
            wheel = base64.encodebytes(stream.read()).decode("ascii")
    os.makedirs(os.path.dirname(cached), exist_ok=True)
    with open(cached, "w", encoding="ascii") as stream:
        stream.write(SCRIPT.format(name=name, wheel=wheel))
    return 0


if __name__ == "__main__":
    sys.exit(main())
