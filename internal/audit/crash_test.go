package audit

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"keybroker/derive"
	"keybroker/internal/tuple"
)

// The test binary is also the child of the tests that need a process of their own.
func TestMain(m *testing.M) {
	child := map[string]func(string) error{"append": appendUntilKilled, "full": fillDisk}[os.Getenv("KEYBROKER_TEST_CHILD")]
	if child != nil {
		fmt.Println("end", child(os.Getenv("KEYBROKER_TEST_DIR")))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func startChild(t *testing.T, kind, dir string, attr *syscall.SysProcAttr) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "KEYBROKER_TEST_CHILD="+kind, "KEYBROKER_TEST_DIR="+dir)
	child.SysProcAttr, child.Stderr = attr, os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(2*time.Minute, func() { child.Process.Kill() })
	t.Cleanup(func() {
		watchdog.Stop()
		child.Process.Kill()
		child.Wait()
	})
	return child, bufio.NewScanner(out)
}

// childConfig keeps the head in a file, and has an identity that every process knows.
func childConfig(dir string) (Config, ed25519.PrivateKey) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	path := filepath.Join(dir, "head")
	return Config{
		Dir: filepath.Join(dir, "audit"), Realm: testRealm,
		Sign: func(_ context.Context, fields ...[]byte) ([]byte, error) {
			return ed25519.Sign(key, tuple.Encode(append([][]byte{[]byte(derive.LabelAudit)}, fields...)...)), nil
		},
		LoadHead: func() (Head, error) {
			text, err := os.ReadFile(path)
			if errors.Is(err, os.ErrNotExist) {
				return Head{}, nil
			}
			if err != nil {
				return Head{}, err
			}
			return ParseHead(string(text))
		},
		SaveHead: func(h Head) error {
			if err := os.WriteFile(path+".new", []byte(h.String()), 0o600); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		},
		MaxFile: 64 << 10, Reserve: 64 << 10, SyncEvery: 5 * time.Millisecond, CheckpointRecords: 100,
	}, key
}

// appendUntilKilled appends from several goroutines and prints each record's place when it is acknowledged.
func appendUntilKilled(dir string) error {
	cfg, _ := childConfig(dir)
	l, err := Open(cfg)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	out := bufio.NewWriter(os.Stdout)
	failed := make(chan error)
	for w := range 4 {
		go func() {
			for i := 0; ; i++ {
				h, err := l.Append(release(i), Durability(w%2))
				if err != nil {
					failed <- err
					return
				}
				mu.Lock()
				fmt.Fprintln(out, h)
				out.Flush()
				mu.Unlock()
			}
		}()
	}
	return <-failed
}

// After a kill -9 at any moment every acknowledged record is in the log, which verifies and is gone on with.
func TestKillMinusNine(t *testing.T) {
	dir := t.TempDir()
	var acknowledged []Head
	for round := range 8 {
		child, lines := startChild(t, "append", dir, nil)
		for n := 1; lines.Scan(); n++ {
			h, err := ParseHead(lines.Text())
			if err != nil {
				if n > 200+150*round { // the line that was cut off by the kill
					break
				}
				t.Fatalf("the child says %q", lines.Text())
			}
			acknowledged = append(acknowledged, h)
			if n == 200+150*round {
				child.Process.Kill()
			}
		}
		cfg, key := childConfig(dir)
		stored, err := cfg.LoadHead()
		if err != nil {
			t.Fatal(err)
		}
		opts := VerifyOptions{Heads: append([]Head{stored}, acknowledged...)}
		if round > 0 { // the first may be killed before its first checkpoint; from then on Open writes one
			opts.PublicKeys = []ed25519.PublicKey{key.Public().(ed25519.PublicKey)}
		}
		rep := verify(t, cfg.Dir, opts)
		if !rep.OK() {
			t.Fatalf("round %d: %v", round, rep.Breaks)
		}
	}
	if len(acknowledged) < 1000 {
		t.Errorf("only %d records were acknowledged", len(acknowledged))
	}
}

// On a full disk refusals are dropped and counted, releases go on from the reserve until that is gone, and then are refused;
// when there is space again, all goes on.
func TestFullDisk(t *testing.T) {
	for _, fs := range []string{"tmpfs", "ext4"} {
		t.Run(fs, func(t *testing.T) { testFullDisk(t, fs) })
	}
}

func testFullDisk(t *testing.T, fs string) {
	dir := t.TempDir()
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if fs == "ext4" {
		image := filepath.Join(dir, "image")
		dir = filepath.Join(dir, "mnt")
		if err := makeExt4(image, dir); err != nil {
			t.Skipf("%v: run it as root, with e2fsprogs and mount installed", err)
		}
	} else if os.Geteuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	_, lines := startChild(t, "full", dir, attr)
	var said []string
	for lines.Scan() {
		said = append(said, lines.Text())
		t.Log(lines.Text())
	}
	last := "nothing"
	if len(said) > 0 {
		last = said[len(said)-1]
	}
	if strings.Contains(last, "mounting") {
		t.Skipf("%s: allow it with `sysctl kernel.unprivileged_userns_clone=1`, or run as root", last)
	}
	if last != "end <nil>" {
		t.Errorf("the child says %s", last)
	}
}

func makeExt4(image, dir string) error {
	if os.Geteuid() != 0 {
		return errors.New("not root")
	}
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 16<<20), os.Mkdir(dir, 0o700)); err != nil {
		return err
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", image).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return nil
}

// mountIn mounts a small file system at dir, in this process's own namespace: it ends with the process.
func mountIn(dir string) error {
	if err := syscall.Mount("", "/", "", syscall.MS_PRIVATE|syscall.MS_REC, ""); err != nil {
		return fmt.Errorf("mounting: %w", err)
	}
	if image := filepath.Join(filepath.Dir(dir), "image"); filepath.Base(dir) == "mnt" {
		if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
			return fmt.Errorf("mounting: %w: %s", err, out)
		}
		return nil
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		return fmt.Errorf("mounting: %w", err)
	}
	return nil
}

// fillDisk is TestFullDisk's child.
func fillDisk(dir string) error {
	if err := mountIn(dir); err != nil {
		return err
	}
	cfg, key := childConfig(dir)
	var mu sync.Mutex
	head := Head{} // not on the full disk
	cfg.LoadHead = func() (Head, error) { mu.Lock(); defer mu.Unlock(); return head, nil }
	cfg.SaveHead = func(h Head) error { mu.Lock(); defer mu.Unlock(); head = h; return nil }
	cfg.Reserve, cfg.MaxFile = 128<<10, 2<<20
	l, err := Open(cfg)
	if err != nil {
		return err
	}
	filler := filepath.Join(dir, "filler")
	for round := range 2 {
		if err := untilFull(filler); err != nil {
			return err
		}
		released, refused, err := appendUntilFull(l)
		fmt.Printf("round %d: %d releases, %d refusals before the reserve was all; %+v\n", round, released, refused, l.Stats())
		if err != nil {
			return err
		}
		if min := int(cfg.Reserve) / 300; released < min {
			return fmt.Errorf("%d releases fit into the reserve, want %d", released, min)
		}
		if l, err = restart(l, cfg, round); err != nil {
			return err
		}
		if err := os.Remove(filler); err != nil {
			return err
		}
		if _, err := l.Append(release(0), Durable); err != nil {
			return fmt.Errorf("a release when there is space again: %w", err)
		}
		if err := untilRefusalsAreTaken(l); err != nil {
			return err
		}
		if round == 0 { // in the other round the broker that counted ended
			if err := droppedAreCounted(cfg.Dir, l.Stats().Dropped); err != nil {
				return err
			}
		}
	}
	if err := l.Close(context.Background()); err != nil {
		return err
	}
	rep, err := Verify(cfg.Dir, VerifyOptions{Heads: []Head{head}, PublicKeys: []ed25519.PublicKey{key.Public().(ed25519.PublicKey)}})
	if err != nil {
		return err
	}
	if !rep.OK() || rep.Events[EventDropped] == 0 {
		return fmt.Errorf("the log afterwards: %+v", rep)
	}
	return nil
}

// restart ends the log and opens it again on the disk that is still full, in one of two rounds.
func restart(l *Log, cfg Config, round int) (*Log, error) {
	if round == 0 {
		return l, nil
	}
	if err := l.Close(context.Background()); err != nil {
		return nil, err
	}
	again, err := Open(cfg)
	if err != nil {
		return nil, fmt.Errorf("opening on a full disk: %w", err)
	}
	return again, nil
}

// untilFull writes a file until nothing more fits, also in small pieces.
func untilFull(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			if !isNoSpace(err) {
				return err
			}
			size /= 2
		}
	}
	return f.Sync()
}

// appendUntilFull appends refusals and releases until a release fails.
func appendUntilFull(l *Log) (released, refused int, err error) {
	for {
		_, err := l.Append(Record{Event: EventRefusal, Decision: Refused, Code: "no-policy", Subject: fmt.Sprint(refused)}, Written)
		if err == nil {
			refused++
		} else if !errors.Is(err, ErrNoSpace) {
			return released, refused, fmt.Errorf("a refusal: %w", err)
		}
		low := err != nil
		_, err = l.Append(release(released), Durable)
		if errors.Is(err, ErrNoSpace) {
			return released, refused, nil
		}
		if err != nil {
			return released, refused, fmt.Errorf("a release: %w", err)
		}
		if low {
			released++
		}
		if released > 1_000_000 {
			return released, refused, errors.New("the disk does not get full")
		}
	}
}

// droppedAreCounted waits until the log says how many records were left out.
func droppedAreCounted(dir string, want uint64) error {
	var n uint64
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); runtime.Gosched() {
		n = 0
		err := Query(dir, Filter{Event: EventDropped}, func(r *Record, _ []byte) error {
			n += r.Count
			return nil
		})
		if err != nil || n == want {
			return err
		}
	}
	return fmt.Errorf("%d dropped records are counted, want %d", n, want)
}

// untilRefusalsAreTaken waits for the log to notice the space, which it does within seconds.
func untilRefusalsAreTaken(l *Log) error {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		_, err := l.Append(Record{Event: EventRefusal, Decision: Refused, Code: "no-policy"}, Durable)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ErrNoSpace) {
			return err
		}
		l.regain()
	}
	return errors.New("refusals are still dropped")
}
