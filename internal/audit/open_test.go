package audit

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/internal/need"
)

const stranger = 12345 // a uid that nobody has

func must(tb testing.TB, errs ...error) {
	tb.Helper()
	if err := errors.Join(errs...); err != nil {
		tb.Fatal(err)
	}
}

// inTime fails the test when fn hangs.
func inTime(t *testing.T, name string, fn func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-time.After(20 * time.Second):
		t.Fatalf("%s hangs", name)
		return nil
	}
}

// A link in the place of the folder makes nobody write, move or chown what is behind it.
func TestLinkedFolderIsRefused(t *testing.T) {
	behind, k := newKeeper(t), newKeeper(t)
	lines := fill(t, behind, 3)
	must(t, os.Remove(k.dir), os.Symlink(behind.dir, k.dir))
	cfg := k.config()
	cfg.LoadHead, cfg.SaveHead = behind.load, behind.save
	if l, err := Open(cfg); err == nil || l != nil || !strings.Contains(err.Error(), "link") {
		t.Errorf("Open: %v", err)
	}
	if aside, err := SetAside(k.dir, time.Now()); err == nil || aside != "" {
		t.Errorf("SetAside: %q, %v", aside, err)
	}
	if got := readLines(t, behind.dir, 1); len(got) != len(lines) {
		t.Errorf("%d lines behind the link, want %d", len(got), len(lines))
	}
	must(t, os.Remove(k.dir), os.Symlink(filepath.Join(behind.dir, "none"), k.dir))
	if _, err := Open(k.config()); err == nil {
		t.Error("Open took a link to nothing")
	}
}

// Root makes the folder and its files for the owner of the folder above, and takes no folder of a third user.
func TestFolderOwner(t *testing.T) {
	need.Root(t)
	k := newKeeper(t)
	must(t, os.Chown(k.dir, stranger, stranger))
	if _, err := Open(k.config()); err == nil || !strings.Contains(err.Error(), "12345") {
		t.Errorf("a stranger's folder: %v", err)
	}
	above := k.dir
	k.dir = filepath.Join(above, "audit")
	openTest(t, k, nil)
	for _, path := range []string{k.dir, filepath.Join(k.dir, fileName(1))} {
		var st unix.Stat_t
		must(t, unix.Lstat(path, &st))
		if st.Uid != stranger || st.Gid != stranger || st.Mode&0o077 != 0 {
			t.Errorf("%s: uid %d, gid %d, mode %o", path, st.Uid, st.Gid, st.Mode)
		}
	}
}

// makeFolder takes only what it made itself.
func TestFolderIsNew(t *testing.T) {
	parent, err := os.Open(t.TempDir())
	must(t, err)
	defer parent.Close()
	d, err := makeFolder(parent, "a")
	must(t, err)
	d.Close()
	if d, err := makeFolder(parent, "a"); !errors.Is(err, os.ErrExist) || d != nil {
		t.Errorf("made twice: %v", err)
	}
}

// A pipe or a link among the files is an error, and nobody waits for the pipe's other end.
func TestOnlyRegularFiles(t *testing.T) {
	target := filepath.Join(t.TempDir(), "target")
	must(t, os.WriteFile(target, []byte("untouched"), 0o600))
	for name, plant := range map[string]func(path string) error{
		"pipe":   func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link":   func(path string) error { return os.Symlink(target, path) },
		"second": func(path string) error { return os.Link(target, path) },
		"folder": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		k := newKeeper(t)
		must(t, plant(filepath.Join(k.dir, fileName(1))))
		for call, fn := range map[string]func() error{
			"Open":   func() error { _, err := Open(k.config()); return err },
			"Verify": func() error { _, err := Verify(k.dir, VerifyOptions{}); return err },
			"Query":  func() error { return Query(k.dir, Filter{}, func(*Record, []byte) error { return nil }) },
		} {
			if err := inTime(t, call, fn); err == nil || !strings.Contains(err.Error(), "regular file") && name != "folder" {
				t.Errorf("%s of a %s: %v", call, name, err)
			}
		}
		if aside, err := SetAside(k.dir, time.Now()); err != nil || aside == "" {
			t.Errorf("SetAside of a %s: %q, %v", name, aside, err)
		}
		openTest(t, k, nil)
	}
	if got, err := os.ReadFile(target); err != nil || string(got) != "untouched" {
		t.Errorf("behind the link: %q, %v", got, err)
	}
}

// withBlocksAhead makes a file with four megabytes allocated behind its end.
func withBlocksAhead(t *testing.T, path string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte("x"), 0o600))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 4*chunk)
	need.That(t, err == nil, "fallocate: set TMPDIR to a folder on ext4, xfs, btrfs or tmpfs: %v", err)
}

func hasBlocksAhead(t *testing.T, path string) bool {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	return st.Blocks*512 > chunk
}

// What is cut and made is in the folder that was opened, not in one that took its name since, nor behind a link.
func TestFolderExchanged(t *testing.T) {
	k := newKeeper(t)
	l := openTest(t, k, nil)
	moved := k.dir + ".moved"
	must(t, os.Rename(k.dir, moved), os.Mkdir(k.dir, 0o700))
	l.number = 9
	for _, dir := range []string{moved, k.dir} {
		withBlocksAhead(t, filepath.Join(dir, fileName(8)))
	}
	l.trimPrevious()
	if hasBlocksAhead(t, filepath.Join(moved, fileName(8))) || !hasBlocksAhead(t, filepath.Join(k.dir, fileName(8))) {
		t.Error("the planted folder's file was cut, or the log's own was not")
	}
	must(t, os.Remove(filepath.Join(moved, fileName(8))), os.Symlink(filepath.Join(k.dir, fileName(8)), filepath.Join(moved, fileName(8))))
	l.trimPrevious()
	if !hasBlocksAhead(t, filepath.Join(k.dir, fileName(8))) {
		t.Error("a file behind a link was cut")
	}
	f, err := l.create(9, 0)
	must(t, err)
	defer f.Close()
	if _, err := os.Lstat(filepath.Join(moved, fileName(9))); err != nil {
		t.Errorf("a new file: %v", err)
	}
	const copied = "audit-000001.cut-0"
	must(t, l.copyEnd(0, copied), l.copyEnd(0, copied)) // a killed broker does it once more
	if _, err := os.Lstat(filepath.Join(moved, copied)); err != nil {
		t.Errorf("a copy: %v", err)
	}
}

// Where only the reserve is left, releases and an administrator's changes are recorded, and what strangers cause is not.
func TestWhoMayUseTheReserve(t *testing.T) {
	l := openTest(t, newKeeper(t), func(c *Config) { c.SyncEvery = time.Hour }) // nothing wakes the keeper, which would see that there is space
	l.mu.Lock()
	l.low = true
	l.mu.Unlock()
	for event, want := range map[Event]bool{
		EventRelease: true, EventBreakGlass: true, EventStart: true, EventStop: true, EventReset: true,
		EventTicket: true, EventLock: true, EventUnlock: true, EventSlot: true, EventPolicy: true,
		EventRefusal: false, EventAck: false,
	} {
		if _, err := l.Append(Record{Event: event}, Written); (err == nil) != want || err != nil && !errors.Is(err, ErrNoSpace) {
			t.Errorf("%s: %v", event, err)
		}
	}
	if s := l.Stats(); !s.Low || s.Dropped != 2 {
		t.Errorf("%+v", s)
	}
}
