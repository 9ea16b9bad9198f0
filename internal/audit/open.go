package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// openWait is how long Open waits for its checkpoint's signature. Later ones have more time.
const openWait = 2 * time.Second

// Open opens the log in cfg.Dir and goes on where it ends. It reads back to the head that LoadHead returns. An unfinished
// last line, which is what a kill -9 or a power cut leaves, is cut off, and a record says so. Anything else that is not as it
// was written is ErrBroken, with the place, and nothing is changed; so is a log that ends before the stored head.
func Open(cfg Config) (*Log, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("opening the audit log: %w", err)
	}
	l, err := open(cfg)
	if err != nil {
		if errors.Is(err, ErrBroken) {
			err = fmt.Errorf("%w: `keybroker audit verify` shows all of it, `keybroker audit reset --reason TEXT` sets this log aside and begins a new one", err)
		}
		return nil, fmt.Errorf("opening the audit log in %s: %w", cfg.Dir, err)
	}
	return l, nil
}

func open(cfg Config) (_ *Log, err error) {
	l := &Log{cfg: cfg, full: cfg.MaxFile, wake: make(chan struct{}, 1), poke: make(chan struct{}, 1)}
	if l.dir, err = openDir(cfg.Dir, true); err != nil {
		return nil, err
	}
	if err := lockDir(l.dir); err != nil {
		l.dir.Close()
		return nil, err
	}
	end, err := l.openTail()
	if err != nil {
		if l.file != nil {
			l.file.Close()
		}
		l.dir.Close()
		return nil, err
	}
	l.start()
	l.recordRecovery(end)
	ctx, cancel := context.WithTimeout(context.Background(), openWait)
	defer cancel()
	_ = l.Checkpoint(ctx) // a locked realm cannot; Stats says so, and the keeper tries again
	return l, nil
}

// openTail finds the log's end and opens the last file there, or makes the first one.
func (l *Log) openTail() (tail, error) {
	stored, err := l.cfg.LoadHead()
	if err != nil {
		return tail{}, fmt.Errorf("reading the stored head: %w", err)
	}
	end, err := readTail(l.dir, stored)
	if err != nil {
		return tail{}, err
	}
	l.head, l.durable = end.head, Head{}
	l.number, l.size = end.number, end.size
	if end.number == 0 {
		return end, l.createFirst()
	}
	if l.file, err = openFileIn(l.dir, end.number, os.O_RDWR); err != nil {
		return end, err
	}
	if err := l.cutDamage(&end); err != nil {
		return end, err
	}
	l.trimPrevious()
	l.room = l.size
	l.low = l.extend(0) != nil
	return end, nil
}

// createFirst begins a log, on a full disk without a reserve.
func (l *Log) createFirst() (err error) {
	l.number, l.room = 1, l.cfg.Reserve
	if l.file, err = l.create(1, l.cfg.Reserve); isNoSpace(err) {
		l.low, l.room = true, 0
		l.file, err = l.create(1, 0)
	}
	return err
}

// cutDamage cuts off what is behind the last record. Where a power cut left more than an unfinished line, a copy is kept.
func (l *Log) cutDamage(end *tail) error {
	if end.damage == 0 {
		return nil
	}
	if !end.torn {
		name := fmt.Sprintf("audit-%06d.cut-%d", end.number, end.size)
		if err := l.copyEnd(end.size, name); err != nil {
			return fmt.Errorf("keeping a copy of what a power cut damaged, before it is cut off: %w", err)
		}
		end.copy = name
	}
	if err := l.file.Truncate(end.size); err != nil {
		return err
	}
	return l.file.Sync()
}

// copyEnd copies the last file from offset from on. A copy of this name is of the same octets, and perhaps not whole.
func (l *Log) copyEnd(from int64, name string) error {
	out, err := openIn(l.dir, name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, io.NewSectionReader(l.file, from, 1<<62))
	if err := errors.Join(err, out.Sync(), out.Close()); err != nil {
		_ = unix.Unlinkat(int(l.dir.Fd()), name, 0)
		return err
	}
	return nil
}

// trimPrevious gives back the blocks ahead of the file before the last one, if the broker died when it should have.
func (l *Log) trimPrevious() {
	f, err := openFileIn(l.dir, l.number-1, os.O_RDWR)
	if err != nil {
		return
	}
	defer f.Close()
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) == nil && st.Blocks*512 > st.Size+chunk {
		_ = f.Truncate(st.Size)
	}
}

// recordRecovery writes that something was cut off. On a full disk only the broker's own log says so.
func (l *Log) recordRecovery(end tail) {
	if end.damage == 0 {
		return
	}
	reason := fmt.Sprintf("cut off %d octets of an unfinished record in %s", end.damage, fileName(end.number))
	if !end.torn {
		reason = fmt.Sprintf("cut off %d octets that a power cut damaged in %s; copy: %q", end.damage, fileName(end.number), end.copy)
	}
	l.cfg.Logger.Warn("the audit log was recovered", "reason", reason)
	if _, err := l.Append(Record{Event: EventRecovered, Reason: reason}, Durable); err != nil {
		l.cfg.Logger.Warn("the audit log's recovery was not recorded", "error", err)
	}
}

// tail is how a log ends.
type tail struct {
	number int   // of the last file; 0: there is none
	size   int64 // of that file's records in octets
	head   Head
	damage int64  // octets behind the records
	torn   bool   // they are one unfinished line
	copy   string // name of the damage's copy; set by cutDamage
}

// readTail reads the log from its end back to the stored head.
func readTail(dir *os.File, stored Head) (tail, error) {
	numbers, err := fileNumbersIn(dir)
	if err != nil {
		return tail{}, err
	}
	var end tail
	var after *Record // the first record of the next file that has one
	var afterFile int
	for i := len(numbers) - 1; i >= 0; i-- {
		last := i == len(numbers)-1
		s, err := scan(dir, numbers[i], last, stored)
		if err != nil {
			return tail{}, err
		}
		if last {
			end = tail{number: numbers[i], size: s.size, damage: s.damage, torn: s.torn}
		}
		if s.first == nil {
			continue
		}
		if after == nil {
			end.head = s.head
		} else if b := (&chain{head: s.head, known: true}).compare(after); b != nil {
			b.File, b.Line = fileName(afterFile), 1
			return tail{}, b
		}
		if after, afterFile = s.first, numbers[i]; s.first.Seq <= stored.Seq || stored.Seq == 0 {
			break
		}
	}
	if stored.Seq > end.head.Seq {
		return tail{}, cutBreak(stored, end.head, "the stored head")
	}
	return end, nil
}

func cutBreak(want, got Head, whose string) *Break {
	return &Break{Kind: "cut", Want: fmt.Sprintf("records up to %d at least, %s", want.Seq, whose),
		Got: fmt.Sprintf("an end after record %d", got.Seq)}
}

// scanned is what one file holds.
type scanned struct {
	first  *Record // nil: no record
	head   Head
	size   int64 // of the records
	damage int64
	torn   bool
}

// scan reads one file. Only at the end of the last one damage is no error.
func scan(dir *os.File, number int, last bool, stored Head) (s scanned, err error) {
	f, err := openFileIn(dir, number, os.O_RDONLY)
	if err != nil {
		return s, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return s, err
	}
	lines, c := newLineReader(f), chain{}
	for {
		line, whole, err := lines.next()
		if errors.Is(err, io.EOF) {
			return s, nil
		}
		if err != nil && !errors.Is(err, ErrRecord) {
			return s, err
		}
		var r *Record
		b := &Break{Kind: "unreadable", Want: "a whole line", Got: "an end in the middle of it"}
		if whole && err == nil {
			r, b = c.follow(line)
		} else if whole {
			b.Got = err.Error()
		}
		damaged := !whole || lines.nul
		if b != nil && last && damaged { // readTail sees whether the stored head is among what is left
			s.damage, s.torn = st.Size()-lines.start, !whole
			return s, nil
		}
		if b == nil && r.Seq == stored.Seq {
			b = compareHead(stored, c.head)
		}
		if b != nil {
			b.File, b.Line = fileName(number), lines.number
			return s, b
		}
		if s.first == nil {
			s.first = r
		}
		s.head, s.size = c.head, lines.end
	}
}

// compareHead compares a record's hash with that of a head which is known from elsewhere.
func compareHead(want, got Head) *Break {
	if want == got {
		return nil
	}
	return &Break{Kind: "head", Want: fmt.Sprintf("record %d to have the hash %s, as was noted outside of the log", want.Seq, want.Hash),
		Got: got.Hash.String()}
}
