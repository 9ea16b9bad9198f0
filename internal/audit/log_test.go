package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keybroker/internal/tuple"
)

const testRealm = "3f9c0000000000000000000000000001"

// keeper is what a broker keeps outside of the log: the realm's identity and the stored head.
type keeper struct {
	dir     string
	private ed25519.PrivateKey

	mu     sync.Mutex
	locked bool
	head   Head
}

func newKeeper(tb testing.TB) *keeper {
	tb.Helper()
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		tb.Fatal(err)
	}
	return &keeper{dir: tb.TempDir(), private: private}
}

func (k *keeper) public() ed25519.PublicKey { return k.private.Public().(ed25519.PublicKey) }

func (k *keeper) sign(_ context.Context, fields ...[]byte) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.locked {
		return nil, errors.New("the realm is locked")
	}
	return ed25519.Sign(k.private, tuple.Encode(append([][]byte{[]byte("keybroker/v1 audit")}, fields...)...)), nil
}

func (k *keeper) load() (Head, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.head, nil
}

func (k *keeper) save(h Head) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.head = h
	return nil
}

func (k *keeper) config() Config {
	return Config{Dir: k.dir, Realm: testRealm, Sign: k.sign, LoadHead: k.load, SaveHead: k.save, Reserve: 64 << 10}
}

// openTest opens the log, with what change makes of the configuration, and closes it at the test's end.
func openTest(tb testing.TB, k *keeper, change func(*Config)) *Log {
	tb.Helper()
	cfg := k.config()
	if change != nil {
		change(&cfg)
	}
	l, err := Open(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close(context.Background()) })
	return l
}

func release(n int) Record {
	return Record{Event: EventRelease, Decision: Granted, Tier: "vm", Subject: fmt.Sprint("vm", n), Names: []string{"disk"}, Epochs: []uint32{1}}
}

// Many goroutines append both ways while files are changed and checkpoints written: nothing is lost, nothing out of order,
// and no head is stored that is ahead of the disk.
func TestConcurrentAppend(t *testing.T) {
	k := newKeeper(t)
	opened := make(chan *Log, 1)
	l := openTest(t, k, func(c *Config) {
		c.MaxFile, c.CheckpointRecords, c.SyncEvery = 16<<10, 50, 4*time.Millisecond
		c.SaveHead = func(h Head) error {
			l := <-opened
			defer func() { opened <- l }()
			if s := l.Stats(); s.Synced < h.Seq {
				t.Errorf("record %d is stored and not synced", h.Seq)
			}
			return k.save(h)
		}
	})
	opened <- l
	const workers, each = 8, 100
	var mu sync.Mutex
	places := make(map[uint64]Hash)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				h, err := l.Append(release(i), Durability((w+i)%2))
				if err != nil {
					t.Error(err)
					return
				}
				if how := Durability((w + i) % 2); how == Durable && l.Stats().Synced < h.Seq {
					t.Errorf("record %d is acknowledged as durable and not synced", h.Seq)
				}
				mu.Lock()
				places[h.Seq] = h.Hash
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	heads := []Head{k.head}
	for seq, hash := range places {
		heads = append(heads, Head{seq, hash})
	}
	rep := verify(t, k.dir, VerifyOptions{Heads: heads, PublicKeys: []ed25519.PublicKey{k.public()}})
	if !rep.OK() || len(places) != workers*each || rep.Events[EventRelease] != workers*each || rep.Files < 5 || rep.Checkpoints < 5 {
		t.Errorf("%d places, %+v", len(places), rep)
	}
	if rep.Head != k.head || rep.Signed.Seq+1 != rep.Head.Seq {
		t.Errorf("after Close: head %v, stored %v, signed %v", rep.Head, k.head, rep.Signed)
	}
	if _, err := l.Append(release(0), Written); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := l.Close(t.Context()); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}

// A Written record is on disk and its head stored within SyncEvery.
func TestWrittenIsSyncedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		l := openTest(t, k, nil)
		for i := range 5 {
			h, err := l.Append(release(i), Written)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond) // of the bubble's clock
			synctest.Wait()
			if s := l.Stats(); s.Synced < h.Seq || s.Saved.Seq < h.Seq {
				t.Errorf("after 100 ms: %+v, record %d", s, h.Seq)
			}
		}
	})
}

// Checkpoints come by themselves: after the first record, then by count and by time, and none while nothing happens.
func TestCheckpointsComeInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		l := openTest(t, k, func(c *Config) { c.CheckpointRecords, c.CheckpointEvery = 10, time.Minute })
		step := func(n int, wait time.Duration, want uint64, why string) {
			t.Helper()
			for i := range n {
				if _, err := l.Append(release(i), Written); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(wait)
			synctest.Wait()
			if rep := verify(t, k.dir, VerifyOptions{}); rep.Checkpoints != want {
				t.Errorf("%s: %d checkpoints, want %d", why, rep.Checkpoints, want)
			}
		}
		step(0, time.Hour, 0, "nothing to sign")
		step(1, time.Second, 1, "the first record")
		step(1, time.Second, 1, "a record more")
		step(0, 2*time.Minute, 2, "after a minute")
		step(0, time.Hour, 2, "nothing happened since")
		step(12, time.Second, 3, "after ten records")
	})
}

// While the realm is locked the log works without checkpoints; when it is open again, one speaks for all of it.
func TestLockedRealm(t *testing.T) {
	k := newKeeper(t)
	k.locked = true
	l := openTest(t, k, nil)
	if _, err := l.Append(Record{Event: EventStart}, Durable); err != nil {
		t.Fatal(err)
	}
	if err := l.Checkpoint(t.Context()); err == nil || l.Stats().CheckpointError == nil {
		t.Fatalf("a checkpoint of a locked realm: %v", err)
	}
	keys := VerifyOptions{PublicKeys: []ed25519.PublicKey{k.public()}}
	if rep := verify(t, k.dir, keys); rep.OK() {
		t.Error("a log without any signature verifies under an identity")
	}
	k.mu.Lock()
	k.locked = false
	k.mu.Unlock()
	if err := l.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rep := verify(t, k.dir, keys); !rep.OK() || rep.Signed.Seq != 1 || l.Stats().Signed != rep.Signed || l.Stats().CheckpointError != nil {
		t.Errorf("%+v, %+v", rep, l.Stats())
	}
}

// What is written while a checkpoint is being signed is signed by the next one, at the latest when the log is closed.
func TestRecordWhileSigning(t *testing.T) {
	k := newKeeper(t)
	var l *Log
	l = openTest(t, k, func(c *Config) {
		c.SyncEvery = time.Hour // no checkpoint but these
		c.Sign = func(ctx context.Context, fields ...[]byte) ([]byte, error) {
			if l != nil && l.Head().Seq < 2 {
				if _, err := l.Append(release(2), Written); err != nil {
					return nil, err
				}
			}
			return k.sign(ctx, fields...)
		}
	})
	if _, err := l.Append(release(1), Written); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := l.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if s := l.Stats(); s.Signed.Seq != 3 || s.Head.Seq != 4 {
		t.Errorf("%d of %d records are signed", s.Signed.Seq, s.Head.Seq)
	}
}

// A signer that hangs holds nothing up, and Close ends it.
func TestHangingSigner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		l := openTest(t, k, func(c *Config) {
			c.Sign = func(ctx context.Context, _ ...[]byte) ([]byte, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
		})
		for i := range 50 {
			if _, err := l.Append(release(i), Durable); err != nil {
				t.Fatal(err)
			}
			time.Sleep(30 * time.Millisecond)
		}
		began := time.Now()
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > 2*signWait {
			t.Errorf("Close took %v", took)
		}
		if rep := verify(t, k.dir, VerifyOptions{Heads: []Head{k.head}}); !rep.OK() || rep.Records != 50 {
			t.Errorf("%+v", rep)
		}
	})
}

// The chain goes on over restarts and files, the oldest of which may be moved away; a missing one between others shows.
func TestRotation(t *testing.T) {
	k := newKeeper(t)
	for range 3 {
		l := openTest(t, k, func(c *Config) { c.MaxFile = 4 << 10 })
		for i := range 30 {
			if _, err := l.Append(release(i), Written); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	opts := VerifyOptions{Heads: []Head{k.head}, PublicKeys: []ed25519.PublicKey{k.public()}}
	rep := verify(t, k.dir, opts)
	if !rep.OK() || rep.Files < 6 || rep.Events[EventRelease] != 90 {
		t.Fatalf("%+v", rep)
	}
	remove := func(n int) {
		if err := os.Remove(filepath.Join(k.dir, fileName(n))); err != nil {
			t.Fatal(err)
		}
	}
	remove(1)
	remove(2)
	if rep := verify(t, k.dir, opts); !rep.OK() || rep.First.Seq < 10 || rep.Signed.Seq == 0 {
		t.Errorf("without the oldest files: %+v", rep)
	}
	openTest(t, k, nil).Close(t.Context())
	remove(4)
	if rep := verify(t, k.dir, opts); rep.OK() || rep.Breaks[0].Kind != "removal" || rep.Breaks[0].File != fileName(5) || rep.Breaks[0].Line != 1 {
		t.Errorf("without a file between: %+v", rep)
	}
}

// A broker that is killed between making a file and writing to it leaves an empty one, or half a line in it.
func TestKilledWhileRotating(t *testing.T) {
	for _, left := range []string{"", `{"seq":`} {
		k := newKeeper(t)
		before := fill(t, k, 5)
		if err := os.WriteFile(filepath.Join(k.dir, fileName(2)), []byte(left), 0o600); err != nil {
			t.Fatal(err)
		}
		l := openTest(t, k, nil)
		if h, err := l.Append(release(1), Durable); err != nil || h.Seq <= uint64(len(before)) {
			t.Errorf("%v, %v", h, err)
		}
		if err := l.Close(t.Context()); err != nil { // until then it may store a head at any moment
			t.Fatal(err)
		}
		if rep := verify(t, k.dir, VerifyOptions{Heads: []Head{k.head}}); !rep.OK() || rep.Last.File != fileName(2) {
			t.Errorf("%+v", rep)
		}
	}
}

func TestOneWriter(t *testing.T) {
	t.Parallel()
	k := newKeeper(t)
	l := openTest(t, k, nil)
	if _, err := Open(k.config()); !errors.Is(err, ErrHeld) {
		t.Errorf("a second broker: %v", err)
	}
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	openTest(t, k, nil)
}

// Somebody who removes or cuts the file while the broker writes to it stops the broker's releases.
func TestFileTakenAway(t *testing.T) {
	for name, take := range map[string]func(path string) error{
		"removed": os.Remove,
		"cut":     func(path string) error { return os.Truncate(path, 10) },
	} {
		l := openTest(t, newKeeper(t), func(c *Config) { c.SyncEvery = time.Hour })
		for i := range 3 {
			if _, err := l.Append(release(i), Durable); err != nil {
				t.Fatal(err)
			}
		}
		if err := take(l.Stats().File); err != nil {
			t.Fatal(err)
		}
		_, err := l.Append(release(4), Durable)
		if name == "cut" { // the write made the file longer again, with a hole: the next verify or Open sees that
			if rep := verify(t, l.cfg.Dir, VerifyOptions{}); rep.OK() {
				t.Errorf("%s: %+v", name, rep)
			}
			continue
		}
		if !errors.Is(err, ErrFailed) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := l.Append(release(5), Written); !errors.Is(err, ErrFailed) || l.Stats().Err == nil {
			t.Errorf("%s, after that: %v", name, err)
		}
	}
}

func TestConfigIsComplete(t *testing.T) {
	k := newKeeper(t)
	for name, change := range map[string]func(*Config){
		"Dir": func(c *Config) { c.Dir = "" }, "Realm": func(c *Config) { c.Realm = "" }, "Sign": func(c *Config) { c.Sign = nil },
		"LoadHead": func(c *Config) { c.LoadHead = nil }, "SaveHead": func(c *Config) { c.SaveHead = nil },
	} {
		cfg := k.config()
		change(&cfg)
		if l, err := Open(cfg); err == nil || l != nil {
			t.Errorf("without %s: opened", name)
		}
	}
}

func TestQuery(t *testing.T) {
	k := newKeeper(t)
	l := openTest(t, k, func(c *Config) { c.MaxFile = 2 << 10 })
	var middle time.Time
	for i := range 40 {
		if i == 20 {
			middle = time.Now()
		}
		rec := release(i % 4)
		if i%5 == 0 {
			rec = Record{Event: EventRefusal, Decision: Refused, Code: "no-policy", Tier: "vm", Subject: fmt.Sprint("vm", i%4)}
		}
		if _, err := l.Append(rec, Written); err != nil {
			t.Fatal(err)
		}
	}
	count := func(f Filter) (n int) {
		t.Helper()
		var last uint64
		err := Query(k.dir, f, func(r *Record, line []byte) error {
			if n++; r.Seq <= last || !bytes.Equal(r.Encode(nil), line) {
				t.Errorf("record %d after %d: %s", r.Seq, last, line)
			}
			last = r.Seq
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		return n
	}
	for _, c := range []struct {
		name   string
		filter Filter
		want   int
	}{
		{"refusals", Filter{Event: EventRefusal}, 8},
		{"code", Filter{Code: "no-policy"}, 8},
		{"subject", Filter{Subject: "vm1"}, 10},
		{"name", Filter{Subject: "disk"}, 32},
		{"since", Filter{Since: middle, Event: EventRefusal}, 4},
		{"until", Filter{Until: middle, Event: EventRefusal}, 4},
		{"tier", Filter{Tier: "snp"}, 0},
		{"limit", Filter{Tier: "vm", Limit: 7}, 7},
		{"large limit", Filter{Tier: "vm", Limit: 100}, 40},
	} {
		if n := count(c.filter); n != c.want {
			t.Errorf("%s: %d records, want %d", c.name, n, c.want)
		}
	}
	newest := Filter{Tier: "vm", Limit: 2}
	var seqs []uint64
	_ = Query(k.dir, newest, func(r *Record, _ []byte) error { seqs = append(seqs, r.Seq); return nil })
	if h := l.Head(); len(seqs) != 2 || seqs[1]+2 < h.Seq {
		t.Errorf("the newest two are %v, the head is %d", seqs, h.Seq)
	}
	stop := errors.New("enough")
	if err := Query(k.dir, Filter{}, func(*Record, []byte) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("%v", err)
	}
	l.Close(t.Context())
	first := readLines(t, k.dir, 1)
	first[2] = []byte("x")
	writeLines(t, k.dir, first)
	if err := Query(k.dir, Filter{}, func(*Record, []byte) error { return nil }); !errors.Is(err, ErrBroken) {
		t.Errorf("an unreadable line: %v", err)
	}
}
