# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""blockdev_graph: the images, the file and the service that a graph wants, what there is of them, and the steps from the one to the other."""

from __future__ import annotations

import hashlib
import os
import stat
import sys

from . import _policy
from ._disk import observe as observe_disk
from ._disk import plan as plan_disk
from ._disk import wanted as wanted_disk
from ._plan import Refusal, Step, after
from ._service import Service, has_systemd
from .diskwright.beside import beside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    State = Mapping[str, Any]

MAX_GRAPH = 1 << 20  # bytes of a graph file that is there
LAUNCH = "import sys; sys.path.insert(0, %r); from diskwright.cli import main; raise SystemExit(main(['diskwright', *sys.argv[1:]]))"
# what disk_image takes where nothing is said
DISK = {"state": "present", "format": "qcow2", "preallocation": "off", "rebase": "never", "backing_file": None, "backing_format": None}


def wanted(params: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted state from the module's parameters, checked. Raises Refusal, OptionError."""
    state, name, prepared = params["state"], params["name"], params["prepared"] or {}
    path = params["path"]
    if state == "exported" and path is None:
        path = os.path.join(directory(params, "/etc/diskwright"), name + ".json")
    if state == "exported" and not path.endswith(".json"):
        raise Refusal("path: '%s' does not end in .json, which is what a service reads" % path)
    if state != "absent" and not prepared.get("graph"):
        raise Refusal("the graph is prepared on the controller: call the module by its name, diskwright.images.blockdev_graph")
    if name is None or not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] in ".-":
        raise Refusal("name: '%s' is not made of letters, digits, dots, dashes and underscores" % name)
    text = prepared.get("text") if params["path"] else prepared.get("served") if state == "exported" else None
    library = prepared.get("library") if state == "exported" and not params["executable"] else None
    images = [_wanted_image(image) for image in params["images"] or ()]
    return {
        "state": state,
        "name": name,
        "path": os.path.abspath(path) if path else None,
        "text": text,
        "mode": params["mode"],
        "images": images,
        "executable": params["executable"],
        "library": library,
        "prepared": prepared,
        "library_directory": directory(params, "/usr/local/lib/diskwright", "library_directory"),
        "digest": None
        if text is None
        else hashlib.sha256(repr((text, params["executable"], (library or {}).get("digest"))).encode()).hexdigest()[:32],
        "service": Service(
            name, directory(params, "/run/diskwright", "runtime_directory"), systemd(params["service"]), params["drain_seconds"]
        ),
    }


def _wanted_image(image: State) -> dict[str, Any]:
    """What disk_image makes of an entry of `images`: it may create an image and make it larger, and nothing else."""
    from collections import defaultdict

    return wanted_disk(defaultdict(type(None), {**DISK, **{key: value for key, value in image.items() if value is not None}}))


def systemd(choice: str) -> bool:
    """Whether the service is to be a unit of systemd. Raises Refusal where it cannot be."""
    if choice == "systemd" and not has_systemd():
        raise Refusal("service: systemd does not run this machine")
    return choice == "systemd" or choice == "auto" and has_systemd() and os.geteuid() == 0


def directory(params: Mapping[str, Any], default: str, key: str = "") -> str:
    """A directory for what the module keeps: as given, or the usual one of root, or one of the user's own."""
    if key and params[key]:
        return os.path.abspath(params[key])
    if os.geteuid() == 0:
        return default
    return os.path.join(os.path.expanduser("~/.local/state/diskwright"), default.strip("/").split("/")[-1 if "lib" in default else 0])


# -- what is -------------------------------------------------------------------------------------------------------


def observe(want: State) -> dict[str, Any]:
    """The images, the file's text (None: there is none), and the service."""
    have: dict[str, Any] = {"_images": [observe_disk(image["path"], image) for image in want["images"]], "text": _text(want["path"])}
    have["service"] = want["service"].observe() if want["state"] != "present" else None
    if want["state"] == "exported":
        have["_library"] = want["library"] is None or os.path.isdir(_library(want))
    return have


def _text(path: Optional[str]) -> Optional[str]:
    if path is None or not os.path.lexists(path):
        return None
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_GRAPH:
        raise Refusal("%s is no graph file" % path)
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        return stream.read()


def _library(want: State) -> str:
    return os.path.join(want["library_directory"], want["library"]["digest"])


def command(want: State) -> list[str]:
    """What starts the service in the foreground."""
    start = [want["executable"]] if want["library"] is None else [sys.executable, "-c", LAUNCH % _library(want)]
    return [*start, "serve", "--graph", want["path"]]


# -- what is to be done --------------------------------------------------------------------------------------------


def plan(want: State, have: State) -> list[Step]:
    """Steps for the images, the file and the service, in this order; the other way round for what should be absent. No I/O. Raises Refusal."""
    if want["state"] == "absent":
        return [*_stopping(want, have), *_removing(want, have)]
    steps = [step for image, found in zip(want["images"], have["_images"]) for step in plan_disk(image, found)]
    for step in steps:
        step.change = {}  # of an image, not of the graph
    if want["text"] is not None and want["text"] != have["text"]:
        why = "it does not exist" if have["text"] is None else "it describes another graph"
        steps.append(
            Step(
                "write",
                want["path"],
                why,
                ["install", "-m", want["mode"] or "0600", "/dev/stdin", want["path"]],
                {"text": want["text"]},
                lambda: _write(want),
            )
        )
    if want["state"] == "exported":
        steps += _starting(want, have)
    return steps


def _starting(want: State, have: State) -> list[Step]:
    steps = []
    if not have["_library"]:
        place = _library(want)
        steps.append(
            Step(
                "install",
                place,
                "this version of the library is not there",
                ["unzip", "-q", "library.zip", "-d", place],
                {"_library": True},
                lambda: _unpack(want),
            )
        )
    service, found = want["service"], have["service"]
    why = "it does not run" if not found["running"] else "it serves something else" if found["digest"] != want["digest"] else ""
    if why:
        change = {"service": {"running": True, "digest": want["digest"], "installed": True}}
        argv = (
            ["systemctl", "restart", os.path.basename(service.unit)]
            if service.systemd
            else ["diskwright", "serve", "--fork", "--pid-file", service.pid_file, "--graph", want["path"]]
        )
        steps.append(
            Step(
                "restart" if found["running"] else "start",
                want["name"],
                why,
                argv,
                change,
                lambda: _start(want),
            )
        )
    return steps


def _start(want: State) -> None:
    """Start the service, unless an image names files that it may not."""
    for node in resolve(want["prepared"]):
        if node.get("denied"):
            raise Refusal(node["error"])
    want["service"].start(command(want), want["path"], want["digest"])


def _stopping(want: State, have: State) -> list[Step]:
    service, found = want["service"], have["service"]
    if not (found["running"] or found["installed"]):
        return []
    argv = ["systemctl", "disable", "--now", os.path.basename(service.unit)] if service.systemd else ["kill", "-TERM", str(service.pid())]
    change = {"service": {"running": False, "digest": None, "installed": False}}
    return [Step("stop", want["name"], "it should be absent", argv, change, service.stop)]


def _removing(want: State, have: State) -> list[Step]:
    if have["text"] is None:
        return []
    return [Step("remove", want["path"], "it should be absent", ["rm", want["path"]], {"text": None}, lambda: os.unlink(want["path"]))]


def _write(want: State) -> None:
    folder = os.path.dirname(want["path"])
    os.makedirs(folder, mode=0o755, exist_ok=True)
    with beside(want["path"], private=True) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as stream:
            stream.write(want["text"])


def _unpack(want: State) -> None:
    """Put the library in its place, in one step."""
    import shutil
    import zipfile

    place = _library(want)
    os.makedirs(want["library_directory"], mode=0o755, exist_ok=True)
    temporary = "%s.%d.new" % (place, os.getpid())
    try:
        with zipfile.ZipFile(want["library"]["archive"]) as archive:
            archive.extractall(temporary)
        os.rename(temporary, place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if not os.path.isdir(place):
            raise


# -- the nodes -----------------------------------------------------------------------------------------------------


def resolve(prepared: State) -> list[dict[str, Any]]:
    """Each node of the graph with what is known of it; opens all that can be opened, for reading, whoever uses it. One that cannot says
    why, and is `denied` if an image names what the task does not allow."""
    errors, graphs, names, nodes_of, objects = _modules(prepared)
    whole, allowed = prepared["graph"], _policy.current()
    policy = names.OpenPolicy(allowed.mode, allowed.allowed, allowed.json, allowed.protocols, allowed.max_chain, allowed.names)
    graph = graphs.Graph(policy, objects={each["id"]: objects.make_object(each, True) for each in whole.get("objects", ())})
    nodes = []
    try:
        for spec in whole["blockdevs"]:
            entry: dict[str, Any] = {
                "node_name": spec["node-name"],
                "driver": spec["driver"],
                "size": None,
                "filename": None,
                "actual_size": None,
            }
            nodes.append(entry)
            try:
                node = graph.add(_for_reading(spec), nodes_of.OpenFlags(force_share=True))
            except (errors.Error, OSError) as exc:
                entry.update(error=str(exc), denied=isinstance(exc, errors.Denied))
                continue
            _policy.check_size(node.filename, node.size)
            entry.update(size=node.size, filename=node.filename, actual_size=node.disk_size())
            entry["children"] = {role: child.name for role, child in node.children.items()}
    finally:
        graph.close()
    return nodes


def _modules(prepared: State) -> tuple[Any, ...]:
    """errors, graph, names, node and objects: of the library that was sent, if there is one, since it is all of it, or else of this module's own."""
    if prepared.get("library"):
        from importlib import import_module

        sys.path.insert(0, prepared["library"]["archive"])
        return tuple(import_module("diskwright." + name) for name in ("errors", "graph", "names", "node", "objects"))
    from .diskwright import errors, graph, names, node, objects

    return errors, graph, names, node, objects


def _for_reading(value: Any) -> Any:
    """A description of the same node that is opened for reading, whoever writes it."""
    if not isinstance(value, dict):
        return [_for_reading(item) for item in value] if isinstance(value, list) else value
    spec = {key: _for_reading(item) for key, item in value.items()}
    if "driver" in spec:
        spec.update({"read-only": True, "force-share": True})
        spec.pop("auto-read-only", None)
    return spec


def foretold(have: State, steps: list[Step]) -> dict[str, Any]:
    """The file and the service after the steps."""
    state = after(have, steps)
    service: Optional[Mapping[str, Any]] = state["service"]
    return {"running": None if service is None else service["running"]}
