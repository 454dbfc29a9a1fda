# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The commands: one module for each verb, with its option table, its function and the text it prints.

Each module has `COMMAND`, what the command line takes; `main(args, ui)`, which the CLI calls; and the typed function that
does the work, which never writes to the terminal. This file names them and imports none.
"""

from __future__ import annotations

# name: what it does, in the order of the global help
SUMMARIES = {
    "amend": "change options that an image was made with",
    "bench": "time requests to an image",
    "bitmap": "change the persistent dirty bitmaps of an image",
    "check": "look for inconsistencies in an image, and repair them",
    "commit": "write an overlay into its backing file",
    "compare": "tell whether two images hold the same data",
    "convert": "copy images to a new image of any format",
    "create": "make a new, empty image",
    "dd": "copy blocks of one image to a new image",
    "graph": "check, translate and draw descriptions of block graphs",
    "info": "show what an image is",
    "io": "make single requests to an image",
    "map": "show where the data of an image is stored",
    "measure": "compute how large an image file would be",
    "rebase": "give an image another backing file",
    "resize": "change the size of an image",
    "serve": "export images over NBD",
    "snapshot": "list, make, apply or delete internal snapshots",
}
