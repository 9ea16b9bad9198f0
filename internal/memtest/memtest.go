// Package memtest has the memory scan of the tests that look for secrets in running processes.
package memtest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

const page = 4096 // octets, the least that can be readable or not

// Scan reads all of a process's memory that can be read and returns the names of the needles that it holds, sorted. Secret memory
// and guard pages cannot be read, which is the point of them. A keyholder's memory and another user's are root's alone to read.
func Scan(pid int, needles map[string][]byte) ([]string, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("reading where process %d has memory: %w", pid, err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, fmt.Errorf("opening the memory of process %d: %w", pid, err)
	}
	defer mem.Close()
	s := &scan{mem: mem, needles: needles, window: make([]byte, 1<<20)}
	for _, needle := range needles {
		s.longest = max(s.longest, len(needle))
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			return nil, fmt.Errorf("reading where process %d has memory: %q: %w", pid, line, err)
		}
		if mode[0] == 'r' && !strings.Contains(line, "[v") { // not what the kernel shows: vdso, vvar, vsyscall
			s.region(int64(from), int64(to))
		}
	}
	if !s.read {
		return nil, errors.New("no memory could be read: has the process ended?")
	}
	slices.Sort(s.found)
	return slices.Compact(s.found), nil
}

type scan struct {
	mem     *os.File
	needles map[string][]byte
	longest int
	window  []byte
	read    bool // something was
	found   []string
}

// region looks through one region in windows that overlap, and goes on behind a page that cannot be read.
func (s *scan) region(from, to int64) {
	for from < to {
		n, err := s.mem.ReadAt(s.window[:min(int64(len(s.window)), to-from)], from)
		s.read = s.read || n > 0
		for name, needle := range s.needles {
			if bytes.Contains(s.window[:n], needle) {
				s.found = append(s.found, name)
			}
		}
		switch end := from + int64(n); {
		case err != nil:
			from = end&^(page-1) + page
		case end == to:
			return
		default:
			from = end - int64(s.longest)
		}
	}
}
