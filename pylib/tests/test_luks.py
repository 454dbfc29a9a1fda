# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""luks beside qemu-img and cryptsetup: images both ways, words, key slots, damaged headers, and what takes too long."""

from __future__ import annotations

import random
import struct
import subprocess

import pytest
from side_by_side import ours, same, theirs

from diskwright.commands.create import create
from diskwright.crypto import luks as volumes
from diskwright.crypto.secrets import passphrase
from diskwright.errors import Error
from diskwright.formats.luks import LuksAmendOptions
from diskwright.graph import Graph
from diskwright.node import OpenFlags
from diskwright.objects import add_object
from diskwright.options import SecretRef

SECRETS = ["--object", "secret,id=s,data=abc", "--object", "secret,id=n,data=new", "--object", "secret,id=w,data=wrong"]
SIZE = 64 << 10
CIPHERS = [
    "cipher-alg=aes-256",
    "cipher-alg=aes-128,hash-alg=sha512",
    "cipher-alg=aes-192,ivgen-alg=plain,hash-alg=sha1",
    "cipher-alg=serpent-256,hash-alg=ripemd160",
    "cipher-alg=serpent-128,cipher-mode=ctr,hash-alg=md5",
    "cipher-alg=twofish-256,ivgen-alg=essiv,hash-alg=sha384",
    "cipher-alg=twofish-128,cipher-mode=cbc,hash-alg=sha224",
    "cipher-alg=cast5-128,cipher-mode=cbc,hash-alg=sm3",
    "cipher-alg=cast5-128,cipher-mode=ctr",
    "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-mode=ecb",
    "cipher-mode=ctr,ivgen-alg=plain,ivgen-hash-alg=sha1",
    "cipher-mode=cbc,ivgen-alg=plain",
    "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv",
]
MADE_BY_QEMU = CIPHERS[0], CIPHERS[6], CIPHERS[13]


def objects():
    found = {}
    for text in SECRETS[1::2]:
        add_object(found, text)
    return found


def opened(path, secret="s", writable=False, **more):
    spec = {"driver": "luks", "key-secret": secret, "file": {"driver": "file", "filename": str(path)}, **more}
    return Graph(objects=objects()).open_spec(spec, OpenFlags(writable=writable, resize=writable))


def made(path, size=SIZE, options="iter-time=1"):
    create(str(path), size, format="luks", options="key-secret=s," + options, objects=objects())
    return path


def content(seed=1, size=SIZE):
    return random.Random(seed).randbytes(size)


def source(name):
    return ["--image-opts", "driver=luks,key-secret=s,file.filename=" + name]


@pytest.mark.parametrize("options", CIPHERS)
def test_both_ways(tmp_path, options):
    """What we make they read, and what they write we read; they make few themselves, since that takes them seconds."""
    (tmp_path / "raw").write_bytes(content())
    (tmp_path / "other").write_bytes(content(2))
    line = ["convert", *SECRETS, "-O", "luks", "-o", "key-secret=s,iter-time=1," + options, "raw", "image"]
    back = ["convert", *SECRETS, *source("image"), "-O", "raw", "back"]
    for make, read in ((theirs, ours), (ours, theirs)) if options in MADE_BY_QEMU else ((ours, theirs),):
        assert make(line, tmp_path).code == 0
        assert read(back, tmp_path) == (0, "", "")
        assert (tmp_path / "back").read_bytes() == content()
        same("info image", tmp_path)
        same("info --output=json image", tmp_path)
    assert theirs(["convert", *SECRETS, "-n", "-f", "raw", "other", "--target-image-opts", source("image")[1]], tmp_path).code == 0
    assert ours(back, tmp_path) == (0, "", "")
    assert (tmp_path / "back").read_bytes() == content(2)


def cryptsetup(path, key, *arguments):
    command = ["cryptsetup", "--key-file=-", *arguments]
    return subprocess.run(command, input=key, cwd=path.parent, capture_output=True, check=False).returncode


@pytest.mark.parametrize("options", ["cipher-alg=aes-256", "cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1", "cipher-alg=aes-192,cipher-mode=cbc"])
def test_cryptsetup_opens_ours(tmp_path, options):
    path = made(tmp_path / "image", options="iter-time=1," + options)
    assert cryptsetup(path, b"abc", "luksOpen", "--test-passphrase", "image") == 0
    assert cryptsetup(path, b"abd", "luksOpen", "--test-passphrase", "image") == 2
    dump = subprocess.run(["cryptsetup", "luksDump", "image"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "Key Slot 0: ENABLED" in dump and "Key Slot 1: DISABLED" in dump
    with opened(path, writable=True) as node:
        node.amend(LuksAmendOptions(state="active", new_secret=SecretRef("n", objects()), keyslot=3, iter_time=1))
    assert cryptsetup(path, b"new", "luksOpen", "--test-passphrase", "--key-slot=3", "image") == 0


@pytest.mark.parametrize("cipher, bits", [("aes-xts-plain64", 512), ("aes-cbc-essiv:sha256", 256), ("aes-cbc-plain64", 192), ("aes-xts-plain64", 256)])
def test_we_open_what_cryptsetup_makes(tmp_path, cipher, bits):
    path = tmp_path / "image"
    path.write_bytes(bytes(4 << 20))
    code = cryptsetup(
        path, b"abc", "-q", "luksFormat", "--type=luks1", "--pbkdf-force-iterations=1000", "-c", cipher, "-s%d" % bits, "--hash=sha256", "image"
    )
    assert code == 0
    with opened(path) as node:
        assert node.size == (4 << 20) - node.volume.payload_offset
        assert len(node.pread(0, 512)) == 512


def test_reads_and_writes_of_any_shape(tmp_path):
    path = made(tmp_path / "image")
    model = bytearray(content())
    rng = random.Random(5)
    with opened(path, writable=True) as node:
        node.pwrite(0, model)
        for _round in range(60):
            offset = rng.randrange(SIZE)
            length = min(rng.choice((1, 100, 511, 512, 513, 4096, 30000)), SIZE - offset)
            data = rng.randbytes(length)
            node.pwrite(offset, data)
            model[offset : offset + length] = data
            offset = rng.randrange(SIZE)
            assert node.pread(offset, min(5000, SIZE - offset)) == model[offset : offset + 5000]
        node.pwrite_zeroes(1000, 3000)
        model[1000:4000] = bytes(3000)
        kept = bytes(model)
        node.pwrite(0, model)
        assert model == kept  # what is written is not changed by writing it
    with opened(path) as node:
        assert node.pread(0, SIZE) == model
    assert model[:64] not in path.read_bytes()


def test_size_changes(tmp_path):
    path = made(tmp_path / "image")
    with opened(path, writable=True) as node:
        node.pwrite(0, content())
        node.truncate(2 * SIZE)
        assert node.size == 2 * SIZE and node.pread(0, SIZE) == content()
        node.truncate(SIZE // 2)
    with opened(path) as node:
        assert node.size == SIZE // 2 and node.pread(0, SIZE // 2) == content()[: SIZE // 2]


@pytest.mark.parametrize(
    "line",
    [
        "create -f luks -o key-secret=zz new 1M",
        "create -f luks -o iter-time=1 new 1M",
        "create -f luks -o key-secret=s,cipher-alg=bogus new 1M",
        "create -f luks -o key-secret=s,cipher-alg=des new 1M",
        "create -f luks -o key-secret=s,cipher-alg=cast5-128 new 1M",
        "create -f luks -o key-secret=s,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1 new 1M",
        "create -f luks -o key-secret=s,cipher-alg=serpent-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1 new 1M",
        "create -f luks -o key-secret=s,cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=essiv new 1M",
        "create -f luks -o key-secret=s -b image -F luks new",
        "measure -O luks --size 1G",
        "measure -O luks -o key-secret=s,iter-time=1,cipher-alg=aes-128 --size 1000",
        "measure -O luks -o key-secret=s,iter-time=1 image",
        "map image",
        "map --output=json --image-opts driver=luks,key-secret=s,file.filename=image",
        "info --image-opts driver=luks,key-secret=zz,file.filename=image",
        "info --output=json --image-opts driver=luks,key-secret=s,file.filename=image",
        "info --output=json --image-opts driver=luks,header.driver=file,header.filename=detached,file.filename=raw",
        "info --image-opts driver=luks,header.driver=file,header.filename=detached,file.filename=raw",
        "info detached",
        "convert --image-opts driver=luks,key-secret=w,file.filename=image out",
        "convert --image-opts driver=luks,key-secret=zz,file.filename=image out",
        "convert --image-opts driver=luks,file.filename=image out",
        "check image",
        "check --image-opts driver=luks,key-secret=s,file.filename=image",
        "resize image +1M",
        "compare image image",
    ],
)
def test_words(tmp_path, line):
    header = bytearray(made(tmp_path / "image").read_bytes())
    header[104:108] = bytes(4)
    (tmp_path / "detached").write_bytes(header[: 4040 * 512])
    (tmp_path / "raw").write_bytes(bytes(SIZE))
    command, _space, rest = line.partition(" ")
    secrets = "" if command == "check" and "--image-opts" not in rest else " ".join(SECRETS)
    same("%s %s %s" % (command, secrets, rest), tmp_path)


def test_detached_header(tmp_path):
    header = made(tmp_path / "header", options="iter-time=1,detached-header=on")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    place = {"driver": "file", "filename": str(header)}
    with opened(disk, writable=True, header=place) as node:
        assert node.size == SIZE
        node.pwrite(0, content())
    options = "driver=luks,key-secret=s,header.driver=file,header.filename=header,file.driver=file,file.filename=disk"
    assert theirs(["convert", *SECRETS, "--image-opts", options, "-O", "raw", "back"], tmp_path).code == 0
    assert (tmp_path / "back").read_bytes() == content() != disk.read_bytes()


AMENDS = [
    ("state=active,new-secret=n", None),
    ("state=active,new-secret=n,keyslot=5", None),
    ("state=active,new-secret=n,keyslot=5", "Refusing to overwrite active keyslot 5 - please erase it first"),
    ("!state=active,new-secret=s,keyslot=5", None),
    ("state=active,new-secret=n,keyslot=8", "Invalid keyslot 8 specified, must be between 0 and 7"),
    ("state=active", "'new-secret' is required to activate a keyslot"),
    ("state=active,new-secret=zz", "No secret with id 'zz'"),
    ("state=active,new-secret=n,old-secret=s", "'old-secret' must not be given when activating keyslots"),
    ("new-secret=n", "Parameter 'state' is missing"),
    ("state=bogus", "Parameter 'state' does not accept value 'bogus'"),
    ("state=inactive,keyslot=3", "Given keyslot 3 is already erased (inactive) "),
    ("!state=inactive,keyslot=3", None),
    ("state=inactive,old-secret=w", "No keyslots match given (old) password for erase operation"),
    ("state=inactive,new-secret=n,keyslot=1", "'new-secret' must not be given when erasing keyslots"),
    ("state=inactive,old-secret=n,keyslot=0", "Given keyslot 0 doesn't contain the given old password for erase operation"),
    ("state=inactive,old-secret=n,keyslot=1", None),
    ("state=inactive,old-secret=s", "All the active keyslots match the (old) password that was given"),
    ("state=inactive,keyslot=5", None),
    ("state=inactive,keyslot=0", "Attempt to erase the only active keyslot 0"),
    ("!state=inactive,keyslot=0", None),
]


def test_key_slots(tmp_path):
    """The same steps, by qemu-img amend and by us: the same refusals and the same slots afterwards."""
    path = made(tmp_path / "image")
    (tmp_path / "peer").write_bytes(path.read_bytes())
    with opened(path, writable=True) as node:
        for step, words in AMENDS:
            text = step.lstrip("!") + ("" if "state=inactive" in step else ",iter-time=1")
            force = step.startswith("!")
            arguments = ["amend", *SECRETS, *source("peer"), *(["--force"] if force else []), "-o", text]
            expected = theirs(arguments, tmp_path)
            try:
                node.amend(LuksAmendOptions.from_string(text).bind(objects()), force)
            except Error as error:
                assert words is not None and str(error).startswith(words), (step, str(error))
                assert expected.code == 1 and expected.err.startswith("qemu-img: %s" % error), (step, expected.err)
            else:
                assert words is None and expected.code == 0, (step, expected.err)
            with open(tmp_path / "peer", "rb") as peer:
                states = [struct.unpack_from(">I", peer.read(592), 208 + 48 * index)[0] if not peer.seek(0) else 0 for index in range(8)]
            assert [slot.active for slot in node.volume.slots] == states, step
    with pytest.raises(Error, match="cannot unlock any keyslot"):
        opened(path)


def test_a_slot_is_replaced_for_cryptsetup_too(tmp_path):
    """Whose new material lies where another slot had its own: the old one is there until the header turns away from it."""
    path = made(tmp_path / "image")
    with opened(path, writable=True) as node:
        node.amend(LuksAmendOptions(state="active", new_secret=SecretRef("n", objects()), keyslot=0, iter_time=1), True)
    assert cryptsetup(path, b"new", "luksOpen", "--test-passphrase", "--key-slot=0", "image") == 0
    assert cryptsetup(path, b"abc", "luksOpen", "--test-passphrase", "image") == 2
    same("info image", tmp_path)
    with opened(path, "n", writable=True) as node:
        node.amend(LuksAmendOptions(state="active", new_secret=SecretRef("s", objects()), keyslot=1, iter_time=1))
    assert cryptsetup(path, b"abc", "luksOpen", "--test-passphrase", "--key-slot=1", "image") == 0


def test_key_slots_of_a_detached_header(tmp_path):
    header = made(tmp_path / "header", options="iter-time=1,detached-header=on")
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    place = "driver=luks,key-secret=s,file.filename=disk,header.driver=file,header.filename=header"
    line = ["amend", *SECRETS, "--image-opts", "-o", "state=active,new-secret=n,iter-time=1", place]
    assert ours(line, tmp_path) == (0, "", "")
    for secret in ("s", "n"):
        name = place.replace("key-secret=s", "key-secret=" + secret)
        assert theirs(["map", *SECRETS, "--image-opts", name], tmp_path).code == 1  # since encrypted bytes are nowhere to be mapped to
        assert "Invalid password" not in theirs(["map", *SECRETS, "--image-opts", name], tmp_path).err
    assert header.stat().st_size == 4040 * 512 and (tmp_path / "disk").stat().st_size == SIZE


def test_all_key_slots_in_use(tmp_path):
    path = made(tmp_path / "image")
    with opened(path, writable=True) as node:
        for _slot in range(7):
            node.amend(LuksAmendOptions(state="active", new_secret=SecretRef("n", objects()), iter_time=1))
        with pytest.raises(Error, match="Can't add a keyslot - all keyslots are in use"):
            node.amend(LuksAmendOptions(state="active", new_secret=SecretRef("n", objects()), iter_time=1))
        node.amend(LuksAmendOptions(state="inactive", old_secret=SecretRef("n", objects())))
        assert node.volume.active() == [0]
    same("info image", tmp_path)


def u32(value):
    return struct.pack(">I", value)


# offset in the header, bytes; QEMU's words are ours, but where its sums wrap around
DAMAGES = [
    (0, b"LUKX"),
    (6, b"\0\2"),
    (8, b"a" * 32),
    (40, b"x" * 32),
    (72, b"h" * 32),
    (8, b"bogus\0"),
    (8, bytes(32)),
    (40, b"bogus\0" + bytes(20)),
    (40, b"bogus-plain64\0"),
    (40, b"xts-bogus\0\0\0\0"),
    (40, b"xts-plain64:bogus\0"),
    (40, b"cbc-essiv\0\0\0"),
    (40, b"xts-essiv:sha1\0"),
    (40, b"xts-plain64:\0"),
    (72, b"bogus\0\0"),
    (72, b"SHA256\0"),
    (104, u32(0)),
    (104, u32(8)),
    (104, u32(1000)),
    (104, u32(1 << 31)),
    (108, u32(0)),
    (108, u32(16)),
    (108, u32(128)),
    (164, u32(0)),
    (168, b"u" * 40),
    (208, u32(5)),
    (212, u32(0)),
    (248, u32(0)),
    (248, u32(512)),
    (248, u32(4030)),
    (252, u32(0)),
    (252, u32(4001)),
    (252, u32(0xFFFFFFFF)),
    (256, u32(0xAC71F3)),
    (296, u32(8)),
]


def test_damaged_headers(tmp_path):
    whole = made(tmp_path / "image").read_bytes()
    for offset, data in DAMAGES:
        (tmp_path / "image").write_bytes(whole[:offset] + data + whole[offset + len(data) :])
        outcome = same("info -f luks image", tmp_path)
        assert outcome.code == (0 if offset == 168 else 1), (offset, data)
    for length in (592, 5000, 300000, 4039 * 512):
        (tmp_path / "image").write_bytes(whole[:length])
        same("info -f luks image", tmp_path)


def test_any_bytes_give_a_named_error(tmp_path):
    whole = made(tmp_path / "image").read_bytes()[: 4040 * 512]
    rng = random.Random(3)
    volumes._opened.clear()
    before = volumes.limit_iterations(5000)
    try:
        for _round in range(150):
            data = bytearray(whole)
            for _change in range(rng.randrange(1, 4)):
                data[rng.choice((rng.randrange(592), rng.randrange(104, 260)))] = rng.choice((0, 1, 255, rng.randrange(256)))
            (tmp_path / "image").write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
            try:
                opened(tmp_path / "image").close()
            except (Error, OSError):
                pass
    finally:
        volumes.limit_iterations(before)


def test_iterations_are_limited(tmp_path):
    path = made(tmp_path / "image")
    data = bytearray(path.read_bytes())
    data[212:216] = u32(60_000_000)
    path.write_bytes(data)
    before = volumes.limit_iterations(12_000_000)
    try:
        with pytest.raises(Error, match="Keyslot 0 takes 60000000 iterations; the limit is 12000000"):
            opened(path)
    finally:
        volumes.limit_iterations(before)


def test_the_library_as_qcow2_uses_it():
    """A volume in any range of bytes, without a node."""
    storage = bytearray(8 << 20)

    def read(offset, length):
        return bytes(storage[offset : offset + length])

    def write(offset, data):
        storage[offset : offset + len(data)] = data

    parameters = volumes.Parameters(iter_time=1, cipher_mode="cbc", ivgen_alg="essiv")
    secret = passphrase(SecretRef("s", objects()))
    made = volumes.format_luks(parameters, secret, write)
    volumes._opened.clear()
    found = volumes.Volume.read(read)
    with pytest.raises(Error, match="Invalid password, cannot unlock any keyslot"):
        found.unlock(read, b"other")
    found.unlock(read, secret)
    buffer = bytearray(content())
    made.cipher.encrypt(7, buffer)
    found.cipher.decrypt(7, buffer)
    assert buffer == content() and found.describe() == made.describe()
    assert found.payload_offset == parameters.header_size
