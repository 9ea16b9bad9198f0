//go:build linux

package sink

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// snapshot is a copy of a device's first octets in memory that no file system names. Each octet of the device is read at most
// once, so what was checked is what is used, whatever the host does to the disk in between.
type snapshot struct {
	memory *os.File // a memfd: its pages are not this process's, and go with it
	from   io.ReaderAt
	size   int64 // of the device
	have   int64 // octets copied so far
}

func newSnapshot(from io.ReaderAt, size int64) (*snapshot, error) {
	memory, err := newMemory("luks2 header")
	if err != nil {
		return nil, err
	}
	return &snapshot{memory: memory, from: from, size: size}, nil
}

func newMemory(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("making a file in memory: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// ReadAt copies as much of the device as is asked for, up to MaxMetadata, and reads the copy.
func (s *snapshot) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > MaxMetadata {
		return 0, io.EOF
	}
	if err := s.fill(off + int64(len(p))); err != nil {
		return 0, err
	}
	return s.memory.ReadAt(p, off)
}

// fill makes sure that the first n octets are copied, or all that the device has.
func (s *snapshot) fill(n int64) error {
	n = min(n, s.size, MaxMetadata)
	buffer := make([]byte, min(max(n-s.have, 0), 256<<10))
	for s.have < n {
		part := buffer[:min(int64(len(buffer)), n-s.have)]
		if _, err := io.ReadFull(io.NewSectionReader(s.from, s.have, int64(len(part))), part); err != nil {
			return fmt.Errorf("reading the device: %w", err)
		}
		if _, err := s.memory.WriteAt(part, s.have); err != nil {
			return fmt.Errorf("keeping the header in memory: %w", err)
		}
		s.have += int64(len(part))
	}
	return nil
}

// use makes of the copy the header file for cryptsetup: both copies of h, rendered from what was understood and without tokens,
// and the keyslots' area as it was read. Nothing changes it from here on.
func (s *snapshot) use(h *header) error {
	if err := s.fill(int64(h.metadataSize())); err != nil {
		return err
	}
	plain := *h
	plain.tokens = nil // cryptsetup gets the key from us, and looks at no token
	for _, at := range []uint64{0, h.size} {
		b, err := plain.copyAt(at)
		if err != nil {
			return err
		}
		if _, err := s.memory.WriteAt(b, int64(at)); err != nil {
			return fmt.Errorf("keeping the header in memory: %w", err)
		}
	}
	if err := s.memory.Truncate(int64(h.metadataSize())); err != nil {
		return fmt.Errorf("keeping the header in memory: %w", err)
	}
	return nil
}

// seal lets nothing change the copy any more.
func (s *snapshot) seal() error {
	_, err := unix.FcntlInt(s.memory.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	if err != nil {
		return fmt.Errorf("sealing the header in memory: %w", err)
	}
	return nil
}

// blank says whether the copy of the device's first octets is all zeros; a device of less than MaxMetadata is looked at whole.
func (s *snapshot) blank() (bool, error) {
	return zeros(s, 0, min(s.size, MaxMetadata))
}

// zeros reads a stretch of r.
func zeros(r io.ReaderAt, off, n int64) (bool, error) {
	buffer := make([]byte, 256<<10)
	for n > 0 {
		part := buffer[:min(int64(len(buffer)), n)]
		if _, err := r.ReadAt(part, off); err != nil {
			return false, fmt.Errorf("reading the device: %w", err)
		}
		if !allZero(part) {
			return false, nil
		}
		off, n = off+int64(len(part)), n-int64(len(part))
	}
	return true, nil
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

func (s *snapshot) Close() error { return s.memory.Close() }
