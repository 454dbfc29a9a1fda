#!/bin/sh
# A package of two disks, as a tar file and beside one another, with a manifest.
set -e
qemu-img create -q -f raw system.raw 4M
qemu-img create -q -f raw data.raw 2M
qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 3M 64k' system.raw
qemu-io -f raw -c 'write -P 3 1M 1M' data.raw
mkdir ovf
for disk in system data; do qemu-img convert -f raw -O vmdk -o subformat=streamOptimized $disk.raw ovf/$disk.vmdk; done
format=http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized
cat > ovf/machine.ovf << XML
<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References><File ovf:id="f1" ovf:href="system.vmdk"/><File ovf:id="f2" ovf:href="data.vmdk"/></References>
  <DiskSection>
    <Disk ovf:diskId="system" ovf:fileRef="f1" ovf:capacity="4" ovf:capacityAllocationUnits="byte * 2^20" ovf:format="$format"/>
    <Disk ovf:diskId="data" ovf:fileRef="f2" ovf:capacity="2" ovf:capacityAllocationUnits="byte * 2^20" ovf:format="$format"/>
  </DiskSection>
</Envelope>
XML
cd ovf
sha256sum machine.ovf system.vmdk data.vmdk | sed 's/^\([0-9a-f]*\)  \(.*\)$/SHA256(\2)= \1/' > machine.mf
tar --format=ustar -cf ../machine.ova machine.ovf machine.mf system.vmdk data.vmdk
tar --format=ustar -cf ../unsigned.ova machine.ovf system.vmdk data.vmdk
printf x | dd of=data.vmdk bs=1 seek=200000 conv=notrunc status=none || true
tar --format=ustar -cf ../tampered.ova machine.ovf machine.mf system.vmdk data.vmdk
