package audit

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The reserve is blocks that are allocated behind the end of the file that is written to. Releases, changes by hand and the log's
// own records use them without asking the file system for space, so nobody else can take them in between; refusals must leave
// them alone.

// chunk is by how many octets the allocation grows at a time.
const chunk = 1 << 20

// essential says whether the event's is a record that must not be lost: keys that leave, and what the log needs to prove itself.
// These are few, and no stranger makes them.
func essential(e Event) bool {
	switch e {
	case EventRelease, EventBreakGlass, EventCheckpoint, EventStart, EventStop, EventRecovered, EventDropped, EventReset:
		return true
	}
	return false
}

// makeRoom sees to it that the file has n octets and the reserve behind them. A record that may use the reserve needs only the n,
// and takes them from there.
func (l *Log) makeRoom(n int64, mayUseReserve bool) error {
	if !l.low && l.room < l.size+n+l.cfg.Reserve {
		if err := l.extend(n); err != nil {
			l.cfg.Logger.Warn("the disk of the audit log is full; refusals are not recorded until there is space", "error", err)
			l.setLow(true)
		}
	}
	if l.low && !mayUseReserve {
		return fmt.Errorf("%w: only the reserve is left, which is for releases, changes by hand and the log's own records", ErrNoSpace)
	}
	return nil
}

// extend allocates blocks for n octets more, the reserve and a chunk, when that leaves others enough.
func (l *Log) extend(n int64) error {
	end := l.size + n + l.cfg.Reserve + chunk
	if err := allocate(l.file, l.room, end-l.room); err != nil {
		return err
	}
	l.room = end
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(l.file.Fd()), &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; free < l.cfg.Reserve {
		return fmt.Errorf("%d octets are free, fewer than the reserve of %d", free, l.cfg.Reserve)
	}
	return nil
}

// allocate gives the file blocks without changing its size. A file system that cannot is no error: there is no reserve then.
func allocate(f *os.File, from, n int64) error {
	if n <= 0 {
		return nil
	}
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, from, n)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

func isNoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG) || errors.Is(err, ErrNoSpace)
}

// setLow notes that there is no space, or some again. The keeper then looks each second.
func (l *Log) setLow(low bool) {
	l.low = low
	notify(l.poke)
}

// lose counts a record that was left out.
func (l *Log) lose(e Event, now time.Time) {
	if essential(e) {
		return // its caller does not go on
	}
	if l.lost.count == 0 {
		l.lost.since = now
	}
	l.lost.count++
	l.lost.total++
}

// regain tries to have the reserve whole again, and then writes how much was left out.
func (l *Log) regain() {
	l.mu.Lock()
	regained := l.err == nil && l.low && l.extend(0) == nil
	if regained {
		l.low = false
		l.cfg.Logger.Info("the audit log has space again", "dropped", l.lost.count)
	}
	lost, usable := l.lost, !l.low && l.err == nil
	if usable {
		l.lost.count = 0
	}
	l.mu.Unlock()
	if regained && l.cfg.Regained != nil {
		l.cfg.Regained()
	}
	if !usable || lost.count == 0 {
		return
	}
	reason := "no space since " + lost.since.UTC().Format(time.RFC3339)
	if _, err := l.Append(Record{Event: EventDropped, Count: lost.count, Reason: reason}, Written); err != nil {
		l.mu.Lock()
		l.lost.count += lost.count
		l.mu.Unlock()
	}
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
