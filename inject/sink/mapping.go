//go:build linux

package sink

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const blockClass = "/sys/class/block"

// mapping is a device of the kernel's device mapper, as sysfs shows it.
type mapping struct {
	uuid    string   // "CRYPT-LUKS2-" and the volume's without dashes, then the name
	devices []string // below it, "254:16"
}

// errNoMapping: no mapping has the name.
var errNoMapping = errors.New("no such mapping")

// findMapping looks for a mapping by its name.
func findMapping(name string) (*mapping, error) {
	if _, err := os.Stat(blockClass); err != nil {
		return nil, fmt.Errorf("looking for mappings: %w: mount sysfs on /sys", err)
	}
	names, err := filepath.Glob(blockClass + "/dm-*/dm/name")
	if err != nil {
		return nil, fmt.Errorf("looking for mappings: %w", err)
	}
	for _, path := range names {
		if line(path) != name {
			continue
		}
		dir := filepath.Dir(filepath.Dir(path))
		m := &mapping{uuid: line(dir + "/dm/uuid")}
		below, err := filepath.Glob(dir + "/slaves/*/dev")
		if err != nil {
			return nil, fmt.Errorf("looking for mappings: %w", err)
		}
		for _, b := range below {
			m.devices = append(m.devices, line(b))
		}
		return m, nil
	}
	return nil, errNoMapping
}

func line(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// of says whether the mapping is the volume uuid, under this name, on this device.
func (m *mapping) of(uuid, name string, rdev uint64) bool {
	return m.uuid == "CRYPT-LUKS2-"+strings.ReplaceAll(uuid, "-", "")+"-"+name &&
		len(m.devices) == 1 && m.devices[0] == fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
}
