package audit

import (
	"fmt"
	"sync"
	"time"
)

// CoalescerConfig is what a Coalescer needs.
type CoalescerConfig struct {
	// Append writes a record; Log.Append does.
	Append func(Record, Durability) (Head, error)
	// Window is how long repetitions are counted before they are written; 0 means one minute.
	Window time.Duration
	// Peers is how many pairs of peer and code are told apart in a window; all others are counted together; 0 means 1024.
	Peers int
}

// A Coalescer writes refusals, and of those that repeat within a window only how many there were: whoever asks again and again
// makes two records a minute, and not a full disk. It may be used by many goroutines at once.
type Coalescer struct {
	cfg CoalescerConfig

	mu     sync.Mutex
	open   map[refusal]*repeated
	timer  *time.Timer // runs while open has something
	closed bool
}

// refusal is what repetitions have in common.
type refusal struct{ peer, code string }

// others is the peer under which refusals are counted that found the table full.
const others = "(others)"

type repeated struct {
	last  Record
	count uint64 // that are not written
}

// NewCoalescer returns a Coalescer. Close writes what it still counts.
func NewCoalescer(cfg CoalescerConfig) *Coalescer {
	orDefault(&cfg.Window, time.Minute)
	orDefault(&cfg.Peers, 1024)
	return &Coalescer{cfg: cfg, open: make(map[refusal]*repeated)}
}

// Refuse records a refusal. The peer is what the transport knows of who asked, without what changes from one connection to
// the next; rec.Code is the refusal's code. The first of a peer and code is written (Written) before Refuse returns; further
// ones are counted, and written as one record, with Count, at the window's end. It reports whether this one is written; the
// error is Append's.
func (c *Coalescer) Refuse(peer string, rec Record) (written bool, err error) {
	if rec.Peer == "" {
		rec.Peer = peer
	}
	if !c.admit(refusal{peer, rec.Code}, rec) {
		return false, nil
	}
	_, err = c.cfg.Append(rec, Written)
	return true, err
}

// admit says whether the refusal is to be written now; otherwise it is counted.
func (c *Coalescer) admit(key refusal, rec Record) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return true
	}
	r, ok := c.open[key]
	if !ok && len(c.open) >= c.cfg.Peers {
		key, rec = refusal{peer: others}, Record{Event: rec.Event, Decision: rec.Decision, Peer: others}
		r, ok = c.open[key]
	}
	if ok {
		r.last = rec
		r.count++
		return false
	}
	c.open[key] = &repeated{last: rec}
	if c.timer == nil {
		c.timer = time.AfterFunc(c.cfg.Window, c.end)
	}
	if key.peer == others {
		c.open[key].count = 1
	}
	return key.peer != others
}

// end closes the window and writes what was counted in it.
func (c *Coalescer) end() {
	c.mu.Lock()
	counted := c.open
	c.open, c.timer = make(map[refusal]*repeated), nil
	c.mu.Unlock()
	for _, r := range counted {
		if r.count == 0 {
			continue
		}
		rec := r.last
		rec.Count = r.count
		if rec.Peer == others {
			rec.Reason = fmt.Sprintf("%d refusals of too many peers to tell apart", r.count)
		}
		_, _ = c.cfg.Append(rec, Written) // a full disk is counted there
	}
}

// Close writes what is still counted. What is refused later is written one by one.
func (c *Coalescer) Close() {
	c.mu.Lock()
	c.closed = true
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	c.end()
}
