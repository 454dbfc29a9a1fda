# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of graph files: the published one is today's, and jsonschema and our own validation agree."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from diskwright.description import GENERIC, Group, Rows, driver_names, is_needed, shape_of
from diskwright.drivers import lookup
from diskwright.errors import OptionError
from diskwright.graph_file import EXPORT, SERVER, parse
from diskwright.graph_schema import schema
from diskwright.objects import TYPES
from diskwright.options import Field

PUBLISHED = Path(__file__).parents[2] / "docs" / "blockdev.schema.json"


def test_the_published_schema_is_current() -> None:
    text = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert text == schema(), "diskwright graph --schema > docs/blockdev.schema.json"


def test_it_is_a_schema_and_says_what_each_key_is_for() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    for name in driver_names():
        for key, entry in {**GENERIC, **shape_of(lookup(name))}.items():
            assert isinstance(entry, Group) or entry.help, f"{name}: {key} has no help"


class Maker:
    """Descriptions that are right, and then one mistake in them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.depth = 0

    def value(self, field: Field) -> Any:
        rng = self.rng
        if field is GENERIC["node-name"]:
            return "n%d" % rng.randrange(1000)
        if field.choices:
            return rng.choice(field.choices)
        if field.kind == "bool":
            return rng.random() < 0.5
        if field.kind in ("int", "Size"):
            return rng.choice((0, 1, 512, 1 << 40, (1 << 63) - 1))
        if field.kind in ("Words", "TextList"):
            return ["a"] * rng.randrange(3)
        if field.kind == "ServerList":
            return [{"host": "x", "port": "1"}] * rng.randrange(3)
        if field.kind == "Backing" and rng.random() < 0.3:
            return None
        if field.kind in ("NodeRef", "Backing"):
            return self.node() if self.depth < 3 and rng.random() < 0.7 else "other"
        if field.kind == "NodeRefs":
            return [self.node() if self.depth < 3 else "other" for _index in range(rng.randrange(3))]
        return rng.choice(("text", "", "a,b", "\u00e9"))

    def mapping(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, entry in shape.items():
            if isinstance(entry, Rows):
                if self.rng.random() < 0.3:
                    found[key] = [self.mapping(entry.shape) for _index in range(self.rng.randrange(3))]
            elif isinstance(entry, Group):
                if self.rng.random() < 0.3 or any(isinstance(inner, Field) and is_needed(inner) for inner in entry.shape.values()):
                    found[key] = self.mapping(entry.shape)
                elif entry.whole is not None and self.rng.random() < 0.3:
                    found[key] = self.value(entry.whole)
            elif is_needed(entry) or self.rng.random() < 0.25:
                found[key] = self.value(entry)
        return found

    def node(self, top: bool = False) -> dict[str, Any]:
        self.depth += 1
        driver = self.rng.choice(driver_names())
        found = {"driver": driver, **self.mapping({**GENERIC, **shape_of(lookup(driver))})}
        self.depth -= 1
        return {**found, "node-name": "top"} if top else found

    def object(self) -> dict[str, Any]:
        kind = self.rng.choice([name for name in sorted(TYPES) if name != "authz-list-file"])
        found: dict[str, Any] = {"qom-type": kind, "id": "o%d" % self.rng.randrange(10**9)}
        if kind == "secret":
            return {**found, self.rng.choice(("data", "file")): "x"}
        if kind == "throttle-group":
            return {**found, "limits": {"bps-total": 1, "iops-size": 512}} if self.rng.random() < 0.5 else {**found, "x-iops-read": 5}
        for key, what in TYPES[kind].items():
            if what.startswith("!") or self.rng.random() < 0.5:
                plain = what.lstrip("!")
                values: dict[str, Any] = {"string": "x", "int": 3, "bool": True, "list": []}
                found[key] = values[plain] if plain in values else self.rng.choice(plain.split())
        return found

    def file(self) -> dict[str, Any]:
        found: dict[str, Any] = {"blockdevs": [self.node(True) for _index in range(self.rng.randrange(1, 3))]}
        if self.rng.random() < 0.5:
            found["objects"] = [self.object() for _index in range(self.rng.randrange(3))]
        if self.rng.random() < 0.3:
            found["exports"] = [self.mapping(EXPORT)]
        if self.rng.random() < 0.3:
            found["nbd-server"] = self.mapping(SERVER)
        return found

    def mistake(self, found: Any) -> Any:
        """The same with something changed, at whatever depth: mostly for the worse."""
        places: list[tuple[Any, Any]] = []
        todo = [found]
        while todo:
            place = todo.pop()
            for key, value in place.items() if isinstance(place, dict) else enumerate(place):
                places.append((place, key))
                if isinstance(value, (dict, list)):
                    todo.append(value)
        place, key = self.rng.choice(places)
        how = self.rng.randrange(4)
        if how == 0:
            del place[key]
        elif how == 1 and isinstance(place, dict):
            place[self.rng.choice(("colour", "driver", "read-only", "filename", "file", "node-name"))] = place[key]
        else:
            place[key] = self.rng.choice((None, True, 7, -1, 1 << 64, 1.5, "word", "", [], {}, ["x"], {"x": 1}, {"driver": "file", "filename": "x"}))
        return found


@pytest.mark.parametrize("seed", range(6))
def test_jsonschema_and_our_validation_agree(seed: int) -> None:
    maker = Maker(seed)
    validator = jsonschema.Draft202012Validator(schema())
    outcomes = [0, 0]
    for _case in range(40):
        right = maker.file()
        parse(copy.deepcopy(right), "x")
        assert validator.is_valid(right), right
        for _mistake in range(4):
            wrong = maker.mistake(copy.deepcopy(right))
            valid = validator.is_valid(wrong)
            try:
                parse(copy.deepcopy(wrong), "x")
                ours = "right"
            except OptionError as error:
                ours = str(error)
            assert valid == (ours == "right"), (ours, wrong)
            outcomes[valid] += 1
    assert min(outcomes) > 10
