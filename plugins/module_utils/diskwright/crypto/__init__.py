# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Encryption: secrets, ciphers over sectors, and LUKS volumes; the ciphers themselves come from libraries."""
