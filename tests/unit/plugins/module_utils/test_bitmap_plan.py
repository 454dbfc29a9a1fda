# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_bitmap: its plan over generated states, and what merged bitmaps cover against a model."""

from __future__ import annotations

import random

import pytest

from ansible_collections.diskwright.images.plugins.module_utils._bitmap import covered, observe, plan, wanted
from ansible_collections.diskwright.images.plugins.module_utils._plan import Refusal, after
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.commands.bitmap import bitmap as change
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.commands.create import create
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.image import open_node

PATH = "/images/disk.qcow2"
PARAMETERS = {
    "path": PATH,
    "name": "b",
    "state": "present",
    "format": None,
    "merge": None,
    "source_file": None,
    "source_format": None,
    "replace": False,
    "granularity": None,
}
STATES = ["present", "absent", "cleared", "enabled", "disabled", "merged"]


def some_states(count=4000):
    rng = random.Random(29)
    for _number in range(count):
        state = rng.choice(STATES)
        params = {**PARAMETERS, "state": state, "replace": rng.random() < 0.5, "granularity": rng.choice([None, "64k", "4k"])}
        params.update(merge=["c", "d"] if state == "merged" else None, source_file=rng.choice([None, "/images/other"]) if state == "merged" else None)
        bitmap = None
        if rng.random() < 0.7:
            bitmap = {"name": "b", "granularity": 65536, "enabled": rng.random() < 0.5, "inconsistent": rng.random() < 0.2, "dirty_bytes": 65536}
            if bitmap["inconsistent"]:
                bitmap["dirty_bytes"] = None
        have = {"format": "qcow2", "size": 1 << 20, "bitmap": bitmap, "_obstacle": rng.choice([None] * 9 + ["/images/disk.qcow2: it cannot"])}
        have.update(_granularity=65536, _merged=rng.choice([65536, 131072]), _merged_anew=rng.choice([0, 65536]))
        have["_sources"] = {"c": None, "d": rng.choice([None] * 9 + ["/images/disk.qcow2: there is none"])} if state == "merged" else {}
        yield params, have


def test_a_plan_leads_where_it_should_and_a_satisfied_want_needs_none():
    planned, refused = {}, 0
    for params, have in some_states():
        want = wanted(params)
        before = repr(have)
        try:
            steps = plan(want, have)
        except Refusal as refusal:
            refused += 1
            assert PATH in str(refusal)
            continue
        assert repr(have) == before and len(steps) <= 1
        reached = after(have, steps)
        assert plan(want, reached) == [], (want, have)
        bitmap = reached["bitmap"]
        assert (bitmap is None) == (want["state"] == "absent")
        for step in steps:
            planned[want["state"]] = planned.get(want["state"], 0) + 1
            assert step.argv[:2] == ("qemu-img", "bitmap") and step.argv[-2:] == (PATH, "b") and step.why
            assert "--remove" not in step.argv or want["replace"] or want["state"] == "absent"
            assert "--clear" not in step.argv or want["state"] == "cleared"
        if bitmap is not None and steps:
            assert bitmap["granularity"] == (want["granularity"] or bitmap["granularity"]) and not bitmap["inconsistent"]
    assert len(planned) == len(STATES) and min(planned.values()) > 50 and refused > 50


def test_what_intervals_cover():
    rng = random.Random(31)
    for _number in range(200):
        many, marked = [], set()
        for _series in range(rng.randrange(4)):
            ends = sorted(rng.sample(range(60), 2 * rng.randrange(6)))
            series = list(zip(ends[::2], ends[1::2]))
            many.append(series)
            marked.update(point for start, end in series for point in range(start, end))
        assert covered(many) == len(marked)


def test_merging_against_a_model(tmp_path):
    """Whatever granularities meet: what is foretold is what comes, and what is covered already is left alone."""
    rng = random.Random(37)
    for number in range(6):
        path, other = str(tmp_path / ("a%d" % number)), str(tmp_path / ("b%d" % number))
        size = 300 * 512
        for name, bitmaps in ((path, ["b"]), (other, ["c", "d"])):
            create(name, size, format="qcow2")
            for bitmap in bitmaps:
                change(name, bitmap, [("add", "")], granularity=512 << rng.randrange(7))
            with open_node(name, "r+") as node:
                for _write in range(3):
                    offset = rng.randrange(299)
                    node.pwrite(offset * 512, bytes(512 * rng.randrange(1, min(40, 300 - offset) + 1)))
        want = wanted({**PARAMETERS, "path": path, "state": "merged", "merge": ["c", "d"], "source_file": other})
        have = observe(want)
        steps = plan(want, have)
        for step in steps:
            step.run()
        reached = observe(want)
        assert reached["bitmap"] == after(have, steps)["bitmap"] and plan(want, reached) == []
        anew = wanted({**PARAMETERS, "path": path, "name": "new", "state": "merged", "merge": ["c", "d"], "source_file": other, "granularity": "4k"})
        (step,) = plan(anew, observe(anew))
        step.run()
        assert observe(anew)["bitmap"] == step.change["bitmap"]


@pytest.mark.parametrize("params, says", [
    ({"name": ""}, "1 to 1023 bytes"), ({"granularity": "1000"}, "power of two"), ({"granularity": "256"}, "power of two"),
    ({"merge": ["x"]}, "only for that"), ({"state": "merged"}, "names the bitmaps"),
])
def test_what_cannot_be_asked(params, says):
    with pytest.raises(Refusal, match=says):
        wanted({**PARAMETERS, **params})
