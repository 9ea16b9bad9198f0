package daemon

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keybroker/internal/config"
)

// callers ask without end over a socket, on one connection or with each request on a new one, until stop.
type callers struct {
	path string
	stop atomic.Bool
}

// asks returns what happened to the first request that was sent and not answered. A kept connection that is closed before anything
// could be sent is replaced, as every client of HTTP does.
func (l *callers) asks(keep bool) error {
	var c net.Conn
	var in *bufio.Reader
	for !l.stop.Load() {
		fresh := c == nil
		if fresh {
			var err error
			if c, err = net.Dial("unix", l.path); err != nil {
				return err
			}
			in = bufio.NewReader(c)
		}
		if _, err := io.WriteString(c, getting("/")); err != nil {
			if fresh {
				return fmt.Errorf("a new connection: %w", err)
			}
			c.Close()
			c = nil
			continue
		}
		response, err := http.ReadResponse(in, nil)
		if err != nil {
			return fmt.Errorf("sent, on a new connection: %v, and not answered: %w", fresh, err)
		}
		io.Copy(io.Discard, response.Body)
		if response.Close || !keep {
			c.Close()
			c = nil
		}
	}
	return nil
}

// systemdSocket is a listening socket that outlives those who serve it.
func systemdSocket(t *testing.T) (path string, socket *os.File) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if socket, err = l.(*net.UnixListener).File(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	return path, socket
}

// counted answers, and closes enough with the nth request.
func counted(t *testing.T, n int32) (h http.Handler, enough chan struct{}) {
	var count atomic.Int32
	enough = make(chan struct{})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if count.Add(1) == n {
			close(enough)
		}
		runtime.Gosched() // a stop may come here
		if err := r.Context().Err(); err != nil {
			t.Errorf("a request that is to be answered is given up: %v", err)
		}
		io.WriteString(w, "an answer")
	}), enough
}

// One server after another on a socket that systemd holds loses no request between them, on new connections and on kept ones.
func TestStopLosesNoRequest(t *testing.T) {
	t.Run("services", func(t *testing.T) {
		noneLost(t, func(h http.Handler, c *conns) func(net.Listener) error {
			d := door{route: h.ServeHTTP, conns: c, log: slog.New(slog.DiscardHandler), headTime: time.Minute, idleTime: time.Minute, writeTime: time.Minute}
			return d.Serve
		})
	})
	t.Run("administrators", func(t *testing.T) {
		noneLost(t, func(h http.Handler, c *conns) func(net.Listener) error {
			return withConns(&http.Server{Handler: h, ConnContext: withPeer}, c).Serve
		})
	})
}

func noneLost(t *testing.T, serving func(http.Handler, *conns) func(net.Listener) error) {
	const servers, requests = 40, 50
	path, socket := systemdSocket(t)
	all := &callers{path: path}
	var clients sync.WaitGroup
	for n := range 8 {
		clients.Go(func() {
			if err := all.asks(n%2 == 0); err != nil {
				t.Error(err)
				all.stop.Store(true)
			}
		})
	}
	ended := make(chan struct{})
	go func() { clients.Wait(); close(ended) }()

	ctx, fail := context.WithCancelCause(t.Context())
	defer fail(nil)
	for n := range servers {
		l, err := net.FileListener(socket)
		if err != nil {
			t.Fatal(err)
		}
		h, enough := counted(t, requests)
		c := newConns(nil, &config.Limits{Connections: 64, ConnectionsPerCaller: 64}, func(uint32) bool { return true })
		s := newServer(serving(h, c), c, l)
		go s.run(ctx, nil, fail)
		select {
		case <-enough:
		case <-ended:
		}
		if n == servers-1 {
			all.stop.Store(true)
			<-ended // what waits in the socket now would wait for ever
		}
		s.stop(ctx)
	}
	if err := context.Cause(ctx); err != nil {
		t.Error(err)
	}
}
