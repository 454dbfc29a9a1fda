#!/usr/bin/env bash
# Encrypted images; and nowhere in what Ansible says, however much it is asked to say, is a passphrase to be seen.
set -eux
directory=$(mktemp -d --suffix='.a dir, with ä')
trap 'rm -rf "$directory"' EXIT
set +x
printf %s "battery $RANDOM staple" > "$directory/first"
printf %s "wrong, $RANDOM horse" > "$directory/second"
set -x
export ENCRYPTION_DIRECTORY=$directory
ansible-playbook encryption.yml -i ../../inventory --diff -vvv > "$directory/log" 2>&1 || { grep -A 20 '^fatal\|^failed' "$directory/log"; exit 1; }
grep 'failed=0' "$directory/log"
grep -q VALUE_SPECIFIED_IN_NO_LOG_PARAMETER "$directory/log"  # so the parameters are there
set +x
if grep -F -f "$directory/first" -e "$(cat "$directory/second")" "$directory/log"; then
    echo "A passphrase is to be seen." >&2
    exit 1
fi
