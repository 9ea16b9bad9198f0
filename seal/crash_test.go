package seal_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"keybroker/seal"
)

func mkfifo(path string) error { return unix.Mkfifo(path, 0o600) }

// What the test binary does instead of tests: save once and fail, or save until it is killed.
const (
	crashVariable = "SEAL_TEST_SAVE"
	loopVariable  = "SEAL_TEST_SAVE_LOOP"
)

// TestMain lets the test binary be the program that is killed while it saves.
func TestMain(m *testing.M) {
	if path := os.Getenv(crashVariable); path != "" {
		os.Exit(saveOnce(path))
	}
	if path := os.Getenv(loopVariable); path != "" {
		os.Exit(saveForever(path))
	}
	os.Exit(m.Run())
}

// saveOnce replaces the realm at path by one with an empty slot list, within a file size limit of some octets: the write is
// cut short by SIGXFSZ, which kills like kill -9 does.
func saveOnce(path string) int {
	o, err := seal.Create(bytes.Repeat([]byte{0x77}, 32), realmID)
	if err != nil {
		return 3
	}
	l, err := seal.Lock(context.Background(), path)
	if err != nil {
		return 3
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 100, Max: 100}); err != nil {
		return 3
	}
	if err := l.Save(o); err != nil {
		os.Stderr.WriteString(err.Error())
		return 4
	}
	return 0
}

// saveForever replaces the realm at path again and again, and says so after each time.
func saveForever(path string) int {
	o, err := seal.Create(bytes.Repeat([]byte{0x77}, 32), realmID)
	if err != nil {
		return 3
	}
	l, err := seal.Lock(context.Background(), path)
	if err != nil {
		return 3
	}
	for l.Save(o) == nil {
		os.Stdout.WriteString("saved\n")
	}
	return 4
}

// kill -9 at any moment of a Save leaves a whole file, the old one or the new one.
func TestSaveKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "realm.json")
	l := lock(t, path)
	if err := l.Create(create(t, "first passphrase"), nil); err != nil {
		t.Fatal(err)
	}
	l.Close()
	for round := range 12 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), loopVariable+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// After some saves the child is at an unknown place of the next one.
		if _, err := io.ReadFull(out, make([]byte, (round%4+1)*len("saved\n"))); err != nil {
			t.Fatalf("the child saved nothing: %v", err)
		}
		cmd.Process.Kill()
		cmd.Wait()
		if _, err := seal.Load(path); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	l = lock(t, path) // no killed process holds the lock
	defer l.Close()
	if err := l.Save(create(t, "first passphrase")); err != nil {
		t.Error(err)
	}
}

// A Save that cannot be finished leaves the old file as it was, and no other.
func TestSaveCutShort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "realm.json")
	l := lock(t, path)
	if err := l.Create(create(t, "first passphrase"), nil); err != nil {
		t.Fatal(err)
	}
	l.Close()
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashVariable+"="+path)
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() == 3 {
		t.Fatalf("the save did not fail as it should: %v, %s", err, out)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the old file changed: %v", err)
	}
}

// What a killed run left is harmless, and goes with the next change.
func TestLeftovers(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "realm.json")
	left := filepath.Join(dir, ".realm.json.0011223344556677.tmp")
	if err := os.WriteFile(left, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	l := lock(t, path)
	defer l.Close()
	o := create(t, "first passphrase")
	if err := l.Create(o, nil); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "realm.json realm.json.lock" {
		t.Errorf("the folder has %s", got)
	}
}
