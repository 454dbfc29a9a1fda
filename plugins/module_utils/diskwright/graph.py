# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""From a specification to open nodes: file names, json:, image-opts; backing chains; the open policy.

A specification is a nested mapping in the language of QEMU's blockdev options: `driver`, options, and child nodes as
nested mappings. A graph file and the command line are other spellings of it.
"""

from __future__ import annotations

import os

from . import drivers
from .errors import Denied, Error, Locked, OptionError, ReadOnly
from .node import ALL, Format, Node, OpenFlags, Protocol, cache_flags
from .options import flatten, nest, parse_value, opt, split_pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from .node import Reference

MAX_CHAIN = 200  # nodes above one another; deeper chains are refused


class OpenPolicy:
    """Which files an image may make us open by naming them (backing files, data files, extents).

    mode      "any" (as QEMU does), "none", "same_directory" (files at or below the image's own directory, no links out
              of it), "listed" (those in `allowed`, after resolving links)
    allowed   paths of files or directories; for "listed"
    json      whether stored names may be json: descriptions
    protocols names of the protocols that a stored name may use
    """

    __slots__ = ("mode", "allowed", "json", "protocols", "max_chain")

    def __init__(
        self,
        mode: str = "any",
        allowed: Sequence[str] = (),
        json: bool = True,
        protocols: Optional[Sequence[str]] = None,
        max_chain: int = MAX_CHAIN,
    ) -> None:
        if mode not in ("any", "none", "same_directory", "listed"):
            raise OptionError("Unknown open policy '%s'" % mode)
        self.mode = mode
        self.allowed = tuple(os.path.realpath(path) for path in allowed)
        self.json = json
        self.protocols = protocols
        self.max_chain = max_chain

    def admit(self, parent: Node, reference: Reference, spec: Mapping[str, Any]) -> None:
        """Raise Denied unless the file that `reference` of `parent` names, parsed as `spec`, may be opened."""
        if self.mode == "any" and self.json and self.protocols is None:
            return
        what = "%s: the image refers to the %s file '%s', which the open policy" % (parent.filename, reference.role, reference.name)
        if reference.name.startswith("json:") and not self.json:
            raise Denied("%s refuses (json: names are not allowed)" % what, filename=parent.filename)
        if self.mode == "none":
            raise Denied("%s refuses (mode 'none')" % what, filename=parent.filename)
        for leaf in _leaves(spec):
            if "driver" in leaf or "filename" in leaf:
                self._admit_leaf(parent, what, leaf)

    def _admit_leaf(self, parent: Node, what: str, leaf: Mapping[str, Any]) -> None:
        driver, filename = leaf.get("driver"), leaf.get("filename", "")
        if driver is None:
            driver = protocol_prefix(str(filename)) or "file"
        if self.protocols is not None and driver not in self.protocols:
            raise Denied("%s refuses (protocol '%s' is not allowed)" % (what, driver), filename=parent.filename)
        if self.mode == "any":
            return
        if driver != "file" or not isinstance(filename, str) or "\0" in filename:
            raise Denied("%s refuses (mode '%s')" % (what, self.mode), filename=parent.filename)
        path = os.path.realpath(filename)
        places = self.allowed if self.mode == "listed" else (os.path.dirname(os.path.realpath(local_path(parent))),)
        if not any(path == place or path.startswith(place.rstrip("/") + "/") for place in places):
            raise Denied("%s refuses (mode '%s')" % (what, self.mode), filename=parent.filename)


PROBED_RAW = (
    "WARNING: Image format was not specified for '%s' and probing guessed raw.\n"
    "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n"
    "         Specify the 'raw' format explicitly to remove the restrictions."
)


def _leaves(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The innermost descriptions in `spec`, at whatever depth and under whatever key: what is going to be opened in the end."""
    found: list[Mapping[str, Any]] = []
    for value in spec.values():
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, dict):
                found += _leaves(item)
    return found if found and "filename" not in spec else [*found, spec]


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
        self.named: dict[str, Node] = {}

    def open(
        self,
        filename: str,
        format: Optional[str] = None,
        flags: Optional[OpenFlags] = None,
        image_opts: bool = False,
        extra: Optional[Mapping[str, Any]] = None,
    ) -> Node:
        """Open an image, and its backing chain unless flags.no_backing.

        `filename` is a plain name, protocol:name, json:{...} or, with `image_opts`, a string k=v,k2=v2; `format` names
        the driver, None probes; `extra` are further options of it. Raises Error in QEMU's words, beginning "Could not open '<filename>'", and Denied.
        """
        try:
            spec = parse_image_opts(filename) if image_opts else parse_filename(filename)
            if format is not None:
                if spec.get("driver", format) != format:
                    raise OptionError("Driver specified twice")
                spec = with_driver(spec, format)
            if extra:
                spec = {**spec, **nest(extra)}
            flags = flags or OpenFlags()
            node = self.open_spec(spec, flags)
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
        values = dict(spec)
        flags = _generic_flags(values, flags)
        name = values.pop("node-name", None)
        driver = values.pop("driver", None)
        if isinstance(driver, (dict, list)):
            raise OptionError("Invalid parameter type for 'driver', expected: string")
        if driver is None and "file" not in values and "filename" in values:
            values = {**{k: v for k, v in values.items() if k != "filename"}, **parse_filename(str(values["filename"]))}
            driver = values.pop("driver", None)
        opened: list[Node] = []
        try:
            node = self._build(driver, values, flags, opened)
            opened.append(node)
            if node.unwritable and _insists_on_writing(spec):
                raise ReadOnly("Image is read-only")
            self._open_references(node, spec, above)
        except BaseException:
            for child in reversed(opened):
                child.abandon()
            raise
        if self.warn is not None:
            for text in node.warnings:
                self.warn(text)
            if node.probed and node.driver == "raw":
                self._warn_of_raw(node)
            if spec.get("backing") == "":
                self.warn('Use of "backing": "" is deprecated; use "backing": null instead')
        if name is not None:
            self.named[name] = node
        return node

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

    def _build(self, driver: Optional[str], values: dict[str, Any], flags: OpenFlags, opened: list[Node]) -> Node:
        """Open the children that `values` describes, then the node itself; `opened` collects what must be closed on failure."""
        probed = driver is None
        if driver is None:
            from .probe import probe

            if "file" not in values:
                raise OptionError("Must specify either driver or file")
            # without permissions: which ones the format needs shows only afterwards
            file = self._child("file", _as_protocol(values.pop("file")), Format.child_flags("file", flags).but(perm=0, shared=ALL))
            opened.append(file)
            driver = probe(file, file.filename)
            cls = drivers.lookup(driver)
            file.change_flags(cls.child_flags("file", flags))
            values["file"] = file
        cls = drivers.lookup(driver)
        for key, field in cls.options_class.fields.items():
            if field.kind == "NodeRef" and key != "backing" and not isinstance(values.get(key), Node):
                if values.get(key) is None:
                    if not field.optional:
                        raise OptionError('A block device must be specified for "%s"' % key)
                    continue
                spec = _as_protocol(values[key]) if issubclass(cls, Format) else values[key]
                values[key] = self._child(key, spec, cls.child_flags(key, flags).but(no_backing=False))
                opened.append(values[key])
            elif field.kind == "NodeRefs":
                specs = values.get(key) or ()
                if not isinstance(specs, (list, tuple)):
                    raise OptionError("Parameter '%s' expects a list" % key)
                values[key] = []
                for index, spec in enumerate(specs):
                    values[key].append(self._child("%s.%d" % (key, index), spec, cls.child_flags(key, flags).but(no_backing=False)))
                    opened.append(values[key][-1])
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

    def _child(self, key: str, spec: Any, flags: OpenFlags) -> Node:
        if isinstance(spec, Node):
            return spec
        if isinstance(spec, str):
            if spec in self.named:
                return self.named[spec]
            raise OptionError("Cannot find device='%s' nor node-name='%s'" % (spec, spec))
        if not isinstance(spec, dict):
            raise OptionError('A block device must be specified for "%s"' % key)
        return self.open_spec(spec, flags)

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
                if not isinstance(given, dict):
                    raise OptionError("Could not open backing file: Cannot find device='%s' nor node-name='%s'" % (given, given))
                try:
                    node.attach("backing", self.open_spec(given, type(node).child_flags("backing", node.flags), chain))
                except Denied:
                    raise
                except Error as exc:
                    raise prefixed("Could not open backing file: ", exc, node.filename) from exc
            references = [reference for reference in references if reference.role != "backing"]
        for reference in references:
            if reference.role == "backing" and node.flags.no_backing:
                continue
            more = extra if reference.role == "backing" else numbered.get(reference.role, {})
            node.attach(reference.role, self._open_reference(node, reference, chain, more))

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
            return inside.open_spec(reference.spec, type(node).child_flags(reference.role, node.flags), chain)
        resolved = resolve_name(node, reference.name) if not reference.protocol else beside_name(node, reference.name)
        try:
            spec = parse_filename(resolved) if not reference.protocol else {"driver": _file_driver(resolved), "filename": resolved}
            if reference.format and "driver" not in extra:
                spec = with_driver(spec, reference.format)
            if extra and reference.protocol:
                spec = _with_options(spec, extra)
            elif extra:
                spec = nest({**flatten(spec), **flatten(extra)})
            self.policy.admit(node, reference, spec)
            if len(chain) >= self.policy.max_chain:
                raise Error("The backing chain is deeper than %d images" % self.policy.max_chain, filename=node.filename)
            if not reference.protocol and _identity_of_spec(spec) in chain and _identity_of_spec(spec) is not None:
                raise Error("Backing file '%s' creates an infinite loop." % resolved, filename=node.filename)
            return self.open_spec(spec, type(node).child_flags(reference.role, node.flags), chain)
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


def parse_filename(filename: str) -> dict[str, Any]:
    """The specification that a plain FILENAME operand or a stored name means; the driver of the format is left open.

    Raises OptionError for an unknown protocol or a malformed json: name.
    """
    if filename.startswith("json:"):
        return _parse_json(filename)
    protocol = protocol_prefix(filename)
    if protocol is None:
        return {"file": {"driver": _file_driver(filename), "filename": filename}}
    cls = drivers.lookup(protocol) if protocol in drivers.PREFIXED else drivers.lookup_protocol(protocol)
    return {"file": {"driver": cls.driver, **cls.parse_name(filename)}}


def with_driver(spec: Mapping[str, Any], format: str) -> dict[str, Any]:
    """`spec`, as parse_filename gives it, with a driver on top of it; a protocol takes the place of the file's."""
    inner = spec.get("file")
    if format in drivers.PROTOCOLS and isinstance(inner, dict) and "driver" not in spec:
        spec = inner
    return {**spec, "driver": format}


def _as_protocol(spec: Any) -> Any:
    """The specification of a format's own file: a name in it is a protocol's, and its content is not probed for a format."""
    if not isinstance(spec, dict) or "driver" in spec or "file" in spec or "filename" not in spec:
        return spec
    named = parse_filename(str(spec["filename"]))
    rest = {key: value for key, value in spec.items() if key != "filename"}
    return {**(named if "driver" in named else named.get("file", named)), **rest}


def protocol_prefix(filename: str) -> Optional[str]:
    """The protocol in front of the first colon, unless a slash comes earlier; None for a path."""
    colon = filename.find(":")
    slash = filename.find("/")
    if colon < 0 or 0 <= slash < colon:
        return None
    return filename[:colon]


def _file_driver(path: str) -> str:
    """host_device for a block or character device, else file."""
    import stat

    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "file"
    return "host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file"


def _parse_json(filename: str) -> dict[str, Any]:
    from .json_parser import parse_json

    try:
        value = parse_json(filename[5:])
    except OptionError as exc:
        raise OptionError("Could not parse the JSON options: %s" % exc) from None
    if not isinstance(value, dict):
        raise OptionError("Invalid JSON object given")
    return nest(value)


def parse_image_opts(text: str) -> dict[str, Any]:
    """The specification that an --image-opts string means."""
    return nest(dict(split_pairs(text, implied_key="file")))


def resolve_name(node: Node, name: str) -> str:
    """A stored name as seen from the working directory: relative ones are relative to the image that stores them."""
    return join_name(local_path(node) if node.filename.startswith("json:") else node.filename, name)


def beside_name(node: Node, name: str) -> str:
    """A path as seen from the working directory: relative ones are relative to the local file of `node`."""
    place = local_path(node)
    return name if name.startswith("/") else place[: place.rfind("/") + 1] + name


def join_name(base: str, name: str) -> str:
    """`name` as it is, or beside the file `base` if it is a relative path."""
    if not name or name.startswith("/") or name.startswith("json:") or protocol_prefix(name) is not None:
        return name
    return base[: base.rfind("/") + 1] + name


def local_path(node: Node) -> str:
    """The path of the local file at the bottom of `node`; "" where there is none."""
    file: Optional[Node] = node
    while file is not None and not file.leaf:
        file = file.children.get("file")
    return getattr(file.options, "filename", "") if file is not None else ""


def identity(node: Node) -> Any:
    """What tells the file below `node` from all others (device and inode, or the name); None where nothing does."""
    return identity_of_path(local_path(node))


def _identity_of_spec(spec: Mapping[str, Any]) -> Any:
    inner = spec.get("file", spec)
    return identity_of_path(str(inner.get("filename", ""))) if isinstance(inner, dict) else None


def identity_of_path(path: str) -> Any:
    """Device and inode of the file at `path`, None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def describe(node: Node, given: Mapping[str, Any]) -> None:
    """Fill in the name of a node for people, and the specification that it stands for.

    The name is the plain file name where that says it all, else json:{...}, as QEMU has it. `given` are the driver's own
    options as the user wrote them, by flat key.
    """
    full = {key: value for key, value in given.items() if key in node.strong_options}
    weak = not full
    full["driver"] = node.driver
    file = node.children.get("file")
    if isinstance(node, Protocol):
        node.full_options = full
        node.filename = node.options_name()
    else:
        lists: dict[str, dict[int, Any]] = {}
        for role, child in node.children.items():
            name, numbered, number = role.partition(".")
            if numbered:  # one of a list of children
                lists.setdefault(name, {})[int(number)] = child.full_options
            elif role != "backing":
                full[role] = child.full_options
        full.update((name, [members[number] for number in sorted(members)]) for name, members in lists.items())
        node.full_options = full
        node.filename = node.options_name()
        if not node.filename and weak and file is not None and node.unfiltered() is node and (file.leaf or file.options_name()):
            node.filename = "" if file.filename.startswith("json:") else file.filename
    if not node.filename:
        from .json_text import dumps

        node.filename = "json:" + dumps(full)


def _generic_flags(values: dict[str, Any], flags: OpenFlags) -> OpenFlags:
    """Take the options that every node has out of `values` and apply them to `flags`."""
    changed: dict[str, Any] = {}
    cache = values.pop("cache", None) or {}
    for key in ("direct", "no-flush"):
        if isinstance(cache, dict) and key in cache:
            changed[key.replace("-", "_")] = _boolean(cache[key], "cache." + key)
    for key in _GENERIC:
        if key == "node-name" or key not in values:
            continue
        value = values.pop(key)
        if key == "discard":
            if value not in ("ignore", "off", "unmap", "on"):
                raise OptionError("Invalid discard option")
            changed["unmap"] = value in ("unmap", "on")
        elif key == "force-share":
            changed["force_share"] = _boolean(value, key)
        elif key == "read-only" and _boolean(value, key):
            changed["writable"] = changed["resize"] = False
    if changed:
        flags = flags.but(**changed)
    if flags.writable and flags.force_share:
        raise OptionError("force-share=on can only be used with read-only images")
    return flags


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


__all__ = ["Graph", "OpenPolicy", "cache_flags", "describe", "open_image", "parse_filename", "parse_image_opts", "resolve_name"]
