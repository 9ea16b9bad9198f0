package audit

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// maxBreaks is how many breaks a Report lists; the others are counted.
const maxBreaks = 100

// VerifyOptions is what a log is compared with.
type VerifyOptions struct {
	// Heads were noted outside of the log, at any time; each must be in it. None: a tail that was cut off does not show.
	Heads []Head
	// Stored is the one of Heads that the broker's store has; zero: none of them.
	Stored Head
	// PublicKeys are the realm's identities. None: signatures are not checked, so a log that was computed anew with
	// checkpoints of somebody else does not show.
	PublicKeys []ed25519.PublicKey
}

// Report is what Verify found.
type Report struct {
	Files       int
	Records     uint64
	First, Last Place
	Head        Head             // of the last record
	Events      map[Event]uint64 // records by event
	Checkpoints uint64
	Signed      Head // the newest head with a checkpoint that fits, signature included when there were keys
	SignedAt    time.Time
	Unfinished  bool // the last line has no end: it is being written, or the broker was killed
	Breaks      []Break
	MoreBreaks  int // that are not listed
	Notes       []string
}

// Place is where and when a record is.
type Place struct {
	File string
	Seq  uint64
	Time time.Time
}

// OK says whether nothing is broken.
func (r *Report) OK() bool { return len(r.Breaks) == 0 }

// Verify reads all of the log in dir. What is wrong with the log is in the report; the error says that it could not be read.
// A broker may write to it meanwhile.
func Verify(dir string, opts VerifyOptions) (*Report, error) {
	numbers, err := fileNumbers(dir)
	if err != nil {
		return nil, fmt.Errorf("verifying the audit log: %w", err)
	}
	v := &verifier{opts: opts, report: &Report{Files: len(numbers), Events: make(map[Event]uint64)}, hashes: make([]Hash, maxBehind)}
	for i, n := range numbers {
		if err := v.file(dir, n, i == len(numbers)-1); err != nil {
			return nil, fmt.Errorf("verifying the audit log: %w", err)
		}
	}
	v.finish()
	return v.report, nil
}

type verifier struct {
	opts   VerifyOptions
	report *Report
	chain  chain
	hashes []Hash // of the last records, by number modulo the length
	name   string // of the file that is read
	line   int
}

func (v *verifier) broken(b *Break) {
	if len(v.report.Breaks) >= maxBreaks {
		v.report.MoreBreaks++
		return
	}
	v.report.Breaks = append(v.report.Breaks, *b)
}

// here is broken at the line that is read.
func (v *verifier) here(b *Break) {
	b.File, b.Line = v.name, v.line
	v.broken(b)
}

func (v *verifier) note(format string, args ...any) {
	v.report.Notes = append(v.report.Notes, fmt.Sprintf(format, args...))
}

func (v *verifier) file(dir string, number int, last bool) error {
	f, err := openFile(dir, number, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := newLineReader(f)
	v.name = fileName(number)
	for {
		line, whole, err := lines.next()
		v.line = lines.number
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, ErrRecord):
			v.chain.known = false
			v.here(&Break{Kind: "unreadable", Want: "a record", Got: err.Error()})
		case err != nil:
			return err
		case whole:
			v.take(line)
		case last:
			v.report.Unfinished = true
		default:
			v.here(&Break{Kind: "unreadable", Want: "a whole line", Got: "an end in the middle of it"})
		}
	}
}

// take checks one line.
func (v *verifier) take(line []byte) {
	r, wrong := v.chain.follow(line)
	if wrong != nil {
		v.here(wrong)
	}
	if r == nil {
		return
	}
	v.count(r)
	head := v.chain.head
	v.hashes[head.Seq%maxBehind] = head.Hash
	for _, want := range v.opts.Heads {
		if want.Seq == head.Seq {
			if b := compareHead(want, head); b != nil {
				b.Noted = want != v.opts.Stored
				v.here(b)
			}
		}
	}
	if r.Checkpoint != nil {
		v.checkpoint(r)
	}
}

func (v *verifier) count(r *Record) {
	rep := v.report
	if rep.Records == 0 {
		rep.First = Place{v.name, r.Seq, r.Time}
		if r.Seq > 1 {
			v.note("the log begins with record %d: older files were moved away", r.Seq)
		}
	}
	rep.Last = Place{v.name, r.Seq, r.Time}
	rep.Head = v.chain.head
	rep.Records++
	rep.Events[r.Event]++
	if r.Event == EventRecovered || r.Event == EventDropped || r.Event == EventReset {
		v.note("%s:%d: %s: %s", v.name, v.line, r.Event, r.Reason)
	}
}

// checkpoint compares what was signed with what the log holds.
func (v *verifier) checkpoint(r *Record) {
	c := r.Checkpoint
	v.report.Checkpoints++
	if len(v.opts.PublicKeys) > 0 {
		if err := c.verify(v.opts.PublicKeys); err != nil {
			v.here(&Break{Kind: "signature", Want: "a checkpoint signed by the realm's identity", Got: err.Error()})
			return
		}
	}
	switch {
	case c.Seq >= r.Seq || c.Seq == 0 || r.Seq-c.Seq >= maxBehind:
		v.here(&Break{Kind: "recomputed", Want: "a checkpoint over a record shortly before it", Got: fmt.Sprintf("one over record %d", c.Seq)})
	case c.Seq < v.report.First.Seq: // that record is in a file that was moved away
	case v.hashes[c.Seq%maxBehind] != c.Hash:
		v.here(&Break{Kind: "recomputed", Want: fmt.Sprintf("record %d to have the hash %s, which was signed", c.Seq, c.Hash),
			Got: v.hashes[c.Seq%maxBehind].String()})
	default:
		v.report.Signed, v.report.SignedAt = Head{c.Seq, c.Hash}, c.Time
	}
}

// cut is a log that ends before a head.
func (v *verifier) cut(want Head) *Break {
	if want == v.opts.Stored {
		return cutBreak(want, v.report.Head, "the stored head")
	}
	b := cutBreak(want, v.report.Head, "a head that was given")
	b.Noted = true
	return b
}

// finish looks at what only shows at the end.
func (v *verifier) finish() {
	rep := v.report
	for _, want := range v.opts.Heads {
		if want.Seq > rep.Head.Seq {
			v.broken(v.cut(want))
		} else if want.Seq != 0 && want.Seq < rep.First.Seq {
			v.note("record %d, whose hash was given, is in a file that was moved away", want.Seq)
		}
	}
	switch {
	case rep.Records == 0:
		v.note("there is no record")
	case len(v.opts.PublicKeys) == 0:
		v.note("no identity was given: signatures were not checked")
	case rep.Signed.Seq == 0:
		v.broken(&Break{Kind: "signature", Want: "a checkpoint signed by the realm's identity", Got: "none"})
	}
	if rep.Signed.Seq != 0 && rep.Head.Seq-rep.Signed.Seq > 1 {
		v.note("%d records after the newest checkpoint are not signed yet", rep.Head.Seq-rep.Signed.Seq)
	}
	if len(v.opts.Heads) == 0 {
		v.note("no head was given: a tail that was cut off does not show")
	}
	if rep.Unfinished {
		v.note("the last line is not finished: it is being written, or the broker was killed")
	}
}
