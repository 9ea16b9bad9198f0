//go:build linux

package sink

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// File is a file in memory that holds the key's octets and nothing else, mode 0400, of the agent's own user.
type File struct {
	// Path is absolute; its folder exists, lies on tmpfs or ramfs, and only the agent's user may write there. Required.
	Path string
	// Recorded says that this agent wrote the file in this boot, so that a further epoch may replace it.
	Recorded bool
}

const fileMode = 0o400

// Put writes the key. The file appears whole or not at all. A file that is there and is not this agent's own is ErrTaken,
// unless it is just the file that would be written.
func (f *File) Put(_ context.Context, k Key) (Result, error) {
	dir, err := f.openDir()
	if err != nil {
		return Result{}, err
	}
	defer unix.Close(dir)
	name := filepath.Base(f.Path)
	temporary := ".keybroker-" + name
	if err := writeTemporary(dir, temporary, k.Octets()); err != nil {
		return Result{}, fmt.Errorf("writing %s: %w", f.Path, err)
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if f.Recorded {
		flags = 0
	}
	err = unix.Renameat2(dir, temporary, dir, name, flags)
	if err == nil {
		return Result{Place: f.Path}, nil
	}
	unix.Unlinkat(dir, temporary, 0)
	if errors.Is(err, unix.EEXIST) {
		return f.same(dir, name, k.Octets())
	}
	return Result{}, fmt.Errorf("writing %s: %w", f.Path, err)
}

// openDir opens the file's folder and holds it to what File promises.
func (f *File) openDir() (int, error) {
	path := filepath.Dir(f.Path)
	dir, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("opening the folder %s: %w: make it first, as in systemd-tmpfiles or mkdir -m 700", path, err)
	}
	if err := checkDir(dir, path); err != nil {
		unix.Close(dir)
		return -1, err
	}
	return dir, nil
}

func checkDir(dir int, path string) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(dir, &fs); err != nil {
		return fmt.Errorf("looking at the folder %s: %w", path, err)
	}
	if fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("%w: %s is on a file system of type %#x, expected tmpfs or ramfs, as /run is", ErrNotInMemory, path, fs.Type)
	}
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return fmt.Errorf("looking at the folder %s: %w", path, err)
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return fmt.Errorf("the folder %s belongs to user %d with mode %04o, expected this program's user and that nobody else may write", path, st.Uid, st.Mode&0o7777)
	}
	return nil
}

// CheckFolder says why keys may not lie in a folder: it is not in memory, or others may write there.
func CheckFolder(path string) error {
	dir, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the folder %s: %w", path, err)
	}
	defer unix.Close(dir)
	return checkDir(dir, path)
}

// writeTemporary writes the octets beside their place. A leftover of the same name is one that a crash left.
func writeTemporary(dir int, name string, octets []byte) error {
	if err := unix.Unlinkat(dir, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, fileMode)
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(fd), name)
	err = unix.Fchmod(fd, fileMode) // whatever the umask is
	if err == nil {
		_, err = out.Write(octets)
	}
	if err = errors.Join(err, out.Close()); err != nil {
		unix.Unlinkat(dir, name, 0)
	}
	return err
}

// same accepts a file that is there already, if it is exactly the one that would have been written.
func (f *File) same(dir int, name string, octets []byte) (Result, error) {
	taken := fmt.Errorf("%w: %s is there already, with another content, mode or owner: remove it", ErrTaken, f.Path)
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return Result{}, taken
	}
	in := os.NewFile(uintptr(fd), name)
	defer in.Close()
	if !ownFile(fd) {
		return Result{}, taken
	}
	content, err := io.ReadAll(io.LimitReader(in, int64(len(octets))+1))
	defer clear(content)
	if err != nil || subtle.ConstantTimeCompare(content, octets) != 1 {
		return Result{}, taken
	}
	return Result{Place: f.Path, Already: true}, nil
}

// ownFile says whether fd is a regular file of this user with the mode that Put gives.
func ownFile(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode == unix.S_IFREG|fileMode && int(st.Uid) == os.Geteuid() && st.Nlink == 1
}

// Holds says whether the file that was written is still there.
func (f *File) Holds() (bool, error) {
	fd, err := unix.Open(f.Path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking at %s: %w", f.Path, err)
	}
	defer unix.Close(fd)
	if !ownFile(fd) {
		return false, fmt.Errorf("%w: %s is not the file that this agent wrote", ErrTaken, f.Path)
	}
	return true, nil
}
