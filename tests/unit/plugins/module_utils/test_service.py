# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Services of blockdev_graph: processes that are told apart from others with the same number, and units that systemd can read."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ansible_collections.diskwright.images.plugins.module_utils._plan import Refusal
from ansible_collections.diskwright.images.plugins.module_utils._service import UNIT, Service, started_at

# stands in for `diskwright serve`: goes into the background, writes its number, and takes SIGTERM as often as it is told
SERVER = """
import os, signal, sys, time
path, patience = sys.argv[sys.argv.index("--pid-file") + 1], int(sys.argv[1])
if os.fork():
    while not os.path.exists(path): time.sleep(0.005)
    os._exit(0)
os.setsid()
for stream in range(3): os.dup2(os.open(os.devnull, os.O_RDWR), stream)
told = 0
def term(*rest):
    global told
    told += 1
    if told > patience:
        os.unlink(path)
        os._exit(0)
signal.signal(signal.SIGTERM, term)
open(path + ".new", "w").write(str(os.getpid()))
os.rename(path + ".new", path)
while True: time.sleep(1)
"""


@pytest.fixture
def service(tmp_path):
    made = Service("test", str(tmp_path / "run"), False, 1)
    yield made
    pid = made.pid()
    if pid is not None:
        os.kill(pid, 9)


def command(patience=0):
    return [sys.executable, "-c", SERVER, str(patience)]


def test_a_service_is_started_seen_restarted_and_stopped(service):
    assert service.observe() == {"running": False, "digest": None, "installed": False}
    service.start(command(), "/graph", "one")
    assert service.observe() == {"running": True, "digest": "one", "installed": True}
    first = service.pid()
    service.start(command(), "/graph", "two")
    assert service.observe()["digest"] == "two" and service.pid() != first and started_at(first) is None
    service.stop()
    assert service.observe() == {"running": False, "digest": None, "installed": False}
    assert os.listdir(service.runtime) == []
    service.stop()  # which is no error


def test_a_process_that_got_the_number_of_one_that_is_gone_is_not_taken_for_it(service):
    os.makedirs(service.runtime)
    with open(service.pid_file, "w") as stream:
        stream.write("%d\n" % os.getpid())
    with open(service.record, "w") as stream:
        stream.write("digest=one\nstarted=1\n")
    assert service.pid() is None
    service.stop()
    assert os.listdir(service.runtime) == []


def test_one_that_does_not_end_is_told_twice(service):
    service.start(command(patience=1), "/graph", "one")
    pid = service.pid()
    service.stop()
    assert started_at(pid) is None


def test_what_a_service_says_when_it_cannot_start_is_the_error(service):
    with pytest.raises(Refusal, match="test: no such node"):
        service.start([sys.executable, "-c", "raise SystemExit('no such node')"], "/graph", "one")
    assert not service.observe()["running"]


@pytest.mark.parametrize("text", ["", "x", "12 34", "-1", "99999999999999"])
def test_pid_files_that_mean_nothing(service, text):
    os.makedirs(service.runtime)
    with open(service.pid_file, "w") as stream:
        stream.write(text)
    with open(service.record, "w") as stream:
        stream.write("started=5\n")
    assert service.pid() is None


def test_systemd_can_read_the_unit(tmp_path):
    path = tmp_path / "diskwright-test.service"
    words = '"%s" "-c" "%s"' % (sys.executable, "import sys; print('100%%', \\\"$$HOME\\\")")
    path.write_text(UNIT.format(name="test", graph="/etc/diskwright/test.json", command=words, digest="0123", seconds=30))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "diskwright" in line]) == (0, []), done.stderr
