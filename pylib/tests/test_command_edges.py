# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Command lines against qemu-img: what the option matrix does not come to, objects, images in use, places where nothing can be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from locks import stranger
from matrix import GALLERY, Matrix, known
from side_by_side import Outcome, difference


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("edges"), GALLERY)


# Values and names of further forms, orders of refusals, what contradicts what an image holds.
EDGES = r"""
convert --target-image-opts -O raw -n none driver=raw,file.filename=r
convert --target-image-opts -O raw -n q driver=raw,file.filename=r
convert --target-image-opts -O raw -n -f nope q driver=raw,file.filename=r
convert --target-image-opts -O nope -n none driver=raw,file.filename=r
convert --target-image-opts -O raw -n -l x none driver=raw,file.filename=r
convert --target-image-opts -O raw -n -l x q driver=raw,file.filename=r
convert --target-image-opts -O raw -n --bitmaps r driver=raw,file.filename=r
convert --target-image-opts -O raw -n -B base q driver=raw,file.filename=r
convert --target-image-opts -O raw -n -B base q q driver=raw,file.filename=r
convert --target-image-opts -O raw -n -t bad q driver=raw,file.filename=r
convert --target-image-opts -O raw -n -T bad q driver=raw,file.filename=r
convert --target-image-opts -O raw -n -p none x
convert --target-image-opts -O raw -n -p q x
convert --target-image-opts -O raw -n q
convert --target-image-opts -O raw -n -c q driver=raw,file.filename=r
convert --target-image-opts -O raw -n --target-is-zero -B base q driver=raw,file.filename=r
convert --target-image-opts -n --target-is-zero base driver=raw,file.filename=r
convert --target-image-opts -n base driver=raw,file.filename=r
convert --target-image-opts -n -c base driver=qcow2,file.filename=q
convert --target-image-opts -n -B base base driver=qcow2,file.filename=q
convert --target-image-opts -n base driver=qcow2,file.filename=none
convert --target-image-opts -n base file.filename=q
convert --target-image-opts -n base driver=qcow2,file.filename=q,lazy-refcounts=on
convert --target-image-opts -n base driver=qcow2,file.filename=q,foo=on
convert --target-image-opts -n base driver=qcow2,file.filename=q,read-only=on
convert --image-opts --target-image-opts -n driver=raw,file.filename=base driver=qcow2,file.filename=q
convert --image-opts --target-image-opts -n -f raw driver=raw,file.filename=base driver=qcow2,file.filename=q
convert -n -f raw -O qcow2 base q -B base
convert -n -O qcow2 base q -F raw
convert -O qcow2 base x -F raw
convert -n -O raw base none
convert -n -O qcow2 snap q -l one
convert -n -O qcow2 over q
convert -n -O qcow2 q over
convert -n -O qcow2 q bm
convert -n -O qcow2 --bitmaps bm q
convert -n -O qcow2 --bitmaps bm bm
convert -O qcow2 --bitmaps broken x
convert -O qcow2 --bitmaps --skip-broken-bitmaps broken x
convert -O qcow2 -o compat=0.10 --bitmaps bm x
convert -O raw --bitmaps bm x
convert -O qcow2 -C -c q x
convert -O qcow2 -C -S 4k q x
convert -O qcow2 -C --salvage q x
convert -r 10M q q x
convert 'json:{"driver":"qcow2","file":{"driver":"file","filename":"q"}}' x
convert 'json:{"file":{"driver":"file","filename":"q"}}' x
convert 'json:{"driver":"qcow2","file.filename":"q"}' -O qcow2 x
convert 'json:{"driver":"qcow2","file.filename":"q","foo":1}' -O qcow2 x
convert 'json:{"driver":"raw","offset":65536,"size":131072,"file.filename":"q"}' x
convert --image-opts driver=raw,offset=64k,size=128k,file.filename=q x
convert --image-opts q x
convert -B base -F raw -O qcow2 -o backing_fmt=qcow2 q x
convert -B base -O qcow2 -o backing_fmt=raw q x
convert -B base -F raw -O qcow2 -o backing_file=r q x
convert -B base -F raw -O qcow2 -o backing_file=r,backing_fmt=raw q x
convert -B none -F raw -O qcow2 q x
convert -B over -F qcow2 -O qcow2 over x
convert -B over -F qcow2 -O qcow2 top x
convert -B base -F raw -O qcow2 top x
convert -B base -F raw -O qcow2 r x
convert -B base -F raw -O qcow2 -S 64k top x
convert -B base -F raw -O qcow2 -c top x
convert -B base -F raw -O qcow2 -W -m 16 top x
convert -B r -F raw -O qcow2 -o size=3M top x
convert -B base -F raw -O qcow2 -o cluster_size=512 top x
convert -B base -F raw -O qcow2 -l one snap x
convert -B base -F raw -O qcow2 --salvage -C top x
convert -l snapshot.id=1,snapshot.name=two snap x
convert -l snapshot.id=9 snap x
convert -l '' snap x
convert -l 9 snap x
convert -l one snap snap x
convert -l snapshot.name=one snap snap x
convert -l snapshot.name=one q snap x
convert -U -l one snap x
convert -U q x
convert -n -U -O qcow2 base q
amend -o size=3M 'json:{"driver":"qcow2","file":{"driver":"file","filename":"q"}}'
amend -o size=3M --image-opts driver=qcow2,file.filename=q,lazy-refcounts=on
amend -o compat=1.1 -o compat=0.10 q
amend -o '' q
amend -o size=3M,, q
amend -o size=3M,help q
amend --force -o compat=0.10 q
amend -o compat=0.10 snap
amend -o compat=0.10 bm
amend -o compat=0.10 comp
amend -o compat=0.10 df
amend -o compat=0.10 ext
amend -o data_file=other.raw df
amend -o data_file=,data_file_raw=off df
amend -o data_file_raw=on df
amend -o data_file_raw=off dr
amend -o size=512k q
amend -o size=512k snap
amend -o size=512k bm
amend -o size=3M bm
amend -o size=3M v2
amend -o size=3M snap
amend -o refcount_bits=1 snap
amend -o refcount_bits=2 snap
bitmap --add 'json:{"driver":"qcow2","file":{"driver":"file","filename":"q"}}' x
bitmap --add --merge a -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"bm"}}' q x
bitmap --remove --add bm a
bitmap --add --merge a --merge b --disable --clear bm c
bitmap --add --granularity 64k --disable bm c
bitmap --add --merge a -b bm -F raw q c
bitmap --add --merge a -b r q c
bitmap --merge a --merge b bm b
snapshot -c x 'json:{"driver":"qcow2","file":{"driver":"file","filename":"q"}}'
snapshot -c x -a x q
snapshot -l -q snap
snapshot --list --quiet snap
snapshot -c '' q
snapshot -a '' snap
snapshot -d '' snap
snapshot -c x both
snapshot -c x r
snapshot -c x -f raw r
snapshot -c x over
snapshot -a 1 snap
snapshot -d 1 snap
rebase -b 'json:{"driver":"raw","file":{"driver":"file","filename":"base"}}' -F raw top
rebase -b 'json:{"driver":"raw","file":{"driver":"file","filename":"base"}}' top
rebase -b file:base -F raw top
rebase -b ./base -F raw top
rebase -b /nonexistent/x -F raw top
rebase -b sub -F raw top
rebase -b base -F raw -u -c top
rebase -b base -F raw -u -U top
rebase -b base -F raw -U top
rebase -b r -F raw -T none -t none top
rebase -b '' -F raw top
rebase -b '' -u top
rebase -u -b '' -F qcow2 top
rebase -u -F qcow2 top
rebase -b top -F qcow2 top
rebase -b over top
rebase -b base -F raw snap
rebase -b base -F raw bm
rebase -b '' bm
rebase -c -b base -F raw v2
rebase -c -b '' comp
rebase -b comp -F qcow2 top
rebase -b snap -F qcow2 top
commit -b over top
commit -b ./over top
commit -b base top
commit -d -b over top
commit 'json:{"driver":"qcow2","file":{"driver":"file","filename":"top"}}'
commit --image-opts driver=qcow2,file.filename=top,backing.driver=qcow2,backing.file.filename=over
commit --image-opts driver=qcow2,file.filename=top,backing.driver=raw,backing.file.filename=base
commit --image-opts driver=qcow2,file.filename=top,backing=
commit -f qcow2 -t unsafe -q -r 100M -d top
commit snap
commit q
commit -f raw base
map --image-opts driver=qcow2,file.filename=top,backing.driver=raw,backing.file.filename=base --output json
map 'json:{"driver":"qcow2","file.filename":"top","backing":null}' --output json
map -s 1 -l 1 top
map -s 5M top
map -l 5M --output=json top
map --start-offset=1M --max-length=1k --output=json top
map comp
measure -O qcow2 'json:{"driver":"qcow2","file.filename":"top"}'
measure -O qcow2 -l one snap -U
measure -O qcow2 -l snapshot.name=two,snapshot.id=2 snap --output=json
measure -O qcow2 --size 1M -o data_file=nope,data_file_raw=on
measure -O qcow2 --size 1M -o data_file_raw=on
measure -O luks --size 1M
measure -O luks --size 1M -o key-secret=s9
measure -O luks --size 1M -o cipher-alg=bad
measure -O luks top
measure -O qcow2 bm
measure -O qcow2 broken
measure -O qcow2 -o compat=0.10 bm
measure -O qcow2 -o backing_file=base,backing_fmt=raw top
amend -p q -o help
amend -p -f qcow2 -o help q
amend -p -o size=x q
amend -p -o size=3M none
commit -p none
commit -p lost
commit -p -b nope top
commit -p q
commit -p r
rebase -p -b base -F raw none
rebase -p -b none -F raw top
rebase -p -t bad -b base top
rebase -p -u -b base top
rebase -p -u -b base -F raw top
commit -t bad -r x top
bench -c 3 -n none
bench -c 3 -n -t none none
bench -c 3 -n -f nope q
bench -c 3 -i native --image-opts driver=qcow2,file.filename=none
bench -c 3 -n -w -U q
bench -c 3 -w -U q
bench -c 3 -w none
bench -c 3 -n --image-opts driver=qcow2,file.filename=q,file.aio=threads
bench -c 3 --image-opts driver=qcow2,file.filename=q,file.aio=native
bench -c 3 --image-opts driver=qcow2,file.driver=file,file.filename=q,file.aio=native
bench -c 3 -n corrupt
bench -w -c 3 corrupt
bench -n -t none -c 3 q
bench -n -t directsync -c 3 q
bench -c 3 -n top
bench -c 3 -n lost
bench -c 3 -w -t none -d 1 --flush-interval 1 q
bench -c 3 -w -t none -d 1 --flush-interval 1 --no-drain q
bench -c 30 -w -d 2 --flush-interval 3 --no-drain --pattern 7 q
bench -c 30 -w -d 2 --flush-interval 3 --pattern 7 q
bench -c 9 null-co://
bench -c 3 -s 2M q
bench -c 3 -o 1999k q
bench -c 3 -s 2M -w --pattern 9 q
bench -c 9 -s 2000 -S 1234 -w --pattern 9 q
bench -c 1000 -s 2000 -S 1234 -w --pattern 9 q
bench -c 10 -s 4096 -S 100M -w --pattern 9 q
bench -c 10 -s 4096 -S 1M -o 300k -w --pattern 9 q
bench -c 10 -w --pattern 9 -f raw r
bench -c 10 -w --pattern 9 r
bench -c 10 -w --pattern 9 top
bench -c 10 -w --pattern 9 ext
bench -c 10 -w --pattern 9 df
bench -c 10 -w --pattern 9 bm
bench -c 10 -w --pattern 9 lost
bench -c 10 q q
bench -c 10
bench -c 10 -i io_uring -t none -w --pattern 3 q
bench -c 10 -c 11 q
bench -c 1x q
bench -c 1k q
bench -d 1k q
bench -o 1x q
bench -s 1x q
bench -S 1x q
bench -s 4G q
bench -S 4G q
bench --pattern 0x10 -c 3 q
bench --pattern -1 -c 3 q
bench --flush-interval x -w q
bench --flush-interval 4 q
bench --no-drain -w -c 3 q
bench -c 3 -i threads -n q
bench -c 3 -i native -t none -i threads q
bench --count=3 --depth=2 --format=qcow2 --offset=64k --buffer-size=1k --step-size=2k --cache=unsafe --write --aio=threads --force-share q
bench --count=3 --depth=2 --format=qcow2 --offset=64k --buffer-size=1k --step-size=2k --cache=unsafe --write --aio=threads --native q
bench -c 10 -w -s 64k --pattern 9 -i io_uring -f raw r
bench -c 10 -w -s 64k --pattern 9 -i io_uring -t none -f raw r
bench -c 100 -w -s 1000 -d 7 --pattern 9 -i io_uring -f raw r
bench -c 100 -w -s 1000 -d 7 --pattern 9 -i io_uring -f raw -t none r
bench -c 100 -w -s 1000 -d 7 --flush-interval 8 --pattern 9 -i io_uring -f raw r
bench -c 100 -w -s 1000 -d 7 --flush-interval 8 --no-drain --pattern 9 -i io_uring -f raw r
bench -c 100 -s 10000 -d 700 -i io_uring top
bench -c 100 -s 10000 -d 700 -i io_uring -t none top
bench -c 100 -s 10000 -w -d 700 -i io_uring -t none top
bench -c 10 -i io_uring comp
bench -c 10 -i io_uring -o 5M q
bench -c 10 -i io_uring none
bench -c 10 -i io_uring --image-opts driver=qcow2,file.filename=q,file.aio=threads
bench -c 10 --image-opts driver=qcow2,file.filename=q,file.aio=io_uring
bench -c 3 -i native -i threads -i io_uring q
bench -c 3 -i io_uring -n q
bench -c 3 -i io_uring -t none -n q
amend -p -f raw -o size=3M r
amend -p -t bad -o size=1M q
amend -p -o help -f raw
rebase -b base top -f raw
convert --target-image-opts -O raw -n --target-is-zero base driver=raw,file.filename=r
convert -n --target-is-zero -O qcow2 q none
convert -n -t bad q none
convert -O nope q x
convert --target-image-opts -O nope -n q driver=raw,file.filename=r
""".strip().splitlines()


def test_edges(matrix: Matrix) -> None:
    failures = matrix.failures(EDGES, known)
    assert not failures, "\n\n".join(failures)


KEY, VECTOR = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "AAECAwQFBgcICQoLDA0ODw=="
WRAPPED = "f9Etr7fpWZ0LhJrYwuPCHw=="  # hello, by AES-256-CBC with these two

OBJECTS = [
    "secret,id=s0,data=hello",
    "secret,id=s0,file=pw",
    "secret,id=s0,data=aGVsbG8=,format=base64",
    "secret,id=s0,file=pw64,format=base64",
    "secret,id=k,data=%s,format=base64 --object secret,id=s0,keyid=k,iv=%s,data=%s,format=base64" % (KEY, VECTOR, WRAPPED),
    "secret,id=k,data=%s,format=base64 --object secret,id=s0,keyid=k,iv=%s,data=AAAA,format=base64" % (KEY, VECTOR),
    "secret,id=k,data=short --object secret,id=s0,keyid=k,iv=%s,data=%s,format=base64" % (VECTOR, WRAPPED),
    "secret,id=s0,data=wrong",
    "secret,id=s9,data=hello",
    "secret,id=s0,file=none",
    "secret,id=s0,file=sub",
    "secret,id=s0,data=%%%,format=base64",
    "secret,id=s0,data=hello,keyid=k",
    "secret,id=s0,data=hello,keyid=k,iv=x",
    "secret,id=s0",
    "secret",
    "foo,id=s0",
    "secret_keyring,id=s0,serial=1",
    "secret_keyring,id=s0",
    "throttle-group,id=s0,x-bps-total=100M",
    "throttle-group,id=s0,limits.iops-total=1000000,limits.iops-total-max=2000000",
    "tls-creds-x509,id=s0",
    "tls-creds-x509,id=s0,endpoint=client,dir=none",
    "tls-creds-psk,id=s0,endpoint=server,dir=sub",
    "tls-creds-psk,id=s0,endpoint=client,dir=keys",
    "tls-creds-anon,id=s0,endpoint=client",
    "authz-simple,id=s0,identity=x",
    "authz-list-file,id=s0,filename=none",
    "main-loop,id=s0,thread-pool-min=5,thread-pool-max=3",
    """'{"qom-type":"secret","id":"s0","data":"hello"}'""",
    """'{"qom-type":"secret","id":"s0","file":"pw64","format":"base64"}'""",
    """'{"qom-type":"secret","id":"s0","data":"hello","format":"xx"}'""",
    """'{"qom-type":"secret","id":"s0","data":5}'""",
    """'{"qom-type":"throttle-group","id":"s0","limits":{"bps-total":1000000}}'""",
    """'{"qom-type":"tls-creds-psk","id":"s0","dir":"keys"}'""",
]

WITH_OBJECTS = """
amend %s -o size=3M q
bitmap %s --add q x
commit %s -d over
convert %s -O qcow2 q x
map %s q
measure %s -O qcow2 q
rebase %s -u -b base -F raw over
snapshot %s -l q
convert %s --image-opts driver=luks,key-secret=s0,file.filename=luks -O raw x
map %s --output json 'json:{"driver":"luks","key-secret":"s0","file":{"driver":"file","filename":"luks"}}'
measure %s -O luks -o key-secret=s0,cipher-alg=none q
""".strip().splitlines()

FILES = r"""
mkdir keys; printf 'qemu:00112233445566778899aabbccddeeff\n' > keys/keys.psk; printf hello > pw; printf aGVsbG8= > pw64
"""

# By us: qemu-img takes seconds for a key slot.
MADE = [
    "create -q --object secret,id=s0,data=hello -f luks -o key-secret=s0,iter-time=10 luks 512k",
    "create -q --object secret,id=s0,data=hello -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10 enc 1M",
]


ENCRYPTED = r"""
snapshot -c x -f qcow2 enc
measure -O qcow2 --size 1M -o encrypt.format=luks
measure -O qcow2 --size 1M -o encrypt.format=aes,encrypt.key-secret=s0 --object secret,id=s0,data=x
measure -O qcow2 enc
measure -O raw enc
map enc
convert enc x
snapshot -l enc
bitmap --add enc x
amend -o size=3M enc
rebase -u -b base -F raw enc
commit enc
convert --object secret,id=s0,data=hello --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc x
convert --object secret,id=s0,data=bad --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc x
convert --object secret,id=s0,data=hello --image-opts driver=qcow2,encrypt.key-secret=s0,encrypt.format=luks,file.filename=enc -O qcow2 x
measure --object secret,id=s0,data=hello -O qcow2 --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
map --object secret,id=s0,data=hello --output json --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
map --object secret,id=s0,data=hello --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
snapshot --object secret,id=s0,data=hello -c x --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
amend --object secret,id=s0,data=hello -o encrypt.state=inactive,encrypt.old-secret=s0 --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
amend --object secret,id=s0,data=hello -o encrypt.state=inactive,encrypt.keyslot=9 --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
amend --object secret,id=s0,data=hello -o encrypt.keyslot=1 --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
amend --object secret,id=s0,data=hello -o encrypt.state=bad --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
amend --object secret,id=s0,data=hello -o encrypt.state=active --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
amend --object secret,id=s0,data=hello -o encrypt.state=active,encrypt.new-secret=s9 --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
amend --object secret,id=s0,data=hello -o state=inactive,keyslot=0 --image-opts driver=luks,key-secret=s0,file.filename=luks
amend --object secret,id=s0,data=hello -o state=inactive,old-secret=s0 --image-opts driver=luks,key-secret=s0,file.filename=luks
amend --object secret,id=s0,data=hello -o state=inactive --image-opts driver=luks,key-secret=s0,file.filename=luks
amend --object secret,id=s0,data=hello -o state=inactive,new-secret=s0 --image-opts driver=luks,key-secret=s0,file.filename=luks
amend --object secret,id=s0,data=hello -o state=inactive,keyslot=5 --image-opts driver=luks,key-secret=s0,file.filename=luks
amend --object secret,id=s0,data=hello -o state=inactive,keyslot=8 --image-opts driver=luks,key-secret=s0,file.filename=luks
amend --object secret,id=s0,data=hello -o keyslot=1 --image-opts driver=luks,key-secret=s0,file.filename=luks
amend --object secret,id=s0,data=hello -o size=3M --image-opts driver=luks,key-secret=s0,file.filename=luks
amend -o state=inactive,keyslot=0 luks
amend -o help luks
convert luks x
map luks
measure -O raw luks
bench -c 3 luks
bitmap --object secret,id=s0,data=hello --add --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc x
commit --object secret,id=s0,data=hello --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=enc
convert -n --object secret,id=s0,data=hello --target-image-opts -f raw base driver=qcow2,encrypt.key-secret=s0,file.filename=enc
convert -c --object secret,id=s0,data=hello -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s0 q x
convert -O qcow2 -o encrypt.format=luks q x
convert -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s0 q x
convert -O luks q x
convert -O luks -o key-secret=s9 q x
bench -c 3 enc
bench -w -c 3 enc
amend -o encrypt.keyslot=1 q
amend -o encrypt.state=inactive,encrypt.keyslot=1 q
""".strip().splitlines()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("encrypted"), GALLERY + FILES, MADE, opaque=("luks",))


def test_objects(encrypted: Matrix) -> None:
    lines = [
        line % ("--object " + text)
        for number, line in enumerate(WITH_OBJECTS)
        for place, text in enumerate(OBJECTS)
        if "luks" in line or (number + place) % 3 == 0  # all commands read them by the same code
    ]
    failures = encrypted.failures(lines, known)
    assert not failures, "\n\n".join(failures)


def test_encrypted_images(encrypted: Matrix) -> None:
    failures = encrypted.failures(ENCRYPTED, known)
    assert not failures, "\n\n".join(failures)


HELD = {
    "q": "amend -o size=3M q|bitmap --add q x|snapshot -l q|snapshot -U -l q|snapshot -c x q|map q|map -U q|measure q|bench -c 3 q|bench -U -c 3 q|"
    "bench -w -c 3 q|convert -n -O qcow2 base q|convert q x|rebase -u -b base -F raw q",
    "over": "commit over|commit -b base top|rebase -b base -F raw top|rebase -b '' top|rebase -u top|map top",
    "base": "commit over|rebase -b base -F raw q|rebase -U -b base -F raw q|rebase -b '' over|convert -n -f raw -O raw r base|bench -w -c 1 -f raw base",
    "bm": "bitmap --add --merge a -b bm q x|bitmap --clear bm a|convert --bitmaps -O qcow2 bm x",
}


@pytest.mark.parametrize("name", sorted(HELD))
def test_images_in_use(matrix: Matrix, name: str) -> None:
    failures = []
    for byte in (100, 101, 103, 200, 201, 203):
        with stranger(matrix.left / name, byte), stranger(matrix.right / name, byte):
            failures += matrix.failures(HELD[name].split("|"), known)
    assert not failures, "\n\n".join(failures)


PLACES = r"""
mkdir shut; cp q over base r snap bm shut; chmod 444 shut/*; chmod 555 shut
c above 2M 64k '' '-b shut/over -F qcow2'; qemu-io -c 'write -P 6 500k 64k' above; cp q hidden; chmod 0 hidden
"""

IN_PLACES = """
amend -o size=3M shut/q
bitmap --add shut/q x
bitmap --add --merge a -b shut/bm q x
commit shut/over
commit above
commit -b base above
commit -d -b shut/over above
rebase -b '' shut/over
rebase -u shut/over
rebase -b shut/q -F qcow2 above
rebase -b base -F raw above
snapshot -l shut/snap
snapshot -c x shut/snap
snapshot -a one shut/snap
map shut/over
measure -O qcow2 shut/over
convert shut/q shut/x
convert -O qcow2 shut/q x
convert -n -f raw -O raw base shut/r
convert -f raw -O raw base shut/r
convert -f raw -O qcow2 -B shut/base -F raw base shut/q
bench -c 3 shut/q
bench -w -c 3 shut/q
amend -o size=3M hidden
bitmap --add hidden x
bitmap --add --merge a -b hidden q x
snapshot -l hidden
map hidden
measure hidden
convert hidden x
convert -n q hidden
convert q hidden
rebase -b hidden -F qcow2 above
bench -c 3 hidden
""".strip().splitlines()

IN_A_CHILD = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from matrix import plain
from side_by_side import ours, theirs
import shlex
left, right = Path(sys.argv[2]), Path(sys.argv[3])
print(json.dumps([[line, plain(theirs(shlex.split(line), left)), plain(ours(shlex.split(line), right))] for line in json.load(sys.stdin)]))
"""


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    """As a user whom permissions bind; root is one without its privilege to pass them by."""
    matrix = Matrix(tmp_path, GALLERY + PLACES)
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    arguments = [sys.executable, "-c", IN_A_CHILD, str(Path(__file__).parent), str(matrix.left), str(matrix.right)]
    done = subprocess.run([*bound, *arguments], input=json.dumps(IN_PLACES), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    failures = [difference(line, Outcome(*found), Outcome(*expected)) for line, expected, found in json.loads(done.stdout) if expected != found]
    failures += matrix.differences()
    for place in (matrix.left, matrix.right):
        os.chmod(place / "shut", 0o755)
    assert not failures, "\n\n".join(failures)


DAMAGED = r"""
qemu-img create -f qcow2 -o cluster_size=4k lost 4M; qemu-io -c 'write -P 3 0 100k' -c 'write -P 4 2M 4k' lost
printf '\200\0\0\0\0\1\043\105' | dd of=lost bs=1 seek=$((3 * 4096 + 8)) conv=notrunc  # the L2 table of the second half
qemu-img create -f qcow2 -o cluster_size=4k whole 3M; qemu-io -c 'write -P 3 2500k 100k' whole
qemu-img create -f qcow2 -b lost -F qcow2 over 3M; qemu-io -c 'write -P 6 64k 64k' over
"""

ON_DAMAGED = """
convert lost x
convert -m 1 -O qcow2 lost x
convert -q --salvage lost x
convert -q --salvage -O qcow2 lost x
convert -q --salvage -n -f qcow2 -O qcow2 lost over
convert -q --salvage over x
measure lost
map lost
rebase -b lost -F qcow2 whole
rebase -b whole -F qcow2 lost
rebase -b whole -F qcow2 over
rebase -b '' over
commit over
compare lost whole
""".strip().splitlines()


def test_damaged_images(tmp_path: Path) -> None:
    failures = Matrix(tmp_path, DAMAGED).failures(ON_DAMAGED, known)
    assert not failures, "\n\n".join(failures)
