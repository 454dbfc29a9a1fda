# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The NBD server: listeners, connections, exports, and what `diskwright serve` runs. Its codec is protocols/nbd/codec_server.py."""
