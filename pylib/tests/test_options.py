# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Options: one declaration, and every reader of it."""

from __future__ import annotations

import random
from typing import Any, Optional

import jsonschema
import pytest

from diskwright.errors import OptionError
from diskwright.options import REQUIRED, NodeRef, Options, Size, flatten, nest, opt, split_pairs


class Sample(Options):
    file: NodeRef = opt(help="the child")
    cluster_size: Size = opt(65536, help="bytes in a cluster")
    lazy_refcounts: bool = opt(False, help="postpone", legacy=("lazy",))
    refcount_bits: int = opt(16, help="width")
    overlap: str = opt("cached", choices=("none", "cached"), help="what to check", key="overlap-check.template")
    data_file: Optional[str] = opt(None, help="a name")


def test_keys_types_and_defaults() -> None:
    assert list(Sample.fields) == ["file", "cluster-size", "lazy-refcounts", "refcount-bits", "overlap-check.template", "data-file"]
    record = Sample.from_mapping({"file": "node0", "cluster-size": "2M", "lazy": "on", "refcount-bits": 1, "data-file": "x"})
    assert (record.cluster_size, record.lazy_refcounts, record.refcount_bits, record.data_file) == (2 << 20, True, 1, "x")
    assert record.given() == {"file": "node0", "cluster-size": 2 << 20, "lazy-refcounts": True, "refcount-bits": 1, "data-file": "x"}
    assert Sample(file="a") == Sample(file="a") != Sample(file="b")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"file": "a", "colour": 1}, "Invalid parameter 'colour'"),
        ({}, "Parameter 'file' is missing"),
        ({"file": "a", "lazy-refcounts": "maybe"}, "Parameter 'lazy-refcounts' expects 'on' or 'off'"),
        ({"file": "a", "lazy-refcounts": 1}, "Parameter 'lazy-refcounts' expects 'on' or 'off'"),
        ({"file": "a", "refcount-bits": "x"}, "Parameter 'refcount-bits' expects a number"),
        ({"file": "a", "refcount-bits": True}, "Invalid parameter type for 'refcount-bits', expected: integer"),
        ({"file": "a", "cluster-size": "1.5"}, "Parameter 'cluster-size' expects a non-negative number below 2^64"),
        ({"file": "a", "cluster-size": -1}, "Parameter 'cluster-size' expects a non-negative number below 2^64"),
        ({"file": "a", "cluster-size": 1 << 64}, "Parameter 'cluster-size' expects a non-negative number below 2^64"),
        ({"file": "a", "overlap-check.template": "some"}, "Parameter 'overlap-check.template' does not accept value 'some'"),
        ({"file": "a", "data-file": 5}, "Invalid parameter type for 'data-file', expected: string"),
    ],
)
def test_bad_values_are_refused_in_words(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Sample.from_mapping(values)
    assert str(caught.value) == message


def test_none_means_not_given() -> None:
    assert Sample.from_mapping({"file": "a", "data-file": None}).data_file is None
    with pytest.raises(OptionError, match="'file' is missing"):
        Sample.from_mapping({"file": None})


def test_help_is_sorted_and_aligned_and_leaves_children_out() -> None:
    assert Sample.help_lines() == [
        "  cluster-size=<size>    - bytes in a cluster",
        "  data-file=<str>        - a name",
        "  lazy-refcounts=<bool (on/off)> - postpone",
        "  overlap-check.template=<str> - what to check",
        "  refcount-bits=<num>    - width",
    ]


def test_schema_accepts_what_the_reader_accepts_and_refuses_what_it_refuses() -> None:
    schema = Sample.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    rng = random.Random(2)
    pool: dict[str, list[Any]] = {
        "file": ["n", {}, 3],
        "cluster-size": [0, 512, -1, []],
        "lazy-refcounts": [True, False, 3],
        "refcount-bits": [1, []],
        "overlap-check.template": ["none", "nothing", 1],
        "data-file": ["x", 2],
        "colour": [1],
    }
    seen = set()
    for _number in range(400):
        values = {key: rng.choice(pool[key]) for key in pool if rng.random() < (0.9 if key == "file" else 0.4)}
        valid = jsonschema.Draft202012Validator(schema).is_valid(values)
        try:
            Sample.from_mapping(values)
            read = True
        except OptionError:
            read = False
        if values.get("file") != 3:  # what a child may be is graph.py's affair
            assert read == valid, values
            seen.add(valid)
    assert seen == {True, False}


@pytest.mark.parametrize(
    "text, pairs",
    [
        ("", []),
        ("a=1,b=2", [("a", "1"), ("b", "2")]),
        ("a=x,,y,b=,,", [("a", "x,y"), ("b", ",")]),
        ("a,nob,no", [("a", "on"), ("b", "off"), ("no", "on")]),
        ("a=b=c", [("a", "b=c")]),
        ("a=1,", [("a", "1")]),
        ("a=,,,b=2", [("a", ","), ("b", "2")]),
    ],
)
def test_pairs_in_qemus_grammar(text: str, pairs: list[tuple[str, str]]) -> None:
    assert split_pairs(text) == pairs


def test_implied_key_and_empty_key() -> None:
    assert split_pairs("disk.img,a=1", "file") == [("file", "disk.img"), ("a", "1")]
    assert split_pairs("a=1,b", "file") == [("a", "1"), ("b", "on")]
    with pytest.raises(OptionError):
        split_pairs("=x")


def test_commas_survive_a_round_trip() -> None:
    rng = random.Random(3)
    for _number in range(300):
        values = {chr(97 + i): "".join(rng.choice(",=ab ") for _number in range(rng.randrange(6))) for i in range(rng.randrange(1, 4))}
        text = ",".join("%s=%s" % (key, value.replace(",", ",,")) for key, value in values.items())
        assert dict(split_pairs(text)) == values, text


def test_nest_and_flatten_are_inverse() -> None:
    flat = {"driver": "quorum", "children.0.driver": "raw", "children.0.file.filename": "a", "children.1.driver": "raw", "vote": 2}
    nested = nest(flat)
    assert nested == {
        "driver": "quorum",
        "children": [{"driver": "raw", "file": {"filename": "a"}}, {"driver": "raw"}],
        "vote": 2,
    }
    assert flatten(nested) == flat
    assert nest({"a": {"b.c": 1}, "a.d": 2}) == {"a": {"b": {"c": 1}, "d": 2}}
    for clash in ({"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}):
        with pytest.raises(OptionError, match="Cannot mix scalar and non-scalar keys"):
            nest(clash)


def test_required_is_not_a_value() -> None:
    assert Sample.fields["file"].default is REQUIRED
