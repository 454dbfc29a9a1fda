# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""QMP, the protocol by which a running `diskwright serve` is told what to do
(https://www.qemu.org/docs/master/interop/qmp-spec.html): wire format and argument records. What is done is in jobs/."""
