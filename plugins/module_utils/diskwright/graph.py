# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""From a specification to open nodes, and what becomes of them: named nodes and their users; backing chains.

A specification is a nested mapping in the language of QEMU's blockdev options: `driver`, options, and child nodes as
nested mappings. A graph file and the command line are other spellings of it.
"""

from __future__ import annotations

import os
from _thread import RLock
from errno import EACCES, EPERM, EROFS
from itertools import count

from . import drivers
from .edges import change_use, release
from .errors import Denied, Error, Locked, OptionError, ReadOnly
from .hooks import WRITE, Edge
from .names import (
    MAX_CHAIN,
    OpenPolicy,
    as_protocol,
    beside_name,
    bottom,
    describe,
    file_driver,
    identity,
    identity_of_path,
    identity_of_spec,
    join_name,
    local_path,
    parse_filename,
    parse_image_opts,
    protocol_prefix,
    resolve_name,
    with_driver,
)
from .node import ALL, Format, Node, OpenFlags, cache_flags
from .options import flatten, nest, opt, parse_value
from .parts import part

__all__ = [
    "Graph",
    "MAX_CHAIN",
    "OpenPolicy",
    "cache_flags",
    "describe",
    "identity",
    "identity_of_path",
    "join_name",
    "open_image",
    "parse_filename",
    "parse_image_opts",
    "prefixed",
    "protocol_prefix",
    "resolve_name",
    "with_driver",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Any, Callable, Mapping, Optional, Sequence

    from .node import Reference

PROBED_RAW = (
    "WARNING: Image format was not specified for '%s' and probing guessed raw.\n"
    "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n"
    "         Specify the 'raw' format explicitly to remove the restrictions."
)

MAX_NAME = 31  # characters of a node-name
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GENERIC = ("node-name", "read-only", "auto-read-only", "force-share", "detect-zeroes", "discard", "active")


class Graph:
    """A set of nodes opened under one policy, with the objects (secrets, throttle groups) that they refer to by id."""

    def __init__(
        self,
        policy: Optional[OpenPolicy] = None,
        objects: Optional[Mapping[str, Any]] = None,
        warn: Optional[Callable[[str], None]] = None,
    ) -> None:
        """`warn` is called with what a person should know about an image that could be opened all the same."""
        self.policy = policy or OpenPolicy()
        self.warn = warn
        self.objects = dict(objects or {})
        self.named: dict[str, Node] = {}  # every node that is open, by its name, which it may have got from us
        described = getattr(objects, "described", None)  # a command line has descriptions too, of nodes that are opened once somebody names them
        self.declared: dict[str, Mapping[str, Any]] = {str(spec["node-name"]): spec for spec in (described() if described else ())}
        self.gate: Any = None  # what holds requests back; see root.py
        self.notify: Optional[Callable[[str, dict[str, Any]], None]] = None  # told what nodes report; see Hooks.report
        self.lock = RLock()  # held while nodes are added, removed or given to other users
        self._numbers = count()
        self._taken: set[str] = set()  # names of nodes that are being opened
        self._stored = 0  # descriptions by names in images (json:) that are being opened, one in another

    def open(
        self,
        filename: str,
        format: Optional[str] = None,
        flags: Optional[OpenFlags] = None,
        image_opts: bool = False,
        extra: Optional[Mapping[str, Any]] = None,
    ) -> Node:
        """Open an image, and its backing chain unless flags.no_backing.

        `filename` is a plain name, protocol:name, json:{...} or, with `image_opts`, a string k=v,k2=v2 or a node-name; `format` names
        the driver, None probes; `extra` are further options of it. Raises Error in QEMU's words, beginning "Could not open '<filename>'", and Denied.
        """
        try:
            if image_opts and (filename in self.named or filename in self.declared):
                spec = self.declared.get(filename, {})
            else:
                spec = parse_image_opts(filename) if image_opts else parse_filename(filename)
            if format is not None:
                if spec.get("driver", format) != format:
                    raise OptionError("Driver specified twice")
                spec = with_driver(spec, format)
            if extra:
                spec = {**spec, **nest(extra)}
            flags = flags or OpenFlags()
            node = self.named[filename] if image_opts and filename in self.named else self.open_spec(spec, flags)
            if flags.writable and node.read_only:
                node.close()
                raise ReadOnly("Block node is read-only")
            return node
        except Error as exc:
            raise prefixed("Could not open '%s': " % filename, exc, filename) from exc
        except OSError as exc:
            raise Error("Could not open '%s': %s" % (filename, exc.strerror or exc), filename=filename, errno=exc.errno) from exc

    def open_spec(self, spec: Mapping[str, Any], flags: OpenFlags, above: tuple[Any, ...] = ()) -> Node:
        """Open the node that `spec` describes. `above` holds the identities of the files in the overlays above it."""
        if flags.writable and "read-only" not in spec and _boolean(spec.get("auto-read-only", False), "auto-read-only"):
            try:
                return self._open_spec(spec, flags, above)
            except Error as exc:
                if not isinstance(exc, ReadOnly) and exc.errno not in (EACCES, EPERM, EROFS):
                    raise
            spec = {**spec, "read-only": True}
        return self._open_spec(spec, flags, above)

    def _open_spec(self, spec: Mapping[str, Any], flags: OpenFlags, above: tuple[Any, ...]) -> Node:
        values = dict(spec)
        own = own_flags(values)
        flags = _with_own(flags, own)
        driver = values.pop("driver", None)
        if isinstance(driver, (dict, list)):
            raise OptionError("Invalid parameter type for 'driver', expected: string")
        if driver is None and "file" not in values and "filename" in values:
            values = {**{k: v for k, v in values.items() if k != "filename"}, **parse_filename(str(values["filename"]))}
            driver = values.pop("driver", None)
        name = self._reserve(values.pop("node-name", None))
        edges: list[Edge] = []
        node: Optional[Node] = None
        try:
            node = self._build(driver, values, flags, name, edges)
            node.name, node.graph, node.own_flags = name, self, own
            self.named[name] = node
            for edge in edges:
                edge.user = node
            if node.unwritable and _insists_on_writing(spec):
                raise ReadOnly(bottom(node).refusal)
            self._open_references(node, spec, above)
        except BaseException:
            self._taken.discard(name)
            if node is not None:
                node.abandon()
            for edge in reversed(edges):
                release(edge.node, [edge], Node.abandon)
            raise
        self._taken.discard(name)
        if self.warn is not None:
            for text in node.warnings:
                self.warn(text)
            if node.probed and node.driver == "raw":
                self._warn_of_raw(node)
            if spec.get("backing") == "":
                self.warn('Use of "backing": "" is deprecated; use "backing": null instead')
        return node

    # -- named nodes ---------------------------------------------------------------------------------------------

    def add(self, spec: Mapping[str, Any], flags: Optional[OpenFlags] = None) -> Node:
        """Open the node that `spec` describes, as blockdev-add does, and keep it open until it is removed.

        It is open for writing unless it, or `flags`, says otherwise; what it locks depends on its users. Raises OptionError in
        QEMU's words, Error and its leaves where it cannot be opened.
        """
        spec = nest(spec)
        if spec.get("driver") is None:
            raise OptionError("Parameter 'driver' is missing")
        if spec.get("node-name") is None:
            raise OptionError("'node-name' must be specified for the root node")
        with self.lock:
            node = self.open_spec(spec, flags or OpenFlags(writable=True, perm=0))
            node.kept = True
        return node

    def remove(self, name: str) -> None:
        """Close a node that `add` opened. Raises Error in QEMU's words where it is in use, or none of ours."""
        with self.lock:
            node = self.named.get(name)
            if node is None:
                raise Error("Failed to find node with node-name='%s'" % name)
            if any(not isinstance(edge.user, Node) for edge in node.parents):
                raise Error("Node %s is in use" % name)
            if not node.kept:
                raise Error("Node %s is not owned by the monitor" % name)
            if node.parents:
                raise Error("Block device %s is in use" % name)
            node.kept = False
            node.close()

    def adopt(self, node: Node, name: Optional[str] = None) -> Node:
        """Take a node that was made around nodes of this graph: it gets a name, and its children get to know it.

        It is closed once it had users and has none any more. Raises OptionError for the name, Error where permissions do not
        allow it; the node is not ours then.
        """
        from .edges import use

        with self.lock:
            name = self._reserve(name)
            edges: list[Edge] = []
            try:
                for role, child in node.children.items():
                    edges.append(use(node, role, child, *type(node).child_flags(role, node.flags).permissions()))
            except BaseException:
                for edge in edges:
                    release(edge.node, [edge], Node.close)
                raise
            finally:
                self._taken.discard(name)
            node.name, node.graph = name, self
            self.named[name] = node
            describe(node, {})
        return node

    def set_child(self, node: Node, role: str, child: Optional[Node]) -> None:
        """Make `child` the child `role` of a node in place of what it has there; None takes that away. To be called under `drained`.

        The old one is closed if nobody else uses or keeps it. Raises Error for a cycle or where permissions do not allow it.
        """
        from .edges import below, move, use

        with self.lock:
            if child is not None and any(found is node for found in below(child)):
                raise Error("Making '%s' a %s child of '%s' would create a cycle" % (child.name, role, node.name))
            old = node.children.get(role)
            own = [edge for edge in old.parents if edge.user is node and edge.role == role] if old is not None else []
            if old is not None and child is not None:
                move(own, old, child)
                release(old, (), Node.close)
            elif child is not None:
                edge = use(node, role, child, *type(node).child_flags(role, node.flags).permissions())
                self._attach(node, edge)
            elif old is not None:
                node.detach(role)
                release(old, own, Node.close)

    def replace(self, old: Node, new: Node) -> None:
        """Let all users of `old` use `new`; users that `new` is itself made of stay, so that a filter can be put on top of `old`.

        To be called under `drained`. A node that is left without users is closed, unless `add` opened it. Raises Error where
        permissions do not allow it; nothing is changed then.
        """
        from .edges import replace

        with self.lock:
            replace(old, new)
            release(old, (), Node.close)

    def close(self) -> None:
        """Close all nodes, users before what they use. Raises what the first failure raises, after all are closed."""
        failure: Optional[BaseException] = None
        with self.lock:
            while self.named:
                nodes = list(self.named.values())
                tops = [node for node in nodes if not any(isinstance(edge.user, Node) for edge in node.parents)]
                for node in tops or nodes[-1:]:
                    node.kept = False
                    node.parents.clear()
                    try:
                        node.close()
                    except (Error, OSError) as exc:
                        failure = failure or exc
                    self.forget(node)
        if failure is not None:
            raise failure

    def drained(self) -> AbstractContextManager[None]:
        """For a `with` in which no request is under way: those of all Roots are waited for, and new ones held back."""
        drained: AbstractContextManager[None] = part(__package__, "root").gate(self).closed()
        return drained

    def _reserve(self, name: Optional[str]) -> str:
        """The name of a new node, which nobody else can take from now on; None makes one up. Raises OptionError."""
        if name is None:
            name = "#block%03d" % next(self._numbers)
        else:
            check_node_name(name)
        if name in self.named or name in self._taken:
            raise OptionError("Duplicate nodes with node-name='%s'" % name)
        self._taken.add(name)
        return name

    def forget(self, node: Node) -> None:
        """For node.py: a node was closed."""
        if self.named.get(node.name) is node:
            del self.named[node.name]

    def _warn_of_raw(self, node: Node) -> None:
        """Nobody said that `node` is raw."""
        from .probe import unread

        if self.warn is None:
            return
        if not node.read_only:
            self.warn(PROBED_RAW % node.filename)
        content = unread(node.children["file"])
        if content:
            self.warn("'%s' is taken for a raw image, but it holds %s" % (node.filename, content))

    def _build(self, driver: Optional[str], values: dict[str, Any], flags: OpenFlags, name: str, edges: list[Edge]) -> Node:
        """Open the children that `values` describes, then the node `name` itself; `edges` collects its uses of them."""
        probed = driver is None
        if driver is None:
            from .probe import probe

            if "file" not in values:
                raise OptionError("Must specify either driver or file")
            # without permissions: which ones the format needs shows only afterwards
            wanted = Format.child_flags("file", flags).but(perm=0, shared=ALL)
            edges.append(self._child(name, "file", as_protocol(values.pop("file")), wanted))
            file = edges[0].node
            driver = probe(file, file.filename)
            cls = drivers.lookup(driver)
            change_use(edges[0], cls.child_flags("file", flags))
            values["file"] = file
        cls = drivers.lookup(driver)
        for key, field in cls.options_class.fields.items():
            if field.kind == "NodeRef" and key != "backing" and not isinstance(values.get(key), Node):
                if values.get(key) is None:
                    if not field.optional:
                        raise OptionError('A block device must be specified for "%s"' % key)
                    continue
                spec = as_protocol(values[key]) if issubclass(cls, Format) else values[key]
                edges.append(self._child(name, key, spec, cls.child_flags(key, flags).but(no_backing=False)))
                values[key] = edges[-1].node
            elif field.kind == "NodeRefs":
                specs = values.get(key) or ()
                if not isinstance(specs, (list, tuple)):
                    raise OptionError("Parameter '%s' expects a list" % key)
                values[key] = []
                for index, spec in enumerate(specs):
                    edges.append(self._child(name, "%s.%d" % (key, index), spec, cls.child_flags(key, flags).but(no_backing=False)))
                    values[key].append(edges[-1].node)
        unknown = "Block protocol '%s' doesn't support the option '%%s'" if cls.leaf else "Block format '%s' does not support the option '%%s'"
        backing = values.pop("backing", None)
        if backing not in (None, "") and (flags.no_backing or not cls.supports_backing):
            from .json_text import in_order

            raise OptionError(unknown % driver % in_order(flatten({"backing": backing}))[0])
        for key in cls.numbered_references:
            if isinstance(values.get(key), (dict, list)):
                del values[key]  # _open_references knows what it is for
        lists = [key for key, field in cls.options_class.fields.items() if field.kind == "NodeRefs"]
        children = {key: value for key, value in values.items() if isinstance(value, Node) or key in lists}
        flat = flatten({key: value for key, value in values.items() if key not in children})
        options = cls.options_class.from_mapping({**flat, **children}, unknown=unknown % driver).bind(self.objects)
        node = cls(options, flags)
        if probed:
            from .probe import probe_head

            node.probed = probe_head
        describe(node, flat)
        return node

    def _child(self, user: Any, role: str, spec: Any, flags: OpenFlags, chain: tuple[Any, ...] = ()) -> Edge:
        """Open what `spec` describes, or find the node that it names, as the child `role` of `user`, which is about to be opened."""
        if isinstance(spec, str):
            if self._stored:
                raise Denied("A name that an image stores refers to the node '%s', which is for users alone to do" % spec)
            if spec in self.named or spec not in self.declared:
                from .edges import use

                return use(user, role, self.find(spec), *flags.permissions())
            spec = self.declared[spec]
        if isinstance(spec, Node):
            node = spec
        elif isinstance(spec, dict):
            node = self.open_spec(spec, flags, chain)
            if flags.permissions()[0] & WRITE and node.read_only:
                node.abandon()
                raise ReadOnly("Block node is read-only", filename=node.filename)
        else:
            raise OptionError('A block device must be specified for "%s"' % role)
        edge = Edge(user, role, node, *node.flags.permissions())
        node.parents.append(edge)
        return edge

    def find(self, name: str) -> Node:
        """The open node of this name. Raises OptionError."""
        if name not in self.named or name in self._taken:  # one that is being opened is not there yet: it would be its own child
            raise OptionError("Cannot find device='%s' nor node-name='%s'" % (name, name))
        return self.named[name]

    def _attach(self, node: Node, edge: Edge) -> None:
        """Give a node that is open one more child, which was opened for it."""
        try:
            node.attach(edge.role, edge.node)
        except BaseException:
            release(edge.node, [edge], Node.abandon)
            raise

    def _open_references(self, node: Node, spec: Mapping[str, Any], above: tuple[Any, ...]) -> None:
        """Open what the image itself names, or what `spec` puts in its place."""
        chain = above + (identity(node),)

        def open_beside(reference: Reference) -> Node:
            return self._open_beside(node, reference, chain)

        node.open_beside = open_beside
        given = spec.get("backing", "stored") if node.supports_backing else "stored"
        references = node.references()
        extra: Any = {}
        numbered = _numbered(node, spec, [reference.role for reference in references])
        if isinstance(given, dict) and not _names_file(given) and any(reference.role == "backing" for reference in references):
            extra, given = given, "stored"  # a key, say, of the file that the image names
        if given != "stored" and not node.flags.no_backing:
            if given is not None and given != "":
                try:
                    self._attach(node, self._child(node, "backing", given, type(node).child_flags("backing", node.flags), chain))
                except Denied:
                    raise
                except Error as exc:
                    raise prefixed("Could not open backing file: ", exc, node.filename) from exc
            references = [reference for reference in references if reference.role != "backing"]
        for reference in references:
            if reference.role == "backing" and node.flags.no_backing:
                continue
            more = extra if reference.role == "backing" else numbered.get(reference.role, {})
            child = self._open_reference(node, reference, chain, more)
            self._attach(node, self._child(node, reference.role, child, node.flags))

    def _open_beside(self, node: Node, reference: Reference, chain: tuple[Any, ...]) -> Node:
        """Open a file in the directory of `node` or below it, if the policy admits it too."""
        path = beside_name(node, reference.name)
        place = os.path.dirname(os.path.realpath(local_path(node)))
        names = reference.name.split("/")
        if "\0" in path or ".." in names or not names[0] or not os.path.realpath(path).startswith(place.rstrip("/") + "/"):
            raise Denied("'%s' is not in the directory of '%s'" % (reference.name, node.filename), filename=node.filename)
        return self._open_reference(node, reference, chain, {})

    def _open_reference(self, node: Node, reference: Reference, chain: tuple[Any, ...], extra: Any) -> Node:
        """Open a file that `node` names, with the options `extra` besides, which may be whatever a user put there."""
        if reference.spec is not None:
            inside = Graph(OpenPolicy("none", max_chain=self.policy.max_chain), self.objects, self.warn)
            inside.named, inside._numbers, inside._taken = self.named, self._numbers, self._taken
            return inside.open_spec(reference.spec, type(node).child_flags(reference.role, node.flags), chain)
        resolved = resolve_name(node, reference.name) if not reference.protocol else beside_name(node, reference.name)
        try:
            spec = parse_filename(resolved) if not reference.protocol else {"driver": file_driver(resolved), "filename": resolved}
            if reference.format and "driver" not in extra:
                spec = with_driver(spec, reference.format)
            if extra and reference.protocol:
                spec = _with_options(spec, extra)
            elif extra:
                spec = nest({**flatten(spec), **flatten(extra)})
            self.policy.admit(node, reference, spec)
            if len(chain) >= self.policy.max_chain:
                raise Error("The backing chain is deeper than %d images" % self.policy.max_chain, filename=node.filename)
            if not reference.protocol and identity_of_spec(spec) in chain and identity_of_spec(spec) is not None:
                raise Error("Backing file '%s' creates an infinite loop." % resolved, filename=node.filename)
            stored = int(reference.name.startswith("json:"))
            self._stored += stored
            try:
                return self.open_spec(spec, type(node).child_flags(reference.role, node.flags), chain)
            finally:
                self._stored -= stored
        except Denied:
            raise
        except Error as exc:
            # a format locks its own file when it is opened; for a raw file it is the overlay that does, once all is open
            late = isinstance(exc, Locked) and reference.format == "raw"
            raise prefixed("Could not open backing file: " if reference.role == "backing" and not late else "", exc, node.filename) from exc
        except OSError as exc:
            what = "" if reference.protocol else "Could not open %s file: " % reference.role
            raise Error(
                "%sCould not open '%s': %s" % (what, resolved, exc.strerror or exc),
                filename=node.filename,
                errno=exc.errno,
            ) from exc


def check_node_name(name: Any) -> None:
    """Raise OptionError unless `name` may be a node-name."""
    if not isinstance(name, str):
        raise OptionError("Invalid parameter type for 'node-name', expected: string")
    if name[:1] not in _LETTERS or not name or name.strip(_LETTERS + "0123456789-._"):
        raise OptionError("Invalid node-name: '%s'" % name)
    if len(name) > MAX_NAME:
        raise OptionError("Node name too long")


def _numbered(node: Node, spec: Mapping[str, Any], roles: Sequence[str]) -> dict[str, Any]:
    """What `spec` says of the files that `node` names and that have a number, by role. Raises OptionError for others."""
    found: dict[str, Any] = {}
    for key in node.numbered_references:
        given = spec.get(key)
        items = enumerate(given) if isinstance(given, list) else given.items() if isinstance(given, dict) else ()
        found.update({"%s.%s" % (key, number): value for number, value in items} or ({key: ""} if given is not None else {}))
    unknown = {role: value for role, value in found.items() if role not in roles}
    if unknown:
        from .json_text import in_order

        raise OptionError("Block format '%s' does not support the option '%s'" % (node.driver, in_order(flatten(unknown))[0]))
    return found


def _with_options(spec: Mapping[str, Any], extra: Any) -> dict[str, Any]:
    """`spec`, a file that an image names, with a user's options; a format goes on top of it. Raises OptionError."""
    if not isinstance(extra, dict):
        raise OptionError("Cannot reference an existing block device with additional options or a new filename")
    driver = extra.get("driver")
    if isinstance(driver, str) and "file" in drivers.lookup(driver).options_class.fields:
        return {**extra, "file": _with_options(spec, extra.get("file", {}))}
    if "filename" in extra:
        raise OptionError("Can't specify 'file' and 'filename' options at the same time")
    return {**spec, **extra}


def _names_file(spec: Mapping[str, Any]) -> bool:
    """Whether a specification says by itself what is to be opened."""
    file = spec.get("file")
    return "filename" in spec or isinstance(file, str) or isinstance(file, dict) and ("filename" in file or "driver" in file)


def open_image(
    filename: str,
    format: Optional[str] = None,
    flags: Optional[OpenFlags] = None,
    *,
    image_opts: bool = False,
    policy: Optional[OpenPolicy] = None,
    objects: Optional[Mapping[str, Any]] = None,
) -> Node:
    """Open one image in a graph of its own; see Graph.open."""
    return Graph(policy, objects).open(filename, format, flags, image_opts)


def generic_flags(values: dict[str, Any], flags: OpenFlags) -> OpenFlags:
    """Take the options that every node has out of `values` and apply them to `flags`, those of the node above it."""
    return _with_own(flags, own_flags(values))


def _with_own(flags: OpenFlags, own: Mapping[str, Any]) -> OpenFlags:
    if own or flags.detect_zeroes:
        flags = flags.but(**{"detect_zeroes": "", **own})
    if flags.writable and flags.force_share:
        raise OptionError("force-share=on can only be used with read-only images")
    if flags.detect_zeroes == "unmap" and not flags.unmap:
        raise OptionError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    return flags


def own_flags(values: dict[str, Any]) -> dict[str, Any]:
    """Take the options that every node has out of `values`: what they say, as fields of OpenFlags."""
    own: dict[str, Any] = {}
    cache = values.pop("cache", None) or {}
    for key in ("direct", "no-flush"):
        if isinstance(cache, dict) and key in cache:
            own[key.replace("-", "_")] = _boolean(cache[key], "cache." + key)
    for key in _GENERIC:
        if key == "node-name" or key not in values:
            continue
        value = values.pop(key)
        if key == "discard":
            if value not in ("ignore", "off", "unmap", "on"):
                raise OptionError("Invalid discard option")
            own["unmap"] = value in ("unmap", "on")
        elif key == "detect-zeroes":
            if value not in ("off", "on", "unmap"):
                raise OptionError("Parameter 'detect-zeroes' does not accept value '%s'" % value)
            own["detect_zeroes"] = "" if value == "off" else value
        elif key == "force-share":
            own["force_share"] = _boolean(value, key)
        elif key == "read-only" and _boolean(value, key):
            own["writable"] = own["resize"] = False
    return own


def _insists_on_writing(spec: Mapping[str, Any]) -> bool:
    """Whether read-only=off is said, and nothing that softens it. The command may only want to read all the same."""
    return not _boolean(spec.get("read-only", True), "read-only") and not _boolean(spec.get("auto-read-only", False), "auto-read-only")


def _boolean(value: Any, key: str) -> bool:
    field = opt(False)
    field.kind = "bool"
    return bool(parse_value(field, value, key))


def prefixed(prefix: str, exc: Error, filename: str) -> Error:
    """The same error with more context in front; its class and its details stay."""
    again = type(exc).__new__(type(exc))
    Error.__init__(again, prefix + str(exc), filename=exc.filename or filename, offset=exc.offset, errno=exc.errno, hint=exc.hint)
    for name, value in exc.__dict__.items():
        again.__dict__.setdefault(name, value)
    return again
