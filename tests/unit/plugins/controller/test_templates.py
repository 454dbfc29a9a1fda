# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters, the lookup and the test, as templates use them: by ansible itself, on real images."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.copy:
        dest: "{{ result }}"
        mode: "0600"
        content: "{{ %s }}"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with images: whole, leaking, none."""
    path = tmp_path_factory.mktemp("images")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path / "base.qcow2", "10M"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path / "top.qcow2"], check=True)
    image = bytearray((path / "base.qcow2").read_bytes())
    block = int.from_bytes(image[65536:65544], "big")
    image[block + 6 : block + 8] = b"\0\2"  # one reference more than there is
    (path / "leaking.qcow2").write_bytes(image)
    (path / "junk").write_bytes(b"QFI\xfb\0\0\0\3")
    return path


def evaluate(expression, place, tmp_path):
    """What a template makes of an expression, and the exit code."""
    (tmp_path / "play.yml").write_text(PLAYBOOK % ("(%s) | to_json | string" % expression).replace('"', '\\"'))
    environment = {**os.environ, "ANSIBLE_LOCALHOST_WARNING": "0", "ANSIBLE_COLLECTIONS_PATH": os.environ["PYTHONPATH"].split(os.pathsep)[0]}
    line = [os.path.join(os.path.dirname(sys.executable), "ansible-playbook"), "-i", "localhost,", "-e", "result=%s" % (tmp_path / "result")]
    line += ["-e", "ansible_python_interpreter=%s" % sys.executable, str(tmp_path / "play.yml")]
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, check=False)
    return done, json.loads((tmp_path / "result").read_text()) if done.returncode == 0 else None


def test_what_templates_see(place, tmp_path):
    wanted = {
        "'10G' | diskwright.images.size": 10 << 30,
        "['1.5k', '0x10', 512] | map('diskwright.images.size') | list": [1536, 16, 512],
        "[0, 1000, 1127428915] | map('diskwright.images.human_size') | list": ["0 B", "0.977 KiB", "1.05 GiB"],
        "'10G' | diskwright.images.human_size": "10 GiB",
        "lookup('diskwright.images.image_info', '%s/top.qcow2').backing_filename" % place: "base.qcow2",
        "query('diskwright.images.image_info', '%s/top.qcow2', '%s/none', missing_ok=true) | map(attribute='exists')" % (place, place): [True, False],
        "lookup('diskwright.images.image_info', '%s/top.qcow2', backing_chain=true).chain | map(attribute='virtual_size')" % place: [10 << 20] * 2,
        "'%s/base.qcow2' is diskwright.images.consistent" % place: True,
        "'%s/leaking.qcow2' is diskwright.images.consistent" % place: False,
        "'%s/leaking.qcow2' is diskwright.images.consistent(leaks=true)" % place: True,
    }
    done, found = evaluate("[%s]" % ", ".join(wanted), place, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found == list(wanted.values())


@pytest.mark.parametrize(
    "expression,words",
    [
        ("'10X' | diskwright.images.size", "Invalid size '10X'"),
        ("true | diskwright.images.size", "takes a text or a number"),
        ("lookup('diskwright.images.image_info', 'none')", "No such file or directory"),
        ("'junk' is diskwright.images.consistent", "Could not open 'junk'"),
    ],
)
def test_refusals(expression, words, place, tmp_path):
    done, _found = evaluate(expression, place, tmp_path)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
