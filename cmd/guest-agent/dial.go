//go:build linux

package main

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"keybroker/inject"
	"keybroker/internal/vsockconn"
)

const (
	firstCall = 50 * time.Millisecond // before dialling again
	lastCall  = 5 * time.Second
)

// dialHost connects to the relay on this machine's host, and so to a broker elsewhere.
func dialHost(ctx context.Context) (net.Conn, error) {
	return vsockconn.Dial(ctx, vsock.Host, inject.Port)
}

// call dials again and again and hands connections to the agent, one at a time: the next is made when the last has ended.
func (a *agent) call(ctx context.Context, dial func(context.Context) (net.Conn, error)) {
	pause := firstCall
	since := a.console.age()
	for ctx.Err() == nil {
		began := time.Now()
		conn, err := dial(ctx)
		if err == nil {
			a.handOver(ctx, conn)
			since = a.console.age()
		} else {
			a.unanswered(ctx, err, since)
		}
		if time.Since(began) > lastCall {
			pause = firstCall
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, lastCall)
	}
}

// handOver gives the agent a connection and waits for its end.
func (a *agent) handOver(ctx context.Context, conn net.Conn) {
	c := &calledConn{Conn: conn, ended: make(chan struct{})}
	select {
	case a.conns <- c:
	case <-ctx.Done():
		conn.Close()
		return
	}
	select {
	case <-c.ended:
	case <-ctx.Done():
	}
}

// unanswered says that nobody is there, and what to do about it.
func (a *agent) unanswered(ctx context.Context, err error, since string) {
	if ctx.Err() != nil {
		return
	}
	select {
	case a.troubles <- err:
	case <-ctx.Done():
	}
	a.console.sayOnce("dial", "nobody answers, since %s: %v (%s); dialling again", since, err, advice(err))
}

// advice says what to do when the host cannot be dialled.
func advice(err error) string {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return "the agent must be root"
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.ENODEV):
		return "modprobe vmw_vsock_virtio_transport, and <vsock> in the domain"
	}
	return "on the host, `keybroker relay` must listen there"
}

// calledConn tells when it was closed.
type calledConn struct {
	net.Conn
	once  sync.Once
	ended chan struct{}
}

// Close ends the connection.
func (c *calledConn) Close() error {
	c.once.Do(func() { close(c.ended) })
	return c.Conn.Close()
}
