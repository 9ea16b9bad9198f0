//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"keybroker/inject"
)

// listenVsock listens for the host. It waits for the kernel's vsock support, which may be a module that is loaded later.
func listenVsock(ctx context.Context, out *console) (net.Listener, error) {
	for {
		// Any context id: the guest's own may not be known yet, and changes with a restore.
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, inject.Port, nil)
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.ENODEV) {
			return nil, fmt.Errorf("listening on vsock port %d: %w: is another agent running, or this not root?", inject.Port, err)
		}
		out.sayOnce("vsock", "waiting for the kernel's vsock support; if it does not come: modprobe vmw_vsock_virtio_transport, and <vsock> in the domain")
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("listening on vsock port %d: the kernel has no vsock support: modprobe vmw_vsock_virtio_transport", inject.Port)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// fromHost says whether a peer may be the broker: only root on the host has CID 2 and a port below 1024.
func fromHost(peer net.Addr) bool {
	a, ok := peer.(*vsock.Addr)
	return ok && a.ContextID == vsock.Host && a.Port < 1024
}

// accept hands connections from the host to the agent, one at a time, and closes all others.
func (a *agent) accept(ctx context.Context, l net.Listener, allowed func(net.Addr) bool) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			a.console.sayOnce("accept", "warning: accepting a connection: %v", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if !allowed(conn.RemoteAddr()) {
			a.console.sayOnce("peer", "closed a connection from %v: expected the host, CID 2, and a source port below 1024", conn.RemoteAddr())
			conn.Close()
			continue
		}
		select {
		case a.conns <- conn:
		case <-ctx.Done():
			conn.Close()
			return
		}
	}
}
