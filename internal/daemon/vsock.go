package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/mdlayher/socket"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// dialTimeout bounds one attempt; a guest whose driver is not up yet answers nothing at all.
const dialTimeout = 2 * time.Second

// DialGuest connects to a guest's vsock port from a source port below 1024, which is how the guest tells the broker from
// other processes of this host. It needs CAP_NET_BIND_SERVICE.
func DialGuest(ctx context.Context, cid, port uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := socket.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock", nil)
	if err != nil {
		return nil, fmt.Errorf("opening a vsock socket: %w", err)
	}
	local, err := bindPrivileged(c)
	if err == nil {
		_, err = c.Connect(ctx, &unix.SockaddrVM{CID: cid, Port: port})
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("dialling CID %d, port %d: %w", cid, port, err)
	}
	return &guestConn{Conn: c, local: &vsock.Addr{ContextID: vsock.Host, Port: local}, remote: &vsock.Addr{ContextID: cid, Port: port}}, nil
}

// bindPrivileged takes a free port below 1024, from the top: a kernel that picks one itself picks above.
func bindPrivileged(c *socket.Conn) (uint32, error) {
	for port := uint32(1023); port > 0; port-- {
		err := c.Bind(&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
		if err == nil {
			return port, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("binding a vsock port below 1024 (the broker needs CAP_NET_BIND_SERVICE): %w", err)
		}
	}
	return 0, errors.New("every vsock port below 1024 is in use")
}

// guestConn adds the addresses that make a socket a net.Conn, and errors that are net.Error: net/http takes a deadline for the
// end of the connection otherwise.
type guestConn struct {
	*socket.Conn
	local, remote net.Addr
}

func (c *guestConn) LocalAddr() net.Addr  { return c.local }
func (c *guestConn) RemoteAddr() net.Addr { return c.remote }

func (c *guestConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	return n, c.netError("read", err)
}

func (c *guestConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	return n, c.netError("write", err)
}

func (c *guestConn) netError(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return &net.OpError{Op: op, Net: "vsock", Source: c.local, Addr: c.remote, Err: err}
}

// checkVhost refuses a vhost-vsock device that more than root and one group may open: whoever can is any free CID. A host without
// the device has no VMs to serve.
func checkVhost(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil
	}
	if st.Mode&0o007 != 0 {
		return fmt.Errorf("%s has mode %04o, so that any user can take a VM's place: `chmod 660 %s` (and mend the udev rule), or libvirt = [] in broker.toml", path, st.Mode&0o777, path)
	}
	return nil
}
