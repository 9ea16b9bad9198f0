package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// freshTime is how long a connection that was made before the broker was told to stop may take until its first request.
	freshTime = 2 * time.Second
	// finishPoll is how often a stopping server looks which of its connections have become idle.
	finishPoll = 5 * time.Millisecond
)

// server is what serves on some listeners, and the connections of its callers.
type server struct {
	serve     func(net.Listener) error
	listeners []net.Listener
	conns     *conns
	accepted  chan struct{} // closed when no more connections come
}

func newServer(serve func(net.Listener) error, c *conns, listeners ...net.Listener) *server {
	return &server{serve, listeners, c, make(chan struct{})}
}

// withConns makes an http.Server count its connections, and end them without losing a request.
func withConns(h *http.Server, c *conns) *http.Server {
	h.Handler = c.finishing(h.Handler)
	then := h.ConnContext
	h.ConnContext = func(ctx context.Context, conn net.Conn) context.Context { return then(c.identify(ctx, conn), conn) }
	h.ConnState = c.closed
	return h
}

// run serves from when ready is closed until the listeners are; with no ready, at once.
func (s *server) run(ctx context.Context, ready <-chan struct{}, fail context.CancelCauseFunc) {
	defer close(s.accepted)
	if ready != nil {
		select {
		case <-ready:
		case <-ctx.Done():
			return
		}
	}
	var parts sync.WaitGroup
	for _, l := range s.listeners {
		parts.Go(func() {
			if err := s.serve(l); err != nil && !errors.Is(err, net.ErrClosed) {
				fail(fmt.Errorf("serving %s: %w", l.Addr(), err))
			}
		})
	}
	parts.Wait()
}

// stop answers every request that has come, and lets who comes later wait in the socket, where systemd holds it, for the next
// broker. net/http's Shutdown alone does not: it hangs up on a request that it reads after it was called, and on one that
// arrives on an idle connection in the moment in which it closes that.
func (s *server) stop(ctx context.Context) {
	for _, l := range s.listeners {
		l.Close()
	}
	<-s.accepted
	s.conns.finish(ctx)
}
