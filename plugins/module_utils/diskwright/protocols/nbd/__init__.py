# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""NBD (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md): the codec for both roles, and the client."""
