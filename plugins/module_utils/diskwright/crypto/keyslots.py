# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Adding and erasing key slots of a LUKS volume (https://www.qemu.org/docs/master/tools/qemu-img.html, amend)."""

from __future__ import annotations

from ..errors import Error, OptionError
from ..options import Options, SecretRef, opt
from .luks import SLOTS
from .secrets import passphrase

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

    from .luks import Read, Volume, Write

DEFAULT_ITER_TIME = 2000  # milliseconds


class LuksAmendOptions(Options):
    """What amend is told about key slots."""

    state: str = opt(help="active adds a passphrase, inactive erases key slots", choices=("active", "inactive"))
    new_secret: Optional[SecretRef] = opt(None, help="id of the secret object with the passphrase to add")
    old_secret: Optional[SecretRef] = opt(None, help="id of the secret object whose key slots are erased")
    keyslot: Optional[int] = opt(None, help="number of the key slot, 0 to 7")
    iter_time: Optional[int] = opt(None, help="milliseconds that trying a passphrase takes (default: 2000)")


def amend(volume: Volume, options: Any, force: bool, read: Read, write: Write, flush: Callable[[], None]) -> None:
    """Change key slots as `options` (state, new_secret, old_secret, keyslot, iter_time) say.

    `read` and `write` reach the header's bytes, `flush` makes them durable. At any moment the header names only key slots
    whose material is there. Raises OptionError, Error in QEMU's words; with `force` data may get lost.
    """
    if options.keyslot is not None and not 0 <= options.keyslot < SLOTS:
        raise OptionError("Invalid keyslot %d specified, must be between 0 and %d" % (options.keyslot & 0xFFFFFFFF, SLOTS - 1))
    if options.state == "active":
        _add(volume, options, force, write, flush)
    else:
        _erase(volume, options, force, read, write, flush)


def _add(volume: Volume, options: Any, force: bool, write: Write, flush: Callable[[], None]) -> None:
    if options.new_secret is None:
        raise OptionError("'new-secret' is required to activate a keyslot")
    if options.old_secret is not None:
        raise OptionError("'old-secret' must not be given when activating keyslots")
    active = volume.active()
    if options.keyslot is not None:
        index = options.keyslot
        if index in active and not force:
            raise Error("Refusing to overwrite active keyslot %d - please erase it first" % index)
    else:
        free = [index for index in range(SLOTS) if index not in active]
        if not free:
            raise Error("Can't add a keyslot - all keyslots are in use")
        index = free[0]
    secret = passphrase(options.new_secret)
    replaced = None
    if index in active:  # its material must stay until the header names the new one
        replaced = volume.exchange_material(index, next((other for other in range(SLOTS) if other not in active), index))
    offset, material = volume.prepare_slot(index, secret, DEFAULT_ITER_TIME if options.iter_time is None else options.iter_time)
    write(offset, material)
    flush()
    write(0, volume.pack())
    flush()
    if replaced is not None and replaced[0] != offset:
        write(*replaced)
        flush()


def _erase(volume: Volume, options: Any, force: bool, read: Read, write: Write, flush: Callable[[], None]) -> None:
    if options.new_secret is not None:
        raise OptionError("'new-secret' must not be given when erasing keyslots")
    if options.iter_time is not None:
        raise OptionError("'iter-time' must not be given when erasing keyslots")
    secret = passphrase(options.old_secret) if options.old_secret is not None else None
    active = volume.active()
    if options.keyslot is not None:
        index = options.keyslot
        if secret is not None and index not in volume.matching(read, secret):
            raise Error("Given keyslot %d doesn't contain the given old password for erase operation" % index)
        if not force and index not in active:
            raise Error("Given keyslot %d is already erased (inactive) " % index)
        if not force and len(active) == 1:
            text = "Attempt to erase the only active keyslot %d which will erase all the data in the image irreversibly - refusing operation"
            raise Error(text % index)
        chosen = [index]
    elif secret is not None:
        chosen = volume.matching(read, secret)
        if not chosen:
            raise Error("No keyslots match given (old) password for erase operation")
        if not force and len(chosen) == len(active):
            raise Error(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image "
                "irreversibly - refusing operation"
            )
    else:
        raise OptionError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given"
        )
    materials = [volume.clear_slot(index) for index in chosen]
    write(0, volume.pack())
    flush()
    for offset, noise in materials:
        write(offset, noise)
    flush()
