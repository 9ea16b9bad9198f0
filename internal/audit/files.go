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
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return fileNumbersIn(d)
}

// fileNumbersIn is fileNumbers for an open folder, which it reads to its end.
func fileNumbersIn(d *os.File) ([]int, error) {
	entries, err := d.ReadDir(-1)
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

	Noted bool // it is about one of VerifyOptions.Heads other than Stored: the log may be whole, and the head another log's
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

// What follows is also run by root, in a folder of the broker's user, who may exchange any name there at any moment. So what
// root changes is opened once, without following a link, looked at, and changed through its descriptor.

// openFile opens a file of the log by path, and nothing but a regular file.
func openFile(dir string, number, flag int) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, fileName(number)), flag|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	return regular(f, err)
}

// openFileIn is openFile in an open folder.
func openFileIn(d *os.File, number, flag int) (*os.File, error) {
	f, err := openIn(d, fileName(number), flag)
	return regular(f, err)
}

// openIn opens what has the name in the folder itself. It neither follows a link nor waits for a pipe's other end.
func openIn(d *os.File, name string, flag int) (*os.File, error) {
	path := filepath.Join(d.Name(), name)
	for {
		fd, err := unix.Openat(int(d.Fd()), name, flag|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return os.NewFile(uintptr(fd), path), nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// regular passes on what an open returned, unless that is no regular file, or one that has another name as well: whoever made
// that can write to it from elsewhere.
func regular(f *os.File, err error) (*os.File, error) {
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%w: expected a regular file, found a link or a pipe: move it away", err)
	}
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = fmt.Errorf("%s: expected a regular file, found a device or folder: move it away", f.Name())
	case err == nil && st.Nlink != 1:
		err = fmt.Errorf("%s: expected a regular file of one name, found one with %d hard links: remove the others", f.Name(), st.Nlink)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// openDir opens the log's folder, which must not be a link and must belong to its parent's owner, to root or to this
// process. With create it is made, for its parent's owner, where there is none.
func openDir(dir string, create bool) (*os.File, error) {
	dir = filepath.Clean(dir)
	parent, err := os.OpenFile(filepath.Dir(dir), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	d, err := openIn(parent, filepath.Base(dir), unix.O_DIRECTORY)
	made := false
	if create && errors.Is(err, os.ErrNotExist) {
		d, err = makeFolder(parent, filepath.Base(dir))
		made = err == nil
		if errors.Is(err, os.ErrExist) { // another one was first
			d, err = openIn(parent, filepath.Base(dir), unix.O_DIRECTORY)
		}
	}
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		err = fmt.Errorf("%w: expected a folder, found a link or a file: move it away", err)
	}
	if err != nil {
		return nil, err
	}
	if err = checkOwner(d, parent); err == nil && made {
		err = giveToOwner(d, parent)
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// makeFolder makes a folder with mode 0700 and opens it. That the one it opens is the one it made shows in that it is this
// process's own and empty.
func makeFolder(parent *os.File, name string) (*os.File, error) {
	path := filepath.Join(parent.Name(), name)
	if err := unix.Mkdirat(int(parent.Fd()), name, 0o700); err != nil {
		return nil, &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	d, err := openIn(parent, name, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	uid, _, err := owner(d)
	names, read := d.Readdirnames(1)
	if errors.Is(read, io.EOF) {
		_, read = d.Seek(0, io.SeekStart)
	}
	if err = errors.Join(err, read); err == nil && (uid != os.Geteuid() || len(names) > 0) {
		err = fmt.Errorf("%s was exchanged for another folder while it was made", path)
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func owner(f *os.File) (uid, gid int, err error) {
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	return int(st.Uid), int(st.Gid), err
}

func checkOwner(d, parent *os.File) error {
	uid, _, err := owner(d)
	want, _, err2 := owner(parent)
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	if uid != want && uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("%s belongs to uid %d, expected uid %d like the folder above it, or root: move it away", d.Name(), uid, want)
	}
	return nil
}

// giveToOwner makes the folder's owner the owner of what root made in it: the broker must be able to use it later.
func giveToOwner(f, dir *os.File) error {
	if os.Geteuid() != 0 {
		return nil
	}
	uid, gid, err := owner(dir)
	if err != nil {
		return err
	}
	return f.Chown(uid, gid)
}

// SetAside moves a log that is broken into a folder of its own below dir, so that a new one can begin, and returns that
// folder, or nothing where there was no log. It is for an administrator, who keeps it as evidence; the head that is stored
// elsewhere must be removed as well. It fails while a broker has the log.
func SetAside(dir string, now time.Time) (string, error) {
	d, err := openDir(dir, false)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer d.Close()
	if err := lockDir(d); err != nil {
		return "", err
	}
	numbers, err := fileNumbersIn(d)
	if err != nil || len(numbers) == 0 {
		return "", err
	}
	aside, err := makeFolder(d, "set-aside-"+now.UTC().Format("20060102T150405.000Z"))
	if err != nil {
		return "", err
	}
	defer aside.Close()
	for _, n := range numbers {
		if err := unix.Renameat(int(d.Fd()), fileName(n), int(aside.Fd()), fileName(n)); err != nil {
			return aside.Name(), fmt.Errorf("moving %s to %s: %w", fileName(n), aside.Name(), err)
		}
	}
	return aside.Name(), d.Sync()
}

// ErrHeld is a log that another process has open.
var ErrHeld = errors.New("the audit log is held by another process")

// lockDir locks the folder, so that there is one writer. It waits two seconds for a broker that is ending.
func lockDir(d *os.File) error {
	for end := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("locking %s: %w", d.Name(), err)
		}
		if time.Now().After(end) {
			return fmt.Errorf("%w: %s (still after %v): stop that broker, or use another --state-dir", ErrHeld, d.Name(), lockWait)
		}
	}
}

const lockWait = 2 * time.Second
