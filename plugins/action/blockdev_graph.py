# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""blockdev_graph: the graph is checked and put into words here, where the whole library is; the module does on the node what is to be done."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.diskwright.images.plugins.module_utils import diskwright as library
from ansible_collections.diskwright.images.plugins.module_utils.diskwright import description, graph_file
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.errors import Error

FORMS = {".json": "json", ".yaml": "yaml", ".yml": "yaml", ".args": "arguments"}
FORMS_OF_PICTURES = ("text", "dot", "mermaid", "svg")
# what the module has with it; for a graph with others the whole library is sent
CARRIED = {"file", "host_device", "raw", "qcow2", "luks", "vmdk", "vdi", "vhdx", "vpc", "parallels", "qcow", "qed"}
CARRIED |= {"throttle", "compress", "copy-on-read", "preallocate", "quorum"}
EPOCH = (2020, 1, 1, 0, 0, 0)  # the date of all files in the archive: the same library is the same archive


class ActionModule(ActionBase):
    """Says what is wrong with a graph before the node hears of it."""

    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        args = dict(self._task.args)
        if "prepared" in args:
            raise AnsibleActionFail("prepared is what the controller says to the node, and cannot be given")
        if args.get("state", "present") != "absent":
            try:
                args["prepared"] = self._prepare(args)
            except (Error, OSError) as exc:
                hint = getattr(exc, "hint", None)
                return {**result, "failed": True, "msg": "%s%s" % (exc, " (%s)" % hint if hint else ""), "error": type(exc).__name__}
            drivers = {node["driver"] for node in description.all_nodes(args["prepared"]["graph"]["blockdevs"])}
            if args.get("state") == "exported" and not args.get("executable") or drivers - CARRIED:
                args["prepared"]["library"] = self._send_library()
        return self._execute_module("diskwright.images.blockdev_graph", args, task_vars=task_vars)

    def _prepare(self, args):
        """The graph in its normal form, the text of its file, and its pictures. Raises Error."""
        sections = {key: args.get(key.replace("-", "_")) for key in graph_file.SECTIONS}
        graph = graph_file.parse({key: value for key, value in sections.items() if value}, "graph", lenient=True)
        graph.check()
        if not graph.blockdevs:
            raise AnsibleActionFail("blockdevs: a graph has at least one node")
        if args.get("state") == "exported" and not (graph.exports and graph.nbd_server):
            raise AnsibleActionFail("state=exported needs exports, and an nbd_server where they are")
        for found in graph.objects.values():
            if found.type == "secret" and "data" in found.properties:
                raise AnsibleActionFail("objects: the secret '%s' is given by its data, which would be in the graph's file; give a file" % found.id)
        whole = graph.as_mapping()
        return {
            "graph": whole,
            "text": self._text(graph, whole, args.get("path")),
            "served": graph_file.to_json(whole),
            "arguments": graph_file.to_arguments(graph),
            "pictures": _pictures(graph, args.get("draw") or []),
        }

    def _text(self, graph, whole, path):
        """What the file at `path` should hold; None for no file."""
        if not path:
            return None
        form = FORMS.get(os.path.splitext(path)[1])
        if form is None:
            raise AnsibleActionFail("path: '%s' does not end in %s" % (path, ", ".join(FORMS)))
        if form == "arguments":
            return "".join("%s\n" % _quoted(word) for word in graph_file.to_arguments(graph))
        return graph_file.to_yaml(whole) if form == "yaml" else graph_file.to_json(whole)

    def _send_library(self):
        """Put the library, as one archive, into the task's directory on the node. Returns its path there, and its digest."""
        with tempfile.NamedTemporaryFile(prefix="diskwright-", suffix=".zip") as local:
            _archive(local.name)
            with open(local.name, "rb") as stream:
                digest = hashlib.sha256(stream.read()).hexdigest()[:16]
            self._make_tmp_path()
            remote = self._connection._shell.join_path(self._connection._shell.tmpdir, "library.zip")
            self._transfer_file(local.name, remote)
            self._fixup_perms2((self._connection._shell.tmpdir, remote))
        return {"archive": remote, "digest": digest}


def _quoted(word):
    from shlex import quote

    return quote(word)


def _pictures(graph, forms):
    """The graph as a picture, by form."""
    if not forms:
        return {}
    from ansible_collections.diskwright.images.plugins.module_utils.diskwright.drawing import picture_of_description

    unknown = sorted(set(forms) - set(FORMS_OF_PICTURES))
    if unknown:
        raise AnsibleActionFail("draw: '%s' is not one of %s" % (unknown[0], ", ".join(FORMS_OF_PICTURES)))
    picture = picture_of_description(graph)
    return {form: getattr(picture, form)() for form in forms}


def _archive(path):
    """The library as a zip file, the same bytes for the same library."""
    top = os.path.dirname(library.__file__)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        names = [
            os.path.relpath(os.path.join(folder, name), top)
            for folder, _folders, files in os.walk(top)
            for name in files
            if name.endswith(".py")
        ]
        for name in sorted(names):
            with open(os.path.join(top, name), "rb") as stream:
                archive.writestr(zipfile.ZipInfo("diskwright/" + name, EPOCH), stream.read(), zipfile.ZIP_DEFLATED)
