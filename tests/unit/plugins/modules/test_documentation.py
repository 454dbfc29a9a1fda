# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every module says what it takes and returns, alike in its documentation, its arguments and its examples."""

from __future__ import annotations

import os
from importlib import import_module

import pytest
import yaml

COLLECTION = "ansible_collections.diskwright.images.plugins"
PACKAGE = "ansible_collections.diskwright.images.plugins.modules"
MODULES = sorted(
    name[:-3] for name in os.listdir(os.path.join(os.path.dirname(__file__), "../../../../plugins/modules")) if name.endswith(".py")
)


def test_one_set_of_defaults_serves_all_modules():
    with open(os.path.join(os.path.dirname(__file__), "../../../../meta/runtime.yml"), encoding="utf-8") as file:
        assert yaml.safe_load(file)["action_groups"] == {"images": MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_described_as_it_is(name):
    module = import_module("%s.%s" % (PACKAGE, name))
    documented = yaml.safe_load(module.DOCUMENTATION)
    assert documented["module"] == name
    options = dict(documented["options"])
    for fragment in documented.get("extends_documentation_fragment", ()):
        if fragment.startswith("diskwright.images."):
            home = import_module("%s.doc_fragments.%s" % (COLLECTION, fragment.rpartition(".")[2]))
            options.update(yaml.safe_load(home.ModuleDocFragment.DOCUMENTATION)["options"])
    assert set(options) == set(module.ARGUMENTS)
    for key, argument in module.ARGUMENTS.items():
        for field in ("type", "default", "choices", "required", "elements", "aliases"):
            assert options[key].get(field) == argument.get(field), (key, field)
        for inner, suboption in argument.get("options", {}).items():
            for field in ("type", "default", "choices", "required", "elements", "aliases"):
                assert options[key]["suboptions"][inner].get(field) == suboption.get(field), (key, inner, field)
        assert set(options[key].get("suboptions", {})) == set(argument.get("options", {}))
    if name != "seed_image":  # whose work is done on the controller
        assert {"plan", "diskwright"} - set(yaml.safe_load(module.RETURN)) <= ({"plan"} if "_info" in name else set())


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_use_what_there_is(name):
    module = import_module("%s.%s" % (PACKAGE, name))
    tasks = yaml.safe_load(module.EXAMPLES)
    assert len(tasks) >= 2
    own = 0
    for task in tasks:
        assert task["name"]
        arguments = task.get("diskwright.images." + name)
        if arguments is not None:
            own += 1
            required = {key for key, argument in module.ARGUMENTS.items() if argument.get("required")}
            files = {"mode", "owner", "group", "attributes"}
            assert required <= set(arguments) <= set(module.ARGUMENTS) | files
    assert own >= 2
