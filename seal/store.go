package seal

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Load reads the realm file at path. It takes no lock: a file is only ever replaced whole. A missing file is fs.ErrNotExist.
func Load(path string) (*File, error) {
	// O_NONBLOCK: a FIFO must not hang the start.
	h, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the realm file: %w", err)
	}
	defer h.Close()
	info, err := h.Stat()
	if err != nil {
		return nil, fmt.Errorf("opening the realm file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("opening the realm file: %s is not a regular file", path)
	}
	octets, err := io.ReadAll(io.LimitReader(h, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading the realm file: %w", err)
	}
	f, err := Parse(octets)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return f, nil
}

// A Locked realm file is one that no other process changes until Close. Reading needs no lock.
type Locked struct {
	path string
	lock *os.File
}

// lockPause is how often a lock that another process holds is asked for again.
const lockPause = 50 * time.Millisecond

// Lock takes the lock of the realm file at path, which need not exist yet; its folder must. While another process holds it, Lock
// waits for ctx to end, and then fails with ErrBusy.
func Lock(ctx context.Context, path string) (*Locked, error) {
	h, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the realm file: %w", err)
	}
	l := &Locked{path: path, lock: h}
	for {
		err := unix.Flock(int(h.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return l, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			h.Close()
			return nil, fmt.Errorf("locking the realm file: %w", err)
		}
		select {
		case <-ctx.Done():
			h.Close()
			return nil, fmt.Errorf("%w: it holds %s.lock", ErrBusy, path)
		case <-time.After(lockPause):
		}
	}
}

// Close lets the next process change the file.
func (l *Locked) Close() error { return l.lock.Close() }

// Load reads the realm file.
func (l *Locked) Load() (*File, error) { return Load(l.path) }

// An Owner is the user and group that a realm file is given to.
type Owner struct {
	UID, GID int
}

// Create writes a new realm file, owned by owner unless that is nil. It fails with ErrExists, and changes nothing, if there is one.
func (l *Locked) Create(o *Opened, owner *Owner) error {
	if _, err := os.Lstat(l.path); err == nil {
		return fmt.Errorf("%w: %s", ErrExists, l.path)
	}
	return l.write(o, owner, linkNew)
}

// Save replaces the realm file, which keeps its owner. Until the last step the old file stands; after it the new one does, over a
// loss of power too.
func (l *Locked) Save(o *Opened) error {
	var st unix.Stat_t
	if err := unix.Lstat(l.path, &st); err != nil {
		return fmt.Errorf("replacing the realm file: %w", err)
	}
	var owner *Owner
	if int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid() {
		owner = &Owner{UID: int(st.Uid), GID: int(st.Gid)}
	}
	return l.write(o, owner, os.Rename)
}

// linkNew gives a file its name if no other has it. Between the two steps a second name is left, which is harmless.
func linkNew(from, to string) error {
	if err := os.Link(from, to); err != nil {
		return err
	}
	return os.Remove(from)
}

// write makes the new file beside the old one, and puts it in place.
func (l *Locked) write(o *Opened, owner *Owner, place func(from, to string) error) (err error) {
	octets, err := o.file.Encode()
	if err != nil {
		return err
	}
	// What cannot be read back is never written.
	if _, err := Parse(octets); err != nil {
		return fmt.Errorf("encoding the realm file: %w", err)
	}
	l.removeLeftovers()
	temp, err := writeTemp(l.path, octets, owner)
	if err != nil {
		return fmt.Errorf("writing the realm file: %w", err)
	}
	if err = place(temp, l.path); err != nil {
		os.Remove(temp)
	}
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%w: %s", ErrExists, l.path)
	case err != nil:
		return fmt.Errorf("putting the realm file in place: %w", err)
	}
	return syncFolder(filepath.Dir(l.path))
}

// Temporary files are named ".realm.json.<random>.tmp".
func tempPrefix(path string) string { return "." + filepath.Base(path) + "." }

const tempSuffix = ".tmp"

// removeLeftovers removes what killed runs left: only the holder of the lock writes such files.
func (l *Locked) removeLeftovers() {
	folder := filepath.Dir(l.path)
	entries, _ := os.ReadDir(folder) // what stays is harmless
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix(l.path)) && strings.HasSuffix(e.Name(), tempSuffix) {
			os.Remove(filepath.Join(folder, e.Name()))
		}
	}
}

// writeTemp writes and fsyncs a new file beside path, and returns its name.
func writeTemp(path string, octets []byte, owner *Owner) (name string, err error) {
	var random [8]byte
	rand.Read(random[:])
	name = filepath.Join(filepath.Dir(path), tempPrefix(path)+hex.EncodeToString(random[:])+tempSuffix)
	h, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", err
	}
	defer func() {
		if closeErr := h.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			os.Remove(name)
		}
	}()
	if owner != nil {
		if err := h.Chown(owner.UID, owner.GID); err != nil {
			return "", err
		}
	}
	if _, err := io.Copy(h, bytes.NewReader(octets)); err != nil {
		return "", err
	}
	return name, h.Sync()
}

func syncFolder(path string) error {
	h, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("syncing the realm file's folder: %w", err)
	}
	defer h.Close()
	if err := h.Sync(); err != nil {
		return fmt.Errorf("syncing the realm file's folder: %w", err)
	}
	return nil
}
