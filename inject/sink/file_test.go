//go:build linux

package sink

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"keybroker/internal/need"
)

// memoryDir makes a folder on tmpfs.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "keybroker-test-")
	need.That(t, err == nil, "a tmpfs on /dev/shm: mount -t tmpfs tmpfs /dev/shm: %v", err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestFile(t *testing.T) {
	ctx, k := context.Background(), newKey(1, false)
	dir := memoryDir(t)
	f := &File{Path: filepath.Join(dir, "disk.key")}
	if holds, err := f.Holds(); err != nil || holds {
		t.Fatalf("before: %v %v", holds, err)
	}
	old := unix.Umask(0o777)
	_, err := f.Put(ctx, k)
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(f.Path)
	if err != nil || info.Mode() != fileMode || !bytes.Equal(content(t, f.Path), k.Octets()) {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	if holds, err := f.Holds(); err != nil || !holds {
		t.Fatalf("after: %v %v", holds, err)
	}
	if r, err := f.Put(ctx, k); err != nil || !r.Already {
		t.Errorf("the same again: %+v %v", r, err)
	}
	next := newKey(2, false)
	if _, err := f.Put(ctx, next); !errors.Is(err, ErrTaken) {
		t.Errorf("other octets over a file that is not recorded: %v", err)
	}
	f.Recorded = true
	if _, err := f.Put(ctx, next); err != nil || !bytes.Equal(content(t, f.Path), next.Octets()) {
		t.Errorf("the next epoch: %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the folder: %v, %v", entries, err)
	}
}

func TestFileRefusals(t *testing.T) {
	ctx, k := context.Background(), newKey(1, false)
	if _, err := (&File{Path: "/sys/kernel/k"}).Put(ctx, k); !errors.Is(err, ErrNotInMemory) {
		t.Errorf("not on a tmpfs: %v", err)
	}
	dir := memoryDir(t)
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(victim, link); err != nil {
		t.Fatal(err)
	}
	if _, err := (&File{Path: link}).Put(ctx, k); !errors.Is(err, ErrTaken) {
		t.Errorf("over a symbolic link: %v", err)
	}
	if _, err := (&File{Path: victim}).Put(ctx, k); !errors.Is(err, ErrTaken) || string(content(t, victim)) != "x" {
		t.Errorf("over a foreign file: %v", err)
	}
	if _, err := (&File{Path: filepath.Join(dir, "absent", "k")}).Put(ctx, k); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("in a folder that is not there: %v", err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := (&File{Path: filepath.Join(dir, "k")}).Put(ctx, k); err == nil {
		t.Error("in a folder that anybody may write to")
	}
}
