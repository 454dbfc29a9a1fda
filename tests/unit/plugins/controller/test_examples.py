# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The examples of the modules' documentation are run, one after the other, in a directory that stands for the root."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import yaml

PACKAGE = "ansible_collections.diskwright.images.plugins.modules."
COLLECTIONS = os.path.realpath(os.path.join(os.path.dirname(__file__), "../../../../../../.."))
MODULES = ("disk_image", "image_bitmap", "image_check", "image_convert", "image_snapshot", "qemu_img_info", "qemu_img_info_full")
FOLDERS = ("var/lib/images", "srv/incoming", "srv/raw", "srv/backup", "etc/keys", "run")
PASSPHRASE = "correct horse"
QUICK = {"qcow2": {"encrypt.iter-time": 10}, "luks": {"iter-time": 10}}

# What the examples find, for each module besides what all find: name -> arguments of qemu-img create.
COMMON = {
    "var/lib/images/template.qcow2": "-f qcow2 {} 1M",
    "var/lib/images/template-2.qcow2": "-f qcow2 {} 1M",
    "srv/incoming/disk.raw": "-f raw {} 1M",
    "srv/incoming/nightly.qcow2": "-f qcow2 {} 1M",
    "srv/incoming/debian-12.qcow2": "-f qcow2 {} 1M",
    "srv/incoming/upload.qcow2": "-f qcow2 {} 1M",
}
CLONES = ("clone1", "clone2", "node1", "node2", "node3")
FOUND = {
    "disk_image": {
        "var/lib/images/legacy.img": "-f vmdk {} 1M",
        "var/lib/images/old.qcow2": "-f qcow2 {} 1M",
        "var/lib/images/clone2.qcow2": "-f qcow2 -b template.qcow2 -F qcow2 {}",
        "var/lib/images/web-overlay.qcow2": "-f qcow2 -u -b web.qcow2 -F qcow2 {} 40G",
    },
    "": {
        "var/lib/images/web.qcow2": "-f qcow2 {} 20G",
        "var/lib/images/web.vhdx": "-f vhdx {} 20M",
        "var/lib/images/web-overlay.qcow2": "-f qcow2 -b web.qcow2 -F qcow2 {}",
        "srv/backup/web-full.qcow2": "-f qcow2 {} 20G",
        "var/lib/images/db-system.qcow2": "-f qcow2 {} 1M",
        "var/lib/images/db-data.qcow2": "-f qcow2 {} 1M",
        **{"var/lib/images/%s.qcow2" % name: "-f qcow2 -b template.qcow2 -F qcow2 {}" for name in CLONES},
    },
}


def prepare(root, module):
    """Make what the examples of a module take for granted."""
    for folder in FOLDERS:
        os.makedirs(os.path.join(root, folder))
    for name, text in {"new": "wrong horse", "old": PASSPHRASE, "secret": PASSPHRASE}.items():
        with open(os.path.join(root, "etc/keys", name), "w", encoding="utf-8") as file:
            file.write(text)
    for name, words in {**COMMON, **FOUND.get(module, FOUND[""])}.items():
        path = os.path.join(root, name)
        subprocess.run(["qemu-img", "create", "-q", *(path if word == "{}" else word for word in words.split())], check=True)
    if module == "image_convert":
        os.unlink(os.path.join(root, "var/lib/images/template.qcow2"))  # which an example makes
        subprocess.run(["qemu-img", "bitmap", "--add", os.path.join(root, "var/lib/images/web.qcow2"), "since-full-backup"], check=True)
    if module == "image_bitmap":
        for name in ("monday", "tuesday", "since-full-backup"):
            for disk in ("web", "web-overlay"):
                subprocess.run(["qemu-img", "bitmap", "--add", os.path.join(root, "var/lib/images/%s.qcow2" % disk), name], check=True)
    if module == "image_snapshot":
        for _number in range(3):
            subprocess.run(["qemu-img", "snapshot", "-c", "earlier", os.path.join(root, "var/lib/images/web.qcow2")], check=True)
    if module == "qemu_img_info_full":
        appliance(root)


def appliance(root):
    """The package that the examples describe."""
    disk = os.path.join(root, "disk.vmdk")
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", os.path.join(root, "disk.raw"), "1M"], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", os.path.join(root, "disk.raw"), disk], check=True)
    envelope = (
        '<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>'
        '<File ovf:href="disk.vmdk" ovf:id="f"/></References><DiskSection><Disk ovf:capacity="1048576" ovf:diskId="d" ovf:fileRef="f" '
        'ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/></DiskSection></Envelope>'
    )
    with open(os.path.join(root, "a.ovf"), "w", encoding="utf-8") as file:
        file.write(envelope)
    target = os.path.join(root, "srv/incoming/appliance.ova")
    subprocess.run(["tar", "-C", root, "--format=ustar", "-cf", target, "a.ovf", "disk.vmdk"], check=True)


def placed(root, text):
    """The examples with their files below `root`, and the checksum that the download has."""
    text = re.sub(r"(?<![\w/.])/(%s)/" % "|".join(FOLDERS), lambda match: "%s/%s/" % (root, match.group(1)), text)
    with open(os.path.join(root, "srv/incoming/debian-12.qcow2"), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    return re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + digest, text)


@pytest.mark.parametrize("module", MODULES)
def test_examples(tmp_path, module):
    root = str(tmp_path / "root")
    prepare(root, module)
    tasks = yaml.safe_load(placed(root, import_module(PACKAGE + module).EXAMPLES))
    for task in tasks:
        arguments = task.get("diskwright.images." + module, {})
        if "encryption" in arguments:
            arguments["options"] = QUICK[arguments.get("format", "qcow2")]  # a key that is quickly derived
        if "poll" in task:
            task["poll"] = 1
    book = tmp_path / "play.json"
    variables = {"vault_disk_passphrase": PASSPHRASE}
    book.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "vars": variables, "tasks": tasks}]), encoding="utf-8")
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": COLLECTIONS,
        "ANSIBLE_HOME": str(tmp_path / "home"),
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        "ANSIBLE_LOCALHOST_WARNING": "0",
    }
    command = [os.path.join(os.path.dirname(sys.executable), "ansible-playbook"), "-i", "localhost,", "-c", "local", str(book)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
