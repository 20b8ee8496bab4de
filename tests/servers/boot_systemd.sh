#!/bin/bash
# Boots systemd as PID 1 over this machine's own root: nothing is downloaded, and nothing written to it.
#
#   boot_systemd.sh CGROUP BASE FROM=TO ...    CGROUP: a directory in cgroup2, for the machine alone
#                                              BASE: an empty directory, which stays empty
#
# The machine has namespaces of its own for everything, and no network but loopback. What it writes
# is in a tmpfs which goes with it. FROM=TO shows a directory of ours, read-only, at a place of its.
set -euo pipefail
cgroup=$1
shift
echo $$ > "$cgroup/cgroup.procs"
exec unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup --propagation private \
    bash -euo pipefail -c '
base=$1
shift
mount -t tmpfs tmpfs "$base"
root=$base/root
mkdir "$base/upper" "$base/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$root"

mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
for device in null zero full random urandom tty; do
    mknod -m 666 "$root/dev/$device" c $(stat -c "0x%t 0x%T" "/dev/$device")
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for pair in "$@"; do
    mkdir -p "$root${pair#*=}"
    mount --rbind -o ro "${pair%%=*}" "$root${pair#*=}"
done

# Only what a test starts: the units of this machine are its own business.
for name in sysinit basic network-online remote-fs test; do
    printf "[Unit]\nDefaultDependencies=no\nRefuseManualStart=no\n" > "$root/run/$name.target"
done
mount -t tmpfs -o mode=755 tmpfs "$root/etc/systemd/system"
mv "$root"/run/*.target "$root/etc/systemd/system/"
ip link set lo up
hostname ckptmgr-test
cd "$root"
mkdir run/old
pivot_root . run/old
umount -l /run/old
rmdir /run/old
# As on every host: credentials are mounted by a child of PID 1 in a namespace of its own.
mount --make-rshared /
exec env -i container=unshare PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=test.target --log-target=console --log-level=notice --show-status=no
' boot "$@"
