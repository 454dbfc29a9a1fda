# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0

from .commands.amend import amend as amend
from .commands.bench import bench as bench
from .commands.bitmap import bitmap as bitmap
from .commands.check import check as check
from .commands.commit import commit as commit
from .commands.compare import compare as compare
from .commands.convert import convert as convert
from .commands.create import create as create
from .commands.dd import dd as dd
from .describe import info as info
from .commands.map import map_image as map
from .commands.measure import measure as measure
from .commands.rebase import rebase as rebase
from .commands.resize import resize as resize
from .commands.snapshot import snapshot as snapshot
from .errors import Corrupt as Corrupt
from .errors import Denied as Denied
from .errors import Error as Error
from .errors import Locked as Locked
from .errors import OptionError as OptionError
from .errors import ProtocolError as ProtocolError
from .errors import ReadOnly as ReadOnly
from .errors import Unsupported as Unsupported
from .errors import WrongFormat as WrongFormat
from .extent import Extent as Extent
from .graph import Graph as Graph
from .graph import OpenPolicy as OpenPolicy
from .image import ImageFile as ImageFile
from .image import open_file as open_file
from .image import open_node as open
from .node import Node as Node
from .node import OpenFlags as OpenFlags
from .node import Snapshot as Snapshot
from .root import Root as Root
from .temporary import commit as commit_snapshot

__version__: str
