#!/usr/bin/env bash
# The demonstration, in check mode, for real and once more.
set -eux
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
qemu-img create -q -f qcow2 "$directory/disk.qcow2" 20M
qemu-io -c 'write -P 1 0 5M' "$directory/disk.qcow2"
play() {
    ansible-playbook diskwright.images.demo -e demo_image="$directory/disk.qcow2" -e demo_directory="$directory/demo" "$@" | tee "$directory/log"
}
play
grep 'failed=0' "$directory/log"
play --diff
grep 'changed=0 .*failed=0' "$directory/log"
test "$(qemu-img info "$directory/demo/disk/clones/web3.qcow2" | grep -c template.qcow2)" = 1
