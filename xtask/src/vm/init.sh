#!/bin/busybox sh
# The first process of the virtual machine, twice: before the root is there, and in it.
if [ ! -e /etc/passwd ]; then
    export PATH=/bin
    for applet in mount insmod switch_root mkdir cp; do busybox ln -s busybox /bin/$applet; done
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    for module in /modules/*; do insmod "$module"; done
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
    mount -t tmpfs tmpfs /memory
    mkdir /memory/changes /memory/work
    mount -t overlay -o lowerdir=/host,upperdir=/memory/changes,workdir=/memory/work overlay /root
    cp /init /memory/changes/nodemesh-vm-init
    for directory in proc sys dev; do mount --move /$directory /root/$directory; done
    exec switch_root /root /nodemesh-vm-init
fi

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root NODEMESH_EMULATED=1
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /tmp/job /run/netns /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t 9p -o trans=virtio,version=9p2000.L,ro job /tmp/job
mount --bind "$(cat /tmp/job/modules)" /lib/modules 2>/dev/null || {
    mkdir -p /lib/modules
    mount --bind "$(cat /tmp/job/modules)" /lib/modules
}
printf '#!/bin/busybox sh\nexec busybox modprobe "$@"\n' > /run/modprobe
chmod +x /run/modprobe
echo /run/modprobe > /proc/sys/kernel/modprobe
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
ip link set lo up
# What the kernel does not load by itself.
for module in tls aesni_intel ghash_clmulni_intel cls_bpf sch_ingress tcp_diag inet_diag; do
    busybox modprobe $module
done
echo "nodemesh-vm: $(uname -sr)"
failed=
while read -r command; do
    echo "nodemesh-vm: $command"
    # shellcheck disable=SC2086 # it is words
    env $command </dev/null || failed="$failed${failed:+; }$command"
done < /tmp/job/commands
echo "nodemesh-vm: exit ${failed:-0}"
busybox poweroff -f
