//go:build linux

package sink

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// device is the disk that a volume is on, open for reading. The host owns its content.
type device struct {
	*os.File
	path  string // symbolic links resolved
	size  int64  // octets
	rdev  uint64 // its number
	block bool
}

// openDevice opens a block device, or a regular file, for reading.
func openDevice(path string) (*device, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("opening the device: %w", err)
	}
	f, err := os.OpenFile(resolved, os.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the device: %w", err)
	}
	d := &device{File: f, path: resolved}
	if err := d.look(); err != nil {
		f.Close()
		return nil, fmt.Errorf("looking at %s: %w", path, err)
	}
	return d, nil
}

func (d *device) look() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.Fd()), &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		d.size = st.Size
		return nil
	case unix.S_IFBLK:
		d.block, d.rdev = true, st.Rdev
		size, err := d.Seek(0, io.SeekEnd)
		d.size = size
		return err
	}
	return errors.New("it is no block device")
}

// writer opens the device for writing; alone: nobody else has it mounted, mapped or open so.
func (d *device) writer(alone bool) (*os.File, error) {
	flags := os.O_RDWR
	if alone && d.block {
		flags |= os.O_EXCL
	}
	f, err := os.OpenFile(d.path, flags, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("opening %s for writing: it is in use: %w", d.path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the device for writing: %w", err)
	}
	return f, nil
}

// writeSynced writes octets and waits until the disk says that it has them.
func writeSynced(f *os.File, octets []byte, at int64) error {
	if _, err := f.WriteAt(octets, at); err != nil {
		return fmt.Errorf("writing the header: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("writing the header: %w", err)
	}
	return nil
}
