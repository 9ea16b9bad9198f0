//go:build linux

package tsmfs_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"keybroker/attest/snp/snptest/tsmfs"
)

// mounted is a folder with the file system.
func mounted(t *testing.T, p tsmfs.Platform) string {
	t.Helper()
	dir := t.TempDir()
	unmount, err := tsmfs.Mount(dir, p)
	if err != nil {
		t.Skipf("needs root and /dev/fuse (modprobe fuse), or run it in the lab: %v", err)
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Errorf("unmounting: %v", err)
		}
	})
	return dir
}

func TestAnEntry(t *testing.T) {
	var asked atomic.Int32
	dir := mounted(t, tsmfs.Platform{Provider: "sev_guest", Report: func(data []byte, level int) (out, aux []byte, err error) {
		asked.Add(1)
		return append([]byte{byte(level)}, data...), bytes.Repeat([]byte("c"), 20000), nil
	}})
	e := filepath.Join(dir, "entry1")
	read := func(name string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(e, name))
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	write := func(name, value string) error {
		return os.WriteFile(filepath.Join(e, name), []byte(value), 0o200)
	}
	if err := os.Mkdir(e, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(filepath.Join(e, "outblob")); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a report before it was asked for: %v", err)
	}
	if err := errors.Join(write("inblob", "first"), write("privlevel", "1\n")); err != nil {
		t.Fatal(err)
	}
	if got := read("generation"); got != "2\n" {
		t.Errorf("generation %q after two values", got)
	}
	if read("outblob") != "\x01first" || len(read("auxblob")) != 20000 || read("provider") != "sev_guest\n" || asked.Load() != 1 {
		t.Errorf("outblob %q, auxblob of %d octets, asked %d times", read("outblob"), len(read("auxblob")), asked.Load())
	}
	if err := write("inblob", "second"); err != nil || read("outblob") != "\x01second" || asked.Load() != 2 {
		t.Errorf("%v, outblob %q, asked %d times", err, read("outblob"), asked.Load())
	}
	for name, value := range map[string]string{"inblob": string(make([]byte, 65)), "privlevel": "4"} {
		if err := write(name, value); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s of %q: %v", name, value, err)
		}
	}
	if err := write("outblob", "x"); !errors.Is(err, syscall.EACCES) {
		t.Errorf("writing outblob: %v", err)
	}
	if err := os.Remove(e); err != nil {
		t.Errorf("removing an entry: %v", err)
	}
	if _, err := os.Stat(e); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after its removal: %v", err)
	}
}

// Without a driver the kernel makes no entry.
func TestNoDriver(t *testing.T) {
	if err := os.Mkdir(filepath.Join(mounted(t, tsmfs.Platform{}), "entry1"), 0o700); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("%v, expected ENXIO", err)
	}
}
