# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""units.py against qemu-img: what it reads as a size, and how it prints one."""

from __future__ import annotations

import random
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from diskwright.errors import OptionError
from diskwright.units import MAX_IMAGE_SIZE, OutOfRange, format_size, parse_number, parse_size


def sizes() -> list[str]:
    """Texts that are sizes, almost sizes and no sizes."""
    rng = random.Random(20)
    texts = ["", " ", "G", ".", ".G", "1.", "1.k", ".5G", "1.5", "1.5b", "1.0", "1.0b", "0.0", "-0", "-0k", "-1", "-1k", "-1x", "-x"]
    texts += ["+1", "+ 1", "+-1", "--1", " 1G", "\t1", "\n1", "1 ", "1 G", "1MB", "1MiB", "1kB", "1e3", "1.5e3", "1.5E", "1e", "inf", "nan"]
    texts += ["0x", "0x10", "0X1f", "0x1k", "0x1.8k", "0x1p", "0xb", "0x1e", "-0x10", "+0x10", "0x7fffffffffffffff", "0x8000000000000000"]
    texts += ["0x10000000000000000", "010", "08", "00", "7.99E", "7.999999999999999999E", "8E", "15.99E", "16E", "99999999999999999999"]
    texts += ["99999999999999999999x", "9" * 26 + ".5", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616"]
    texts += ["9007199254740993k", "8191.9999999999P", "0.00001k", "-.00001k", "1.333M", "1.3333333333333333333333333333G"]
    texts += ["1,5G", "1_000", "\u0661", "1.\u0661k"]
    for suffix in "bBkKmMgGtTpPeE":
        texts += ["1" + suffix, "1.5" + suffix, "0" + suffix, "1" + suffix + suffix, "0.0005" + suffix]
    while len(texts) < 400:
        whole = str(rng.randrange(10 ** rng.choice((1, 3, 6))))
        fraction = "." + str(rng.randrange(10**6)).zfill(rng.randrange(1, 9)) if rng.random() < 0.6 else ""
        texts.append(rng.choice(("", "", "", " ", "+")) + whole + fraction + rng.choice("kMGTPEkMGTPEb!i "))
    return texts


def ours(text: str) -> object:
    try:
        return parse_size(text, MAX_IMAGE_SIZE)
    except OutOfRange:
        return "range"
    except OptionError:
        return "invalid"


def theirs(text: str) -> object:
    """qemu-img says which size it read before it finds that /dev/null cannot have it."""
    run = subprocess.run(["qemu-img", "create", "/dev/null", "--", text], capture_output=True, text=True, check=False)
    if run.stdout:
        return int(run.stdout.split("size=")[1])
    assert run.stderr.startswith("qemu-img: Invalid image size specified")
    return "range" if "Must be between" in run.stderr else "invalid"


def test_sizes_are_read_as_qemu_img_reads_them() -> None:
    texts = sizes()
    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(theirs, texts))
    wrong = [(text, ours(text), want) for text, want in zip(texts, expected) if ours(text) != want]
    assert not wrong
    assert {"range", "invalid"} < set(map(str, expected)) and len(set(map(str, expected))) > 150


@pytest.mark.parametrize(
    "text, size",
    [("1", 1), ("1k", 1024), ("1.333M", 1397752), (".5G", 1 << 29), ("0x10000", 65536), ("16.0b", 16), ("18446744073709551615", (1 << 64) - 1)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["-1", "16E", "18446744073709551616", "9" * 5000])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(OutOfRange):
        parse_size(text)


def test_a_very_long_number_costs_no_time() -> None:
    """Python refuses to convert more than 4300 digits; neither that nor its quadratic time may be reached."""
    for text in ("9" * 100000, "0x" + "f" * 100000, "1." + "3" * 100000 + "k"):
        try:
            assert parse_size(text) == 1365
        except OutOfRange:
            pass
    with pytest.raises(OutOfRange):
        parse_number("9" * 100000)


NUMBERS = ["", "0", "-0", "-1", "8", "08", "010", "0x8", "0x", "0xg", " 8", "+8", "+-8", "8 ", "8.0", "8b", "1k", "17", "16"]
NUMBERS += ["99999999999999999999", "1e1", "-99999999999999999999"]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_read_as_qemu_img_reads_them(text: str) -> None:
    run = subprocess.run(["qemu-img", "convert", "-m", text], capture_output=True, text=True, check=False)
    want = "good"
    if "Invalid number of coroutines" in run.stderr:
        want = "range" if "Must be between" in run.stderr else "invalid"
    try:
        parse_number(text, 16, 1)
        got = "good"
    except OutOfRange:
        got = "range"
    except OptionError:
        got = "invalid"
    assert got == want


def test_octal_and_hexadecimal() -> None:
    assert [parse_number(text) for text in ("010", "0x10", "10", "0")] == [8, 16, 10, 0]


def human_sizes() -> list[int]:
    rng = random.Random(21)
    sizes = [0, 512, 1023 * 512, 1024, 999 << 10, 1000 << 10, 1023 << 10, 1 << 20, 9995 << 9, 1 << 40, (1 << 62), 1 << 50, 1000 << 40, 999 << 30]
    sizes += [int(1000 * 1024**n * 0.9995) // 512 * 512 for n in range(1, 6)]
    return sizes + [rng.getrandbits(rng.randrange(10, 62)) // 512 * 512 for _count in range(60)]


def test_sizes_are_printed_as_qemu_img_prints_them() -> None:
    def printed(size: int) -> str:
        options = "driver=null-co,size=%d" % size
        out = subprocess.run(["qemu-img", "info", "--image-opts", options], capture_output=True, text=True, check=True).stdout
        return out.split("virtual size: ")[1].split(" (")[0]

    values = human_sizes()
    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(printed, values))
    assert [format_size(value) for value in values] == expected
