# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules at work on real images, as Ansible starts them: policies, locks, lists, conversions, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

PACKAGE = "ansible_collections.diskwright.images.plugins.modules."


def start(name, arguments, check_mode=False):
    text = json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check_mode, "_ansible_diff": True}})
    return subprocess.Popen([sys.executable, "-m", PACKAGE + name, text], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)


def result_of(process):
    output = process.communicate(timeout=120)[0]
    return json.loads(output)


def run(module, check_mode=False, **arguments):
    return result_of(start(module, arguments, check_mode))


def qemu_img(*words):
    return subprocess.run(["qemu-img", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True).stdout


def write(path, *commands):
    subprocess.run(["qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), str(path)], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture()
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    write(path, "write -P 5 1M 64k")
    return path


@pytest.fixture()
def away(tmp_path):
    """An overlay whose backing file is in another directory."""
    for folder in ("elsewhere", "own"):
        (tmp_path / folder).mkdir()
    base, overlay = tmp_path / "elsewhere/base.qcow2", tmp_path / "own/overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    write(base, "write -P 6 0 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    return overlay, base


def test_what_an_image_refers_to_needs_permission(away):
    overlay, base = map(str, away)
    refused = run("disk_image", path=overlay, size="2M")
    assert refused["failed"] and refused["error"] == "Denied" and base in refused["msg"] and "same_directory" in refused["msg"]
    listed = {"implicit_references": "listed", "allowed_references": [os.path.dirname(base)]}
    assert run("disk_image", path=overlay, size="2M", **listed)["changed"]
    assert run("disk_image", path=overlay, size="3M", allowed_references=[base])["changed"]
    assert run("disk_image", path=overlay, size="4M", implicit_references="any")["changed"]
    named = run("disk_image", path=overlay, size="5M", backing_file=base)
    assert named["changed"] and named["plan"][0]["cost"] == 0
    assert run("image_check", path=overlay)["check"]["corruptions"] == 0  # it opens no backing file
    deny = run("image_convert", src=[overlay], dest=overlay + ".raw", format="raw")
    assert deny["error"] == "Denied" and not os.path.exists(overlay + ".raw")


def test_names_of_servers_and_descriptions_are_refused_unless_listed(tmp_path, image):
    overlay = tmp_path / "overlay.qcow2"
    for stored in ('json:{"driver":"qcow2","file":{"driver":"file","filename":"%s"}}' % image, "nbd://127.0.0.1:1/x"):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", stored, "-F", "qcow2" if stored[0] == "j" else "raw", overlay, "4M")
        refused = run("qemu_img_info", path=[str(overlay)], backing_chain=True)
        assert refused["error"] == "Denied" and stored in refused["msg"]
        verdict = run("qemu_img_info", path=[str(overlay)], inspect=True)["images"][0]["inspect"]
        assert not verdict["safe"] and verdict["references"] == [{"image": str(overlay), "role": "backing", "name": stored, "allowed": False}]
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", 'json:{"driver":"qcow2","file.filename":"%s"}' % image, "-F", "qcow2", overlay)
    name = json.loads(qemu_img("info", "--output=json", overlay))["backing-filename"]
    allowed = run("qemu_img_info", path=[str(overlay)], backing_chain=True, allowed_references=[name])
    assert [entry["virtual_size"] for entry in allowed["images"][0]["chain"]] == [4 << 20, 4 << 20]


def test_a_verdict_has_reasons(tmp_path, image, away):
    vmdk, text = tmp_path / "disk.vmdk", tmp_path / "text"
    vmdk.write_text('# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 8 FLAT "/etc/hostname" 0\n')
    text.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(100))
    loop = tmp_path / "loop.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", loop, "1M")
    qemu_img("rebase", "-u", "-b", loop, "-F", "qcow2", loop)
    paths = [str(path) for path in (image, away[0], vmdk, text, loop, "/dev/null")]
    found = run("qemu_img_info_full", path=paths, inspect=True, limits={"virtual_size": "2M", "chain_depth": 5})["images"]
    verdicts = [entry["inspect"] for entry in found]
    assert [verdict["safe"] for verdict in verdicts] == [False] * 6
    for verdict, word in zip(verdicts, ("limits.virtual_size", "elsewhere", "/etc/hostname", "Unsupported cluster size", "loop", "neither a file")):
        assert any(word in reason for reason in verdict["reasons"]), verdict
    good = run("qemu_img_info", path=[str(image)], inspect=True, implicit_references="none")["images"][0]
    assert good["inspect"] == {"safe": True, "reasons": [], "references": []} and good["format"] == "qcow2"


def test_limits_on_work(tmp_path, image):
    bomb, secret = tmp_path / "bomb.qcow2", tmp_path / "secret.qcow2"
    with open(tmp_path / "content", "wb") as file:
        file.write(b"x" * (8 << 20))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", tmp_path / "content", bomb)
    refused = run("image_convert", src=[str(bomb)], dest=str(tmp_path / "copy"), limits={"expansion": 20})
    assert refused["error"] == "Denied" and "limits.expansion" in refused["msg"] and not os.path.exists(tmp_path / "copy")
    refused = run("image_convert", src=[str(image)], dest=str(tmp_path / "copy"), limits={"virtual_size": "1M"})
    assert refused["error"] == "Denied" and "limits.virtual_size" in refused["msg"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=correct-horse", "-o", options, secret, "1M")
    refused = run("disk_image", path=str(secret), encryption={"passphrase": "correct-horse"}, limits={"key_derivation": 1000})
    assert refused["failed"] and "iterations; the limit is 1000" in refused["msg"]
    unverified = run("disk_image", path=str(secret), encryption={"passphrase": "wrong-horse", "verify": False})
    assert not unverified["changed"] and "failed" not in unverified


def test_a_lock_is_waited_for_and_its_holder_named(image):
    command = ["qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as holder:
        holder.stdin.write(b"write 0 512\n")
        holder.stdin.flush()
        while b"wrote" not in holder.stdout.readline():
            assert holder.poll() is None
        refused = run("disk_image", path=str(image), size="8M", wait_for_unlock=0.3)
        assert refused["error"] == "Locked" and "qemu-io (process %d)" % holder.pid in refused["msg"] and "after 0.3 seconds" in refused["msg"]
        assert refused["holder"] == "qemu-io (process %d)" % holder.pid and refused["permission"] == {"name": "write", "shared": False}
        waiting = start("disk_image", {"path": str(image), "size": "8M", "wait_for_unlock": 60})
        time.sleep(0.5)
        holder.stdin.close()
        holder.wait()
    done = result_of(waiting)
    assert done["changed"] and done["image"]["size"] == 8 << 20 and len(done["plan"]) == 1


def test_many_images_in_one_task(tmp_path):
    wanted = [{"path": str(tmp_path / ("disk%d" % number))} for number in range(3)] + [{"path": str(tmp_path / "large"), "size": "3M"}]
    foretold = run("disk_image", check_mode=True, images=wanted, size="1M")
    assert foretold["changed"] and len(foretold["diff"]) == 4 and not os.path.exists(wanted[0]["path"])
    made = run("disk_image", images=wanted, size="1M", mode="0640")
    assert [entry["size"] for entry in made["images"]] == [1 << 20] * 3 + [3 << 20] and len(made["plan"]) == 4
    assert os.stat(wanted[3]["path"]).st_mode & 0o777 == 0o640
    again = run("disk_image", images=wanted, size="1M", mode="0640")
    assert not again["changed"] and not any(entry["changed"] for entry in again["images"])
    failed = run("disk_image", images=[{"path": wanted[0]["path"], "size": "2M"}, {"path": wanted[1]["path"], "size": "512k"}])
    assert failed["failed"] and "needs allow_shrink" in failed["msg"] and failed["changed"] and failed["images"][0]["size"] == 2 << 20
    twice = run("disk_image", images=[wanted[1], {"path": str(tmp_path) + "/./disk1"}], size="1M")
    assert twice["failed"] and "twice" in twice["msg"]


def test_conversion_in_place_where_it_is_allowed(tmp_path, image, away):
    path = str(image)
    assert "needs allow_convert" in run("disk_image", path=path, format="vmdk")["msg"]
    foretold = run("disk_image", check_mode=True, path=path, options={"cluster_size": "4k"}, allow_convert=True)
    assert [step["verb"] for step in foretold["plan"]] == ["convert"] and foretold["plan"][0]["cost"] == 65536
    original = tmp_path / "original"
    qemu_img("convert", "-O", "raw", path, original)
    for wish in ({"options": {"cluster_size": "4k"}}, {"format": "vmdk"}, {"format": "qcow2", "preallocation": "full"}):
        done = run("disk_image", path=path, allow_convert=True, **wish)
        assert done["changed"], done
        again = run("disk_image", path=path, allow_convert=True, **wish)
        assert not again["changed"], again
        qemu_img("compare", path, original)
    overlay, base = map(str, away)
    kept = run("disk_image", path=overlay, backing_file=base, options={"cluster_size": "4k"}, allow_convert=True)
    assert kept["image"]["backing_file"] == base and os.path.getsize(overlay) < 400000
    qemu_img("snapshot", "-c", "s", path)
    lost = run("disk_image", path=path, options={"cluster_size": "4k"}, allow_convert=True)
    assert lost["failed"] and "internal snapshots" in lost["msg"]


def test_room_for_a_raw_image(tmp_path):
    path = str(tmp_path / "disk.raw")
    run("disk_image", path=path, format="raw", size="1M")
    done = run("disk_image", path=path, format="raw", preallocation="falloc")
    assert [step["verb"] for step in done["plan"]] == ["allocate"] and os.stat(path).st_blocks * 512 >= 1 << 20
    assert not run("disk_image", path=path, format="raw", preallocation="falloc")["changed"]


def test_progress_is_in_a_file(tmp_path, away):
    overlay, base = map(str, away)
    report = tmp_path / "progress.json"
    done = run("disk_image", path=overlay, flatten=True, allowed_references=[base], progress_file=str(report))
    assert done["plan"][0]["cost"] == 65536
    state = json.loads(report.read_text())
    assert state["finished"] and not state["failed"] and state["verb"] == "rebase" and state["step"] == state["steps"] == 1
    assert state["done"] == state["total"] and os.listdir(tmp_path).count("progress.json") == 1
    failed = run("disk_image", path=str(tmp_path / "none"), progress_file=str(report))
    assert failed["failed"] and json.loads(report.read_text())["failed"]


def test_a_killed_snapshot_of_two_disks_is_made_anew(tmp_path, image):
    other = tmp_path / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", other, "1M")
    paths = [str(image), str(other)]
    qemu_img("snapshot", "-c", "now", image)
    asked = run("image_snapshot", path=paths, name="now")
    assert asked["failed"] and "needs complete" in asked["msg"]
    try:
        for path in paths:  # as the process that was killed left it
            os.setxattr(path, "user.diskwright.snapshot", b"now")
    except OSError:  # the file system keeps no such record, so that nobody can know of the killed one: it is asked for again
        again = run("image_snapshot", path=paths, name="now")
        assert again["failed"] and "needs complete" in again["msg"]
        return
    done = run("image_snapshot", path=paths, name="now")
    assert [step["verb"] for step in done["plan"]] == ["delete", "create"], done
    assert [len(entry["snapshots"]) for entry in done["images"]] == [1, 1]
    assert not any(os.listxattr(path) for path in paths)
    assert not run("image_snapshot", path=paths, name="now")["changed"]


def test_encrypted_sources_and_backing_files(tmp_path):
    base, overlay, luks = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2", tmp_path / "disk.luks"
    secret, quick = ["--object", "secret,id=s,data=correct-horse"], "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", quick, base, "1M")
    options = "driver=qcow2,encrypt.key-secret=s,file.filename=%s" % base
    subprocess.run(["qemu-io", *secret, "--image-opts", options, "-c", "write -P 9 0 64k"], check=True, stdout=subprocess.DEVNULL)
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay, "1M")
    opened = {"passphrase": "correct-horse"}
    copy = run("image_convert", src=[str(base)], src_format="qcow2", src_encryption=opened, dest=str(tmp_path / "copy"), format="raw", content_checksum=True)
    assert copy["changed"] and open(tmp_path / "copy", "rb").read(65537) == b"\t" * 65536 + b"\0"
    wrong = run("image_convert", src=[str(base)], src_format="qcow2", src_encryption={"passphrase": "wrong-horse"}, dest=str(tmp_path / "bad"), format="raw")
    assert wrong["failed"] and not os.path.exists(tmp_path / "bad")
    made = run("image_convert", src=[str(overlay)], src_format="qcow2", backing_encryption=opened, dest=str(tmp_path / "whole.qcow2"), content_checksum=True)
    assert made["plan"][0]["content_checksum"] == copy["plan"][0]["content_checksum"]
    flat = run("disk_image", path=str(overlay), flatten=True, backing_encryption=opened)
    assert flat["image"]["backing_file"] is None
    qemu_img("compare", "-f", "qcow2", "-F", "raw", overlay, tmp_path / "copy")
    qemu_img("convert", "-O", "luks", *secret, "-o", "key-secret=s,iter-time=10", tmp_path / "copy", luks)
    again = run("image_convert", src=[str(luks)], src_format="luks", src_encryption=opened, dest=str(tmp_path / "again"), format="raw")
    assert again["changed"] and open(tmp_path / "again", "rb").read() == open(tmp_path / "copy", "rb").read()


def test_where_there_is_no_room_nothing_is_left(tmp_path, image):
    """As on a full disk, by a limit on the size of files."""
    folder = tmp_path / "full"
    folder.mkdir()
    for name, arguments in (
        ("image_convert", {"src": [str(image)], "dest": str(folder / "copy"), "format": "raw", "options": {"preallocation": "full"}}),
        ("disk_image", {"path": str(folder / "disk"), "format": "raw", "size": "4M"}),
    ):
        text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments})
        command = ["prlimit", "--fsize=1048576", sys.executable, "-m", PACKAGE + name, text]
        result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
        assert result["failed"] and "too large" in result["msg"] and str(folder) in result["msg"], result
        assert os.listdir(folder) == []


def test_a_content_checksum_keeps_an_up_to_date_copy(tmp_path, image):
    dest = tmp_path / "copy.qcow2"
    wish = {"src": [str(image)], "dest": str(dest), "compress": True, "up_to_date": "checksum", "replace": True}
    first = run("image_convert", **wish)
    kept = json.loads((tmp_path / "copy.qcow2.content.json").read_text())
    assert kept["content"] == first["plan"][0]["content_checksum"]
    described = run("qemu_img_info_full", path=[str(image), str(dest)], content_checksum=True)["images"]
    assert {entry["content_checksum"] for entry in described} == {kept["content"]}
    os.utime(image)
    assert not run("image_convert", **wish)["changed"]
    write(image, "write -P 6 0 64k")
    renewed = run("image_convert", **wish)
    assert renewed["changed"] and renewed["plan"][0]["why"] == "its content is different"
    write(dest, "write -P 7 0 64k")
    assert "no content checksum" in run("image_convert", check_mode=True, **wish)["plan"][0]["why"]


@pytest.mark.parametrize("name, arguments, says", [
    ("disk_image", {}, "one of the following is required: path, images"),
    ("disk_image", {"path": "/x", "images": []}, "mutually exclusive"),
    ("disk_image", {"images": [{"size": "1M"}]}, "missing required arguments: path"),
    ("disk_image", {"path": "/nonexistent/x", "size": "-1"}, "Size '-1' is not between"),
    ("disk_image", {"path": "/nonexistent/x", "size": "1M"}, "/nonexistent"),
    ("disk_image", {"path": "/x", "wait_for_unlock": -1}, "wait_for_unlock: -1"),
    ("disk_image", {"path": "/x", "limits": {"chain_depth": 0}}, "chain_depth must be at least 1"),
    ("disk_image", {"path": "/x", "limits": {"virtual_size": "large"}}, "large"),
    ("disk_image", {"path": "/x", "implicit_references": "listed"}, "needs allowed_references"),
    ("disk_image", {"path": "/x", "implicit_references": "none", "allowed_references": ["/y"]}, "allowed_references"),
    ("disk_image", {"path": "/x", "implicit_references": "some"}, "implicit_references must be one of"),
    ("disk_image", {"path": "/x", "progress_file": "/nonexistent/p"}, "/nonexistent/p"),
    ("disk_image", {"path": "/x", "backing_encryption": {"passphrase": "correct-horse"}}, "backing_encryption opens"),
    ("image_check", {"paths": []}, "at least one image"),
    ("image_convert", {"src": [], "dest": "/x"}, "at least one image"),
    ("image_convert", {"src": ["/a", "/b"], "dest": "/x", "content_file": True}, "needs a single source"),
    ("image_convert", {"src": ["/a"], "dest": "/x", "src_encryption": {"passphrase": "correct-horse"}}, "and its src_format"),
    ("qemu_img_info", {"path": ["/nonexistent"], "backing_chain": "perhaps"}, "bool"),
])
def test_bad_input_is_refused_in_words(name, arguments, says):
    result = run(name, **arguments)
    assert result["failed"] and says in result["msg"], result["msg"]
