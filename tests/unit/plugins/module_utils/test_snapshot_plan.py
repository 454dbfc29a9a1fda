# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_snapshot: its plan over generated states, and on real images that all are changed or none."""

from __future__ import annotations

import random

import pytest

from ansible_collections.diskwright.images.plugins.module_utils import _snapshot
from ansible_collections.diskwright.images.plugins.module_utils._plan import Refusal, after
from ansible_collections.diskwright.images.plugins.module_utils._snapshot import UNDO, Creation, observe, plan, wanted
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.commands.create import create
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.errors import Error
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.image import open_node

PARAMETERS = {
    "state": "present",
    "name": None,
    "id": None,
    "keep": None,
    "match": "*",
    "complete": False,
    "allow_rollback": False,
    "format": None,
}
NAMES = ["a", "b", "day 1", "day 2", UNDO]


def some_states(count=4000):
    rng = random.Random(23)
    for _number in range(count):
        paths = ["/images/%d" % index for index in range(rng.choice([1, 1, 2, 3]))]
        params = {**PARAMETERS, "path": paths, "state": rng.choice(["present", "absent", "applied"]), "keep": rng.choice([None, None, 0, 1, 2])}
        key, value = rng.choice([("id", "2"), ("name", None), ("name", "a"), ("name", "b"), ("name", "day 2")])
        params.update({key: value, "match": rng.choice(["*", "day *"])})
        params.update(complete=rng.random() < 0.5, allow_rollback=rng.random() < 0.5)
        images = {}
        for path in paths:
            entries = [(str(number), rng.choice(NAMES), float(rng.randrange(5))) for number in rng.sample(range(1, 9), rng.randrange(5))]
            snapshots = [{"id": id, "name": name, "date": date, "size": 512, "vm_state_size": 0} for id, name, date in entries]
            images[path] = {"format": "qcow2", "size": 1024, "snapshots": snapshots}
            if params["state"] == "applied":
                images[path]["holds"] = rng.random() < 0.5
        have = {"images": images}
        for key in ("_obstacles", "_rollback_obstacles"):
            have[key] = {path: rng.choice([None] * 9 + ["it cannot"]) for path in paths}
        yield params, have


def plans():
    for params, have in some_states():
        try:
            want = wanted(params)
            yield want, have, plan(want, have)
        except Refusal:
            continue


def test_a_plan_leads_where_it_should_and_a_satisfied_want_needs_none():
    verbs = []
    for want, have, steps in plans():
        before = repr(have)
        reached = after(have, steps)
        assert repr(have) == before
        assert plan(want, reached) == [], (want, have)
        verbs += [step.verb for step in steps]
        for path in want["paths"]:
            image = reached["images"][path]
            named = _snapshot.chosen(want, image["snapshots"])
            if want["state"] == "absent" and want["keep"] is None:
                assert not named
            elif want["state"] == "present":
                assert named
            elif want["state"] == "applied":
                assert image["holds"] and named
            if want["keep"] is not None and want["match"] == "*":
                assert len(image["snapshots"]) <= want["keep"]
    assert min(verbs.count(verb) for verb in ("create", "delete", "apply")) > 10


def test_nothing_is_lost_unasked():
    for want, have, steps in plans():
        for step in steps:
            if step.verb == "apply":
                assert want["allow_rollback"]
            elif step.verb == "delete":
                assert want["state"] == "absent" or want["keep"] is not None or (want["allow_rollback"] and UNDO in step.line())
            elif step.verb == "create" and not want["complete"]:
                assert step.target == ", ".join(want["paths"])
            assert all(words[:2] == ("qemu-img", "snapshot") for words in map(tuple, (step.argv, *step.more))) and step.why


def test_the_newest_are_kept_and_the_one_that_is_wanted():
    snapshots = [
        {"id": str(number), "name": name, "date": date, "size": 512, "vm_state_size": 0}
        for number, (name, date) in enumerate([("a", 1.0), ("b", 3.0), ("other", 0.0), ("b", 2.0)], 1)
    ]
    have = {"images": {"/i": {"format": "qcow2", "size": 512, "snapshots": snapshots}}, "_obstacles": {"/i": None}, "_rollback_obstacles": {"/i": None}}
    want = wanted({**PARAMETERS, "path": ["/i"], "name": "a", "keep": 2, "match": "[ab]"})
    (step,) = plan(want, have)
    assert [entry["id"] for entry in step.change["images"]["/i"]["snapshots"]] == ["1", "2", "3"]
    assert step.line() == "qemu-img snapshot -d b /i"


# -- real images ---------------------------------------------------------------------------------------------------


def make(path, text, options=None):
    create(str(path), 1 << 20, format="qcow2", options=options)
    write(path, text)
    return str(path)


def write(path, text):
    with open_node(path, "r+") as node:
        node.pwrite(0, text * 512)


def content(path):
    with open_node(path) as node:
        return node.pread(0, 1), [snapshot.name for snapshot in node.snapshots()]


def test_where_one_disk_cannot_be_set_back_none_is(tmp_path):
    """The second one has no reference count to spare for what it holds."""
    first, second = make(tmp_path / "a", b"1"), make(tmp_path / "b", b"1", "refcount_bits=2")
    for path in (first, second):
        with open_node(path, "r+") as node:
            node.create_snapshot("s")
        write(path, b"2")
    with open_node(second, "r+") as node:
        for name in "tu":
            node.create_snapshot(name)
    params = {**PARAMETERS, "path": [first, second], "name": "s", "state": "applied", "allow_rollback": True}
    want = wanted(params)
    (step,) = plan(want, observe(want))
    with pytest.raises(Error, match="b: Could not apply snapshot 's'"):
        step.run()
    assert content(first) == (b"2", ["s"])
    assert content(second) == (b"2", ["s", "t", "u"])


def test_what_a_killed_run_left_is_used_and_then_removed(tmp_path):
    first, second = make(tmp_path / "a", b"1"), make(tmp_path / "b", b"1")
    for path in (first, second):
        with open_node(path, "r+") as node:
            node.create_snapshot("s")
        write(path, b"2")
    with open_node(first, "r+") as node:  # as far as it came
        node.create_snapshot(UNDO)
        node.apply_snapshot("s")
    want = wanted({**PARAMETERS, "path": [first, second], "name": "s", "state": "applied", "allow_rollback": True})
    steps = plan(want, observe(want))
    assert [(step.verb, step.target) for step in steps] == [("apply", second), ("delete", first)]
    for step in steps:
        step.run()
    assert content(first) == content(second) == (b"1", ["s"])
    assert plan(want, observe(want)) == []


def test_an_interruption_undoes_what_was_done(tmp_path):
    class Interrupted(Creation):
        def do(self):
            super().do()
            raise KeyboardInterrupt

    paths = [make(tmp_path / name, b"1") for name in "abc"]
    want = wanted({**PARAMETERS, "path": paths, "name": "s"})
    with pytest.raises(KeyboardInterrupt), _snapshot._held(want, paths) as nodes:
        changes = [cls(path, nodes[path], "s") for cls, path in zip((Creation, Interrupted, Creation), paths)]
        _snapshot._all_or_none("create", "s", changes)
    assert [content(path) for path in paths] == [(b"1", [])] * 3


def test_every_disk_is_locked_before_the_first_is_changed(tmp_path):
    paths = [make(tmp_path / name, b"1") for name in "ab"]
    want = wanted({**PARAMETERS, "path": paths, "name": "s"})
    (step,) = plan(want, observe(want))
    with open_node(paths[1], "r+"), pytest.raises(Error, match="b': Failed to get"):
        step.run()
    assert content(paths[0]) == (b"1", [])


@pytest.mark.parametrize("params, says", [
    ({"name": ""}, "1 to 255 bytes"), ({"name": "x" * 256}, "1 to 255 bytes"), ({"name": "x", "keep": 0}, "keep: 0 is too small"),
    ({}, "needs the name"), ({"state": "absent"}, "one of name, id and keep"), ({"state": "absent", "name": "x", "keep": 1}, "one of name, id and keep"),
    ({"state": "applied"}, "name or the id"), ({"state": "applied", "name": "x", "keep": 1}, "no meaning"), ({"path": [], "name": "x"}, "at least one"),
    ({"path": ["/a", "/b"], "id": "1", "state": "absent"}, "several images need a name"), ({"path": ["/a", "//a"], "name": "x"}, "the same image"),
])
def test_what_cannot_be_asked(params, says):
    with pytest.raises(Refusal, match=says):
        wanted({**PARAMETERS, "path": ["/a"], **params})
