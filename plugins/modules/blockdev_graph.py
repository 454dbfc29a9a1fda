#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call. The action plugin of the same name comes first: it checks the graph on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: blockdev_graph
short_description: Check, describe, draw and serve graphs of block nodes
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Takes the objects and the nodes of a graph in QEMU's own language, the one of C(--object), C(--blockdev) and C(blockdev-add), and
    refuses what is wrong with it before anything is
    touched, with the nearest right word. Unknown keys, cycles, dangling references, nodes that two users would write.
  - Makes sure that images exist, as M(diskwright.images.disk_image) does, writes the graph as a file, and returns it node by node,
    with sizes and pictures.
  - With O(state=exported) it keeps a C(diskwright serve) running that offers nodes of the graph over NBD to virtual machines and other clients.
extends_documentation_fragment:
  - diskwright.images.attributes
  - diskwright.images.untrusted
attributes:
  action:
    description: The graph is checked on the controller.
    support: full
  async:
    description: The action plugin waits for the module.
    support: none
options:
  state:
    description:
      - V(present) makes the images and the file, and starts nothing.
      - V(exported) has the service run as well. It is started anew when the graph has changed, after its clients have got what they had asked for.
      - V(absent) lets the service finish what its clients have asked for, stops it, and removes the file. Images are never removed.
    type: str
    choices: [present, exported, absent]
    default: present
  name:
    description: The name of the service, and of what is kept about it. Letters, digits, dots, dashes and underscores.
    type: str
    default: graph
  objects:
    description:
      - The objects that nodes refer to, as C(object-add) takes them.
      - A secret is given by its C(file), never by its C(data), which would be in the graph's file for all to read.
    type: list
    elements: dict
  blockdevs:
    description: The nodes, as C(blockdev-add) takes them, each with a C(node-name). Keys may be nested or dotted. Their order does not matter.
    type: list
    elements: dict
  nbd_server:
    description: Where exports are offered, as C(nbd-server-start) takes it, the address in one piece.
    type: dict
  exports:
    description: The exports, as C(block-export-add) takes them.
    type: list
    elements: dict
  images:
    description:
      - Images that must exist, each made or changed as M(diskwright.images.disk_image) would. They are not changed while a
        service uses them.
    type: list
    elements: dict
    suboptions:
      path:
        description: Where the image is.
        type: path
        required: true
      format:
        description: Its format.
        type: str
        default: qcow2
      size:
        description: Its virtual size.
        type: str
      backing_file:
        description: What the image itself does not hold is read from this one.
        type: str
      backing_format:
        description: The format of that one.
        type: str
      preallocation:
        description: How much of a new image is allocated beforehand.
        type: str
        choices: ['off', metadata, falloc, full]
        default: 'off'
      options:
        description: More options of the format.
        type: dict
  path:
    description:
      - The file for the graph. What it is tells its suffix. C(.json) and C(.yaml) are graph files, as C(diskwright graph) and
        C(diskwright serve) read them. C(.args) has arguments for
        QEMU and qemu-storage-daemon, one a line.
      - YAML takes the Python package ruamel.yaml on the controller. With O(state=exported) it must be JSON, and is
        C(/etc/diskwright/NAME.json) if not given.
    type: path
  mode:
    description: The permissions of that file.
    type: str
    default: "0600"
  draw:
    description: Pictures of the graph to return.
    type: list
    elements: str
    choices: [text, dot, mermaid, svg]
    default: []
  resolve:
    description: Whether to open the nodes, for reading, and return their sizes.
    type: bool
    default: true
  service:
    description: What keeps the service running. V(auto) is a unit of systemd where that is and the user is root, and otherwise a process of its own.
    type: str
    choices: [auto, systemd, process]
    default: auto
  executable:
    description: The C(diskwright) on the managed node to serve with. If not given, the collection's own library is put into O(library_directory).
    type: path
  library_directory:
    description: Where that is. C(/usr/local/lib/diskwright), or below the user's home, if not given.
    type: path
  runtime_directory:
    description: Where a service that is a process of its own has its files. C(/run/diskwright), or below the user's home, if not given.
    type: path
  drain_seconds:
    description: How long clients have to get what they have asked for when the service ends.
    type: int
    default: 30
  prepared:
    description: What the controller says to the node. Not to be given.
    type: dict
notes:
  - A service is not started if an image of the graph names files that O(implicit_references) does not allow. Nodes that are described are always allowed.
seealso:
  - module: diskwright.images.disk_image
  - name: Block devices in QEMU
    description: The language.
    link: https://www.qemu.org/docs/master/interop/qemu-storage-daemon-qmp-ref.html
"""

EXAMPLES = r"""
- name: A throttled disk, described, checked and drawn
  diskwright.images.blockdev_graph:
    objects:
      - {qom-type: throttle-group, id: tg0, limits: {bps-total: 10485760}}
    images:
      - {path: /var/lib/images/web.qcow2, size: 20G}
    blockdevs:
      - {driver: file, node-name: file0, filename: /var/lib/images/web.qcow2}
      - {driver: qcow2, node-name: qcow0, file: file0}
      - {driver: throttle, node-name: drive0, file: qcow0, throttle-group: tg0}
    path: /var/lib/images/web.args
    draw: [text]

- name: A template for all machines of the network, read-only
  diskwright.images.blockdev_graph:
    name: template
    state: exported
    images:
      - {path: /var/lib/images/template.qcow2, size: 20G}
    blockdevs:
      - {driver: qcow2, node-name: template, read-only: true, file: {driver: file, filename: /var/lib/images/template.qcow2}}
    nbd_server:
      addr: {type: unix, path: /var/lib/images/template.socket}
    exports:
      - {type: nbd, id: template, node-name: template, name: template}

- name: No service any more
  diskwright.images.blockdev_graph:
    name: template
    state: absent
"""

RETURN = r"""
graph:
  description: The graph in its normal form, as a graph file has it.
  returned: unless O(state=absent)
  type: dict
  sample: {blockdevs: [{driver: file, node-name: file0, filename: /var/lib/images/web.qcow2}]}
arguments:
  description: The same as arguments of QEMU and qemu-storage-daemon.
  returned: unless O(state=absent)
  type: list
  elements: str
  sample: [--blockdev, "file,node-name=file0,filename=/var/lib/images/web.qcow2"]
nodes:
  description: Each node that has been described, as far as it could be opened. In check mode images that would be made are missing yet.
  returned: with O(resolve)
  type: list
  elements: dict
  contains:
    node_name:
      description: Its name.
      type: str
      sample: drive0
    driver:
      description: Its driver.
      type: str
      sample: throttle
    size:
      description: Its virtual size in bytes.
      type: int
      sample: 21474836480
    actual_size:
      description: Bytes that it takes on its host.
      type: int
      sample: 200704
    filename:
      description: The name of what it shows.
      type: str
      sample: /var/lib/images/web.qcow2
    children:
      description: The names of the nodes below it, by their roles.
      type: dict
      sample: {file: qcow0}
    error:
      description: Why it could not be opened.
      type: str
    denied:
      description: Whether that is because an image names a file that is not allowed.
      type: bool
pictures:
  description: The pictures of O(draw), by their form.
  returned: with O(draw)
  type: dict
  sample: {text: "drive0 (throttle)"}
running:
  description: Whether the service runs. Null with O(state=present), which does not look.
  returned: success
  type: bool
  sample: true
path:
  description: The file of the graph.
  returned: success
  type: str
  sample: /etc/diskwright/template.json
plan:
  description: The steps that were taken, or would be in check mode, with the commands that they replace and the reasons for them.
  returned: success
  type: list
  elements: dict
  sample:
    - verb: start
      target: template
      command: diskwright serve --fork --pid-file /run/diskwright/template.pid --graph /etc/diskwright/template.json
      why: it does not run
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

from ..module_utils import _policy  # noqa: E402
from ..module_utils._graph import foretold, observe, plan, resolve, wanted  # noqa: E402
from ..module_utils._runner import carry_out, run  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..module_utils import _bundle_graph  # noqa: E402, F401  # pylint: disable=unused-import

IMAGE = {
    "path": {"type": "path", "required": True},
    "format": {"type": "str", "default": "qcow2"},
    "size": {"type": "str"},
    "backing_file": {"type": "str"},
    "backing_format": {"type": "str"},
    "preallocation": {"type": "str", "choices": ["off", "metadata", "falloc", "full"], "default": "off"},
    "options": {"type": "dict"},
}
ARGUMENTS = {
    "state": {"type": "str", "choices": ["present", "exported", "absent"], "default": "present"},
    "name": {"type": "str", "default": "graph"},
    "objects": {"type": "list", "elements": "dict"},
    "blockdevs": {"type": "list", "elements": "dict"},
    "nbd_server": {"type": "dict"},
    "exports": {"type": "list", "elements": "dict"},
    "images": {"type": "list", "elements": "dict", "options": IMAGE},
    "path": {"type": "path"},
    "mode": {"type": "str", "default": "0600"},
    "draw": {"type": "list", "elements": "str", "choices": ["text", "dot", "mermaid", "svg"], "default": []},
    "resolve": {"type": "bool", "default": True},
    "service": {"type": "str", "choices": ["auto", "systemd", "process"], "default": "auto"},
    "executable": {"type": "path"},
    "library_directory": {"type": "path"},
    "runtime_directory": {"type": "path"},
    "drain_seconds": {"type": "int", "default": 30},
    "prepared": {"type": "dict"},
    **_policy.ARGUMENTS,
}


def task(module):
    params, prepared = module.params, module.params["prepared"] or {}
    want = wanted(params)
    have = observe(want)
    steps = plan(want, have)
    result = carry_out(module, want["path"] or want["name"], have, steps)
    result.update(foretold(have, steps), path=want["path"])
    if want["state"] != "absent":
        result.update(graph=prepared["graph"], arguments=prepared["arguments"])
        if params["draw"]:
            result["pictures"] = prepared["pictures"]
        if params["resolve"]:
            result["nodes"] = resolve(prepared)
    if want["text"] is not None and want["path"] is not None:
        result["changed"] = module.set_mode_if_different(want["path"], params["mode"], result["changed"])
    return result


def main():
    run(task, argument_spec=ARGUMENTS, required_if=[("state", "present", ["blockdevs"]), ("state", "exported", ["blockdevs", "exports", "nbd_server"])])


if __name__ == "__main__":
    main()
