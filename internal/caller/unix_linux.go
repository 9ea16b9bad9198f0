package caller

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Why a caller's unit is unknown.
const (
	noPidfd     = "this kernel has no SO_PEERPIDFD, which came with Linux 6.5"
	noPID       = "the caller is in another PID namespace"
	noCgroup2   = "the process is in no cgroup v2 hierarchy"
	noSockGroup = "this kernel does not say the cgroup of a socket; Linux 5.9 with CONFIG_SOCK_CGROUP_DATA does"
)

// UnixUID returns the uid of who connected to a Unix socket, and asks for nothing else: FromUnix names the same one. The error
// matches ErrUnknownUID if this is why.
func UnixUID(conn *net.UnixConn) (uid uint32, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("asking who connected: %w", err)
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(ctlErr, err); err == nil {
		uid, err = cred.Uid, checkUID(cred.Uid)
	}
	if err != nil {
		return 0, fmt.Errorf("asking who connected: %w", err)
	}
	return uid, nil
}

// FromUnix returns who connected to a Unix socket: the process that did, whoever holds its end of the connection now. The
// Caller is to be closed. The error matches ErrGone or ErrUnknownUID if these are why. A unit that cannot be known is no
// error, as rules by uid alone can be met: NoUnit says why.
func (r *Resolver) FromUnix(conn *net.UnixConn) (*Caller, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("asking who connected: %w", err)
	}
	c := &Caller{Transport: Unix, from: r}
	ctlErr := raw.Control(func(fd uintptr) { err = c.readPeer(int(fd)) })
	if err := errors.Join(ctlErr, err); err != nil {
		c.Close()
		return nil, fmt.Errorf("asking who connected: %w", err)
	}
	if err := c.readUnit(); err != nil {
		c.Close()
		return nil, fmt.Errorf("asking for the caller's unit: %w", err)
	}
	return c, nil
}

// readPeer takes what the kernel keeps with the socket.
func (c *Caller) readPeer(fd int) error {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return err
	}
	c.UID, c.PID = cred.Uid, int(cred.Pid)
	if err := checkUID(c.UID); err != nil {
		return err
	}
	pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch {
	case err == nil:
		c.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	case errors.Is(err, unix.ENOPROTOOPT):
		c.NoUnit = noPidfd
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL): // the process has ended and was reaped
		return ErrGone
	default:
		return err
	}
	return nil
}

// readUnit reads the process's cgroup. Its handle is asked before and after: between, the PID is that of no other.
func (c *Caller) readUnit() error {
	if c.NoUnit != "" {
		return nil
	}
	if c.PID == 0 {
		c.NoUnit = noPID
		return alive(c.pidfd)
	}
	if err := alive(c.pidfd); err != nil {
		return err
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", c.PID))
	if goneErr := alive(c.pidfd); goneErr != nil {
		return goneErr
	}
	if err != nil {
		c.NoUnit = fmt.Sprintf("the broker cannot read /proc/%d/cgroup (hidepid or ProtectProc= hides it)", c.PID)
		return nil
	}
	if c.cgroup = unifiedPath(data); c.cgroup == "" {
		c.NoUnit = noCgroup2
	}
	return nil
}

// unifiedPath returns the path of the cgroup v2 hierarchy in /proc/PID/cgroup, or "".
func unifiedPath(data []byte) string {
	for line := range bytes.Lines(data) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(string(line), "\n"), "0::"); ok && strings.HasPrefix(p, "/") {
			return p
		}
	}
	return ""
}

// alive returns ErrGone if the process of a handle has ended.
func alive(pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("asking for the caller's process: %w", err)
	}
	var n int
	var pollErr error
	err = raw.Control(func(fd uintptr) { n, pollErr = pollOnce(int(fd)) })
	if err := errors.Join(err, pollErr); err != nil {
		return fmt.Errorf("asking for the caller's process: %w", err)
	}
	if n > 0 { // readable: it has ended
		return ErrGone
	}
	return nil
}

func pollOnce(fd int) (n int, err error) {
	for {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if err != unix.EINTR {
			return n, err
		}
	}
}
