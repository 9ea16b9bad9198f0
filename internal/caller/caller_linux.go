package caller

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"sync"
)

// The transports.
const (
	Unix = "unix" // the Unix socket
	TCP  = "tcp"  // 127.0.0.1 or ::1
)

// Errors that callers of this package match. Each is a refusal.
var (
	// ErrGone means that there is nobody any more at the other end, or somebody else.
	ErrGone = errors.New("the caller is gone")
	// ErrRoot means uid 0 on TCP. The kernel also says 0 where it does not know, so root is served on the Unix socket.
	ErrRoot = errors.New("root is not served over TCP: use the Unix socket")
	// ErrUnknownUID means a uid that this process's user namespace has no number for.
	ErrUnknownUID = errors.New("the caller's uid has no number in this user namespace; run the broker without PrivateUsers= or outside the container")
)

// A Caller is who made one connection. Its methods may be called at the same time, also with Close.
type Caller struct {
	UID       uint32
	PID       int    // on the Unix socket; 0: unknown, and always on TCP
	Transport string // Unix or TCP
	NoUnit    string // why no unit rule can be met; empty: the unit is known

	from   *Resolver
	cgroup string   // Unix: the path of the process's cgroup; empty: unknown
	pidfd  *os.File // Unix: the process; nil: unknown
	conn   *tuple   // TCP: the client's socket
	sock   socket   // TCP: what the kernel said of it
}

// A Resolver asks the kernel who callers are. It may be used by many goroutines at once.
type Resolver struct {
	diag       *diag
	cgroupRoot string
	cgroupDev  uint64
	noCgroups  string // why cgroups cannot be compared
}

// Config is what New needs.
type Config struct {
	CgroupRoot string // where the cgroup v2 hierarchy is mounted; empty: it is looked for
}

// New returns a Resolver. Without a cgroup v2 hierarchy it still knows uids, and no unit rule is met on TCP.
func New(c Config) (*Resolver, error) {
	r := &Resolver{diag: newDiag()}
	root, err := c.CgroupRoot, error(nil)
	if root == "" {
		root, err = findCgroupRoot()
	}
	if err == nil {
		r.cgroupDev, err = cgroupDevice(root)
	}
	if err != nil && c.CgroupRoot != "" {
		return nil, fmt.Errorf("opening cgroups: %w", err)
	}
	if err != nil {
		r.noCgroups = err.Error()
	}
	r.cgroupRoot = root
	return r, nil
}

// Close ends the Resolver. Callers that it made know nothing new from then on: Still is an error on TCP.
func (r *Resolver) Close() { r.diag.close() }

// Close lets go of the process's handle. It does not close the connection.
func (c *Caller) Close() {
	if c.pidfd != nil {
		c.pidfd.Close()
	}
}

// Still returns nil if the one who made the connection is there still, and is the same; to be asked right before an answer.
// Otherwise the error matches ErrGone, or says that the kernel could not be asked: a refusal too. On the Unix socket of a
// kernel without process handles it says nil.
func (c *Caller) Still(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	switch {
	case c.conn != nil:
		return c.stillTCP()
	case c.pidfd != nil:
		return alive(c.pidfd)
	}
	return nil
}

// MatchUnit reports whether the caller is in the cgroup at this path, "/system.slice/x.service" as in /proc/PID/cgroup.
// A cgroup below it is another. On TCP the path's cgroup is looked up each time: one that was removed and made anew is
// another.
func (c *Caller) MatchUnit(unit string) bool {
	if len(unit) < 2 || unit[0] != '/' || path.Clean(unit) != unit || c.NoUnit != "" {
		return false
	}
	if c.Transport == Unix {
		return c.cgroup == unit
	}
	id, ok := c.from.cgroupID(unit)
	return ok && id == c.sock.cgroup
}

// Unit says for people which unit the caller is in; empty if it is unknown.
func (c *Caller) Unit() string {
	switch {
	case c.NoUnit != "":
		return ""
	case c.Transport == Unix:
		return c.cgroup
	}
	return fmt.Sprintf("cgroup %d (find %s -inum %d)", c.sock.cgroup, c.from.cgroupRoot, c.sock.cgroup)
}

// overflowUID is what the kernel says for a uid that has no number in this user namespace.
const overflowUID = 65534

// checkUID refuses the uid that stands for all that cannot be named, unless here everything can be.
func checkUID(uid uint32) error {
	if uid == overflowUID && !allUIDsNamed() {
		return ErrUnknownUID
	}
	return nil
}

// allUIDsNamed reports whether this process's user namespace has a number for every uid, as the first one has.
var allUIDsNamed = sync.OnceValue(func() bool {
	data, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	f := strings.Fields(string(data))
	return len(f) == 3 && f[0] == "0" && f[1] == "0" && f[2] == "4294967295"
})
