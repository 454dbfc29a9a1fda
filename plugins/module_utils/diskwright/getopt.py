# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Command lines as GNU getopt_long reads them (https://www.gnu.org/software/libc/manual/html_node/Using-Getopt.html).

Options and operands may be mixed, `--` ends the options, short options bundle, and any unambiguous prefix of a long
option is that option.
"""

from __future__ import annotations

from .errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Optional, Sequence

FLAG, VALUE, MAYBE = 0, 1, 2  # takes no argument, needs one, takes one only as --name=value


class Option:
    """One option: its spellings, what it takes, and what help says about it.

    `names` are spellings with their dashes, first those that prefixes are matched against. `extra` are the long ones
    that only another dialect of qemu-img knows: they are accepted, but a prefix is tried on them only if it matches no
    name of any option, so that they never make a prefix ambiguous that qemu-img takes. `key` is the name of its value,
    `check` turns the argument into that value or raises.
    """

    __slots__ = ("names", "kind", "metavar", "help", "extra", "key", "check")

    def __init__(
        self,
        names: str,
        kind: int = FLAG,
        metavar: str = "",
        help: str = "",
        extra: str = "",
        key: str = "",
        check: Optional[Callable[[str], Any]] = None,
    ) -> None:
        self.names = names.split()
        self.kind = kind
        self.metavar = metavar
        self.help = help
        self.extra = extra.split()
        self.key = key or (self.names + self.extra)[-1].lstrip("-").replace("-", "_")
        self.check = check


class Parser:
    """Reads the arguments `args` one by one.

    Iterate over it for (option, value) pairs in the order of the command line; an operand comes as (None, text).
    Everything after `--` is an operand; `stop_at_operand` makes everything from the first
    operand on one, as POSIXLY_CORRECT does. `index` is the position of the next argument in `args`; the consumer may
    read on there and move it. `ended` tells whether `--` was met.

    Raises OptionError in glibc's words.
    """

    def __init__(self, options: Sequence[Option], args: Sequence[str], stop_at_operand: bool = False) -> None:
        self.options = options
        self.args = args
        self.index = 0
        self.stop_at_operand = stop_at_operand
        self.ended = False

    def __iter__(self) -> Iterator[tuple[Optional[Option], Optional[str]]]:
        args = self.args
        while self.index < len(args):
            word = args[self.index]
            self.index += 1
            if word == "--":
                self.ended = True
                break
            if word.startswith("--"):
                yield self._long(word)
            elif word.startswith("-") and word != "-":
                yield from self._short(word)
            elif self.stop_at_operand:
                self.index -= 1
                break
            else:
                yield None, word
        while self.index < len(args):
            self.index += 1
            yield None, args[self.index - 1]

    def _long(self, word: str) -> tuple[Option, Optional[str]]:
        name, equals, value = word.partition("=")
        option, full = self._find(name, word)
        if equals:
            if option.kind == FLAG:
                raise OptionError("option '%s' doesn't allow an argument" % full)
            return option, value
        if option.kind != VALUE:
            return option, None
        if self.index == len(self.args):
            raise OptionError("option '%s' requires an argument" % full)
        self.index += 1
        return option, self.args[self.index - 1]

    def _find(self, name: str, word: str) -> tuple[Option, str]:
        """The option that `name`, a long spelling or a prefix of one, means, and its full spelling."""
        for option in self.options:
            if name in option.names or name in option.extra:
                return option, name
        for table in ("names", "extra"):
            found = [
                (option, full)
                for option in self.options
                for full in getattr(option, table)
                if full.startswith("--") and full.startswith(name)
            ]
            if found and all(option is found[0][0] for option, full in found):
                return found[0]
            if found:
                raise OptionError(
                    "option '%s' is ambiguous; possibilities: %s"
                    % (word, " ".join("'%s'" % full for option, full in found))
                )
        raise OptionError("unrecognized option '%s'" % word)

    def _short(self, word: str) -> Iterator[tuple[Option, Optional[str]]]:
        for position in range(1, len(word)):
            name = "-" + word[position]
            for option in self.options:
                if name in option.names:
                    break
            else:
                raise OptionError("invalid option -- '%s'" % word[position])
            if option.kind != VALUE:
                yield option, None
                continue
            rest = word[position + 1 :]
            if not rest:
                if self.index == len(self.args):
                    raise OptionError("option requires an argument -- '%s'" % word[position])
                rest = self.args[self.index]
                self.index += 1
            yield option, rest
            return
