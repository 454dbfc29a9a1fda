# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters audit and chain_picture."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.diskwright.images.plugins.filter.audit import audit, chain_picture


def record(path, backing=None, **more):
    entry = {"path": path, "format": "qcow2", "virtual_size": 100, "actual_size": 50, "cluster_size": 10, "chain": [{}]}
    if backing:
        entry.update(full_backing_filename=backing, backing_filename=backing, backing_filename_format="qcow2", chain=[{}, {}])
    return {**entry, **more}


def test_chains_are_trees_and_no_image_is_in_two():
    found = audit(
        [record("/b"), record("/a1", "/b"), record("/a2", "/b"), record("/c", "/a1"), record("/alone"), record("/x", "/elsewhere")]
    )
    assert [(chain["base"], [(row["path"], row["depth"]) for row in chain["images"]]) for chain in found["chains"]] == [
        ("/b", [("/b", 0), ("/a1", 1), ("/c", 2), ("/a2", 1)]),
        ("/elsewhere", [("/x", 1)]),
    ]
    assert found["virtual_size"] == 600 and found["actual_size"] == 300 and not found["problems"]


def test_problems_are_said_and_counted():
    rows = [
        {
            "path": "/gone",
            "inspect": {
                "safe": False,
                "reasons": ["b: No such file or directory"],
                "references": [{"image": "/gone", "role": "backing", "name": "b"}],
            },
        },
        record("/leaky", measure={"required": 10}),
        record("/dirty", dirty_flag=True),
        record("/untold", "/b", backing_filename_format=None),
        record("/used", holder="qemu-system-x86_64 (pid 7)"),
    ]
    checks = [
        {"path": "/leaky", "leaks": 2, "corruptions": 0, "check_errors": 0},
        {"path": "/dirty", "leaks": 0, "corruptions": 3, "check_errors": 1},
        {"path": "/used", "error": "locked"},
        {"path": "/untold", "error": "/untold: This image format does not support checks"},
    ]
    found = audit(rows, checks)
    said = {row["path"]: row["problems"] for row in found["images"]}
    assert said["/gone"] == ["b: No such file or directory"]
    assert said["/leaky"] == ["2 leaked clusters"]
    assert said["/dirty"] == ["it was not closed cleanly", "it is damaged: 3 corruptions, 1 check errors"]
    assert len(said["/untold"]) == 1 and "not recorded" in said["/untold"][0]
    assert said["/used"] == ["it could not be checked: locked"]
    assert found["orphans"] == ["/gone"] and found["locked"] == ["/used"] and found["problems"] == 6
    assert found["leaked"] == 20 and found["waste"] == 20 + (50 - 10 - 20)


def test_pictures_are_well_formed_whatever_the_names():
    names = ['/a"<&>#;', "/b|c\n", "/d`e`"]
    found = audit([record(names[0]), record(names[1], names[0]), record(names[2], names[1])])
    picture = ElementTree.fromstring(chain_picture(found["chains"][0]))
    texts = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["%s (qcow2)" % name.lstrip("/") for name in names]
    lines = chain_picture(found["chains"][0], "mermaid").splitlines()
    assert lines[0] == "graph BT" and len(lines) == 6 and lines[-1] == "    n2 --> n1"
    with pytest.raises(AnsibleFilterError, match="svg and mermaid"):
        chain_picture(found["chains"][0], "png")


def test_images_in_a_loop_do_not_hang():
    found = audit([record("/a", "/b"), record("/b", "/a"), record("/c", "/c")])
    assert found["chains"] == []


def test_a_base_that_is_elsewhere_is_drawn():
    found = audit([record("/x", "/missing", inspect={"reasons": ["No such file or directory"]})])
    assert "missing (missing)" in chain_picture(found["chains"][0])


@pytest.mark.parametrize("wrong", ["text", [1], [{}], None])
def test_anything_else_is_refused(wrong):
    with pytest.raises(AnsibleFilterError):
        audit(wrong)
