# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The protocol drivers, a file for each; drivers.py lists them."""
