# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Speed against qemu-img and cp, whole processes, in the same run: a table of ratios, and the same as JSON.

    python pylib/bench/run.py [--quick] [--repeat N] [--size MIB] [--json FILE] [--list] [ROW...]

ROW is a part of a row's name. Each round runs all programs of a row one after the other, and a ratio is the median over the
rounds of (our time / qemu-img's time in the same round): what slows the machine down for a while slows both.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Sequence

import inputs
import nbd

ROOT = Path(__file__).resolve().parents[2]
PURE, ACCEL, QEMU, CP = "pure", "accel", "qemu-img", "cp"


class Row(NamedTuple):
    """One line of the table; the commands name their files {source}, {other} and {target}.

    `before` are commands, with ";" between them, that make the target for those that change an image; they are not timed.
    """

    name: str
    source: str  # an input, see inputs.py
    ours: str
    theirs: str
    goal_accel: Optional[float]
    goal_pure: Optional[float]
    place: str = "tmpfs"
    other: str = ""
    cp: str = ""
    slow: bool = False
    inner: bool = False  # timed inside a Python program
    before: str = ""


COPY = "cp --sparse=always {source} {target}"
SECRET = "--object secret,id=s,data=bench"
LUKS = "driver=luks,key-secret=s,file.filename={source}"
OVERLAY = "qemu-img create -q -f qcow2 -b {source} -F qcow2 {target}"
COMMITTED = "truncate -s 0 {target}.base; truncate -s {size}M {target}.base; %s; qemu-img rebase -u -f qcow2 -b {target}.base -F raw {target}" % COPY
TABLE = [
    Row("raw -> qcow2, tmpfs", "data.raw", "convert -f raw -O qcow2 {source} {target}", "", 0.70, 0.75, cp=COPY),
    Row("raw -> qcow2, ext4", "data.raw", "convert -f raw -O qcow2 {source} {target}", "", 0.45, 0.50, "disk", cp=COPY),
    Row("raw without holes -> qcow2, tmpfs", "full.raw", "convert -f raw -O qcow2 {source} {target}", "", 0.65, 0.80, cp=COPY),
    Row("qcow2 -> raw, tmpfs", "data.qcow2", "convert -f qcow2 -O raw {source} {target}", "", 0.75, 0.80, cp=COPY),
    Row("qcow2 -> raw, ext4", "data.qcow2", "convert -f qcow2 -O raw {source} {target}", "", 0.50, 0.55, "disk", cp=COPY),
    Row("raw -> raw, tmpfs", "data.raw", "convert -f raw -O raw {source} {target}", "", 0.70, 0.80, cp=COPY),
    Row("qcow2 -> qcow2, tmpfs", "data.qcow2", "convert -f qcow2 -O qcow2 {source} {target}", "", 0.75, 0.90),
    Row("qcow2 -> vmdk, tmpfs", "data.qcow2", "convert -f qcow2 -O vmdk {source} {target}", "", 0.25, 0.30),
    Row("raw -> streamOptimized vmdk", "data.raw", "convert -f raw -O vmdk -o subformat=streamOptimized {source} {target}", "", 0.60, 0.75, slow=True),
    Row("streamOptimized vmdk -> raw", "stream.vmdk", "convert -f vmdk -O raw {source} {target}", "", 0.60, 0.80, slow=True),
    Row("dmg -> raw", "data.dmg", "convert -f dmg -O raw {source} {target}", "", 0.60, 0.80, slow=True),
    Row("qcow2 -> vhdx, tmpfs", "data.qcow2", "convert -f qcow2 -O vhdx {source} {target}", "", 0.75, 0.90),
    Row("qcow2 -> vdi, tmpfs", "data.qcow2", "convert -f qcow2 -O vdi {source} {target}", "", 0.75, 0.90),
    Row("qcow2 -> vpc, tmpfs", "data.qcow2", "convert -f qcow2 -O vpc {source} {target}", "", 0.75, 0.90),
    Row("qcow2 -> parallels, tmpfs", "data.qcow2", "convert -f qcow2 -O parallels {source} {target}", "", 0.75, 0.90),
    Row("qcow2 -> qed, tmpfs", "data.qcow2", "convert -f qcow2 -O qed {source} {target}", "", 0.75, 0.90),
    Row("qcow2 -> qcow, tmpfs", "data.qcow2", "convert -f qcow2 -O qcow {source} {target}", "", 0.75, 0.90),
    Row("cloop -> raw", "data.cloop", "convert -f cloop -O raw {source} {target}", "", 0.60, 0.80, slow=True),
    Row("sparse100g raw -> qcow2", "sparse100g", "convert -f raw -O qcow2 {source} {target}", "", 0.60, 0.80, cp=COPY),
    Row("sparse100g raw -> raw", "sparse100g", "convert -f raw -O raw {source} {target}", "", 0.60, 0.80, cp=COPY),
    Row("compare raw with full", "data.raw", "compare -f raw -F raw {source} {other}", "", 0.30, 0.60, other="full.raw"),
    Row("convert -c zlib", "data.raw", "convert -c -m 16 -W -f raw -O qcow2 {source} {target}", "", 0.30, 1.0, slow=True),
    Row("convert -c zstd", "data.raw", "convert -c -m 16 -W -f raw -O qcow2 -o compression_type=zstd {source} {target}", "", 0.50, None, slow=True),
    Row("zlib qcow2 -> raw", "zlib.qcow2", "convert -f qcow2 -O raw {source} {target}", "", 0.35, 0.80, slow=True),
    Row("zstd qcow2 -> raw", "zstd.qcow2", "convert -f qcow2 -O raw {source} {target}", "", None, None, slow=True),
    Row("luks -> raw, 512 MiB", "512m.luks", "convert %s --image-opts %s -O raw {target}" % (SECRET, LUKS), "", 0.45, None),
    Row("raw -> luks, 512 MiB", "512m.raw", "convert %s -f raw -O luks -o key-secret=s,iter-time=100 {source} {target}" % SECRET, "", 0.35, None),
    Row("snapshot -c on meta100g", "meta100g.qcow2", "snapshot -c s {target}", "", 0.10, 0.50, before=COPY),
    Row("rebase to no backing file (flatten)", "data.qcow2", "rebase -f qcow2 -b '' {target}", "", 0.50, 0.70, before=OVERLAY),
    Row("commit into a raw base", "data.qcow2", "commit -q -f qcow2 {target}", "", None, None, before=COMMITTED),
    Row("amend refcount_bits on meta100g", "meta100g.qcow2", "amend -f qcow2 -o refcount_bits=64 {target}", "", None, None, before=COPY),
    Row("amend compat=0.10", "data.qcow2", "amend -f qcow2 -o compat=0.10 {target}", "", None, None, before=COPY),
    Row("bitmap --add on meta100g", "meta100g.qcow2", "bitmap --add -g 4k {target} b", "", None, None, before=COPY),
    Row("check meta100g", "meta100g.qcow2", "check -q -f qcow2 {source}", "", 0.15, 0.60),
    Row("create preallocation=metadata 100 GiB, ext4", "", "create -q -f qcow2 -o preallocation=metadata {target} 100G", "", 0.10, 0.30, "disk"),
    Row("info, whole process", "data.qcow2", "info -f qcow2 {source}", "", None, 1.8),
    Row("info, from a Python program", "data.qcow2", "", "info --output=json {source}", 0.05, 0.10, inner=True),
]

# Times the same question asked by a Python program in the two ways; prints the median of each in seconds.
INNER = """
import json, statistics, subprocess, sys, time
import diskwright
def median(ask):
    ask()
    times = []
    for _number in range(15):
        began = time.perf_counter()
        ask()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
path = sys.argv[1]
ours = median(lambda: diskwright.info(path))
theirs = median(lambda: json.loads(subprocess.run(["qemu-img", "info", "--output=json", path], stdout=subprocess.PIPE, check=True).stdout))
print(ours, theirs)
"""


def command(words: str, program: str, row: Row, places: dict[str, Path], target: Path) -> list[str]:
    """The command line of one program for a row."""
    text = row.ours if program in (PURE, ACCEL) else row.cp if program == CP else row.theirs or row.ours
    names = {"{source}": str(places.get("source", "")), "{other}": str(places.get("other", "")), "{target}": str(target)}
    parsed = filled(text, names)
    if program in (PURE, ACCEL):
        return [str(places["script"]), *parsed]
    return parsed if program == CP else ["qemu-img", *parsed]


def filled(text: str, names: dict[str, str]) -> list[str]:
    """The words of a command line, with names put in."""
    words = shlex.split(text)
    for name, value in names.items():
        words = [word.replace(name, value) for word in words]
    return words


def environment(program: str) -> dict[str, str]:
    """The environment that decides between the twins."""
    return {**os.environ, "DISKWRIGHT_ACCEL": "require" if program == ACCEL else "off"}


def run_once(line: list[str], program: str, target: Path, before: Sequence[list[str]]) -> float:
    """Seconds that one process takes from start to end; its target is removed, or made by `before`."""
    if target.exists():
        target.unlink()
    for made in before:
        subprocess.run(made, check=True)
    began = time.perf_counter()
    subprocess.run(line, env=environment(program), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def run_inner(program: str, source: Path) -> tuple[float, float]:
    """Seconds of our call and of running qemu-img, in one Python program."""
    line = [sys.executable, "-c", INNER, str(source)]
    output = subprocess.run(line, env=environment(program), stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    return float(output[0]), float(output[1])


def install(folder: Path) -> Path:
    """Install the library (and the accelerator, if this Python has it) as users do, and not editable; the script."""
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*line, "--prefix", str(folder), str(ROOT / "pylib")], check=True)
    # the interpreter beside the script, as in every virtual environment
    os.symlink(os.path.realpath(sys.executable), folder / "bin" / ("python%d.%d" % sys.version_info[:2]))
    found = importlib.util.find_spec("diskwright_accel")
    if found is not None and found.submodule_search_locations:
        packages = next(folder.glob("lib/python3.*/*-packages"))
        shutil.copytree(found.submodule_search_locations[0], packages / "diskwright_accel")
    return folder / "bin" / "diskwright"


def measure(row: Row, programs: list[str], rounds: int, memory: Path, disk: Path, size_mib: int, script: Path) -> dict[str, object]:
    """One row's results: medians in milliseconds and ratios to qemu-img's time."""
    places = {key: inputs.make(name, memory, size_mib) for key, name in (("source", row.source), ("other", row.other)) if name}
    places["script"] = script
    target = (memory if row.place == "tmpfs" else disk) / "target"
    names = {"{source}": str(places.get("source", "")), "{target}": str(target), "{size}": str(size_mib)}
    before = [filled(text, names) for text in row.before.split(";") if text]
    times: dict[str, list[float]] = {program: [] for program in programs if program != CP or row.cp}
    try:
        for number in range(rounds + 1):  # the first round warms caches and does not count
            order = list(times)
            shift = number % len(order)
            if row.inner:
                pairs = {program: run_inner(program, places["source"]) for program in order if program != QEMU}
                found = {program: pair[0] for program, pair in pairs.items()}
                found[QEMU] = statistics.median(pair[1] for pair in pairs.values())
            else:
                found = {}
                for program in order[shift:] + order[:shift]:
                    found[program] = run_once(command(row.ours, program, row, places, target), program, target, before)
            if number:
                for program in order:
                    times[program].append(found[program])
    finally:
        for path in target.parent.glob("target*"):
            path.unlink()
    ratios = {
        program: statistics.median(own / theirs for own, theirs in zip(series, times[QEMU])) for program, series in times.items() if program != QEMU
    }
    return {
        "row": row.name,
        "ms": {program: round(statistics.median(series) * 1000, 2) for program, series in times.items()},
        "ratio": {program: round(ratio, 3) for program, ratio in ratios.items()},
        "goal": {ACCEL: row.goal_accel, PURE: row.goal_pure},
        "rounds": rounds,
    }


def has(program: str) -> bool:
    """Whether a twin can be used here."""
    line = [sys.executable, "-c", "import diskwright.kernels"]
    return subprocess.run(line, env=environment(program), stderr=subprocess.DEVNULL, check=False).returncode == 0


def can_zstd(program: str, script: Path) -> bool:
    """Whether a twin has a zstd codec where `script` is installed."""
    packages = next(script.parents[1].glob("lib/python3.*/*-packages"))
    ask = "import sys; sys.path.append(%r); import diskwright.compression as c; c.zstd_compress(b'x')" % str(packages)
    line = [sys.executable, "-I", "-S", "-c", ask]
    return subprocess.run(line, env=environment(program), stderr=subprocess.DEVNULL, check=False).returncode == 0


def print_table(results: list[dict[str, object]], write: Callable[[str], object]) -> None:
    """The results as text; a star marks a goal that was missed."""
    write("%-46s %13s %13s %8s %10s\n" % ("", "accel (goal)", "pure (goal)", "cp", "qemu-img"))
    for result in results:
        ratio, goal, ms = result["ratio"], result["goal"], result["ms"]
        cells = []
        for program in (ACCEL, PURE):
            own, wanted = ratio.get(program), goal[program]  # type: ignore[attr-defined, index]
            if own is None:
                cells.append("-")
                continue
            missed = "*" if wanted is not None and own > wanted else ""
            cells.append("%s%.2f (%s)" % (missed, own, "-" if wanted is None else "%.2f" % wanted))
        copied = ratio.get(CP)  # type: ignore[attr-defined]
        own_cells = "".join(" %13s" % cell for cell in cells)
        write("%-46s%s %8s %7.0f ms\n" % (result["row"], own_cells, "-" if copied is None else "%.2f" % copied, ms[QEMU]))  # type: ignore[index]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="part of a row's name; without any, all rows are run")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and small images for the slow rows")
    parser.add_argument("--repeat", type=int, help="rounds (default: 5)")
    parser.add_argument("--size", type=int, default=2048, metavar="MIB", help="virtual size of the images data and full (default: 2048)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a folder on tmpfs (default: /dev/shm)")
    parser.add_argument("--disk", type=Path, default=ROOT / "build", help="a folder on a disk (default: build)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json", help="where the results go (default: build/bench.json)")
    parser.add_argument("--list", action="store_true", help="list the rows and do nothing")
    parser.add_argument("--keep", type=Path, help="keep the inputs in this folder, and use those that are there")
    given = parser.parse_args()
    rows: list[Row | nbd.Row] = [row for row in (*TABLE, *nbd.TABLE) if not given.rows or any(part in row.name for part in given.rows)]
    if given.list:
        for row in rows:
            sys.stdout.write(row.name + "\n")
        return 0
    if shutil.which("qemu-img") is None:
        sys.stderr.write("qemu-img is missing: install qemu-utils\n")
        return 1
    twins = [program for program in (ACCEL, PURE) if has(program)]
    if ACCEL not in twins:
        sys.stdout.write("The accelerator is not installed: its column stays empty.\n")
    given.disk.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(dir=given.memory, prefix="diskwright-bench.") as memory, tempfile.TemporaryDirectory(
        dir=given.disk, prefix="bench."
    ) as disk:
        folder = given.keep or Path(memory)
        folder.mkdir(parents=True, exist_ok=True)
        script = install(Path(disk) / "prefix")
        for row in rows:
            if isinstance(row, nbd.Row):
                environments = {program: environment(program) for program in twins}
                results.append(nbd.measure(row, environments, given.repeat or (3 if given.quick else 5), folder, given.size, script))
                sys.stderr.write("%s: %s\n" % (row.name, json.dumps(results[-1]["ratio"])))
                continue
            programs = [QEMU, CP] + [program for program in twins if "zstd" not in row.name or can_zstd(program, script)]
            size = given.size // 8 if given.quick and row.slow else given.size
            result = measure(row, programs, given.repeat or (3 if given.quick else 5), folder, Path(disk), size, script)
            results.append(result)
            sys.stderr.write("%s: %s\n" % (row.name, json.dumps(result["ratio"])))
    print_table(results, sys.stdout.write)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    given.json.write_text(json.dumps({"machine": machine, "size_mib": given.size, "rows": results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
