# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""All that is used of libiscsi (https://github.com/sahlberg/libiscsi), declared."""

from __future__ import annotations

from ctypes import CFUNCTYPE, POINTER, Structure, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_void_p

from .. import clibrary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SONAMES = tuple("libiscsi.so.%d" % number for number in (7, 8, 9, 10, 11, 12))
PACKAGES = "libiscsi7 (Debian, Ubuntu) or libiscsi (Fedora, openSUSE)"

TCP, ISER = 0, 1
NORMAL_SESSION = 2
HEADER_DIGESTS = {"none": 0, "none-crc32c": 1, "crc32c-none": 2, "crc32c": 3}

NO_TRANSFER, READ, WRITE = 0, 1, 2  # enum scsi_xfer_dir

GOOD = 0
CHECK_CONDITION = 2
BUSY = 8
TASK_SET_FULL = 0x28
CANCELLED = 0x0F000000
ERROR = 0x0F000001
TIMEOUT = 0x0F000002


class Sense(Structure):
    """struct scsi_sense, as far as it is looked at."""

    _fields_ = (("error_type", c_ubyte), ("key", c_int), ("ascq", c_int), ("specific", c_char * 8))


class Task(Structure):
    """The beginning of struct scsi_task, which the library allocates."""

    _fields_ = (
        ("status", c_int),
        ("cdb_size", c_int),
        ("xfer_dir", c_int),
        ("expxferlen", c_int),
        ("cdb", c_ubyte * 16),
        ("residual_status", c_int),
        ("residual", c_size_t),
        ("sense", Sense),
    )


CALLBACK = CFUNCTYPE(None, c_void_p, c_int, c_void_p, c_void_p)  # context, status, what the command gave, the caller's own

_PROTOTYPES = {
    "iscsi_create_context": (c_void_p, (c_char_p,)),
    "iscsi_destroy_context": (c_int, (c_void_p,)),
    "iscsi_init_transport": (c_int, (c_void_p, c_int)),
    "iscsi_set_targetname": (c_int, (c_void_p, c_char_p)),
    "iscsi_set_session_type": (c_int, (c_void_p, c_int)),
    "iscsi_set_header_digest": (c_int, (c_void_p, c_int)),
    "iscsi_set_initiator_username_pwd": (c_int, (c_void_p, c_char_p, c_char_p)),
    "iscsi_set_timeout": (c_int, (c_void_p, c_int)),
    "iscsi_set_noautoreconnect": (None, (c_void_p, c_int)),
    "iscsi_full_connect_async": (c_int, (c_void_p, c_char_p, c_int, CALLBACK, c_void_p)),
    "iscsi_logout_async": (c_int, (c_void_p, CALLBACK, c_void_p)),
    "iscsi_get_error": (c_char_p, (c_void_p,)),
    "iscsi_get_fd": (c_int, (c_void_p,)),
    "iscsi_which_events": (c_int, (c_void_p,)),
    "iscsi_service": (c_int, (c_void_p, c_int)),
    "iscsi_scsi_command_async": (c_int, (c_void_p, c_int, POINTER(Task), CALLBACK, c_void_p, c_void_p)),
    "scsi_create_task": (POINTER(Task), (c_int, c_char_p, c_int, c_int)),
    "scsi_free_scsi_task": (None, (POINTER(Task),)),
    "scsi_task_add_data_in_buffer": (c_int, (POINTER(Task), c_int, c_void_p)),
    "scsi_task_add_data_out_buffer": (c_int, (POINTER(Task), c_int, c_void_p)),
}


def libiscsi() -> Any:
    """The library. Raises Unsupported where there is none."""
    return clibrary.load("iscsi", SONAMES, PACKAGES, _PROTOTYPES)
