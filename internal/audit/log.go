package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Defaults of Config, which are those of broker.toml too.
const (
	DefaultSyncEvery = 100 * time.Millisecond
	DefaultReserve   = 16 << 20 // octets
	DefaultMaxFile   = 64 << 20 // octets
)

// Config is what a log needs.
type Config struct {
	// Dir is the folder of the log's files. It is made, with mode 0700, where there is none.
	Dir string
	// Realm is the realm's id, 32 hex digits.
	Realm string
	// Sign signs tuple.Encode(derive.LabelAudit, fields...) with the realm's identity, Ed25519. While it cannot, because the realm is
	// locked, it returns an error; the log goes on without checkpoints and tries again. It must obey ctx.
	Sign func(ctx context.Context, fields ...[]byte) ([]byte, error)
	// LoadHead returns the head that SaveHead was given last, or the zero Head when there was none. SaveHead keeps a head
	// outside of the log, on disk when it returns. It is only given heads that are on disk in the log themselves.
	LoadHead func() (Head, error)
	SaveHead func(Head) error

	// SyncEvery is the longest time until a Written record is on disk; 0 means DefaultSyncEvery.
	SyncEvery time.Duration
	// Reserve is how many octets are allocated ahead for releases, changes by hand and the log's own records alone; 0 means
	// DefaultReserve, a negative number none.
	Reserve int64
	// MaxFile is the size in octets from which on a new file is begun; 0 means DefaultMaxFile.
	MaxFile int64
	// CheckpointRecords and CheckpointEvery: a checkpoint follows after so many records, or after so long when there was at
	// least one; 0 means 4096 and 10 minutes.
	CheckpointRecords uint64
	CheckpointEvery   time.Duration
	// Regained is called in the background when there is space again after there was only the reserve, or none; nil: nobody
	// is told. It must not wait for the log.
	Regained func()
	// Logger gets what goes wrong in the background; nil means nobody does.
	Logger *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	switch {
	case c.Dir == "":
		return c, errors.New("no folder is configured")
	case !isHex(c.Realm, 32):
		return c, fmt.Errorf("the realm id %q is not 32 lower-case hex digits", c.Realm)
	case c.Sign == nil || c.LoadHead == nil || c.SaveHead == nil:
		return c, errors.New("the fields Sign, LoadHead and SaveHead are required")
	}
	orDefault(&c.SyncEvery, DefaultSyncEvery)
	orDefault(&c.Reserve, DefaultReserve)
	orDefault(&c.MaxFile, DefaultMaxFile)
	orDefault(&c.CheckpointRecords, 4096)
	orDefault(&c.CheckpointEvery, 10*time.Minute)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Reserve = max(c.Reserve, 0)
	return c, nil
}

func orDefault[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// Durability is what Append promises when it returns without an error.
type Durability int

const (
	// Written: the record survives the broker's death at any moment (write(2)), and the host's from Config.SyncEvery on.
	Written Durability = iota
	// Durable: the record survives the host's death (fsync).
	Durable
)

// Errors that callers match, beside ErrBroken, ErrHeld and ErrRecord.
var (
	ErrNoSpace = errors.New("no space for the audit record")
	ErrFailed  = errors.New("the audit log failed")
	ErrClosed  = errors.New("the audit log is closed")
)

// Log is an open log. It may be used by many goroutines at once; one process has it open.
type Log struct {
	cfg  Config
	dir  *os.File // locked; what is in it is reached through it, not by path
	wake chan struct{}
	poke chan struct{}

	mu      sync.Mutex
	file    *os.File
	number  int   // of the file
	size    int64 // of the file
	room    int64 // how far the file's blocks are allocated
	full    int64 // at which size the next file is begun
	retired []*os.File
	head    Head
	line    []byte
	stirred bool // the flusher was woken
	low     bool // there is no space but the reserve
	lost    loss
	err     error // ErrFailed or ErrClosed, for good

	syncing sync.Mutex // one fsync at a time; before mu
	durable Head
	synced  atomic.Uint64 // durable.Seq

	signing sync.Mutex // one checkpoint at a time; before mu
	signed  signed     // under mu
	saved   saved      // under mu

	cancel context.CancelFunc
	ended  sync.WaitGroup
}

// loss counts what was left out since the last dropped record.
type loss struct {
	count, total uint64
	since        time.Time
}

// buffers keep the encoded part of a record that does not depend on its place.
var buffers = sync.Pool{New: func() any { return new(make([]byte, 0, 1024)) }}

// Append writes rec as the next record and returns its place. Seq, Prev and Time are the log's to set. When it returns an
// error the record does not count, and what was to follow from it must not happen: no record, no key. ErrNoSpace means a full
// disk; ErrFailed that the disk lost writes, after which every Append fails until the log is opened again.
func (l *Log) Append(rec Record, how Durability) (Head, error) {
	rec.bound(maxText)
	if err := rec.check(); err != nil {
		return Head{}, fmt.Errorf("writing the audit record: %w", err)
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	*buf = rec.appendBody((*buf)[:0])
	if len(*buf) > maxBody {
		rec.bound(shortText)
		*buf = rec.appendBody((*buf)[:0])
	}
	if len(*buf) > maxBody {
		return Head{}, fmt.Errorf("writing the audit record: %w: %d octets are too many", ErrRecord, len(*buf))
	}
	head, err := l.append(rec.Event, *buf)
	if err == nil && how == Durable {
		err = l.sync(head.Seq)
	}
	if err != nil {
		return Head{}, fmt.Errorf("writing the audit record: %w", err)
	}
	return head, nil
}

func (l *Log) append(event Event, body []byte) (Head, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return Head{}, l.err
	}
	if l.size >= l.full && !l.low {
		l.rotate()
	}
	now := time.Now()
	l.line = appendHead(l.line[:0], l.head.Seq+1, &l.head.Hash, now)
	l.line = append(l.line, body...)
	hash := sha256.Sum256(l.line)
	l.line = append(l.line, '\n')
	if err := l.write(essential(event) || byHand(event)); err != nil {
		l.lose(event, now)
		return Head{}, err
	}
	l.head = Head{l.head.Seq + 1, hash}
	if !l.stirred {
		l.stirred = true
		notify(l.wake)
	}
	return l.head, nil
}

// byHand says whether the event is a change that an administrator makes, himself or by starting and stopping a machine. It may
// use the reserve like what is essential: a full disk must not hide it. When there is no space at all it is counted as dropped,
// unlike what is essential, since its caller may go on. Refusals and acks are not among them: peers decide how many there are.
func byHand(e Event) bool {
	switch e {
	case EventTicket, EventLock, EventUnlock, EventSlot, EventPolicy:
		return true
	}
	return false
}

// write puts l.line at the file's end, whole or not at all.
func (l *Log) write(mayUseReserve bool) error {
	if l.err != nil {
		return l.err
	}
	if err := l.makeRoom(int64(len(l.line)), mayUseReserve); err != nil {
		return err
	}
	n, err := l.file.WriteAt(l.line, l.size)
	if err == nil {
		l.size += int64(n)
		return nil
	}
	if n > 0 {
		if undo := l.file.Truncate(l.size); undo != nil {
			return l.fail(fmt.Errorf("undoing half a record: %w", undo))
		}
		l.room = l.size // truncating gave the blocks ahead back
	}
	if isNoSpace(err) {
		l.setLow(true)
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

// fail ends the log's use: what the disk holds is no longer known.
func (l *Log) fail(err error) error {
	l.err = fmt.Errorf("%w: %w: restart the broker once the disk is well", ErrFailed, err)
	l.cfg.Logger.Error("the audit log failed; nothing is released until the broker is restarted", "error", err)
	return l.err
}

// rotate begins the next file. When that fails the records go on into this one.
func (l *Log) rotate() {
	if err := fdatasync(l.file); err != nil {
		_ = l.fail(err)
		return
	}
	next, err := l.create(l.number+1, l.cfg.Reserve)
	if err != nil {
		l.cfg.Logger.Warn("no new file for the audit log; it goes on in the one that is there", "error", err)
		l.full = l.size + chunk
		if isNoSpace(err) {
			l.setLow(true)
		}
		return
	}
	_ = l.file.Truncate(l.size) // gives back the blocks ahead
	l.retired = append(l.retired, l.file)
	l.file, l.number = next, l.number+1
	l.size, l.room, l.full = 0, l.cfg.Reserve, l.cfg.MaxFile
}

// create makes a file with so many octets allocated ahead, and the folder's entry of it durable.
func (l *Log) create(number int, reserve int64) (*os.File, error) {
	f, err := openFileIn(l.dir, number, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, err
	}
	err = giveToOwner(f, l.dir)
	if err == nil {
		err = allocate(f, 0, reserve)
	}
	if err == nil {
		err = l.dir.Sync()
	}
	if err != nil {
		f.Close()
		_ = unix.Unlinkat(int(l.dir.Fd()), fileName(number), 0)
		return nil, err
	}
	return f, nil
}

// sync returns when the record is on disk. Whoever waits meanwhile shares the next fsync.
func (l *Log) sync(seq uint64) error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	if l.durable.Seq >= seq {
		return nil
	}
	l.mu.Lock()
	file, head, size, retired, err := l.file, l.head, l.size, l.retired, l.err
	l.retired = nil
	l.mu.Unlock()
	for _, f := range retired { // rotate synced them
		f.Close()
	}
	if errors.Is(err, ErrFailed) {
		return err
	}
	if err := syncFile(file, size); err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.fail(err)
	}
	l.durable = head
	l.synced.Store(head.Seq)
	return nil
}

// syncFile writes the file to disk and looks whether it is still the one that others see.
func syncFile(f *os.File, size int64) error {
	if err := fdatasync(f); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if st.Nlink == 0 || st.Size < size {
		return fmt.Errorf("somebody removed or cut %s while it was written", f.Name())
	}
	return nil
}

func fdatasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("fsync: %w", err)
		}
	}
}

// Head returns the last record's place.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Stats is the state of a log.
type Stats struct {
	Head    Head
	Synced  uint64 // the last record that is known to be on disk
	File    string // that is written to
	Reserve int64  // how many octets are allocated ahead now
	Low     bool   // no space but the reserve: refusals are dropped
	Dropped uint64 // records that were left out since the log was opened

	Signed          Head      // the newest head with a checkpoint since the log was opened
	SignedAt        time.Time // zero: none
	CheckpointError error     // why the last checkpoint failed
	Saved           Head      // the newest head that SaveHead took
	SaveError       error     // why it did not take the last one
	Err             error     // why nothing can be written, for good
}

// Stats returns the state of the log.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{
		Head: l.head, Synced: l.synced.Load(), File: l.file.Name(),
		Reserve: max(l.room-l.size, 0), Low: l.low, Dropped: l.lost.total,
		Signed: l.signed.head, SignedAt: l.signed.at, CheckpointError: l.signed.err,
		Saved: l.saved.head, SaveError: l.saved.err, Err: l.err,
	}
}

// Close writes a last checkpoint, if Sign can within ctx, and everything to disk, and lets go of the folder.
func (l *Log) Close(ctx context.Context) error {
	l.cancel()
	l.ended.Wait()
	_ = l.Checkpoint(ctx) // Stats says why not
	l.mu.Lock()
	if errors.Is(l.err, ErrClosed) {
		l.mu.Unlock()
		return nil
	}
	head, failed := l.head, l.err
	l.err = ErrClosed
	l.mu.Unlock()
	if failed == nil {
		failed = l.sync(head.Seq)
	}
	if failed == nil {
		failed = l.save()
	}
	l.syncing.Lock()
	defer l.syncing.Unlock()
	for _, f := range l.retired {
		f.Close()
	}
	if err := errors.Join(failed, l.file.Close(), l.dir.Close()); err != nil {
		return fmt.Errorf("closing the audit log: %w", err)
	}
	return nil
}
