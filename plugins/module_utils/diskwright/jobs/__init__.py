# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A graph that lives: jobs, bitmaps that record, snapshots and exports of nodes while clients write to them
(https://www.qemu.org/docs/master/interop/live-block-operations.html).

live.py holds it together. The operations are functions that take a `Live`, and the names and options of QMP; qmp/ is their wire form.
"""
