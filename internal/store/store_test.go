package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

func openNew(t *testing.T) (*Store, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	return reopen(t, path), path
}

func reopen(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t *testing.T, s *Store, bucket, key, value string) {
	t.Helper()
	if err := s.Update(func(tx Tx) error { return tx.Put(bucket, key, []byte(value)) }); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, s *Store, bucket, key string) (string, error) {
	t.Helper()
	var v []byte
	err := s.View(func(tx Tx) (err error) {
		v, err = tx.Get(bucket, key)
		return err
	})
	return string(v), err
}

func TestReadWhatWasWritten(t *testing.T) {
	s, path := openNew(t)
	put(t, s, "tickets", "a", "1")
	put(t, s, "tickets", "b", "")
	err := s.Update(func(tx Tx) error {
		return errors.Join(tx.Put("tickets", "c", []byte("3")), tx.Delete("tickets", "a"), tx.Delete("none", "x"))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = reopen(t, path)
	if v, err := get(t, s, "tickets", "c"); v != "3" || err != nil {
		t.Errorf("c = %q, %v", v, err)
	}
	if v, err := get(t, s, "tickets", "b"); v != "" || err != nil {
		t.Errorf("b, which is empty and there = %q, %v", v, err)
	}
	for _, where := range [][2]string{{"tickets", "a"}, {"nothing", "a"}} {
		if _, err := get(t, s, where[0], where[1]); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v: %v, want ErrNotFound", where, err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

// Inside one transaction Get and ForEach see what it wrote itself, and ForEach may write to what it walks.
func TestTransactionSeesItsOwnWrites(t *testing.T) {
	s, _ := openNew(t)
	put(t, s, "b", "kept", "old")
	put(t, s, "b", "gone", "old")
	err := s.Update(func(tx Tx) error {
		if err := errors.Join(tx.Put("b", "new", []byte("new")), tx.Delete("b", "gone")); err != nil {
			return err
		}
		if _, err := tx.Get("b", "gone"); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleted key: %v", err)
		}
		return tx.ForEach("b", func(k string, v []byte) error { return tx.Put("b", k+"+", append(v, '+')) })
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	err = s.View(func(tx Tx) error {
		return tx.ForEach("b", func(k string, v []byte) error {
			got = append(got, k+"="+string(v))
			return nil
		})
	})
	if want := []string{"kept=old", "kept+=old+", "new=new", "new+=new+"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

// An update that fails or panics leaves nothing, and the ones that share its commit are not harmed.
func TestFailedUpdateLeavesNothing(t *testing.T) {
	s, _ := openNew(t)
	refused := errors.New("refused")
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			defer func() { _ = recover() }()
			err := s.Update(func(tx Tx) error {
				if err := tx.Put("b", strconv.Itoa(i), []byte("v")); err != nil {
					return err
				}
				switch i % 3 {
				case 1:
					return refused
				case 2:
					panic("a bug")
				}
				return nil
			})
			if want := map[int]error{0: nil, 1: refused}[i%3]; !errors.Is(err, want) || (err == nil) != (want == nil) {
				t.Errorf("update %d: %v, want %v", i, err, want)
			}
		})
	}
	wg.Wait()
	for i := range 60 {
		if _, err := get(t, s, "b", strconv.Itoa(i)); (err == nil) != (i%3 == 0) {
			t.Errorf("key %d: %v", i, err)
		}
	}
}

// Each update sees the one before it, however many come at once.
func TestUpdatesAreSerial(t *testing.T) {
	s, _ := openNew(t)
	const workers, each = 16, 20
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				err := s.Update(func(tx Tx) error {
					v, err := tx.Get("b", "n")
					if err != nil && !errors.Is(err, ErrNotFound) {
						return err
					}
					n, _ := strconv.Atoi(string(v))
					return tx.Put("b", "n", []byte(strconv.Itoa(n+1)))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if v, err := get(t, s, "b", "n"); v != strconv.Itoa(workers*each) || err != nil {
		t.Errorf("counted %s, %v; want %d", v, err, workers*each)
	}
}

func TestRefusedWrites(t *testing.T) {
	s, path := openNew(t)
	for name, fn := range map[string]func(Tx) error{
		"no key":        func(tx Tx) error { return tx.Put("b", "", nil) },
		"no bucket":     func(tx Tx) error { return tx.Put("", "k", nil) },
		"long key":      func(tx Tx) error { return tx.Put("b", string(make([]byte, MaxKey+1)), nil) },
		"long value":    func(tx Tx) error { return tx.Put("b", "k", make([]byte, MaxValue+1)) },
		"own bucket":    func(tx Tx) error { return tx.Put(systemBucket, formatKey, []byte("9")) },
		"own bucket, d": func(tx Tx) error { return tx.Delete(systemBucket, formatKey) },
	} {
		if err := s.Update(fn); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := s.View(func(tx Tx) error { return tx.Put("b", "k", nil) }); !errors.Is(err, ErrReadOnly) {
		t.Errorf("writing in View: %v", err)
	}
	s.Close()
	ro, err := OpenReadOnly(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if err := ro.Update(func(tx Tx) error { return tx.Put("b", "k", nil) }); err == nil {
		t.Error("a store opened for reading was written")
	}
}

func TestSecondBrokerIsRefused(t *testing.T) {
	t.Parallel()
	s, path := openNew(t)
	for name, open := range map[string]func(string) (*Store, error){"Open": Open, "OpenReadOnly": OpenReadOnly} {
		if second, err := open(path); !errors.Is(err, ErrHeld) || second != nil {
			t.Errorf("%s of a held file: %v, want ErrHeld", name, err)
		}
	}
	s.Close()
	reopen(t, path)
}

func TestNewerFormatIsRefused(t *testing.T) {
	for value, want := range map[string]error{"2": ErrNewer, "0": ErrCorrupt, "x": ErrCorrupt, "": ErrCorrupt} {
		s, path := openNew(t)
		s.Close()
		db, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte(systemBucket)).Put([]byte(formatKey), []byte(value))
		})
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the first one must not have kept the lock
			if _, err := Open(path); !errors.Is(err, want) {
				t.Errorf("format %q: %v, want %v", value, err, want)
			}
		}
	}
}

// A broker that is killed while it makes the file leaves one under another name, which the next one removes.
func TestUnfinishedFileIsNoObstacle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	left := path + ".new-1234"
	if err := os.WriteFile(left, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := reopen(t, path)
	put(t, s, "b", "k", "v")
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", left, err)
	}
}

// A new file is written through its descriptor: what takes its name meanwhile stays as it is.
func TestInitialiseOpensNothingByName(t *testing.T) {
	dir := t.TempDir()
	temp, err := os.CreateTemp(dir, "state.db.new-")
	if err != nil {
		t.Fatal(err)
	}
	defer temp.Close()
	victim, kept := filepath.Join(dir, "victim"), filepath.Join(dir, "kept")
	if err := errors.Join(os.WriteFile(victim, nil, 0o600), os.Rename(temp.Name(), kept), os.Symlink(victim, temp.Name())); err != nil {
		t.Fatal(err)
	}
	if err := initialise(temp); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(victim); err != nil || len(got) != 0 {
		t.Errorf("%d octets were written through the link, %v", len(got), err)
	}
	reopen(t, kept)
}

// A pipe or a link in the file's place is refused, and nobody waits for the pipe's other end.
func TestOnlyRegularFiles(t *testing.T) {
	dir := t.TempDir()
	pipe, link, target := filepath.Join(dir, "pipe"), filepath.Join(dir, "link"), filepath.Join(dir, "target")
	if err := errors.Join(unix.Mkfifo(pipe, 0o600), os.Symlink(target, link)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, link} {
		for name, open := range map[string]func(string) (*Store, error){"Open": Open, "OpenReadOnly": OpenReadOnly} {
			done := make(chan error, 1)
			go func() { _, err := open(path); done <- err }()
			select {
			case err := <-done:
				if err == nil {
					t.Errorf("%s took %s", name, path)
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("%s of %s hangs", name, path)
			}
		}
	}
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link's target: %v", err)
	}
}

// Two brokers that start at once on an empty folder: one has the store, the other is told so.
func TestTwoCreateAtOnce(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	var wg sync.WaitGroup
	results := make(chan error, 4)
	for range cap(results) {
		wg.Go(func() {
			_, err := Open(path)
			results <- err
		})
	}
	wg.Wait()
	close(results)
	won := 0
	for err := range results {
		if err == nil {
			won++
		} else if !errors.Is(err, ErrHeld) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d have the store", won)
	}
}

func BenchmarkUpdate(b *testing.B) {
	s, err := Open(filepath.Join(b.TempDir(), "state.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	b.SetParallelism(64)
	value := bytes.Repeat([]byte("v"), 100)
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			key := fmt.Sprint(i % 1000)
			if err := s.Update(func(tx Tx) error { return tx.Put("b", key, value) }); err != nil {
				b.Error(err)
			}
		}
	})
}
