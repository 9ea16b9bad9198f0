package folder

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// What root makes in a service's folder is the service's; without root it is one's own anyway.
func TestOwner(t *testing.T) {
	parent := t.TempDir()
	uid := os.Geteuid()
	if uid == 0 {
		uid = 12345
		if err := os.Chown(parent, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(parent, "folder")
	for range 2 {
		if err := Make(dir); err != nil {
			t.Fatal(err)
		}
	}
	f, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := f.Lock(t.Context(), "mine", nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Write("sub/file", []byte("text")); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{".", ".mine.lock", "sub", "sub/file"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Sys().(*syscall.Stat_t).Uid; int(got) != uid {
			t.Errorf("%s belongs to %d, expected %d", name, got, uid)
		}
	}
	if names, err := f.Names("."); err != nil || !slices.Equal(names, []string{"sub"}) {
		t.Errorf("%q, %v", names, err)
	}
	if octets, err := f.Read("sub/file", 4); err != nil || string(octets) != "text" {
		t.Errorf("%q, %v", octets, err)
	}
	if _, err := f.Read("sub/file", 3); err == nil {
		t.Error("too much was read")
	}
}

// A lock has one holder, also within a process; who waits says so once, and gives up with its context.
func TestLock(t *testing.T) {
	f, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := f.Lock(t.Context(), "mine", nil)
	if err != nil {
		t.Fatal(err)
	}
	other, err := f.Lock(t.Context(), "other", nil)
	if err != nil {
		t.Fatal(err)
	}
	other.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	waits := 0
	if _, err := f.Lock(ctx, "mine", func() { waits++; cancel() }); !errors.Is(err, context.Canceled) || waits != 1 {
		t.Errorf("%v, said %d times", err, waits)
	}
	l.Unlock()
	if l, err = f.Lock(t.Context(), "mine", nil); err != nil {
		t.Fatal(err)
	}
	l.Unlock()
}

// Names lead nowhere else, and what is no file does not hang.
func TestNames(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(outside, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(os.Symlink(outside, filepath.Join(dir, "link")), syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600), os.Mkdir(filepath.Join(dir, "sub"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "fifo", "sub", "../file", outside, "none", ""} {
		if octets, err := f.Read(name, 100); err == nil {
			t.Errorf("%s: %q", name, octets)
		}
	}
	if _, err := f.Names("fifo"); err == nil {
		t.Error("a FIFO has names")
	}
	if names, err := f.Names("none"); err != nil || names != nil {
		t.Errorf("%q, %v", names, err)
	}
	l, err := f.Lock(t.Context(), "mine", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"../file", "../new/file"} {
		if err := l.Write(name, []byte("other")); err == nil {
			t.Errorf("%s was written", name)
		}
	}
	if octets, err := os.ReadFile(outside); err != nil || string(octets) != "text" {
		t.Errorf("%q, %v", octets, err)
	}
	if err := l.Write("link", []byte("other")); err != nil { // the link itself is replaced
		t.Error(err)
	}
	if octets, err := os.ReadFile(outside); err != nil || string(octets) != "text" {
		t.Errorf("%q, %v", octets, err)
	}
	if err := l.Remove("link"); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "link")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := Make(filepath.Join(outside, "below")); err == nil || !strings.Contains(err.Error(), "making a folder") {
		t.Error(err)
	}
}
