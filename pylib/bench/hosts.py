# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What the modules cost on many hosts, beside a `command` task that runs qemu-img: seconds per task and host, and bytes that are sent.

The hosts are local connections, so that what is measured is Ansible and the module, not a network. Each figure is the difference between a playbook
with several tasks and one with a single task, which pays for the start of ansible-playbook and for building the payload.

    make bench-hosts ARGS="--hosts 50 --forks 2 10 --rounds 3"
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("qemu_img_info", "disk_image", "image_snapshot", "image_bitmap", "image_check", "image_convert")
TASKS = 4  # in the longer playbook; the shorter one has one
MANY = 100  # images in one task

NO_OP = {"diskwright.images.disk_image": {"path": "{{ image }}", "size": "1G"}}
COMMAND = {"ansible.builtin.command": "qemu-img info --force-share {{ image }}", "changed_when": False}
INFO = {"diskwright.images.qemu_img_info": {"path": "{{ image }}"}}
HUNDRED = {"diskwright.images.disk_image": {"images": "{{ hundred }}", "size": "1G"}}
HUNDRED_INFO = {"diskwright.images.qemu_img_info": {"path": "{{ hundred | map(attribute='path') | list }}"}}


class Fleet:
    """Hosts that are directories of this machine, each with an image, the first with a hundred more."""

    def __init__(self, place: Path, count: int) -> None:
        self.place, self.count = place, count
        hosts: dict[str, Any] = {}
        for number in range(count):
            image = place / ("host%d.qcow2" % number)
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"], check=True)
            hosts["host%d" % number] = {"image": str(image), "ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        many = [str(place / ("many%d.qcow2" % number)) for number in range(MANY)]
        for image in many:
            subprocess.run(["cp", str(place / "host0.qcow2"), image], check=True)
        everything = {"hundred": [{"path": image} for image in many]}
        (place / "inventory.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": everything}}), encoding="utf-8")
        subprocess.run([str(ROOT / ".ci/collection"), str(place / "collections")], check=True)

    def play(self, task: dict[str, Any], tasks: int, hosts: str, forks: int, pipelining: bool) -> float:
        """Seconds that a playbook takes which has this task so many times. Raises CalledProcessError where one fails or changes anything."""
        book = self.place / "play.json"
        play = {"hosts": hosts, "gather_facts": False, "tasks": [{"name": "%d" % number, **task} for number in range(tasks)]}
        book.write_text(json.dumps([play]), encoding="utf-8")
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},  # unbuffered input is read byte by byte
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_PIPELINING": str(pipelining),
            "ANSIBLE_FORKS": str(forks),
            "ANSIBLE_HOME": str(self.place / "home"),
            "ANSIBLE_LOCALHOST_WARNING": "0",
        }
        start = time.perf_counter()
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self.place / "inventory.json"), str(book)]
        run = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        changed = re.findall(r"changed=([1-9]\d*)", run.stdout)
        if changed:
            raise SystemExit("a task that should change nothing did")
        return seconds

    def cost(self, task: dict[str, Any], hosts: str = "all", forks: int = 2, pipelining: bool = False) -> float:
        """Seconds per task and host."""
        count = self.count if hosts == "all" else 1
        return (self.play(task, TASKS, hosts, forks, pipelining) - self.play(task, 1, hosts, forks, pipelining)) / (TASKS - 1) / count


def payload(place: Path, module: str) -> int:
    """The bytes that a task with the module sends."""
    program = (
        "import sys\n"
        "from ansible.plugins.loader import init_plugin_loader, module_loader\n"
        "init_plugin_loader([sys.argv[1]])\n"
        "from ansible.executor.module_common import modify_module\n"
        "from ansible.parsing.dataloader import DataLoader\n"
        "from ansible.template import Templar\n"
        "name = 'diskwright.images.' + sys.argv[2]\n"
        "built = modify_module(module_name=name, module_path=module_loader.find_plugin(name), module_args={}, templar=Templar(loader=DataLoader()),\n"
        "    task_vars={'ansible_python_interpreter': '/usr/bin/python3'}, module_compression='ZIP_DEFLATED')\n"
        "sys.stdout.write(str(len(built.b_module_data)))\n"
    )
    environment = {**os.environ, "ANSIBLE_HOME": str(place / "home")}
    run = subprocess.run(
        [sys.executable, "-c", program, str(place / "collections"), module], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    return int(run.stdout)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=50)
    parser.add_argument("--forks", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--rounds", type=int, default=3, help="measure so many times, in turns, and take the medians")
    parser.add_argument("--place", help="where the images of the hosts are made (default: a temporary directory)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.place) as folder:
        fleet = Fleet(Path(folder), given.hosts)
        print("| module | kB sent |\n|---|---|")
        for module in MODULES:
            print("| %s | %.0f |" % (module, payload(Path(folder), module) / 1000))
        print("\n| forks | pipelining | command, ms | disk_image, ms | ratio | qemu_img_info, ms | ratio |\n|---|---|---|---|---|---|---|", flush=True)
        for forks in given.forks:
            for pipelining in (False, True):
                taken: dict[str, list[float]] = {"command": [], "disk_image": [], "info": []}
                for _round in range(given.rounds):
                    for name, task in (("command", COMMAND), ("disk_image", NO_OP), ("info", INFO)):
                        taken[name].append(1000 * fleet.cost(task, forks=forks, pipelining=pipelining))
                base, own, info = [statistics.median(taken[name]) for name in ("command", "disk_image", "info")]
                row = (forks, "yes" if pipelining else "no", base, own, own / base, info, info / base)
                print("| %d | %s | %.0f | %.0f | %.2f | %.0f | %.2f |" % row, flush=True)
        print("\n| %d images in one task | ms | one image, ms | ratio |\n|---|---|---|---|" % MANY)
        for name, one, many in (("disk_image", NO_OP, HUNDRED), ("qemu_img_info", INFO, HUNDRED_INFO)):
            first = statistics.median(1000 * fleet.cost(one, hosts="host0") for _round in range(given.rounds))
            second = statistics.median(1000 * fleet.cost(many, hosts="host0") for _round in range(given.rounds))
            print("| %s | %.0f | %.0f | %.2f |" % (name, second, first, second / first), flush=True)


if __name__ == "__main__":
    main()
