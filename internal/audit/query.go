package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// MaxLimit is the largest Filter.Limit.
const MaxLimit = 100_000

// Filter says which records Query returns. A zero field takes all.
type Filter struct {
	Since, Until time.Time // Since is in, Until is out
	Subject      string
	Tier         string
	Event        Event
	Code         string
	Decision     string
	Limit        int // the newest so many; 0 means all
}

func (f *Filter) takes(r *Record) bool {
	return (f.Since.IsZero() || !r.Time.Before(f.Since)) &&
		(f.Until.IsZero() || r.Time.Before(f.Until)) &&
		(f.Subject == "" || f.Subject == r.Subject || contains(r.Names, f.Subject)) &&
		(f.Tier == "" || f.Tier == r.Tier) &&
		(f.Event == "" || f.Event == r.Event) &&
		(f.Code == "" || f.Code == r.Code) &&
		(f.Decision == "" || f.Decision == r.Decision)
}

func contains(names []string, name string) bool {
	for _, n := range names {
		if n == name {
			return true
		}
	}
	return false
}

// Query calls fn with the records that f takes, oldest first, and each one's line, which is valid until fn returns. A service
// is found by its name, too. It stops at fn's first error. Lines that cannot be read are skipped, and then the error, after
// the last record, is ErrBroken. A broker may write to the log meanwhile.
func Query(dir string, f Filter, fn func(r *Record, line []byte) error) error {
	if f.Limit < 0 || f.Limit > MaxLimit {
		return fmt.Errorf("searching the audit log: a limit of %d, 0 to %d is possible", f.Limit, MaxLimit)
	}
	numbers, err := fileNumbers(dir)
	if err != nil {
		return fmt.Errorf("searching the audit log: %w", err)
	}
	q := query{filter: f, fn: fn}
	for _, n := range numbers {
		if err := q.file(dir, n); err != nil {
			return err
		}
	}
	if err := q.flush(); err != nil {
		return err
	}
	if q.bad > 0 {
		return fmt.Errorf("searching the audit log: %w: %d lines cannot be read: run `keybroker audit verify`", ErrBroken, q.bad)
	}
	return nil
}

type query struct {
	filter Filter
	fn     func(*Record, []byte) error
	newest []match // with a limit: the ring of the newest
	next   int
	bad    int
}

type match struct {
	record *Record
	line   []byte
}

func (q *query) file(dir string, number int) error {
	f, err := openFile(dir, number, os.O_RDONLY)
	if err != nil {
		return fmt.Errorf("searching the audit log: %w", err)
	}
	defer f.Close()
	for lines := newLineReader(f); ; {
		line, whole, err := lines.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !errors.Is(err, ErrRecord) {
			return fmt.Errorf("searching the audit log: %w", err)
		}
		if !whole { // it is being written
			continue
		}
		r, wrong := Parse(line)
		if err != nil || wrong != nil {
			q.bad++
			continue
		}
		if q.filter.takes(r) {
			if err := q.take(r, line); err != nil {
				return err
			}
		}
	}
}

func (q *query) take(r *Record, line []byte) error {
	switch limit := q.filter.Limit; {
	case limit == 0:
		return q.fn(r, line)
	case len(q.newest) < limit:
		q.newest = append(q.newest, match{r, bytes.Clone(line)})
	default:
		q.newest[q.next] = match{r, append(q.newest[q.next].line[:0], line...)}
		q.next = (q.next + 1) % limit
	}
	return nil
}

// flush hands over what the limit held back.
func (q *query) flush() error {
	for i := range q.newest {
		m := q.newest[(q.next+i)%len(q.newest)]
		if err := q.fn(m.record, m.line); err != nil {
			return err
		}
	}
	return nil
}
