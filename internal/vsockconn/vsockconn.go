// Package vsockconn is a vsock connection from a source port below 1024, by which the other end tells root, or a process with
// CAP_NET_BIND_SERVICE, from every other process of that machine.
package vsockconn

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

// timeout bounds one attempt; a machine whose driver is not up yet answers nothing at all.
const timeout = 2 * time.Second

// Dial connects to a port of a machine. It needs CAP_NET_BIND_SERVICE. One attempt takes at most 2 s.
func Dial(ctx context.Context, cid, port uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, err := socket.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock", nil)
	if err != nil {
		return nil, fmt.Errorf("opening a vsock socket: %w", err)
	}
	local, err := bind(c)
	if err == nil {
		_, err = c.Connect(ctx, &unix.SockaddrVM{CID: cid, Port: port})
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("dialling CID %d, port %d: %w", cid, port, err)
	}
	return &conn{Conn: c, local: &vsock.Addr{ContextID: unix.VMADDR_CID_ANY, Port: local}, remote: &vsock.Addr{ContextID: cid, Port: port}}, nil
}

// bind takes a free port below 1024, from the top: a kernel that picks one itself picks above.
func bind(c *socket.Conn) (uint32, error) {
	for port := uint32(1023); port > 0; port-- {
		err := c.Bind(&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
		if err == nil {
			return port, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("binding a vsock port below 1024 (it takes root, or CAP_NET_BIND_SERVICE): %w", err)
		}
	}
	return 0, errors.New("every vsock port below 1024 is in use")
}

// conn adds the addresses that make a socket a net.Conn, and errors that are net.Error: net/http takes a deadline for the end
// of the connection otherwise.
type conn struct {
	*socket.Conn
	local, remote net.Addr
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	return n, c.netError("read", err)
}

func (c *conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	return n, c.netError("write", err)
}

func (c *conn) netError(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return &net.OpError{Op: op, Net: "vsock", Source: c.local, Addr: c.remote, Err: err}
}
