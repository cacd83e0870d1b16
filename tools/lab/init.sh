#!/bin/busybox sh
# The first process of the guest: makes the host's root its own, and runs a command there.
#
# The kernel's command line says which: lab.python, lab.repository and lab.job, absolute paths of
# the host; without lab.job there is a shell on the console.
export PATH=/bin
b=/bin/busybox

$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r name; do
    $b insmod "/modules/$name.ko" || echo "lab: module $name does not load"
done </modules/order

for word in $($b cat /proc/cmdline); do
    case $word in
    lab.python=*) python=${word#*=} ;;
    lab.repository=*) repository=${word#*=} ;;
    lab.tools=*) tools=${word#*=} ;;
    lab.modules=*) modules=${word#*=} ;;
    lab.job=*) job=${word#*=} ;;
    esac
done

die() {
    echo "lab: $*"
    $b poweroff -f
}

$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose host /host ||
    die "the host's root cannot be mounted"
$b mount -t tmpfs top /top
$b mkdir /top/upper /top/work
$b mount -t overlay -o lowerdir=/host,upperdir=/top/upper,workdir=/top/work root /root ||
    die "no overlay over the host's root"
for name in proc sys dev; do
    $b mount --move /$name /root/$name
done
$b mkdir -p /root/dev/shm /root/dev/pts /root/mnt
for name in dev/shm run; do
    $b mount -t tmpfs $name /root/$name
done
$b mount -t devpts pts /root/dev/pts
$b mount -t debugfs debug /root/sys/kernel/debug
$b mkdir -p "/root/lib/modules"
$b ln -s "$modules" "/root/lib/modules/$($b uname -r)"

run="PATH=$tools/bin:$repository/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LANG=C.UTF-8
     PYTHONPATH=$repository/tools:$repository PYTHONDONTWRITEBYTECODE=1 LAB_TOOLS=$tools"
cd "/root$repository" || die "no $repository"
if [ -n "$job" ]; then
    # shellcheck disable=SC2086  # one word per variable is meant
    $b chroot /root /usr/bin/env -i -C "$repository" $run "$python" -m lab.inside "$job"
    echo "lab: the job ended with $?"
else
    # busybox of the host's side, where /dev is by now, makes the console the shell's terminal.
    b2=$tools/usr/bin/busybox
    # shellcheck disable=SC2086
    $b chroot /root "$b2" setsid "$b2" cttyhack /usr/bin/env -i -C "$repository" $run \
        TERM=linux /bin/bash
fi
$b sync
$b poweroff -f
