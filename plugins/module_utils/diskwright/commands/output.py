# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The image that convert and dd make: created, opened for writing and, if asked for, given its name only when it is whole
(https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

import os

from ..errors import Error, OptionError
from ..graph import identity, parse_filename, prefixed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Any, Iterable, Mapping, Optional

    from ..graph import Graph
    from ..node import Node, OpenFlags
    from .creation import CreationOptions


class Output:
    """A new image named `filename`; with `atomic` it is written beside its name (beside.py), and has it once it is whole.

    Use it in a `with` statement: leaving that by an exception removes the draft. Without `atomic` what is there of the image stays.
    """

    def __init__(self, filename: str, atomic: bool) -> None:
        self.filename = filename
        self.path = filename  # what to create, and to open
        self._final = os.path.realpath(_local_path(filename)) if atomic else ""
        self._beside: Optional[AbstractContextManager[str]] = None
        self._extents: list[tuple[str, str]] = []  # further files of the image: where they are written, and their names in the end

    def __enter__(self) -> Output:
        if self._final:
            from ..beside import beside

            self._beside = beside(self._final)
            self.path = self._beside.__enter__()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], exc: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        if self._beside is not None:
            try:
                self._settle_extents(kind is None)
            except BaseException as failure:
                self._beside.__exit__(type(failure), failure, failure.__traceback__)
                raise
            self._beside.__exit__(kind, exc, trace)

    def _settle_extents(self, whole: bool) -> None:
        """Give the further files of the image their names, which the image must know; or remove them."""
        if whole and self._extents:
            with open(self.path, "r+b") as file:
                text = file.read()
                for draft, final in self._extents:
                    text = text.replace(os.fsencode(os.path.basename(draft)), os.fsencode(os.path.basename(final)))
                file.seek(0)
                file.write(text)
                file.truncate()
        for draft, final in self._extents:
            if whole:
                os.rename(draft, final)
            elif os.path.lexists(draft):
                os.unlink(draft)

    def create(self, options: CreationOptions, sources: Iterable[Node], doing: str) -> None:
        """Make the empty image. Raises Error "<filename>: error while <doing>: ..."; sources are never overwritten."""
        from .create import write_image

        try:
            self._spare(sources)
            if self._beside is not None and not options.own.leaf:
                record = options.own_record()
                drafts = options.own.creation_files(record, self.path)
                finals = options.own.creation_files(record, self._final)
                self._extents = [(drafts[role], finals[role]) for role in drafts if drafts[role] != finals[role]]
            write_image(self.path, options.own, options.protocol, options.own_record(), options.protocol_record())
        except Error as exc:
            raise self.named(exc, "error while %s: " % doing) from exc
        except OSError as exc:
            reason = "Could not create '%s': %s" % (self.filename, exc.strerror or exc)
            raise Error("%s: error while %s: %s" % (self.filename, doing, reason), filename=self.filename, errno=exc.errno) from exc

    def open(self, graph: Graph, format: Optional[str], flags: OpenFlags, image_opts: bool = False, extra: Optional[Mapping[str, Any]] = None) -> Node:
        """Open the image, with the further options `extra`. Raises Error."""
        try:
            return graph.open(self.path, format, flags, image_opts, extra)
        except Error as exc:
            if self._beside is None:
                raise
            raise self._retold(exc, str(exc).replace(self.path, self.filename)) from exc

    def _spare(self, sources: Iterable[Node]) -> None:
        """Raise Error if the image would take the place of a file that is being read."""
        try:
            status = os.stat(self._final or _local_path(self.filename))
        except (OSError, ValueError, OptionError):
            return
        for node in sources:
            for layer in node.layers():
                if identity(layer) == (status.st_dev, status.st_ino):
                    raise Error(
                        'Failed to get "write" lock', filename=self.filename, hint="Is another process using the image [%s]?" % self.filename
                    )

    def named(self, exc: Error, words: str) -> Error:
        """The error of an image, under the name that the user knows."""
        text = str(exc).replace(self.path, self.filename) if self._beside is not None else str(exc)
        return self._retold(exc, "%s: %s%s" % (self.filename, words, text))

    def _retold(self, exc: Error, text: str) -> Error:
        """The same error, of its class and with all that it knows, in other words and about the image."""
        again = prefixed("", exc, self.filename)
        again.filename = self.filename
        again.args = (text,)
        return again


def _local_path(filename: str) -> str:
    """The path of a local file. Raises OptionError for the name of anything else."""
    described = parse_filename(filename).get("file")
    if not isinstance(described, dict) or described.get("driver") != "file":
        raise OptionError("%s: only a file can be written under another name first" % filename)
    return str(described["filename"])
