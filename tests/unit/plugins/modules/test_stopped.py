# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A module that is told to stop says so, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

MODULE = "ansible_collections.diskwright.images.plugins.modules.disk_image"


def wait_for_reader(fifo):
    """A descriptor for writing, as soon as somebody wants to read."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as exc:
            assert exc.errno == errno.ENXIO and time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_in_the_middle(tmp_path, number):
    """While an image is being made, whose passphrase does not come."""
    fifo, folder = tmp_path / "fifo", tmp_path / "images"
    folder.mkdir()
    os.mkfifo(fifo)
    arguments = {"path": str(folder / "disk"), "size": "1M", "encryption": {"passphrase_file": str(fifo)}}
    text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments})
    command = [sys.executable, "-m", MODULE, text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        writer = wait_for_reader(fifo)
        assert os.listdir(folder) == [".disk.new"]
        process.send_signal(number)
        os.close(writer)  # a signal that came just before the process went to sleep would not wake it
        output, errors = process.communicate(timeout=60)
    result = json.loads(output)
    assert result["failed"] and result["msg"] == "stopped by %s" % signal.Signals(number).name, (result, errors)
    assert os.listdir(folder) == []
