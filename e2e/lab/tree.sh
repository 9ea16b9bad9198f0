#!/bin/bash
# tree.sh DIR LOG: makes in DIR what the lab's host VM boots: tree, its root file system, with the kernel in
# its /boot, and qemu, the QEMU that runs it. Runs as root in a PID and mount namespace of its own, so that ending it ends and unmounts everything. The
# cache is named by this file's hash: whoever changes the recipe gets a new tree.
set -euo pipefail
dir=$1 tree=$1/tree
exec 3>&1 >"$2" 2>&1 </dev/null
export DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
say() { printf '%17s %s\n' '' "$*" >&3; }

packages=(
	systemd systemd-sysv udev dbus polkitd
	libvirt-daemon-system libvirt-clients qemu-system-x86 swtpm swtpm-tools
	cryptsetup-bin dmsetup e2fsprogs keyutils tpm2-tools
	busybox-static curl iproute2 jq kmod less make nano openssl procps socat strace xxd zstd
)

# the Debian mirror and the proxy that this machine uses
mirror=$(grep -rhE '^[^#]*https?://[^ ]*/debian/?( |$)' /etc/apt --include='*.list' --include='*.sources' |
	grep -oE 'https?://[^ ]*/debian' | head -n 1 || true)
mirror=${mirror:-http://deb.debian.org/debian}
eval "$(apt-config shell proxy Acquire::http::Proxy)"
[[ -z ${proxy:-} ]] || export http_proxy=$proxy

say "debootstrap bookworm from $mirror"
debootstrap --variant=minbase --include=ca-certificates bookworm "$tree" "$mirror"

say "packages: ${packages[*]}"
cat >"$tree/etc/apt/sources.list" <<LIST
deb $mirror bookworm main
deb $mirror bookworm-backports main
LIST
cat >"$tree/etc/dpkg/dpkg.cfg.d/lab" <<LIST
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
LIST
printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d" # nothing starts in here
chmod +x "$tree/usr/sbin/policy-rc.d"
cp -L /etc/resolv.conf "$tree/etc/resolv.conf"
mount -t proc proc "$tree/proc"
chroot "$tree" apt-get -q update
chroot "$tree" apt-get -q install -y --no-install-recommends "${packages[@]}"

# 6.12: 6.1 has neither AF_ALG keys by serial nor configfs-tsm; the cloud flavour has no 9p
kernel=$(chroot "$tree" apt-cache depends linux-image-amd64/bookworm-backports | grep -oE 'linux-image-[0-9][^ ]*-amd64' | head -n 1)
say "kernel: $kernel"
mkdir "$dir/kernel" "$tree/var/tmp/kernel"
chroot "$tree" sh -c "cd /var/tmp/kernel && apt-get -q -o APT::Sandbox::User=root download $kernel"
dpkg-deb -x "$tree"/var/tmp/kernel/*.deb "$dir/kernel"
version=$(ls "$dir/kernel/lib/modules")
mkdir -p "$tree/usr/lib/modules"
mv "$dir/kernel/lib/modules/$version" "$tree/usr/lib/modules/"
chroot "$tree" depmod "$version"
vmlinuz=$tree/boot/vmlinuz
mv "$dir/kernel/boot/vmlinuz-$version" "$vmlinuz"

# The QEMU that runs the host VM is of the backports too, with the tree's libraries: the one of bookworm, when it emulates,
# now and then executes half of an instruction that another CPU of the host VM patches (its kernel then panics with an int3).
say "QEMU for the host VM"
mkdir "$dir/qemu" "$tree/var/tmp/qemu"
chroot "$tree" sh -c 'cd /var/tmp/qemu && apt-get -q -o APT::Sandbox::User=root -t bookworm-backports download \
	qemu-system-x86 qemu-system-common qemu-system-data seabios'
for package in "$tree"/var/tmp/qemu/*.deb; do dpkg-deb -x "$package" "$dir/qemu"; done

# The same kernel unpacked, for guests: QEMU starts it by its PVH entry, which spares each boot the unpacking, slow when
# emulated. Not for a machine with a TPM: QEMU 7.2 then loads the initramfs over the ACPI tables.
# Offsets: Documentation/arch/x86/boot.rst, setup_sects, payload_offset, payload_length.
number() { od -A n -t "u$2" -j "$1" -N "$2" "$vmlinuz" | tr -d ' '; }
start=$((($(number 497 1) + 1) * 512 + $(number 584 4)))
tail -c +$((start + 1)) "$vmlinuz" | head -c "$(number 588 4)" | chroot "$tree" zstd -qdc >"$tree/boot/vmlinux" || true
[[ $(head -c 4 "$tree/boot/vmlinux") == $'\x7fELF' ]]

# a host that knows its own name, without what a short-lived one does not need
echo host >"$tree/etc/hostname"
printf '127.0.0.1 localhost host\n::1 localhost\n' >"$tree/etc/hosts"
tr -d - </proc/sys/kernel/random/uuid >"$tree/etc/machine-id"
: >"$tree/etc/fstab"
chroot "$tree" systemctl -q disable apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
	logrotate.timer e2scrub_reap.service libvirt-guests.service remote-fs.target getty@tty1.service
chroot "$tree" systemctl -q set-default multi-user.target
chroot "$tree" systemctl -q mask systemd-hwdb-update.service systemd-udev-trigger.service ldconfig.service \
	systemd-journal-catalog-update.service systemd-networkd.service
umount "$tree/proc"
rm -rf "$dir/kernel" "$tree"/var/tmp/{kernel,qemu} "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree"/usr/sbin/policy-rc.d \
	"$tree"/usr/share/{doc,man,locale} "$dir"/qemu/usr/share/{doc,man} "$tree"/etc/resolv.conf "$tree"/var/log/*
touch "$dir/complete"
