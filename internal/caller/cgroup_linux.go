package caller

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// errNoCgroups means a host without cgroup v2.
var errNoCgroups = errors.New("no cgroup v2 hierarchy is mounted here (mount -t cgroup2 none /sys/fs/cgroup)")

// findCgroupRoot returns where the whole cgroup v2 hierarchy is mounted.
func findCgroupRoot() (string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("looking for cgroups: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		// 36 35 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw
		mount, kind, _ := strings.Cut(line, " - ")
		f := strings.Fields(mount)
		if strings.HasPrefix(kind, "cgroup2 ") && len(f) > 4 && f[3] == "/" && !strings.Contains(f[4], `\`) {
			return f[4], nil
		}
	}
	return "", errNoCgroups
}

// cgroupDevice returns the device number of the hierarchy at root.
func cgroupDevice(root string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%s: %w", root, errNoCgroups)
	}
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: root, Err: err}
	}
	return st.Dev, nil
}

// cgroupID returns the id of the cgroup at a path of the hierarchy. On 64-bit kernels that is the folder's inode number,
// which no other cgroup gets later.
func (r *Resolver) cgroupID(unit string) (id uint64, ok bool) {
	var st unix.Stat_t
	if err := unix.Lstat(r.cgroupRoot+unit, &st); err != nil {
		return 0, false
	}
	return st.Ino, st.Dev == r.cgroupDev && st.Ino != 0 && st.Mode&unix.S_IFMT == unix.S_IFDIR
}
