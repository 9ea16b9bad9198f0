package store

import (
	"bytes"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"sync"

	"go.etcd.io/bbolt"
)

// Limits of what Put takes, in octets.
const (
	MaxName  = 255     // of a bucket
	MaxKey   = 4096    // of a key
	MaxValue = 1 << 20 // of a value
)

// Tx is one transaction. It is valid inside the function that got it, for that goroutine alone.
type Tx struct {
	tx     *bbolt.Tx
	writes map[string]map[string]write // nil in View; what this transaction changed, not yet in tx
}

// write is a value that is put, or a key that is deleted.
type write struct {
	value   []byte
	deleted bool
}

// Get returns a copy of the key's value, which may be empty. A key or bucket that is not there is ErrNotFound.
func (t Tx) Get(bucket, key string) ([]byte, error) {
	if w, ok := t.writes[bucket][key]; ok {
		if w.deleted {
			return nil, fmt.Errorf("%s %q: %w", bucket, key, ErrNotFound)
		}
		return bytes.Clone(w.value), nil
	}
	if b := t.tx.Bucket([]byte(bucket)); b != nil {
		if v := b.Get([]byte(key)); v != nil {
			return append([]byte{}, v...), nil
		}
	}
	return nil, fmt.Errorf("%s %q: %w", bucket, key, ErrNotFound)
}

// Put sets the key's value, of which it keeps a copy; the bucket is made where there is none.
func (t Tx) Put(bucket, key string, value []byte) error {
	if len(value) > MaxValue {
		return fmt.Errorf("writing %s %q: a value of %d octets, at most %d are taken", bucket, key, len(value), MaxValue)
	}
	return t.write(bucket, key, write{value: append([]byte{}, value...)})
}

// Delete removes the key. One that is not there is no error.
func (t Tx) Delete(bucket, key string) error {
	return t.write(bucket, key, write{deleted: true})
}

func (t Tx) write(bucket, key string, w write) error {
	switch {
	case t.writes == nil:
		return fmt.Errorf("writing %s %q: %w", bucket, key, ErrReadOnly)
	case len(bucket) == 0 || len(bucket) > MaxName || bucket == systemBucket:
		return fmt.Errorf("writing %q %q: not a bucket's name", bucket, key)
	case len(key) == 0 || len(key) > MaxKey:
		return fmt.Errorf("writing into %s: a key of %d octets, 1 to %d are taken", bucket, len(key), MaxKey)
	}
	if t.writes[bucket] == nil {
		t.writes[bucket] = make(map[string]write)
	}
	t.writes[bucket][key] = w
	return nil
}

// ForEach calls fn with every key of the bucket and a copy of its value, sorted by key, and stops at fn's first error. A
// bucket that is not there is an empty one. fn sees the bucket as it was when ForEach began, and may write to it.
func (t Tx) ForEach(bucket string, fn func(key string, value []byte) error) error {
	all := make(map[string][]byte)
	if b := t.tx.Bucket([]byte(bucket)); b != nil {
		for c, k, v := first(b); k != nil; k, v = c.Next() {
			all[string(k)] = append([]byte{}, v...)
		}
	}
	for k, w := range t.writes[bucket] {
		if w.deleted {
			delete(all, k)
		} else {
			all[k] = bytes.Clone(w.value)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(all)) {
		if err := fn(k, all[k]); err != nil {
			return err
		}
	}
	return nil
}

func first(b *bbolt.Bucket) (c *bbolt.Cursor, k, v []byte) {
	c = b.Cursor()
	k, v = c.First()
	return c, k, v
}

// endOnPanic ends the process, deferred, when bbolt panics while it writes: it does so over a file that is damaged in a way that
// check does not see, and keeps its locks. Who recovers from panics, as net/http does, would go on in a broker in which every
// further update waits for ever. What is committed is safe, and the next start checks the file.
func endOnPanic() {
	if r := recover(); r != nil {
		go panic(fmt.Sprintf("the state file cannot be written, so this process ends: bbolt panicked: %v\n%s", r, debug.Stack()))
		select {}
	}
}

// apply hands what this transaction wrote to bbolt and says whether there was anything.
func (t Tx) apply() (changed bool, err error) {
	defer endOnPanic()
	for bucket, writes := range t.writes {
		b, err := t.tx.CreateBucketIfNotExists([]byte(bucket))
		if err != nil {
			return true, err
		}
		for k, w := range writes {
			changed = true
			if w.deleted {
				err = b.Delete([]byte(k))
			} else {
				err = b.Put([]byte(k), w.value)
			}
			if err != nil {
				return true, err
			}
		}
	}
	return changed, nil
}

// View calls fn with a transaction that reads one state of the file, whatever is written meanwhile. It must not be called
// inside View or Update.
func (s *Store) View(fn func(Tx) error) error {
	var failed error
	err := s.db.View(func(tx *bbolt.Tx) error {
		failed = fn(Tx{tx: tx})
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the state file: %w", err)
	}
	return failed
}

// Update calls fn with a transaction that may write. When fn returns nil, Update returns nil only after everything written is
// committed and on disk (fsync); when fn fails or panics nothing of it is written. When bbolt itself panics the process ends. One
// fn runs at a time, and each sees what those before it wrote; updates that wait at the same time go to disk together. It must not
// be called inside View or Update.
func (s *Store) Update(fn func(Tx) error) error {
	g, leads := s.join()
	if leads {
		defer s.lead(g)() // also when fn panics: others are in the group
	}
	if err := g.run(fn); err != nil {
		return err
	}
	if leads {
		return g.finish()
	}
	<-g.done
	return g.err
}

// A group is updates that share a commit. Its members come while the group before it is written.
type group struct {
	members sync.WaitGroup
	ready   chan struct{} // closed when tx is begun, or err says why not
	done    chan struct{} // closed when err is final

	mu      sync.Mutex // one member at a time uses tx
	tx      *bbolt.Tx
	changed bool
	err     error
	ended   bool
}

// join enters the group that waits, or a new one, which the caller then leads.
func (s *Store) join() (g *group, leads bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == nil {
		s.next = &group{ready: make(chan struct{}), done: make(chan struct{})}
		leads = true
	}
	s.next.members.Add(1)
	return s.next, leads
}

// lead waits for the file, closes the group to newcomers and lets its members run. The function that it returns ends the
// group if that is still to be done.
func (s *Store) lead(g *group) func() {
	tx, err := s.begin()
	s.mu.Lock()
	s.next = nil
	s.mu.Unlock()
	g.tx = tx
	if err != nil {
		g.err = fmt.Errorf("writing the state file: %w", err)
	}
	close(g.ready)
	return func() { _ = g.finish() }
}

func (s *Store) begin() (*bbolt.Tx, error) {
	defer endOnPanic()
	return s.db.Begin(true)
}

// run calls fn on top of what the members before it wrote. What fn wrote counts only when it returns nil.
func (g *group) run(fn func(Tx) error) error {
	defer g.members.Done()
	<-g.ready
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return g.err
	}
	t := Tx{tx: g.tx, writes: make(map[string]map[string]write)}
	if err := fn(t); err != nil {
		return err
	}
	changed, err := t.apply()
	g.changed = g.changed || changed
	if err != nil {
		g.err = fmt.Errorf("writing the state file: %w", err)
	}
	return g.err
}

// finish waits for the members and commits what they wrote. Only the leader calls it; a second call does nothing.
func (g *group) finish() error {
	if g.ended {
		return g.err
	}
	g.ended = true
	g.members.Wait()
	defer close(g.done)
	defer endOnPanic()
	switch {
	case g.tx == nil:
	case g.err != nil || !g.changed:
		_ = g.tx.Rollback()
	default:
		if err := g.tx.Commit(); err != nil {
			g.err = fmt.Errorf("writing the state file: %w", err)
		}
	}
	return g.err
}
