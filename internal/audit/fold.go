package audit

import (
	"fmt"
	"sync"
	"time"
)

// FolderConfig is what a Folder needs.
type FolderConfig struct {
	// Append writes a record; Log.Append does.
	Append func(Record, Durability) (Head, error)
	// Window is how long repetitions are counted before they are written; 0 means one minute.
	Window time.Duration
	// Peers is how many pairs of peer and code are told apart in a window; all others are counted together; 0 means 1024.
	Peers int
}

// A Folder writes refusals, and of those that repeat within a window only how many there were: whoever asks again and again
// makes two records a minute, and not a full disk. It may be used by many goroutines at once.
type Folder struct {
	cfg FolderConfig

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

// NewFolder returns a Folder. Close writes what it still counts.
func NewFolder(cfg FolderConfig) *Folder {
	orDefault(&cfg.Window, time.Minute)
	orDefault(&cfg.Peers, 1024)
	return &Folder{cfg: cfg, open: make(map[refusal]*repeated)}
}

// Refuse records a refusal. The peer is what the transport knows of who asked, without what changes from one connection to
// the next; rec.Code is the refusal's code. The first of a peer and code is written (Written) before Refuse returns; further
// ones are counted, and written as one record, with Count, at the window's end. It reports whether this one is written; the
// error is Append's.
func (f *Folder) Refuse(peer string, rec Record) (written bool, err error) {
	if rec.Peer == "" {
		rec.Peer = peer
	}
	if !f.admit(refusal{peer, rec.Code}, rec) {
		return false, nil
	}
	_, err = f.cfg.Append(rec, Written)
	return true, err
}

// admit says whether the refusal is to be written now; otherwise it is counted.
func (f *Folder) admit(key refusal, rec Record) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return true
	}
	r, ok := f.open[key]
	if !ok && len(f.open) >= f.cfg.Peers {
		key, rec = refusal{peer: others}, Record{Event: rec.Event, Decision: rec.Decision, Peer: others}
		r, ok = f.open[key]
	}
	if ok {
		r.last = rec
		r.count++
		return false
	}
	f.open[key] = &repeated{last: rec}
	if f.timer == nil {
		f.timer = time.AfterFunc(f.cfg.Window, f.end)
	}
	if key.peer == others {
		f.open[key].count = 1
	}
	return key.peer != others
}

// end closes the window and writes what was counted in it.
func (f *Folder) end() {
	f.mu.Lock()
	counted := f.open
	f.open, f.timer = make(map[refusal]*repeated), nil
	f.mu.Unlock()
	for _, r := range counted {
		if r.count == 0 {
			continue
		}
		rec := r.last
		rec.Count = r.count
		if rec.Peer == others {
			rec.Reason = fmt.Sprintf("%d refusals of too many peers to tell apart", r.count)
		}
		_, _ = f.cfg.Append(rec, Written) // a full disk is counted there
	}
}

// Close writes what is still counted. What is refused later is written one by one.
func (f *Folder) Close() {
	f.mu.Lock()
	f.closed = true
	if f.timer != nil {
		f.timer.Stop()
	}
	f.mu.Unlock()
	f.end()
}
