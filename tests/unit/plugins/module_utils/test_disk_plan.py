# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""disk_image's plan over generated states: what holds for every want and have."""

from __future__ import annotations

import random

import pytest

from ansible_collections.diskwright.images.plugins.module_utils._disk import plan, satisfied
from ansible_collections.diskwright.images.plugins.module_utils._steps import plan as all_steps
from ansible_collections.diskwright.images.plugins.module_utils._encryption import Encryption
from ansible_collections.diskwright.images.plugins.module_utils._plan import Refusal, after, difference
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.drivers import lookup_format

PATH = "/images/disk.qcow2"
AMENDABLE = ["compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits"]
PARAMETERS = {
    "state": "present",
    "path": PATH,
    "format": "qcow2",
    "size": None,
    "backing_file": None,
    "backing_format": None,
    "options": {},
    "preallocation": "off",
    "allow_shrink": False,
    "rebase": "never",
    "allow_unsafe_rebase": False,
    "flatten": False,
    "commit": False,
    "allow_backing_change": False,
    "allow_data_file_change": False,
    "allow_convert": False,
    "private": False,
    "encryption": None,
}
SECRET = "correct horse"


def encryption(**given):
    params = {"passphrase": SECRET, "passphrase_file": None, "old_passphrase": None, "old_passphrase_file": None, "erase_old": False, "keyslot": None}
    return Encryption({**params, **given}, lookup_format("qcow2"))


def some_want(rng):
    if rng.random() < 0.1:
        return {"state": "absent", "path": PATH}
    want = {
        **PARAMETERS,
        "format": rng.choice(["qcow2", "qcow2", "raw"]),
        "size": rng.choice([None, 0, 1 << 20, 2 << 20]),
        "backing_file": rng.choice([None, "base.qcow2", "/images/base.qcow2", "/other/base.qcow2"]),
        "backing_format": rng.choice([None, "qcow2"]),
        "options": rng.choice([{}, {"cluster_size": "65536"}, {"compat": "0.10", "nocow": "on"}, {"lazy_refcounts": "on"}, {"data_file": "x"}]),
        "preallocation": rng.choice(["off", "metadata"]),
        "rebase": rng.choice(["never", "moved", "safe", "unsafe"]),
        "encryption": rng.choice([None, None, encryption(), encryption(old_passphrase_file="/old, key", erase_old=rng.random() < 0.5)]),
    }
    for name in ("allow_shrink", "allow_unsafe_rebase", "commit", "allow_backing_change", "allow_data_file_change", "allow_convert", "private"):
        want[name] = rng.random() < 0.5
    want["flatten"] = want["backing_file"] is None and not want["commit"] and rng.random() < 0.3
    return want


def some_have(rng):
    if rng.random() < 0.3:
        return {"state": "absent", "_backing": rng.choice([None, {"format": "qcow2", "size": 1 << 20, "chain": []}])}
    have = {
        "state": "present",
        "format": rng.choice(["qcow2", "qcow2", "raw"]),
        "size": rng.choice([0, 1 << 20, 2 << 20]),
        "backing_file": rng.choice([None, "base.qcow2"]),
        "backing_format": rng.choice([None, "qcow2"]),
        "options": rng.choice([{}, {"cluster_size": "65536", "compat": "1.1"}, {"compat": "1.1", "data_file": "y", "lazy_refcounts": "on"}]),
        "encryption": rng.choice([None, None, "luks", "aes"]),
        "_new": rng.choice([None, {"format": "qcow2", "size": 1 << 20, "chain": rng.choice([["/other/base.qcow2"]] * 9 + [[PATH]])}]),
        "_moved": rng.random() < 0.5,
        "_data": rng.random() < 0.5,
        "_amendable": AMENDABLE,
        "_bitmaps": rng.random() < 0.1,
        "_preallocated": rng.random() < 0.7,
        "_lost": rng.choice([[], [], ["2 internal snapshots"]]),
        "_stored": rng.choice([None, 4096]),
        "_below": rng.choice([None, 4096]),
    }
    if have["encryption"] is not None:
        have.update(key_slots=2, _slots=None, _old_slots=None)
    if have["encryption"] == "luks":
        have.update(_slots=rng.choice([[], [0]]), _old_slots=rng.choice([[], [1], [0, 1]]))
    return have


def pairs(count=8000):
    rng = random.Random(11)
    for _number in range(count):
        want, have = some_want(rng), some_have(rng)
        if want["state"] == "present" and want["encryption"] is None:
            have.pop("_slots", None)
        if want["state"] == "present" and want["encryption"] is not None and not want["encryption"].old and have.get("_old_slots"):
            have["_old_slots"] = []
        yield want, have


def test_a_plan_leads_where_it_should_and_a_satisfied_want_needs_none():
    verbs = []
    for want, have in pairs():
        try:
            steps = plan(want, have)
        except Refusal:
            continue
        verbs += [step.verb for step in steps]
        reached = after(have, steps)
        assert reached["state"] == want["state"]
        if want["state"] == "absent":
            continue
        if want["size"] is not None:
            assert reached["size"] == want["size"]
        if want["flatten"]:
            assert reached["backing_file"] is None
        if want["encryption"] is not None and reached["encryption"] == "luks":
            assert reached["_slots"] and not (want["encryption"].erase_old and set(reached["_old_slots"]) - set(reached["_slots"]))
        assert not (want["commit"] and reached["_data"])
        if want["size"] is not None or have["state"] == "present":
            assert plan(want, reached) == [], (want, have)
    for verb in ("create", "remove", "resize", "rebase", "commit", "amend", "convert", "allocate"):
        assert verbs.count(verb) > 15, verb


def test_what_is_seen_at_once_to_be_satisfied_is():
    count = 0
    for want, have in pairs():
        if want["state"] == "present" and have["state"] == "present" and satisfied(want, have):
            count += 1
            assert all_steps(want, have) == [], (want, have)
    assert count > 20


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
            elif step.verb == "rebase" and "-u" in step.argv:
                assert (want["rebase"] == "moved" and have["_moved"]) or (want["rebase"] == "unsafe" and want["allow_unsafe_rebase"])
            elif step.verb == "rebase":
                assert want["rebase"] == "safe" or want["flatten"]
            elif step.verb == "commit":
                assert want["commit"] and want["allow_backing_change"]
            elif step.verb == "convert":
                assert want["allow_convert"] and not have["_lost"] and have["encryption"] is None
            elif step.verb == "amend":
                assert "data_file" not in step.line() or want["allow_data_file_change"]
                assert "inactive" not in step.line() or want["encryption"].erase_old
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
        assert [line.partition("  # ")[0] for line in shown["after"].get("plan", [])] == [step.line() for step in steps]
        assert all(str(step.cost) in line for step, line in zip(steps, shown["after"].get("plan", [])) if step.cost)
        assert all(PATH in step.line() and step.why for step in steps)
        assert SECRET not in repr((want, have, shown)) + "".join(map(repr, steps))
        assert steps or shown["before"] == shown["after"]


def test_the_command_that_a_step_shows():
    want = {**PARAMETERS, "path": "/images/a disk", "size": 1 << 30, "backing_file": "base,1.raw", "backing_format": "raw", "options": {"data_file": "x,y"}}
    (step,) = plan(want, {"state": "absent", "_backing": None})
    assert step.line() == "qemu-img create -f qcow2 -b base,1.raw -F raw -o data_file=x,,y '/images/a disk' 1073741824"


HAVE = {
    "state": "present",
    "format": "qcow2",
    "size": 512,
    "backing_file": "base",
    "backing_format": None,
    "options": {"compat": "1.1", "lazy_refcounts": "off", "refcount_bits": "16", "cluster_size": "65536"},
    "encryption": None,
    "_new": {"format": "qcow2", "size": 512, "chain": ["/other/base"]},
    "_moved": False,
    "_data": True,
    "_amendable": AMENDABLE,
    "_bitmaps": False,
}


def test_a_relative_and_an_absolute_name_of_one_backing_file_are_the_same():
    assert plan({**PARAMETERS, "backing_file": "/images/base"}, HAVE) == []
    with pytest.raises(Refusal, match="backing file 'base'"):
        plan({**PARAMETERS, "backing_file": "/other/base"}, HAVE)


@pytest.mark.parametrize("want, lines", [
    ({"backing_file": "/other/base", "rebase": "safe"}, ["rebase -f qcow2 -b /other/base -F qcow2 P"]),
    ({"backing_file": "/other/base", "rebase": "unsafe", "allow_unsafe_rebase": True}, ["rebase -u -f qcow2 -b /other/base -F qcow2 P"]),
    ({"flatten": True, "size": 1024}, ["rebase -f qcow2 -b '' P", "resize -f qcow2 P 1024"]),
    ({"commit": True, "allow_backing_change": True, "size": 1024}, ["resize -f qcow2 P 1024", "commit -f qcow2 P"]),
    ({"options": {"compat": "0.10", "lazy_refcounts": "off"}}, ["amend -f qcow2 -o compat=0.10 P"]),
    ({"options": {"lazy_refcounts": "on", "refcount_bits": "64"}}, ["amend -f qcow2 -o lazy_refcounts=on,refcount_bits=64 P"]),
])
def test_the_commands_that_change_an_image(want, lines):
    steps = plan({**PARAMETERS, **want}, HAVE)
    assert [step.line() for step in steps] == ["qemu-img " + line.replace(" P", " " + PATH) for line in lines]


@pytest.mark.parametrize("want, have, says", [
    ({"backing_file": "/other/base", "rebase": "unsafe"}, {}, "needs allow_unsafe_rebase"),
    ({"backing_file": "/other/base", "rebase": "safe"}, {"_new": None}, "does not exist"),
    ({"backing_file": "/other/base", "rebase": "safe"}, {"_new": {"format": "qcow2", "size": 1, "chain": ["/x", PATH]}}, "the image itself"),
    ({"backing_file": "base", "backing_format": "raw"}, {"backing_format": "qcow2"}, r"'base \(qcow2\)' and 'base \(raw\)' is wanted"),
    ({"commit": True}, {}, "needs allow_backing_change"),
    ({"commit": True}, {"backing_file": None}, "has no backing file"),
    ({"options": {"cluster_size": "4096"}}, {}, "has cluster_size=65536 and 4096 is wanted"),
    ({"options": {"compat": "0.10", "lazy_refcounts": "on"}}, {}, "compat=0.10 cannot have lazy_refcounts=on"),
    ({"options": {"compat": "0.10"}}, {"_bitmaps": True}, "compat=0.10 cannot have dirty bitmaps"),
    ({"options": {"data_file": "x"}}, {}, "has data_file=None and x is wanted"),
    ({"size": 1024}, {"encryption": "luks", "key_slots": 1}, r"is encrypted: changing it \(resize\) needs encryption.passphrase"),
    ({"encryption": encryption()}, {}, "is not encrypted"),
    ({"encryption": encryption()}, {"encryption": "luks", "key_slots": 1, "_slots": [], "_old_slots": []}, "the passphrase opens no key slot$"),
])
def test_what_is_refused(want, have, says):
    with pytest.raises(Refusal, match=says) as refusal:
        plan({**PARAMETERS, **want}, {**HAVE, **have})
    assert PATH in str(refusal.value) and SECRET not in str(refusal.value)


def test_a_passphrase_is_changed_in_an_order_that_never_locks_anybody_out():
    want = {**PARAMETERS, "size": 1024, "encryption": encryption(old_passphrase_file="/old, key", erase_old=True, keyslot=3)}
    have = {**HAVE, "encryption": "luks", "key_slots": 1, "_slots": [], "_old_slots": [0]}
    image = "file.filename=" + PATH
    assert [step.line() for step in plan(want, have)] == [
        "qemu-img amend --object 'secret,id=old-key,file=/old,, key' --object 'secret,id=key,data=(not shown)' --image-opts "
        "-o encrypt.state=active,encrypt.new-secret=key,encrypt.keyslot=3 driver=qcow2,encrypt.key-secret=old-key," + image,
        "qemu-img amend --object 'secret,id=key,data=(not shown)' --object 'secret,id=old-key,file=/old,, key' --image-opts "
        "-o encrypt.state=inactive,encrypt.old-secret=old-key driver=qcow2,encrypt.key-secret=key," + image,
        "qemu-img resize --object 'secret,id=key,data=(not shown)' --image-opts driver=qcow2,encrypt.key-secret=key,%s 1024" % image,
    ]


@pytest.mark.parametrize("params, says", [
    ({"erase_old": True}, "erase_old needs"), ({"keyslot": 8}, "from 0 to 7"), ({"keyslot": -1}, "from 0 to 7"),
])
def test_what_cannot_be_asked_of_encryption(params, says):
    with pytest.raises(Refusal, match=says):
        encryption(**params)


def test_a_format_without_encryption():
    with pytest.raises(Refusal, match="the raw format has no encryption"):
        Encryption({"passphrase": "x"}, lookup_format("raw"))
