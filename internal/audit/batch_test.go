package audit

import (
	"context"
	"crypto/ed25519"
	"errors"
	"runtime"
	"sync"
	"testing"
	"time"
)

// appendAtOnce appends records in one batch, and returns what became of each.
func appendAtOnce(l *Log, records []Record) ([]Head, []error) {
	heads, errs := make([]Head, len(records)), make([]error, len(records))
	l.mu.Lock()
	var callers sync.WaitGroup
	for n, r := range records {
		callers.Go(func() { heads[n], errs[n] = l.Append(r, Written) })
	}
	for joined := 0; joined < len(records); runtime.Gosched() {
		l.joining.Lock()
		if l.next != nil {
			joined = len(l.next.entries)
		}
		l.joining.Unlock()
	}
	l.mu.Unlock()
	callers.Wait()
	return heads, errs
}

func (k *keeper) lock(locked bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.locked = locked
}

// Of records that are written together each gets its own place; where there is only the reserve, each its own answer.
func TestBatch(t *testing.T) {
	for name, low := range map[string]bool{"space": false, "only the reserve": true} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper(t)
			l := openTest(t, k, func(c *Config) { c.SyncEvery = time.Hour }) // nothing wakes the keeper, which would see that there is space
			l.mu.Lock()
			l.low = low
			l.mu.Unlock()
			var records []Record
			for n := range 50 {
				records = append(records, release(n), Record{Event: EventRefusal, Decision: Refused, Code: "no-policy", Tier: "vm"})
			}
			k.lock(true) // so that no checkpoint comes in between
			before := l.Head()
			heads, errs := appendAtOnce(l, records)
			kept := []Head{before}
			for n, r := range records {
				if lost := low && r.Event == EventRefusal; lost != errors.Is(errs[n], ErrNoSpace) || lost != (heads[n] == Head{}) || !lost && errs[n] != nil {
					t.Errorf("record %d, a %s: %v, %v", n, r.Event, heads[n], errs[n])
				}
				if errs[n] == nil {
					kept = append(kept, heads[n])
				}
			}
			if s := l.Stats(); s.Head.Seq != before.Seq+uint64(len(kept)-1) || low != (s.Dropped == 50) {
				t.Errorf("%d kept, %+v", len(kept), s)
			}
			k.lock(false)
			if err := l.Close(context.Background()); err != nil {
				t.Fatal(err)
			}
			if rep := verify(t, k.dir, VerifyOptions{Heads: kept, PublicKeys: []ed25519.PublicKey{k.public()}}); !rep.OK() {
				t.Errorf("%+v", rep)
			}
		})
	}
}
