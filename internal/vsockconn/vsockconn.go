// Package vsockconn is a vsock connection from a source port below 1024, by which the other end tells root, or a process with
// CAP_NET_BIND_SERVICE, from every other process of that machine.
package vsockconn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
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
	local, err := bind(c, port)
	if err == nil {
		_, err = c.Connect(ctx, &unix.SockaddrVM{CID: cid, Port: port})
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("dialling CID %d, port %d: %w", cid, port, err)
	}
	return &conn{Conn: c, local: &vsock.Addr{ContextID: unix.VMADDR_CID_ANY, Port: local}, remote: &vsock.Addr{ContextID: cid, Port: port}}, nil
}

// Ports that dialling takes: those that rresvport(3) takes, so that services find theirs free.
const (
	lowest  = 512
	highest = 1023
)

// bind takes any free port below 1024 but one. The host still has the connections of a guest that was reset, and drops what comes
// from the same port as one of those until it ends: so a guest that boots again must not begin at the same port as before.
func bind(c *socket.Conn, but uint32) (uint32, error) {
	const ports = highest - lowest + 1
	first := rand.Uint32N(ports)
	for n := range uint32(ports) {
		port := lowest + (first+n)%ports
		if port == but {
			continue
		}
		err := c.Bind(&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
		if err == nil {
			return port, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("binding a vsock port below 1024 (it takes root, or CAP_NET_BIND_SERVICE): %w", err)
		}
	}
	return 0, fmt.Errorf("every vsock port from %d to %d is in use", lowest, highest)
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
