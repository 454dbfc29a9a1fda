# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""seed_image: an ISO 9660 image of a few files, made on the controller by pycdlib and sent to the node if it has another one."""

from __future__ import annotations

import os
import tempfile
from base64 import b64decode
from io import BytesIO

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.diskwright.images.plugins.modules.seed_image import ARGUMENTS

ATTRIBUTES = ("mode", "owner", "group", "seuser", "serole", "selevel", "setype", "attributes", "unsafe_writes")
MAX_SEED = 16 << 20  # bytes; a seed is a few files of text
MAX_LABEL = 32  # bytes, of an ISO 9660 volume
INTERCHANGE_LEVEL = 3


class ActionModule(ActionBase):
    """Compares the files in the image with those that are wanted, not the bytes, in which there are dates."""

    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        spec = {**ARGUMENTS, **{name: {"type": "raw"} for name in ATTRIBUTES}}
        args = self.validate_argument_spec(argument_spec=spec)[1]
        wanted = _checked(args["files"], args["label"])
        found = self._present(args["path"], args["replace"], task_vars)
        attributes = {name: args[name] for name in ATTRIBUTES if args[name] is not None}
        attributes.setdefault("mode", "0600")
        result["label"], result["files"] = args["label"], sorted(wanted)
        same = found == (args["label"], wanted)
        if same:
            made = self._execute_module("ansible.builtin.file", {"path": args["path"], "state": "file", **attributes}, task_vars=task_vars)
        else:
            made = self._send(args["path"], _iso(wanted, args["label"]), attributes, task_vars)
        result.update((key, value) for key, value in made.items() if key not in ("diff", "invocation", "src", "dest"))
        result["path"] = args["path"]
        if self._task.diff:
            result["diff"] = [_difference(args["path"], found, (args["label"], wanted))] if not same else made.get("diff", [])
        return result

    def _present(self, path, replace, task_vars):
        """(label, files) of the image at `path`; None where there is none, or where it may be replaced whatever it is."""
        status = self._execute_module("ansible.builtin.stat", {"path": path, "get_checksum": False, "get_mime": False}, task_vars=task_vars)
        if status.get("failed"):
            raise AnsibleActionFail("%s: %s" % (path, status.get("msg", "it cannot be looked at")))
        if not status["stat"]["exists"]:
            return None
        if status["stat"].get("isreg") and status["stat"]["size"] <= MAX_SEED:
            content = self._execute_module("ansible.builtin.slurp", {"src": path}, task_vars=task_vars)
            if content.get("failed"):
                raise AnsibleActionFail("%s: %s" % (path, content.get("msg", "it cannot be read")))
            found = _read(b64decode(content["content"]))
            if found is not None:
                return found
        if not replace:
            raise AnsibleActionFail("%s exists and is no seed: making one in its place destroys it, and needs replace" % path)
        return None

    def _send(self, path, content, attributes, task_vars):
        """Copy `content` to the node, by the action of ansible.builtin.copy."""
        with tempfile.NamedTemporaryFile(prefix="seed-", suffix=".iso") as local:
            local.write(content)
            local.flush()
            task = self._task.copy()
            task.args = {"src": local.name, "dest": path, **attributes}
            task.diff = False
            copy = self._shared_loader_obj.action_loader.get(
                "ansible.legacy.copy",
                task=task,
                connection=self._connection,
                play_context=self._play_context,
                loader=self._loader,
                templar=self._templar,
                shared_loader_obj=self._shared_loader_obj,
            )
            return copy.run(task_vars=task_vars)


def _pycdlib():
    try:
        import pycdlib
    except ImportError as exc:
        raise AnsibleActionFail("seed_image needs the Python package pycdlib on the controller: pip install pycdlib") from exc
    return pycdlib


def _checked(files, label):
    """The files as bytes by name. Raises AnsibleActionFail."""
    if not 0 < len(label.encode()) <= MAX_LABEL or not all(" " <= letter <= "~" for letter in label):
        raise AnsibleActionFail("label: '%s' is not a label of 1 to %d ASCII characters" % (label, MAX_LABEL))
    if not files:
        raise AnsibleActionFail("files: a seed has at least one file")
    wanted = {}
    for name, content in files.items():
        parts = name.split("/")
        if any(part in ("", ".", "..") or len(part) > 64 or not all(" " < letter <= "~" for letter in part) for part in parts):
            raise AnsibleActionFail("files: '%s' is not a relative name of up to 64 ASCII characters between slashes" % name)
        if not isinstance(content, str):
            raise AnsibleActionFail("files: the content of '%s' is not text (filters such as to_nice_yaml and to_json make text of it)" % name)
        wanted[name] = content.encode()
    if sum(map(len, wanted.values())) > MAX_SEED // 2:
        raise AnsibleActionFail("files: more than %d bytes" % (MAX_SEED // 2))
    return wanted


def _iso(files, label):
    """An ISO 9660 image with Rock Ridge and Joliet names."""
    iso = _pycdlib().PyCdlib()
    iso.new(interchange_level=INTERCHANGE_LEVEL, joliet=3, rock_ridge="1.09", vol_ident=label)
    made = {"": ""}
    try:
        for number, name in enumerate(sorted(files)):
            folder, _slash, leaf = name.rpartition("/")
            place = ""
            for part in folder.split("/") if folder else ():
                below = place + "/" + part if place else part
                if below not in made:
                    made[below] = "%s/D%d" % (made[place], len(made))
                    iso.add_directory(made[below], rr_name=part, joliet_path="/" + below)
                place = below
            content = files[name]
            iso.add_fp(BytesIO(content), len(content), "%s/F%d.;1" % (made[place], number), rr_name=leaf, joliet_path="/" + name)
        written = BytesIO()
        iso.write_fp(written)
        return written.getvalue()
    finally:
        iso.close()


def _read(content):
    """(label, files) of an ISO 9660 image with Joliet names; None for anything else."""
    pycdlib = _pycdlib()
    iso = pycdlib.PyCdlib()
    try:
        iso.open_fp(BytesIO(content))
    except Exception:  # pylint: disable=broad-except  # whatever pycdlib makes of bytes that are no such image
        return None
    try:
        if not iso.has_joliet():
            return None
        files = {}
        for folder, _folders, names in iso.walk(joliet_path="/"):
            for name in names:
                path = os.path.join(folder, name)
                data = BytesIO()
                iso.get_file_from_iso_fp(data, joliet_path=path)
                files[path.lstrip("/")] = data.getvalue()
        return iso.pvd.volume_identifier.decode("ascii", "replace").rstrip(), files
    except Exception:  # pylint: disable=broad-except
        return None
    finally:
        iso.close()


def _difference(path, found, wanted):
    """The two as text, for --diff."""
    before, after = (_text(*seed) if seed else "" for seed in (found, wanted))
    return {"before_header": path, "after_header": path, "before": before, "after": after}


def _text(label, files):
    parts = ["label: %s\n" % label]
    for name in sorted(files):
        parts.append("--- %s\n%s\n" % (name, files[name].decode("utf-8", "replace").rstrip("\n")))
    return "".join(parts)
