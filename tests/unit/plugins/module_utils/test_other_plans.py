# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plans of image_convert and image_check over generated states, and what options become."""

from __future__ import annotations

import random

import pytest

from ansible_collections.diskwright.images.plugins.module_utils import _conversion, _repair
from ansible_collections.diskwright.images.plugins.module_utils._encryption import Encryption
from ansible_collections.diskwright.images.plugins.module_utils._options import as_text, checked, joined, virtual_size
from ansible_collections.diskwright.images.plugins.module_utils._plan import Refusal, after
from ansible_collections.diskwright.images.plugins.module_utils._runner import failure
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.drivers import lookup_format
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.errors import Corrupt, OptionError

SECRET = "correct horse"


def conversions():
    rng = random.Random(5)
    for _number in range(1000):
        want = {
            "src": ["/images/source", "/images/a b"][: rng.choice([1, 2])],
            "src_format": rng.choice([None, "raw"]),
            "checksum": None,
            "dest": "/images/dest",
            "format": rng.choice(["raw", "qcow2"]),
            "options": rng.choice([{}, {"cluster_size": "4096"}]),
            "size": rng.choice([None, 1 << 30]),
            "compress": rng.random() < 0.5,
            "backing_file": rng.choice([None, "base"]),
            "backing_format": "raw",
            "up_to_date": rng.choice(["source", "content", "exists"]),
            "replace": rng.random() < 0.5,
            "private": False,
            "changed": rng.choice([None, None, "since"]),
            "disk": None,
            "verify_manifest": False,
            "content_checksum": rng.random() < 0.5,
            "content_file": rng.random() < 0.5,
            "src_encryption": rng.choice([None, None, {"passphrase": SECRET, "passphrase_file": None}]),
            "backing_encryption": None,
            "encryption": rng.choice([None, Encryption({"passphrase": SECRET, "passphrase_file": None}, lookup_format("qcow2"))]),
        }
        current = rng.random() < 0.3
        have = {"state": "present" if current else rng.choice(["present", "absent"]), "current": current, "_reason": "" if current else "it is old"}
        yield want, have


def test_a_conversion_happens_where_it_must_and_never_unasked():
    done = 0
    for want, have in conversions():
        if have["state"] == "present" and not have["current"] and not want["replace"]:
            with pytest.raises(Refusal, match="needs replace"):
                _conversion.plan(want, have)
            continue
        steps = _conversion.plan(want, have)
        assert bool(steps) != have["current"]
        assert _conversion.plan(want, after(have, steps)) == []
        for step in steps:
            done += 1
            program = ("qemu-img", "convert") if want["changed"] is None else ("diskwright", "convert")
            assert step.argv[:2] == program and step.argv[-1] == "/images/dest"
            assert ("source-key" in step.line()) == (want["src_encryption"] is not None)
            assert ("resize" in step.line()) == (want["size"] is not None)
            assert ("encrypt.format=luks,encrypt.key-secret=key" in step.line()) == (want["encryption"] is not None)
            assert SECRET not in step.line() + repr((have, _conversion.request(want)))
    assert done > 300


def test_a_repair_happens_where_it_was_allowed_and_something_is_wrong():
    rng = random.Random(6)
    for _number in range(1000):
        want = {"path": "/images/disk", "format": None, "repair": rng.choice(["none", "leaks", "all"])}
        have = {"check_errors": 0, "leaks": rng.choice([0, 3]), "corruptions": rng.choice([0, 2]), "messages": ["x"]}
        steps = _repair.plan(want, have)
        mends = {"none": 0, "leaks": have["leaks"], "all": have["leaks"] + have["corruptions"]}[want["repair"]]
        assert len(steps) == bool(mends)
        reached = after(have, steps)
        assert _repair.plan(want, reached) == []
        if steps and want["repair"] == "all":
            _repair.judge([{"path": "/images/disk", **reached}], "nothing")


@pytest.mark.parametrize("tolerate, counts, passes", [
    ("nothing", (0, 0, 0), True), ("nothing", (0, 0, 1), False), ("leaks", (0, 0, 1), True), ("leaks", (0, 1, 1), False),
    ("leaks", (1, 0, 0), False), ("everything", (1, 1, 1), True),
])
def test_what_is_tolerated(tolerate, counts, passes):
    found = dict(zip(_repair.COUNTS, counts))
    images = [{"path": "/images/disk", **found}, {"path": "/images/good", **dict.fromkeys(_repair.COUNTS, 0)}]
    if passes:
        _repair.judge(images, tolerate)
        return
    with pytest.raises(Refusal, match="^/images/disk is not consistent: 1 [^;]*$") as caught:
        _repair.judge(images, tolerate)
    assert failure(caught.value)["images"] == images
    with pytest.raises(Refusal) as caught:
        _repair.judge(images[:1], tolerate)
    assert failure(caught.value)["check"] == found


@pytest.mark.parametrize("given, text", [
    ({}, None), ({"lazy_refcounts": True, "cluster_size": 4096}, "lazy_refcounts=on,cluster_size=4096"), ({"data_file": "a,b"}, "data_file=a,,b"),
])
def test_options_of_a_playbook_as_text(given, text):
    assert joined({key: as_text(value) for key, value in given.items()}) == text


@pytest.mark.parametrize("given, wanted", [
    ({"cluster_size": "64k"}, {"cluster_size": "65536"}), ({"compat": 0.1}, {"compat": "0.10"}), ({"compat": "v3"}, {"compat": "1.1"}),
    ({"compat": 1.1}, {"compat": "1.1"}), ({"lazy_refcounts": "yes"}, {"lazy_refcounts": "on"}), ({"extended_l2": False}, {"extended_l2": "off"}),
])
def test_options_are_spelled_as_info_shows_them(given, wanted):
    assert checked("qcow2", given) == wanted


@pytest.mark.parametrize("format, options, says", [
    ("qcow2", {"x": 1}, "Invalid parameter 'x'"), ("qcow2", {"cluster_size": "x"}, "cluster_size"), ("x", {}, "'x'"),
    ("qcow2", {"lazy_refcounts": 3}, "lazy_refcounts"), ("qcow2", {"size": 1}, "has a parameter of its own"),
])
def test_options_that_are_refused(format, options, says):
    with pytest.raises(OptionError, match=says):
        checked(format, options, ("size",))


def test_sizes_are_whole_sectors():
    assert [virtual_size(text) for text in (None, "0", "1", "512", "1k", "1.5G")] == [None, 0, 512, 512, 1024, 3 << 29]


def test_failures_name_the_file_and_the_cause():
    assert failure(OSError(28, "No space left on device", "/images/disk"))["msg"] == "/images/disk: No space left on device"
    assert failure(Corrupt("it is bad", filename="/images/disk"))["msg"] == "/images/disk: it is bad"
    fields = failure(Corrupt("/images/disk: bad", filename="/images/disk", offset=512, errno=5))
    assert fields == {"msg": "/images/disk: bad", "error": "Corrupt", "filename": "/images/disk", "offset": 512, "errno": 5}
