package audit

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// written collects what a Coalescer appends.
type written struct {
	mu      sync.Mutex
	records []Record
}

func (w *written) append(r Record, _ Durability) (Head, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.records = append(w.records, r)
	return Head{Seq: uint64(len(w.records))}, nil
}

// take returns what was written since the last call, and how many refusals that is.
func (w *written) take() (records []Record, refusals int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	records, w.records = w.records, nil
	for _, r := range records {
		refusals += int(max(r.Count, 1))
	}
	return records, refusals
}

func refuse(t *testing.T, f *Coalescer, peer, code string) {
	t.Helper()
	if _, err := f.Refuse(peer, Record{Event: EventRefusal, Decision: Refused, Code: code}); err != nil {
		t.Error(err)
	}
}

func TestRepeatedRefusalsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w written
		f := NewCoalescer(CoalescerConfig{Append: w.append})
		for range 1000 {
			refuse(t, f, "uid 1001", "no-policy")
		}
		refuse(t, f, "uid 1001", "bad-host")
		refuse(t, f, "uid 1002", "no-policy")
		if got, _ := w.take(); len(got) != 3 || got[0].Peer != "uid 1001" || got[0].Count != 0 {
			t.Errorf("at once: %+v", got)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got, n := w.take(); len(got) != 1 || n != 999 || got[0].Peer != "uid 1001" || got[0].Code != "no-policy" {
			t.Errorf("at the window's end: %+v", got)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if got, _ := w.take(); len(got) != 0 {
			t.Errorf("afterwards: %+v", got)
		}
		refuse(t, f, "uid 1001", "no-policy")
		refuse(t, f, "uid 1001", "no-policy")
		f.Close()
		if got, n := w.take(); len(got) != 2 || n != 2 {
			t.Errorf("in the next window, closed: %+v", got)
		}
		refuse(t, f, "uid 1001", "no-policy")
		if got, _ := w.take(); len(got) != 1 {
			t.Errorf("after Close: %+v", got)
		}
	})
}

// However many peers there are, the table and what is written stay bounded, and every refusal is counted.
func TestManyPeersAreCountedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w written
		f := NewCoalescer(CoalescerConfig{Append: w.append, Peers: 10})
		for i := range 500 {
			refuse(t, f, fmt.Sprint("cid ", i), fmt.Sprint("code ", i))
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got, n := w.take(); len(got) != 11 || n != 500 {
			t.Errorf("%d records of %d refusals, want 11 of 500", len(got), n)
		}
	})
}
