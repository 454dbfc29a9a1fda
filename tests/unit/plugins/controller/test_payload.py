# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is sent to a managed node: as little as the limits say, and all that the module is made for."""

from __future__ import annotations

import ast
import base64
import io
import os
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), "../../../.."))
COLLECTIONS = os.path.realpath(os.path.join(ROOT, "../../.."))
LIBRARY = "ansible_collections/diskwright/images/plugins/module_utils/diskwright/"
LARGEST = 700000  # bytes of any module
LIMITS = {"qemu_img_info": 400000}
MODULES = sorted(name[:-3] for name in os.listdir(os.path.join(ROOT, "plugins/modules")) if name.endswith(".py"))

CREATABLE = "raw qcow2 luks parallels qcow qed vdi vhdx vmdk vpc"
FORMATS = {
    "qemu_img_info": "raw qcow2",
    "image_convert": CREATABLE + " dmg ova ovf gzip xz bzip2 zstd",
    "qemu_img_info_full": CREATABLE + " bochs cloop dmg ova ovf gzip xz bzip2 zstd",
    "disk_image": CREATABLE,
    "image_check": CREATABLE,
    "image_snapshot": CREATABLE,
    "image_bitmap": CREATABLE,
}
PARTS = {
    "disk_image": "commands.create commands.resize commands.amend commands.rebase commands.commit commands.convert formats.qcow2.amend formats.qcow2.resize",
    "image_convert": "commands.convert commands.compare copy.content formats.qcow2.create formats.vmdk.stream",
    "image_check": "commands.check formats.qcow2.repair formats.vmdk.check formats.qed.check",
    "image_snapshot": "formats.qcow2.snapshots formats.qcow2.switch",
    "image_bitmap": "commands.bitmap formats.qcow2.bitmaps",
    "qemu_img_info_full": "commands.map commands.measure copy.content",
}
BUILD = """
import sys
from ansible.plugins.loader import init_plugin_loader, module_loader
init_plugin_loader([sys.argv[1]])
from ansible.executor.module_common import modify_module
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
for name in sys.argv[3:]:
    full = "diskwright.images." + name
    built = modify_module(module_name=full, module_path=module_loader.find_plugin(full), module_args={}, templar=Templar(loader=DataLoader()),
        task_vars={"ansible_python_interpreter": "/usr/bin/python3"}, module_compression="ZIP_DEFLATED")
    data = getattr(built, "b_module_data", None) or built[0]
    with open(sys.argv[2] + "/" + name, "wb") as file:
        file.write(data)
"""


@pytest.fixture(scope="module")
def payloads(tmp_path_factory):
    """What AnsiballZ makes of each module."""
    folder = tmp_path_factory.mktemp("payloads")
    environment = {**os.environ, "ANSIBLE_HOME": str(folder / "home")}
    subprocess.run([sys.executable, "-c", BUILD, COLLECTIONS, str(folder), *MODULES], check=True, env=environment)
    return {name: (folder / name).read_bytes() for name in MODULES}


def content(payload):
    """The names of the library's modules in a payload."""
    texts = re.findall(rb"['\"]([A-Za-z0-9+/=\n]{1000,})['\"]", payload)
    if not texts:  # a module whose work is done on the controller
        return set()
    archive = zipfile.ZipFile(io.BytesIO(base64.b64decode(max(texts, key=len))))
    files = {name[len(LIBRARY) : -3] for name in archive.namelist() if name.startswith(LIBRARY)}
    return {name.replace("/", ".").replace(".__init__", "") for name in files}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_sends_more_than_it_may(payloads, name):
    assert len(payloads[name]) <= LIMITS.get(name, LARGEST), "%s sends %d bytes" % (name, len(payloads[name]))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_module_carries_what_it_is_made_for(payloads, name):
    table = ast.parse(open(os.path.join(ROOT, "plugins/module_utils/diskwright/drivers.py"), encoding="utf-8").read())
    tables = {node.target.id: ast.literal_eval(node.value) for node in table.body if isinstance(node, ast.AnnAssign)}
    places = {**{key: value[0] for key, value in tables["FORMATS"].items()}, **tables["PROTOCOLS"]}
    wanted = {places[key].partition(":")[0] for key in [*FORMATS[name].split(), "file", "host_device"]} | set(PARTS.get(name, "").split())
    assert wanted <= content(payloads[name])


@pytest.mark.parametrize("name", MODULES)
def test_no_module_carries_the_command_line_or_a_server(payloads, name):
    carried = content(payloads[name])
    assert not carried & {"cli", "commands.help", "commands.ui", "trace", "commands.bench"}
    assert not [part for part in carried if part.startswith(("server", "qmp", "jobs"))]
