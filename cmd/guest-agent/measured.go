//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"keybroker/inject"
)

// source is where a configuration was read.
type source struct {
	name       string
	cmdline    bool  // the kernel's command line
	unmeasured error // why it cannot be part of what the launch measured; nil: it can
}

func (s *source) String() string {
	switch {
	case s.cmdline:
		return s.name + ", which the launch measures if it has kernelHashes"
	case s.unmeasured == nil:
		return s.name + ", in the initramfs"
	}
	return s.name
}

// signs are files that the kernel has in a confidential machine alone.
var signs = []string{"/dev/sev-guest", "/sys/devices/system/cpu/sev/vmpl", "/dev/tdx_guest"}

// check refuses what the host could have written, wherever that matters: in tier snp, and in every confidential machine. There
// whom to believe is for the measured image to say, and disks, SMBIOS, fw_cfg and HOST_DATA are the host's word.
func (s *source) check(tier string, signs []string) error {
	if s.unmeasured == nil {
		return nil
	}
	why := ""
	if tier == inject.TierSNP {
		why = fmt.Sprintf("tier %q", tier)
	}
	for _, sign := range signs {
		if _, err := os.Stat(sign); err == nil && why == "" {
			why = "a confidential machine (" + sign + " is there)"
		}
	}
	if why == "" {
		return nil
	}
	return fmt.Errorf("%s: %w: %s takes its configuration from a file in the initramfs, or from the kernel's command line under kernelHashes, for the launch measures these and the host writes the others",
		s.name, s.unmeasured, why)
}

// mountsOf are the mounts of this process, as the kernel tells them.
const mountsOf = "/proc/self/mountinfo"

// inInitramfs returns nil for a file of the kernel's first root, which is in memory and filled from the initramfs alone. What
// else is in memory may be a copy of what the host gave.
func inInitramfs(f *os.File, mountinfo string) error {
	var fs unix.Statfs_t
	var file unix.Stat_t
	if err := errors.Join(unix.Fstatfs(int(f.Fd()), &fs), unix.Fstat(int(f.Fd()), &file)); err != nil {
		return fmt.Errorf("asking for its file system: %w", err)
	}
	mounts, err := readBounded(mountinfo, 0)
	if err != nil {
		return fmt.Errorf("asking for its file system: %w: mount proc on /proc", err)
	}
	m, found := mountOf(string(mounts), file.Dev)
	inMemory := fs.Type == unix.RAMFS_MAGIC || fs.Type == unix.TMPFS_MAGIC
	switch {
	case found && m.kind == "rootfs" && inMemory:
		return nil
	case found:
		return fmt.Errorf("it is on %s, %s, not in the initramfs", m.point, m.kind)
	}
	return fmt.Errorf("it is on a file system of type %#x, not in the initramfs", fs.Type)
}

// mount is a line of mountinfo; see proc_pid_mountinfo(5).
type mount struct{ point, kind string }

// mountOf finds a mount of a device. Where there are several, one that is not the kernel's first root comes before it.
func mountOf(mountinfo string, device uint64) (m mount, found bool) {
	number := fmt.Sprintf("%d:%d", unix.Major(device), unix.Minor(device))
	for line := range strings.Lines(mountinfo) {
		front, back, ok := strings.Cut(line, " - ")
		fields, kind := strings.Fields(front), strings.Fields(back)
		if !ok || len(fields) < 5 || len(kind) == 0 || fields[2] != number {
			continue
		}
		if !found || m.kind == "rootfs" {
			m, found = mount{point: fields[4], kind: kind[0]}, true
		}
	}
	return m, found
}
