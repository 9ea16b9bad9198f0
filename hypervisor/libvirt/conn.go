package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// conn is one opened connection to libvirt. It is used by one goroutine at a time and thrown away on any trouble.
type conn struct {
	rpc    *golibvirt.Libvirt
	wire   *wire
	socket string
}

// open connects to the first socket that somebody listens on, and opens the hypervisor there.
func (c *Client) open(ctx context.Context) (*conn, error) {
	if len(c.cfg.Sockets) == 0 {
		return nil, errors.New("connecting to libvirt: no socket is configured")
	}
	var tried error
	for _, path := range c.cfg.Sockets {
		raw, err := (&net.Dialer{Timeout: c.cfg.Timeout}).DialContext(ctx, "unix", path)
		if err == nil {
			return c.openOn(ctx, raw, path)
		}
		if errors.Is(err, syscall.EAGAIN) || errors.Is(err, context.DeadlineExceeded) { // nobody accepts, and the queue is full
			err = fmt.Errorf("%w: %w", ErrNotAnswering, err)
		}
		if !nobodyThere(err) {
			return nil, fmt.Errorf("connecting to libvirt: %w", err)
		}
		tried = err
	}
	return nil, fmt.Errorf("connecting to libvirt: nobody listens on any of %v; is libvirtd or virtqemud running? %w", c.cfg.Sockets, tried)
}

// nobodyThere says that another socket is worth trying.
func nobodyThere(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

func (c *Client) openOn(ctx context.Context, raw net.Conn, path string) (*conn, error) {
	w := newWire(raw)
	n := &conn{rpc: golibvirt.NewWithDialer(dialers.NewAlreadyConnected(w)), wire: w, socket: path}
	err := n.do(ctx, c.cfg.Timeout, func() error {
		defer close(w.opened)
		return n.rpc.ConnectToURI(golibvirt.ConnectURI(c.cfg.URI))
	})
	if err != nil {
		w.fail(err)
		return nil, fmt.Errorf("opening %s on %s: %w", c.cfg.URI, path, withHint(err))
	}
	return n, nil
}

// withHint says what to do when libvirt refuses to talk to us.
func withHint(err error) error {
	var refusal golibvirt.Error
	if !errors.As(err, &refusal) {
		return err
	}
	switch golibvirt.ErrorNumber(refusal.Code) {
	case golibvirt.ErrAuthFailed, golibvirt.ErrAuthCancelled, golibvirt.ErrAuthUnavailable, golibvirt.ErrAccessDenied:
		return fmt.Errorf(`%w; the read-only socket needs polkit's action org.libvirt.unix.monitor, or auth_unix_ro = "none" in libvirt's configuration`, err)
	}
	return err
}

func (n *conn) close() { n.wire.fail(net.ErrClosed) }

// usable says whether the connection is worth another call.
func (n *conn) usable() bool { return n.wire.cause() == nil }

// do runs one call, which must be one RPC or a few, and ends the connection when it takes longer than timeout or ctx ends.
func (n *conn) do(ctx context.Context, timeout time.Duration, f func() error) error {
	_, err := call(ctx, n, timeout, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

// ask is one call of a look-up. libvirt may be long in answering it without being stuck: while it starts a domain, or a hook
// of one runs, it holds whoever asks about that domain or for the list. So after Config.Timeout another connection is asked
// whether libvirt lives; while it does there is Config.Patience.
func ask[T any](ctx context.Context, c *Client, n *conn, f func() (T, error)) (T, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	probe := time.AfterFunc(c.cfg.Timeout, func() {
		if err := c.ping(ctx); err != nil && ctx.Err() == nil { // else the answer has come meanwhile
			n.wire.fail(err)
		}
	})
	defer probe.Stop()
	return call(ctx, n, c.cfg.Patience, f)
}

// ping asks libvirt for what it knows without looking at any domain.
func (c *Client) ping(ctx context.Context) error {
	n, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer n.close()
	_, err = call(ctx, n, c.cfg.Timeout, n.rpc.ConnectGetLibVersion)
	return err
}

// call is do with a result. f runs in a goroutine of its own: when it is given up it may still be stuck in go-libvirt, whose
// calls know no context, until the closed connection sets it free.
func call[T any](ctx context.Context, n *conn, timeout time.Duration, f func() (T, error)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	var none T
	if err := n.wire.cause(); err != nil {
		return none, err
	}
	done := make(chan outcome, 1)
	go func() {
		var o outcome
		defer func() {
			if r := recover(); r != nil { // go-libvirt's decoder, on a reply that it did not expect
				o.err = fmt.Errorf("%w: %v", errMalformed, r)
			}
			done <- o
		}()
		o.value, o.err = f()
	}()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case o := <-done:
		return o.value, n.settle(o.err)
	case <-timer.C:
		n.wire.fail(fmt.Errorf("%w within %v", ErrNotAnswering, timeout))
	case <-ctx.Done():
		n.wire.fail(fmt.Errorf("%w: %w", ErrNotAnswering, context.Cause(ctx)))
	}
	return none, n.wire.cause()
}

// settle keeps the connection after libvirt's own errors only. Any other is replaced by what ended the connection, where
// that is known: go-libvirt says "interrupted".
func (n *conn) settle(err error) error {
	if err == nil || errors.As(err, new(golibvirt.Error)) {
		return err
	}
	n.wire.fail(err)
	return n.wire.cause()
}
