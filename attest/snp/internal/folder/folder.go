// Package folder is a folder whose files are replaced whole: a reader sees the old file or the new one, also after a loss of
// power. Names lead nowhere outside it.
package folder

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Folder is an open folder. It may be used by many goroutines. Names have slashes between their parts.
type Folder struct {
	root *os.Root
}

// Make makes a folder that everybody may read, unless it is there. Root gives it to the owner of the folder that it is in, so
// that a service can write in what an administrator made for it.
func Make(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		if info, statErr := os.Stat(dir); statErr == nil && info.IsDir() {
			return nil
		}
		return fmt.Errorf("making a folder: %w", err)
	}
	// By a handle that is no link: whoever may write around here must not choose what is given away.
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	h := os.NewFile(uintptr(fd), dir)
	defer h.Close()
	parent, err := os.Stat(filepath.Dir(filepath.Clean(dir)))
	if err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	return giveTo(h, parent)
}

// giveTo gives what root made to the owner of a folder.
func giveTo(h *os.File, folder fs.FileInfo) error {
	st, ok := folder.Sys().(*syscall.Stat_t)
	if !ok || os.Geteuid() != 0 || st.Uid == 0 && st.Gid == 0 {
		return nil
	}
	return h.Chown(int(st.Uid), int(st.Gid))
}

// Open opens a folder. One that is missing is fs.ErrNotExist.
func Open(dir string) (*Folder, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Folder{root}, nil
}

// Close closes the folder.
func (f *Folder) Close() error { return f.root.Close() }

// Read reads a file of at most this many octets.
func (f *Folder) Read(name string, most int) ([]byte, error) {
	h, err := f.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not hang
	if err != nil {
		return nil, err
	}
	defer h.Close()
	if info, err := h.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("expected a file, got something else"))
	}
	octets, err := io.ReadAll(io.LimitReader(h, int64(most)+1))
	if err != nil {
		return nil, err
	}
	if len(octets) > most {
		return nil, fmt.Errorf("expected at most %d octets, got more", most)
	}
	return octets, nil
}

// Names returns the names of what is in a folder below this one, "." for itself. Hidden ones are left out: those are locks and
// files that are not complete. What is missing has none.
func (f *Folder) Names(sub string) ([]string, error) {
	h, err := f.openDir(sub)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer h.Close()
	all, err := h.Readdirnames(-1)
	var out []string
	for _, name := range all {
		if !strings.HasPrefix(name, ".") {
			out = append(out, path.Join(sub, name))
		}
	}
	return out, err
}

// openDir opens a folder, and nothing else: a FIFO would hang.
func (f *Folder) openDir(name string) (*os.File, error) {
	return f.root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
}

const tempSuffix = ".tmp"

// Write puts a file in place of the one with this name, if there is one, and makes the folder that it is in. Of two locks' holders
// each has its own files.
func (l *Lock) Write(name string, octets []byte) error {
	dir := path.Dir(name)
	if err := l.f.makeSub(dir); err != nil {
		return err
	}
	l.removeLeftovers(dir)
	var random [8]byte
	rand.Read(random[:])
	temp := path.Join(dir, l.tempPrefix()+hex.EncodeToString(random[:])+tempSuffix)
	if err := l.f.writeNew(temp, octets); err != nil {
		l.f.root.Remove(temp)
		return fmt.Errorf("writing %s: %w", name, err)
	}
	if err := l.f.root.Rename(temp, name); err != nil {
		l.f.root.Remove(temp)
		return fmt.Errorf("putting %s in place: %w", name, err)
	}
	return l.f.sync(dir)
}

func (l *Lock) tempPrefix() string { return "." + l.name + "-" }

// removeLeftovers removes what killed holders of this lock left. What stays is harmless.
func (l *Lock) removeLeftovers(dir string) {
	h, err := l.f.openDir(dir)
	if err != nil {
		return
	}
	defer h.Close()
	names, _ := h.Readdirnames(-1)
	for _, name := range names {
		if strings.HasPrefix(name, l.tempPrefix()) && strings.HasSuffix(name, tempSuffix) {
			l.f.root.Remove(path.Join(dir, name))
		}
	}
}

// Remove removes a file.
func (l *Lock) Remove(name string) error {
	if err := l.f.root.Remove(name); err != nil {
		return err
	}
	return l.f.sync(path.Dir(name))
}

func (f *Folder) makeSub(dir string) error {
	if dir == "." {
		return nil
	}
	if err := f.root.Mkdir(dir, 0o755); errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	h, err := f.openDir(dir)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := f.give(h); err != nil {
		return err
	}
	return f.sync(".")
}

// give gives what root made to the folder's owner.
func (f *Folder) give(h *os.File) error {
	info, err := f.root.Stat(".")
	if err != nil {
		return err
	}
	return giveTo(h, info)
}

func (f *Folder) writeNew(name string, octets []byte) error {
	h, err := f.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = h.Write(octets)
	return errors.Join(err, f.give(h), h.Sync(), h.Close())
}

func (f *Folder) sync(dir string) error {
	h, err := f.openDir(dir)
	if err != nil {
		return fmt.Errorf("syncing a folder: %w", err)
	}
	return errors.Join(h.Sync(), h.Close())
}

// lockPause is how often a lock that another process holds is asked for again.
const lockPause = 50 * time.Millisecond

// A Lock is the right to write. It is used by one goroutine.
type Lock struct {
	f    *Folder
	name string
	h    *os.File
}

// Unlock lets the next one in.
func (l *Lock) Unlock() { l.h.Close() }

// Lock takes the lock of this name, which is a hidden file that stays. While another holder has it, in this process or another
// one, Lock waits for ctx to end, and then returns its error; waiting, unless nil, is called once before that.
func (f *Folder) Lock(ctx context.Context, name string, waiting func()) (*Lock, error) {
	h, err := f.openLock("." + name + ".lock")
	if err != nil {
		return nil, fmt.Errorf("locking: %w", err)
	}
	tick := time.NewTicker(lockPause)
	defer tick.Stop()
	for {
		err := unix.Flock(int(h.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return &Lock{f, name, h}, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			h.Close()
			return nil, fmt.Errorf("locking: %w", err)
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-ctx.Done():
			h.Close()
			return nil, fmt.Errorf("locking: another process holds %s: %w", "."+name+".lock", ctx.Err())
		case <-tick.C:
		}
	}
}

// openLock opens a lock's file, and makes it if it is not there.
func (f *Folder) openLock(name string) (*os.File, error) {
	h, err := f.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case err == nil:
		if err := f.give(h); err != nil {
			h.Close()
			return nil, err
		}
	case errors.Is(err, fs.ErrExist):
		return f.root.OpenFile(name, os.O_RDWR|unix.O_NONBLOCK, 0)
	}
	return h, err
}
