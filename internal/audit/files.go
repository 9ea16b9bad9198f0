package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Head names a record and everything before it.
type Head struct {
	Seq  uint64 // 0: the log has no record
	Hash Hash
}

// String returns SEQ:HASH, which ParseHead reads.
func (h Head) String() string { return strconv.FormatUint(h.Seq, 10) + ":" + h.Hash.String() }

// ParseHead reads SEQ:HASH: a decimal number and 64 lower-case hex digits.
func ParseHead(text string) (Head, error) {
	seq, hash, _ := strings.Cut(text, ":")
	n, err := strconv.ParseUint(seq, 10, 64)
	if err != nil || !isHex(hash, 2*sha256.Size) || strconv.FormatUint(n, 10) != seq {
		return Head{}, errors.New("not a head of the audit log: SEQ:HASH is expected, a number and 64 lower-case hex digits")
	}
	h := Head{Seq: n}
	_, err = hex.Decode(h.Hash[:], []byte(hash))
	return h, err
}

// Where the broker's store keeps the head, as Head.String writes it.
const (
	HeadBucket = "audit"
	HeadKey    = "head"
)

const (
	filePrefix = "audit-"
	fileSuffix = ".jsonl"
)

func fileName(number int) string { return fmt.Sprintf("%s%06d%s", filePrefix, number, fileSuffix) }

// fileNumbers lists the log's files in dir, oldest first. What is not named like one is not the log's.
func fileNumbers(dir string) ([]int, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var numbers []int
	for _, e := range entries {
		digits := strings.TrimSuffix(strings.TrimPrefix(e.Name(), filePrefix), fileSuffix)
		if n, err := strconv.Atoi(digits); err == nil && n > 0 && e.Name() == fileName(n) {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// lineReader reads a log file line by line.
type lineReader struct {
	r      *bufio.Reader
	number int   // of the line that next returned last, from 1
	start  int64 // its offset in octets
	end    int64 // the offset behind it
	nul    bool  // it holds an octet that no record has, and that a file system leaves where it lost a write
}

var errLongLine = fmt.Errorf("%w: the line has more than %d octets", ErrRecord, MaxLine)

func newLineReader(r io.Reader) *lineReader {
	return &lineReader{r: bufio.NewReaderSize(r, MaxLine+1)}
}

// next returns the next line without its end, valid until the next call, and whether it had an end. After the last line it
// is io.EOF. A line that is too long is skipped and is errLongLine.
func (l *lineReader) next() (line []byte, whole bool, err error) {
	line, err = l.r.ReadSlice('\n')
	l.start = l.end
	l.end += int64(len(line))
	if len(line) == 0 {
		return nil, false, err
	}
	l.number++
	l.nul = bytes.IndexByte(line, 0) >= 0
	switch {
	case err == nil:
		return line[:len(line)-1], true, nil
	case errors.Is(err, bufio.ErrBufferFull):
		return nil, true, l.skip()
	case errors.Is(err, io.EOF):
		return line, false, nil
	}
	return nil, false, err
}

func (l *lineReader) skip() error {
	for {
		part, err := l.r.ReadSlice('\n')
		l.end += int64(len(part))
		if err == nil || errors.Is(err, io.EOF) {
			return errLongLine
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}

// Break is a place where the log is not what the broker wrote. As an error it is ErrBroken.
type Break struct {
	File string // the file's name; empty when it is about the whole log
	Line int    // in the file, from 1
	Kind string // unreadable, edit, removal, insertion, recomputed, signature, head, cut
	Want string // what was expected
	Got  string // what was found
}

// ErrBroken is a log that was tampered with or damaged.
var ErrBroken = errors.New("the audit log is broken")

// Error says where and what, in one line.
func (b Break) Error() string {
	where := "log"
	if b.File != "" {
		where = b.File
		if b.Line > 0 {
			where += ":" + strconv.Itoa(b.Line)
		}
	}
	return fmt.Sprintf("%s: %s: expected %s, found %s", where, b.Kind, b.Want, b.Got)
}

// Is makes every Break an ErrBroken.
func (b Break) Is(target error) bool { return target == ErrBroken }

// chain follows the records from one to the next.
type chain struct {
	head  Head // of the last record
	known bool // whether head can be compared with: not before the first record, nor after one that cannot be read
}

// follow takes the next line. It returns the record, unless it cannot be read, and what is wrong with it, of which the caller
// knows the place. Either way the chain goes on from this line.
func (c *chain) follow(line []byte) (*Record, *Break) {
	r, err := Parse(line)
	if err != nil {
		c.known = false
		return nil, &Break{Kind: "unreadable", Want: "a record", Got: err.Error()}
	}
	wrong := c.compare(r)
	*c = chain{head: Head{r.Seq, sha256.Sum256(line)}, known: true}
	return r, wrong
}

func (c *chain) compare(r *Record) *Break {
	switch {
	case r.Seq == 0:
		return &Break{Kind: "edit", Want: "a number from 1", Got: "record 0"}
	case !c.known && r.Seq == 1 && r.Prev != Hash{}:
		return &Break{Kind: "edit", Want: "the first record to follow nothing", Got: "prev " + r.Prev.String()}
	case !c.known:
		return nil
	case r.Seq > c.head.Seq+1:
		return &Break{Kind: "removal", Want: fmt.Sprintf("record %d", c.head.Seq+1), Got: fmt.Sprintf("record %d", r.Seq)}
	case r.Seq <= c.head.Seq:
		return &Break{Kind: "insertion", Want: fmt.Sprintf("record %d", c.head.Seq+1), Got: fmt.Sprintf("record %d", r.Seq)}
	case r.Prev != c.head.Hash:
		return &Break{Kind: "edit", Want: fmt.Sprintf("prev %s, the hash of record %d as it is now", c.head.Hash, c.head.Seq),
			Got: fmt.Sprintf("prev %s: record %d was changed, or this one", r.Prev, c.head.Seq)}
	}
	return nil
}

// openFile opens a file of the log, and none that a link names.
func openFile(dir string, number, flag int) (*os.File, error) {
	return os.OpenFile(filepath.Join(dir, fileName(number)), flag|unix.O_NOFOLLOW, 0o600)
}

// giveToOwner makes the folder's owner the owner of what root makes in it: the broker must be able to use it later.
func giveToOwner(f *os.File, dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return err
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}

// SetAside moves a log that is broken into a folder of its own below dir, so that a new one can begin, and returns that
// folder, or nothing where there was no log. It is for an administrator, who keeps it as evidence; the head that is stored
// elsewhere must be removed as well. It fails while a broker has the log.
func SetAside(dir string, now time.Time) (string, error) {
	lock, err := lockDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer lock.Close()
	numbers, err := fileNumbers(dir)
	if err != nil || len(numbers) == 0 {
		return "", err
	}
	aside := filepath.Join(dir, "set-aside-"+now.UTC().Format("20060102T150405.000Z"))
	if err := os.Mkdir(aside, 0o700); err != nil {
		return "", err
	}
	for _, n := range numbers {
		if err := os.Rename(filepath.Join(dir, fileName(n)), filepath.Join(aside, fileName(n))); err != nil {
			return aside, err
		}
	}
	return aside, lock.Sync()
}

// ErrHeld is a log that another process has open.
var ErrHeld = errors.New("the audit log is held by another process")

// lockDir opens the folder and locks it, so that there is one writer. It waits two seconds for a broker that is ending.
func lockDir(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			d.Close()
			return nil, fmt.Errorf("locking %s: %w", dir, err)
		}
		if time.Now().After(end) {
			d.Close()
			return nil, fmt.Errorf("%w: %s (still after %v): stop that broker, or use another --state-dir", ErrHeld, dir, lockWait)
		}
	}
}

const lockWait = 2 * time.Second
