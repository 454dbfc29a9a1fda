# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The drivers that the modules carry. drivers.py of the library loads drivers by name, which Ansible does not see: what stands here, in a
file that modules import for type checkers only, is sent along, and is not loaded before it is needed."""

from __future__ import annotations

from .diskwright.formats import bochs, cloop, dmg, luks, ova, parallels, qcow, qcow2, qed, raw, vdi, vhdx, vmdk, vpc, wrapped
from .diskwright.protocols import file, null
from .diskwright.protocols.file import device

__all__ = "bochs cloop device dmg file luks null ova parallels qcow qcow2 qed raw vdi vhdx vmdk vpc wrapped".split()
