# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The one engine that moves data (https://www.qemu.org/docs/master/tools/qemu-img.html, convert and compare).

pieces.py cuts the sources into pieces of work, crew.py runs threads over them, transfer.py and difference.py say what is
done with a piece: write it to a target, or compare it with another. stream.py is for pipes. The engine knows nodes and
descriptors, and no format; memory is a few buffers and a thousand extents, however large the images are.
"""
