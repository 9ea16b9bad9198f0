package tomlfile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// MaxSize is how many octets a file of settings may have.
const MaxSize = 1 << 20

// ErrUnsafe is in the chain of an error about a file or folder that others than root and this user may change.
var ErrUnsafe = errors.New("unsafe owner or mode")

// Read returns the content of a file of at most MaxSize octets which only root or the user of this process can have
// written. An error says what to run. A missing file matches fs.ErrNotExist.
func Read(path string) ([]byte, error) {
	// O_NONBLOCK: a pipe must not hold up the caller for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("reading %s: expected a regular file, got %s", path, info.Mode().Type())
	}
	if err := checkOwner(path, info); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(data) > MaxSize {
		return nil, fmt.Errorf("reading %s: expected at most %d octets, got more; split it into drop-ins", path, MaxSize)
	}
	return data, nil
}

// List returns the paths of the files in dir whose names end in .toml and do not begin with a dot, in the order of names.
// A missing folder is an empty list. The folder must be safe as files must for Read, and has at most limit such files.
func List(dir string, limit int) ([]string, error) {
	info, err := os.Stat(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := checkOwner(dir, info); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		if filepath.Ext(e.Name()) == ".toml" && e.Name()[0] != '.' {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	if len(paths) > limit {
		return nil, fmt.Errorf("reading %s: expected at most %d files, got %d", dir, limit, len(paths))
	}
	return paths, nil
}

// checkOwner refuses what somebody else than root or the user of this process may change.
func checkOwner(path string, info os.FileInfo) error {
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf("reading %s: expected it to be writable by its owner alone, got mode %04o; run: chmod go-w %s (%w)",
			path, mode, path, ErrUnsafe)
	}
	uid := info.Sys().(*syscall.Stat_t).Uid
	if uid != 0 && int(uid) != os.Geteuid() {
		return fmt.Errorf("reading %s: expected it to belong to root or to uid %d, got uid %d; run: chown root %s (%w)",
			path, os.Geteuid(), uid, path, ErrUnsafe)
	}
	return nil
}
