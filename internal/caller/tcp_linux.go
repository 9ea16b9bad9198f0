package caller

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// A tuple is a socket's own address and that of its peer. IPv4 is never mapped to IPv6 in it.
type tuple struct{ local, remote netip.AddrPort }

// A socket is what the kernel says of a client's socket.
type socket struct {
	cookie uint64 // differs from every other socket's since boot
	inode  uint32 // 0: no process has it
	uid    uint32
	cgroup uint64 // 0: not said
}

// FromTCP returns who connected over loopback. A client that has closed its end, or its sending half, is ErrGone. The
// Caller is to be closed. The error matches ErrGone, ErrRoot or
// ErrUnknownUID if these are why. A client in another network namespace is ErrGone. A unit that cannot be known is no error:
// NoUnit says why.
func (r *Resolver) FromTCP(conn *net.TCPConn) (*Caller, error) {
	t, err := clientTuple(conn)
	if err != nil {
		return nil, fmt.Errorf("asking for the client's socket: %w", err)
	}
	s, err := r.diag.lookup(t)
	if err == nil {
		err = s.check()
	}
	if err == nil {
		err = checkEstablished(conn)
	}
	if err != nil {
		return nil, fmt.Errorf("asking for the client's socket: %w", err)
	}
	return &Caller{UID: s.uid, Transport: TCP, NoUnit: r.noUnit(s), from: r, conn: &t, sock: s}, nil
}

// checkEstablished returns ErrGone if the connection has ended. It is asked after the client's socket was found: the client
// may have sent a request and reset the connection, and its port may have passed to somebody else before that. While this
// end is established no other socket can be on the client's addresses.
func checkEstablished(conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var info *unix.TCPInfo
	ctlErr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err := errors.Join(ctlErr, err); err != nil {
		return err
	}
	if info.State != tcpEstablished {
		return ErrGone
	}
	return nil
}

// clientTuple returns the addresses as the client has them.
func clientTuple(conn *net.TCPConn) (t tuple, err error) {
	client, ok := conn.RemoteAddr().(*net.TCPAddr)
	server, ok2 := conn.LocalAddr().(*net.TCPAddr)
	if !ok || !ok2 {
		return t, fmt.Errorf("the connection has no addresses: %w", ErrGone)
	}
	return tuple{local: unmap(client), remote: unmap(server)}, nil
}

func unmap(a *net.TCPAddr) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// check refuses sockets of nobody and of root. A closed socket has uid 0 and inode 0: that is not root.
func (s socket) check() error {
	switch {
	case s.inode == 0:
		return ErrGone
	case s.uid == 0:
		return ErrRoot
	}
	return checkUID(s.uid)
}

func (r *Resolver) noUnit(s socket) string {
	if s.cgroup == 0 {
		return noSockGroup
	}
	return r.noCgroups
}

// stillTCP asks for the client's socket again.
func (c *Caller) stillTCP() error {
	now, err := c.from.diag.lookup(*c.conn)
	if err != nil {
		return fmt.Errorf("asking for the client's socket again: %w", err)
	}
	if now.cookie != c.sock.cookie {
		return fmt.Errorf("the client's port has another socket now: %w", ErrGone)
	}
	if now != c.sock {
		return fmt.Errorf("the client's socket has changed: %w", ErrGone)
	}
	return nil
}

// CheckTCP connects to itself over loopback and asks for its own socket, so that a kernel or unit file that does not let it
// ask is noticed before the first caller is refused. The error says what is missing.
func (r *Resolver) CheckTCP() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("trying loopback: %w", err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return fmt.Errorf("trying loopback: %w", err)
	}
	defer client.Close()
	own := tuple{local: unmap(client.LocalAddr().(*net.TCPAddr)), remote: unmap(client.RemoteAddr().(*net.TCPAddr))}
	s, err := r.diag.lookup(own)
	if err != nil {
		return fmt.Errorf("asking the kernel for a socket of this process: %w; "+
			"it needs CONFIG_INET_DIAG (modprobe tcp_diag) and AF_NETLINK in RestrictAddressFamilies=", err)
	}
	if int(s.uid) != os.Geteuid() || s.inode == 0 {
		return fmt.Errorf("asking the kernel for a socket of this process: expected uid %d, got uid %d, inode %d", os.Geteuid(), s.uid, s.inode)
	}
	return nil
}
