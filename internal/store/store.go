// Package store keeps the broker's state (epochs, tickets, receivers, the audit log's head) in one bbolt file behind one
// small interface: named buckets of keys and values, read and written in transactions.
//
// Nothing of bbolt shows here, so that a fleet can keep the same buckets elsewhere. The file holds no key octets.
package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// Format is the version of the file that this release writes, and the newest that it reads.
const Format = 1

const (
	// systemBucket is this package's own; its name cannot be had by Put.
	systemBucket = "keybroker"
	formatKey    = "format"

	// lockWait is how long Open waits for another process to let go: a broker that is being restarted needs a moment.
	lockWait = 2 * time.Second
	// headroom is allocated ahead in the file, so that updates go on for a while when the disk is full.
	headroom = 1 << 20
)

// Errors that callers match.
var (
	ErrNotFound = errors.New("not found")
	ErrHeld     = errors.New("held by another process")
	ErrCorrupt  = errors.New("corrupt file")
	ErrNewer    = errors.New("newer format")
	ErrReadOnly = errors.New("read-only transaction")
)

// Store is an open file of state. It may be used by many goroutines at once.
type Store struct {
	db   *bbolt.DB
	path string

	mu   sync.Mutex
	next *group // the updates that wait for the file; nil when none does
}

// Open opens the file at path and makes it, with mode 0600, where there is none. Only one process has it at a time: when
// another does not let go within two seconds the error is ErrHeld. A damaged file is ErrCorrupt, and one that a later
// release wrote is ErrNewer; neither is changed.
func Open(path string) (*Store, error) {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if err := create(path); err != nil {
			return nil, fmt.Errorf("creating the state file %s: %w", path, err)
		}
	}
	s, err := open(path, false)
	if err != nil {
		return nil, fmt.Errorf("opening the state file %s: %w", path, err)
	}
	removeUnfinished(path)
	return s, nil
}

// OpenReadOnly opens an existing file for View alone. It is ErrHeld while a broker has the file.
func OpenReadOnly(path string) (*Store, error) {
	s, err := open(path, true)
	if err != nil {
		return nil, fmt.Errorf("opening the state file %s: %w", path, err)
	}
	return s, nil
}

// Close lets go of the file. It waits for transactions that are under way.
func (s *Store) Close() error {
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("closing the state file %s: %w", s.path, err)
	}
	return nil
}

func open(path string, readOnly bool) (*Store, error) {
	db, err := openBolt(path, readOnly)
	if err != nil {
		return nil, err
	}
	s := &Store{db: db, path: path}
	if err := s.checkFormat(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

// openBolt opens the file when its structure is sound. bbolt itself trusts what it reads: bad octets make it panic, or touch
// memory outside of the file. So the file is checked first, under its lock, and what still goes wrong becomes an error.
func openBolt(path string, readOnly bool) (db *bbolt.DB, err error) {
	var file *os.File
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			db, err = nil, fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
		if err != nil && file != nil { // bbolt closed it, unless it panicked: then its mapping still holds the lock
			_ = unix.Flock(int(file.Fd()), unix.LOCK_UN)
			file.Close()
		}
	}()
	return bbolt.Open(path, 0o600, &bbolt.Options{
		ReadOnly:        readOnly,
		PreLoadFreelist: !readOnly,
		FreelistType:    bbolt.FreelistMapType,
		Timeout:         lockWait,
		OpenFile: func(path string, flag int, _ os.FileMode) (*os.File, error) {
			file, err = openLocked(path, flag&^os.O_CREATE, readOnly)
			return file, err
		},
	})
}

// openLocked opens the file, takes its lock (bbolt takes it once more, on the same descriptor, which changes nothing) and
// checks it.
func openLocked(path string, flag int, readOnly bool) (*os.File, error) {
	f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) // a pipe must not make it wait; check refuses it
	if err != nil {
		return nil, err
	}
	if err := lock(f, readOnly); err != nil {
		f.Close()
		return nil, err
	}
	if err := check(f); err != nil {
		f.Close()
		return nil, err
	}
	if !readOnly { // a file system that cannot is no error: updates then need free space, as ever
		_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, headroom)
	}
	return f, nil
}

// lock takes the file's lock, shared for a reader, and gives up after lockWait.
func lock(f *os.File, shared bool) error {
	how := unix.LOCK_EX
	if shared {
		how = unix.LOCK_SH
	}
	for end := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("locking: %w", err)
		}
		if time.Now().After(end) {
			return fmt.Errorf("%w: another broker is running on it (still after %v): stop that one, or use another --state-dir", ErrHeld, lockWait)
		}
	}
}

func (s *Store) checkFormat() error {
	return s.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte(systemBucket))
		if b == nil {
			return fmt.Errorf("%w: it has no format key: it is not a state file of keybroker", ErrCorrupt)
		}
		text := string(b.Get([]byte(formatKey)))
		n, err := strconv.ParseUint(text, 10, 31)
		switch {
		case err != nil:
			return fmt.Errorf("%w: its format is %q, not a number", ErrCorrupt, text)
		case n > Format:
			return fmt.Errorf("%w: it has format %d, this keybroker knows formats up to %d: install the newer keybroker again", ErrNewer, n, Format)
		case n == 0:
			return fmt.Errorf("%w: its format is 0", ErrCorrupt)
		}
		return nil
	})
}

// unfinished is what the names of files in the making have in common; see create.
func unfinished(path string) string { return filepath.Base(path) + ".new-" }

// create makes a whole file under another name and links it to path, so that a broker that dies meanwhile leaves no half
// file. When two do it at once, the first one's file stays.
func create(path string) error {
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, unfinished(path)) // with O_EXCL, which follows no link
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	defer temp.Close() // bbolt did, unless something failed before it had the file
	if err := giveToOwner(temp, dir); err != nil {
		return err
	}
	if err := initialise(temp); err != nil {
		return err
	}
	if err := os.Link(temp.Name(), path); err != nil && !exists(path) {
		return err
	}
	return syncDir(dir)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// giveToOwner makes the folder's owner the owner of a file that root makes there: the broker must be able to open it later.
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

// initialise makes temp, which is new and empty, a state file, and closes it. Nothing is opened by name: root runs this in a
// folder of the broker's user, who may have put something else there meanwhile.
func initialise(temp *os.File) error {
	db, err := bbolt.Open(temp.Name(), 0o600, &bbolt.Options{
		Timeout:  lockWait,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return temp, nil },
	})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte(systemBucket))
		if err != nil {
			return err
		}
		return b.Put([]byte(formatKey), []byte(strconv.Itoa(Format)))
	})
	return errors.Join(err, db.Close())
}

// removeUnfinished removes what a broker left that was killed in create. It is called under the file's lock.
func removeUnfinished(path string) {
	entries, _ := os.ReadDir(filepath.Dir(path))
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), unfinished(path)) {
			os.Remove(filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
