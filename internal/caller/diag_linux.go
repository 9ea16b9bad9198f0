package caller

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Sizes and places in the messages of sock_diag(7): struct nlmsghdr, inet_diag_req_v2 and inet_diag_msg.
const (
	headerSize  = unix.SizeofNlMsghdr
	requestSize = headerSize + 56
	replySize   = headerSize + 72

	attrCgroupID   = 21 // INET_DIAG_CGROUP_ID
	tcpEstablished = 1
)

// errReply means a message that is not an answer to what was asked.
var errReply = errors.New("the kernel's answer is not understood")

// maxIdle is how many netlink sockets are kept open between queries.
const maxIdle = 8

// A diag looks up sockets by their addresses. It keeps a few netlink sockets open, each used by one goroutine at a time:
// this is asked before every answer, so it makes no garbage and no dump of all sockets.
type diag struct {
	idle   chan *netlink
	closed atomic.Bool
}

func newDiag() *diag { return &diag{idle: make(chan *netlink, maxIdle)} }

func (d *diag) close() {
	d.closed.Store(true)
	for {
		select {
		case n := <-d.idle:
			unix.Close(n.fd)
		default:
			return
		}
	}
}

// lookup returns the established socket with these addresses in this network namespace. Without one, the error matches
// ErrGone.
func (d *diag) lookup(t tuple) (socket, error) {
	n, err := d.get()
	if err != nil {
		return socket{}, err
	}
	reply, err := n.query(t)
	if err != nil {
		unix.Close(n.fd) // a late answer to this query must not be taken for that to the next
		return socket{}, err
	}
	s, err := parseReply(reply, n.seq, t)
	d.put(n)
	return s, err
}

func (d *diag) get() (*netlink, error) {
	if d.closed.Load() {
		return nil, errors.New("the resolver is closed")
	}
	select {
	case n := <-d.idle:
		return n, nil
	default:
		return dialNetlink()
	}
}

func (d *diag) put(n *netlink) {
	if !d.closed.Load() {
		select {
		case d.idle <- n:
			if d.closed.Load() { // close may have looked before this one was back
				d.close()
			}
			return
		default:
		}
	}
	unix.Close(n.fd)
}

// A netlink is one socket to the kernel's socket diagnosis.
type netlink struct {
	fd  int
	seq uint32
	buf [1024]byte // an answer has under 200 octets
}

func dialNetlink() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	// Connected: the kernel drops what other processes send here. The answer is there when the write returns; the limit is
	// for a kernel that proves otherwise.
	err = errors.Join(
		unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}))
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	return &netlink{fd: fd}, nil
}

// query sends one request and returns the answer, which lies in n.buf until the next.
func (n *netlink) query(t tuple) ([]byte, error) {
	n.seq++
	req := n.buf[:requestSize]
	putRequest(req, n.seq, t)
	if _, err := retry(unix.Write, n.fd, req); err != nil {
		return nil, fmt.Errorf("writing to netlink: %w", err)
	}
	size, err := retry(unix.Read, n.fd, n.buf[:])
	if err != nil {
		return nil, fmt.Errorf("reading from netlink: %w", err)
	}
	return n.buf[:size], nil
}

// retry repeats a call that a signal has interrupted: Go's scheduler sends them.
func retry(call func(int, []byte) (int, error), fd int, b []byte) (int, error) {
	for {
		n, err := call(fd, b)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// putRequest writes a request for exactly one socket: no dump. See linux/inet_diag.h.
func putRequest(b []byte, seq uint32, t tuple) {
	clear(b)
	native := binary.NativeEndian
	native.PutUint32(b, requestSize)
	native.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	native.PutUint16(b[6:], unix.NLM_F_REQUEST)
	native.PutUint32(b[8:], seq)
	req := b[headerSize:]
	req[0] = family(t.local.Addr())
	req[1] = unix.IPPROTO_TCP
	native.PutUint32(req[4:], 1<<tcpEstablished)
	binary.BigEndian.PutUint16(req[8:], t.local.Port())
	binary.BigEndian.PutUint16(req[10:], t.remote.Port())
	putAddr(req[12:28], t.local.Addr())
	putAddr(req[28:44], t.remote.Addr())
	native.PutUint64(req[48:], ^uint64(0)) // INET_DIAG_NOCOOKIE: whichever socket it is
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func putAddr(b []byte, a netip.Addr) {
	if a.Is4() {
		v4 := a.As4()
		copy(b, v4[:])
		return
	}
	v6 := a.As16()
	copy(b, v6[:])
}

// parseReply returns what an answer says of the socket that was asked for. The kernel also answers with a listener on the
// client's address if the client's socket is gone, so state and addresses are compared.
func parseReply(b []byte, seq uint32, t tuple) (socket, error) {
	native := binary.NativeEndian
	if len(b) < headerSize+4 || native.Uint32(b) < headerSize+4 || int64(native.Uint32(b)) > int64(len(b)) || native.Uint32(b[8:]) != seq {
		return socket{}, errReply
	}
	b = b[:native.Uint32(b)]
	switch kind := native.Uint16(b[4:]); {
	case kind == unix.NLMSG_ERROR:
		return socket{}, replyError(unix.Errno(-int32(native.Uint32(b[headerSize:]))))
	case kind != unix.SOCK_DIAG_BY_FAMILY || len(b) < replySize:
		return socket{}, errReply
	}
	msg := b[headerSize:]
	if msg[1] != tcpEstablished || !sameAddrs(msg, t) {
		return socket{}, ErrGone
	}
	return socket{
		cookie: native.Uint64(msg[44:]),
		uid:    native.Uint32(msg[64:]),
		inode:  native.Uint32(msg[68:]),
		cgroup: cgroupAttr(b[replySize:]),
	}, nil
}

func replyError(errno unix.Errno) error {
	if errno == unix.ENOENT {
		return ErrGone
	}
	return fmt.Errorf("looking up a socket: %w", errno)
}

func sameAddrs(msg []byte, t tuple) bool {
	return binary.BigEndian.Uint16(msg[4:]) == t.local.Port() && binary.BigEndian.Uint16(msg[6:]) == t.remote.Port() &&
		addrAt(msg[0], msg[8:24]) == t.local.Addr() && addrAt(msg[0], msg[24:40]) == t.remote.Addr()
}

// addrAt reads an address; an IPv6 socket to an IPv4 address has mapped ones.
func addrAt(family byte, b []byte) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b))
	}
	return netip.AddrFrom16([16]byte(b)).Unmap()
}

// cgroupAttr returns the socket's cgroup among the attributes, 0 if it is not said.
func cgroupAttr(b []byte) uint64 {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return 0
		}
		if binary.NativeEndian.Uint16(b[2:]) == attrCgroupID && size == unix.SizeofNlAttr+8 {
			return binary.NativeEndian.Uint64(b[unix.SizeofNlAttr:])
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return 0
}
