package store

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The test binary is also the child of TestKillMinusNine and TestPanicEndsTheProcess.
func TestMain(m *testing.M) {
	if path := os.Getenv("KEYBROKER_TEST_PANIC"); path != "" {
		fmt.Println("goes on", panicking(path))
		os.Exit(0)
	}
	if path := os.Getenv("KEYBROKER_TEST_STORE"); path != "" {
		fmt.Println("error", countUp(path))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// countUp counts up in the store and prints each number after Update returned, until it is killed.
func countUp(path string) error {
	s, err := Open(path)
	if err != nil {
		return err
	}
	n, err := stored(s)
	for n++; err == nil; n++ {
		err = s.Update(func(tx Tx) error {
			for i := range 20 { // enough to split and free pages
				if err := tx.Put("b", fmt.Sprintf("%d-%d", n%50, i), bytes.Repeat([]byte{byte(n)}, 200)); err != nil {
					return err
				}
			}
			return tx.Put("b", "n", []byte(strconv.Itoa(n)))
		})
		if err == nil {
			fmt.Println(n)
		}
	}
	return err
}

func stored(s *Store) (int, error) {
	n := 0
	err := s.View(func(tx Tx) error {
		v, err := tx.Get("b", "n")
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		n, err = strconv.Atoi(string(v))
		return err
	})
	return n, err
}

// After a kill -9 at any moment the last update that was acknowledged is there.
func TestKillMinusNine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	for round := range 8 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), "KEYBROKER_TEST_STORE="+path)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		last := killAfter(t, child, bufio.NewScanner(out), 5+7*round)
		s := reopen(t, path)
		if n, err := stored(s); err != nil || n != last && n != last+1 { // one more may be written and not yet acknowledged
			t.Fatalf("round %d: %d is stored, %d was acknowledged (%v)", round, n, last, err)
		}
		s.Close()
	}
}

// killAfter kills the child once it has acknowledged n updates and returns the last one that it did.
func killAfter(t *testing.T, child *exec.Cmd, lines *bufio.Scanner, n int) int {
	t.Helper()
	watchdog := time.AfterFunc(time.Minute, func() { child.Process.Kill() })
	defer watchdog.Stop()
	last := 0
	for seen := 0; lines.Scan(); {
		v, err := strconv.Atoi(lines.Text())
		if err != nil {
			t.Fatalf("the child says %q", lines.Text())
		}
		last = v
		if seen++; seen == n {
			child.Process.Kill()
		}
	}
	_ = child.Wait()
	if last == 0 {
		t.Fatal("the child wrote nothing")
	}
	return last
}

// sample is a store with branch pages, leaf pages, inline buckets and free pages.
func sample(t *testing.T) (data []byte, path string) {
	t.Helper()
	s, path := openNew(t)
	for round := range 3 {
		err := s.Update(func(tx Tx) error {
			for i := range 60 {
				if err := tx.Put("big", fmt.Sprintf("%03d", i), bytes.Repeat([]byte{byte(round)}, 150)); err != nil {
					return err
				}
			}
			return tx.Put("small", "k", []byte("v"))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data, path
}

// A file that is cut anywhere is refused with an error, by the check and so before bbolt can touch it.
func TestCutFile(t *testing.T) {
	data, path := sample(t)
	im, err := newestMeta(bytes.NewReader(data), uint64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	inUse := int(im.pages * im.pageSize)
	for n := 0; n < inUse; n += 97 {
		if err := checkImage(bytes.NewReader(data[:n]), uint64(n)); err == nil {
			t.Fatalf("cut to %d of %d octets: taken", n, inUse)
		}
	}
	for _, n := range []int{0, 1, 4096, 8192, inUse / 2, inUse - 1} {
		if err := os.WriteFile(path, data[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); !errors.Is(err, ErrCorrupt) {
			t.Errorf("cut to %d octets: %v, want ErrCorrupt", n, err)
		}
		if after, _ := os.ReadFile(path); !bytes.Equal(after, data[:n]) {
			t.Errorf("cut to %d octets: Open changed it", n)
		}
	}
}

// Whatever octet is changed: the check finds it, or bbolt reads and writes the file without a panic.
func TestFlippedOctets(t *testing.T) {
	data, path := sample(t)
	taken := 0
	for at := range data {
		if at%4096 > 200 && at%61 != 0 { // every octet of headers and elements, some of the others
			continue
		}
		for _, flip := range []byte{0xff, 0x01} {
			data[at] ^= flip
			if checkImage(bytes.NewReader(data), uint64(len(data))) == nil {
				taken++
				if taken%8 == 0 {
					useFlipped(t, path, data, at)
				}
			}
			data[at] ^= flip
		}
	}
	if taken == 0 {
		t.Error("no change was taken: the test tests nothing")
	}
}

func useFlipped(t *testing.T, path string, data []byte, at int) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(path)
	if err != nil {
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
			t.Errorf("octet %d: %v", at, err)
		}
		return
	}
	defer s.Close()
	err = s.Update(func(tx Tx) error {
		for _, b := range []string{"big", "small"} {
			if err := tx.ForEach(b, func(string, []byte) error { return nil }); err != nil {
				return err
			}
		}
		return tx.Put("big", "new", []byte("v"))
	})
	if err != nil {
		t.Errorf("octet %d: %v", at, err)
	}
}

// Random damage of the parts that describe the file never gets past the check into a panic.
func FuzzCheck(f *testing.F) {
	f.Add(uint16(0), []byte{1, 2, 3})
	f.Add(uint16(3*4096), []byte{0xff, 0xff, 0xff, 0xff})
	dir := f.TempDir()
	clean := filepath.Join(dir, "clean.db")
	s, err := Open(clean)
	if err != nil {
		f.Fatal(err)
	}
	if err := s.Update(func(tx Tx) error { return tx.Put("b", "k", make([]byte, 5000)) }); err != nil {
		f.Fatal(err)
	}
	s.Close()
	data, err := os.ReadFile(clean)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, at uint16, patch []byte) {
		damaged := bytes.Clone(data)
		copy(damaged[int(at)%len(damaged):], patch)
		err := checkImage(bytes.NewReader(damaged), uint64(len(damaged)))
		if err != nil && strings.Contains(err.Error(), "runtime error") {
			t.Error(err)
		}
		if bytes.Equal(damaged, data) && err != nil {
			t.Errorf("the undamaged file: %v", err)
		}
	})
}

// branches lists where in the file the elements of branch pages have their keys.
func branches(data []byte) (keys [][2]int) {
	for page := 2 * os.Getpagesize(); page < len(data); page += os.Getpagesize() {
		p := data[page:]
		if binary.NativeEndian.Uint16(p[8:]) != branchFlag {
			continue
		}
		for i := range int(binary.NativeEndian.Uint16(p[10:])) {
			at := headerSize + i*elementSize
			key := page + at + int(u32(p[at:]))
			keys = append(keys, [2]int{key, key + int(u32(p[at+4:]))})
		}
	}
	return keys
}

// bbolt panics at an update where a branch page has another key for a page than that page's first, also one in the right order.
func TestKeysOfBranches(t *testing.T) {
	s, path := openNew(t)
	err := s.Update(func(tx Tx) error {
		for i := range 60 {
			if err := tx.Put("big", fmt.Sprintf("%03d", 2*i), make([]byte, 150)); err != nil {
				return err
			}
		}
		return nil
	})
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	keys := branches(data)
	for _, key := range keys {
		for at := key[0]; at < key[1]; at++ {
			data[at] ^= 1
			if err := checkImage(bytes.NewReader(data), uint64(len(data))); err == nil {
				t.Errorf("key %q of a branch: taken", data[key[0]:key[1]])
			}
			data[at] ^= 1
		}
	}
	if len(keys) < 3 {
		t.Errorf("%d keys: the test tests nothing", len(keys))
	}
}

// Whatever is put and deleted, the check takes the file.
func TestCheckTakesWhatIsWritten(t *testing.T) {
	s, path := openNew(t)
	s.db.NoSync = true
	r := rand.New(rand.NewPCG(1, 2))
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for round := range 150 {
		low := r.IntN(1000)
		err := s.Update(func(tx Tx) (err error) {
			for n := range 100 {
				key := strings.Repeat("k", 150) + fmt.Sprintf("%04d", low+r.IntN(200))
				if round/20%2 == 0 && n%4 != 0 {
					err = tx.Put("b", key, make([]byte, r.IntN(700)))
				} else {
					err = tx.Delete("b", key)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := check(f); err != nil {
			t.Fatalf("after round %d: %v", round, err)
		}
	}
}

// panicking makes an update in which bbolt panics, below somebody who recovers from panics.
func panicking(path string) (recovered any) {
	defer func() { recovered = recover() }()
	s, err := Open(path)
	if err != nil {
		return err
	}
	return s.Update(func(tx Tx) error {
		tx.tx.OnCommit(func() { panic("a damaged page") })
		return tx.Put("b", "k", nil)
	})
}

// When bbolt panics in an update the process ends and says so, whoever recovers from panics: its locks would stay taken.
func TestPanicEndsTheProcess(t *testing.T) {
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "KEYBROKER_TEST_PANIC="+filepath.Join(t.TempDir(), "state.db"))
	out, err := child.CombinedOutput()
	var status *exec.ExitError
	if !errors.As(err, &status) || !strings.Contains(string(out), "the state file cannot be written, so this process ends: bbolt panicked: a damaged page") {
		t.Errorf("%v:\n%s", err, out)
	}
}
