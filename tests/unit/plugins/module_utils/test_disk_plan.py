# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""disk_image's plan over generated states: what holds for every want and have."""

from __future__ import annotations

import random

import pytest

from ansible_collections.diskwright.images.plugins.module_utils._disk import plan
from ansible_collections.diskwright.images.plugins.module_utils._plan import Refusal, after, difference

PATH = "/images/disk.qcow2"


def some_want(rng):
    if rng.random() < 0.1:
        return {"state": "absent", "path": PATH}
    return {
        "state": "present",
        "path": PATH,
        "format": rng.choice(["qcow2", "raw"]),
        "size": rng.choice([None, 0, 1 << 20, 2 << 20]),
        "backing_file": rng.choice([None, "base.qcow2", "/images/base.qcow2", "/other/base.qcow2"]),
        "backing_format": rng.choice([None, "qcow2"]),
        "options": rng.choice([{}, {"cluster_size": "65536"}, {"compat": "0.10", "nocow": "on"}]),
        "preallocation": rng.choice(["off", "metadata"]),
        "allow_shrink": rng.random() < 0.5,
        "rebase": rng.choice(["never", "moved"]),
        "private": rng.random() < 0.5,
    }


def some_have(rng):
    if rng.random() < 0.3:
        return {"state": "absent", "_backing": rng.choice([None, {"format": "qcow2", "size": 1 << 20}])}
    return {
        "state": "present",
        "format": rng.choice(["qcow2", "raw"]),
        "size": rng.choice([0, 1 << 20, 2 << 20]),
        "backing_file": rng.choice([None, "base.qcow2"]),
        "backing_format": rng.choice([None, "qcow2"]),
        "_moved": rng.random() < 0.5,
        "options": rng.choice([{}, {"cluster_size": "65536", "compat": "1.1"}]),
    }


def pairs(count=4000):
    rng = random.Random(11)
    return [(some_want(rng), some_have(rng)) for _number in range(count)]


def test_a_plan_leads_where_it_should_and_a_satisfied_want_needs_none():
    planned = 0
    for want, have in pairs():
        try:
            steps = plan(want, have)
        except Refusal:
            continue
        planned += bool(steps)
        reached = after(have, steps)
        assert reached["state"] == want["state"]
        if want["state"] == "present" and want["size"] is not None:
            assert reached["size"] == want["size"]
        if want.get("size") is not None or have["state"] == "present" or want["state"] == "absent":
            assert plan(want, reached) == [], (want, have)
    assert planned > 500


def test_what_destroys_data_needs_its_permission():
    shrunk = 0
    for want, have in pairs():
        try:
            steps = plan(want, have)
        except Refusal:
            continue
        for step in steps:
            if step.verb == "remove":
                assert want["state"] == "absent"
            elif step.verb == "create":
                assert have["state"] == "absent"
            elif step.verb == "resize" and want["size"] < have["size"]:
                assert want["allow_shrink"] and "--shrink" in step.argv
                shrunk += 1
            elif step.verb == "rebase":
                assert want["rebase"] == "moved" and have["_moved"]
    assert shrunk > 10


def test_planning_changes_neither_state_and_shows_what_it_will_do():
    for want, have in pairs(300):
        before = (repr(want), repr(have))
        try:
            steps = plan(want, have)
        except Refusal as refusal:
            assert PATH in str(refusal)
            continue
        assert (repr(want), repr(have)) == before
        shown = difference(PATH, have, steps)
        assert shown["after"].get("plan", []) == [step.line() for step in steps]
        assert all(PATH in step.line() and step.why for step in steps)
        assert steps or shown["before"] == shown["after"]


def test_the_command_that_a_step_shows():
    want = {
        "state": "present",
        "path": "/images/a disk",
        "format": "qcow2",
        "size": 1 << 30,
        "backing_file": "base,1.raw",
        "backing_format": "raw",
        "options": {"data_file": "x,y"},
        "preallocation": "off",
        "allow_shrink": False,
        "rebase": "never",
        "private": False,
    }
    (step,) = plan(want, {"state": "absent", "_backing": None})
    assert step.line() == "qemu-img create -f qcow2 -b base,1.raw -F raw -o data_file=x,,y '/images/a disk' 1073741824"


def test_a_relative_and_an_absolute_name_of_one_backing_file_are_the_same():
    have = {"state": "present", "format": "qcow2", "size": 512, "backing_file": "base", "backing_format": None, "_moved": False, "options": {}}
    want = {"state": "present", "path": PATH, "format": "qcow2", "size": None, "backing_format": None, "options": {}, "preallocation": "off"}
    want.update(allow_shrink=False, rebase="never")
    assert plan({**want, "backing_file": "/images/base"}, have) == []
    with pytest.raises(Refusal, match="backing file 'base'"):
        plan({**want, "backing_file": "/other/base"}, have)
