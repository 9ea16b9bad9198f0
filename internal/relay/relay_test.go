package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// listen is a listener on loopback whose connections f serves.
func listen(t *testing.T, f func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f(c)
		}
	}()
	return l.Addr().String()
}

// says is a broker that says its name and then all that it is told, and closes.
func says(name string) func(net.Conn) {
	return func(c net.Conn) {
		io.WriteString(c, name)
		io.Copy(c, c)
		c.Close()
	}
}

// dialTCP is how a relay reaches its brokers.
func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", address)
}

// start starts a relay and returns where guests find it.
func start(t *testing.T, cfg Config) (address string) {
	t.Helper()
	if cfg.Guest == nil {
		cfg.Guest = func(net.Addr) (string, error) { return "guest", nil }
	}
	if cfg.Dial == nil {
		cfg.Dial = dialTCP
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the relay ended with %v", err)
		}
	})
	return l.Addr().String()
}

// session says something through a relay and returns all that comes back.
func session(t *testing.T, relay, text string) string {
	t.Helper()
	c, err := net.Dial("tcp", relay)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	go func() {
		io.WriteString(c, text)
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil && !strings.Contains(err.Error(), "reset") {
		t.Errorf("a session ended with %v", err)
	}
	return string(got)
}

func TestRelayCopiesBothWays(t *testing.T) {
	relay := start(t, Config{Brokers: []string{listen(t, says("a:"))}})
	long := strings.Repeat("0123456789abcdef", 1<<16)
	for range 3 {
		if got := session(t, relay, long); got != "a:"+long {
			t.Errorf("%d octets came back, expected %d", len(got), len(long)+2)
		}
	}
}

// A broker that is gone costs a moment, and the one that answered is asked first from then on.
func TestDeadBrokers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tried := make(chan string, 3)
		r, err := New(Config{
			Brokers: []string{"hangs", "refuses", "answers"}, Log: slog.New(slog.DiscardHandler),
			Dial: func(ctx context.Context, broker string) (net.Conn, error) {
				tried <- broker
				switch broker {
				case "hangs":
					<-ctx.Done()
					return nil, ctx.Err()
				case "refuses":
					return nil, errors.New("refused")
				}
				c, _ := net.Pipe()
				return c, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, broker, err := r.dial(t.Context()); err != nil || broker != "answers" {
			t.Fatalf("%s, %v", broker, err)
		}
		if took := time.Since(began); took > 50*time.Millisecond {
			t.Errorf("a broker that hangs and one that refuses cost %v", took)
		}
		for range 3 {
			<-tried
		}
		if _, broker, err := r.dial(t.Context()); err != nil || broker != "answers" || len(tried) != 1 {
			t.Errorf("then %d were tried: %s, %v", len(tried), broker, err)
		}
	})
}

func TestNoBrokerAnswers(t *testing.T) {
	relay := start(t, Config{Brokers: []string{"127.0.0.1:1", "127.0.0.1:1"}})
	if got := session(t, relay, "x"); got != "" {
		t.Errorf("somebody said %q", got)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("a relay without a broker is made")
	}
}

// Who is no guest gets nothing. One guest does not use up what there is for the others: its oldest sessions end.
func TestLimits(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	var guest atomic.Value
	guest.Store("")
	relay := start(t, Config{
		Brokers: []string{listen(t, func(c net.Conn) {
			io.WriteString(c, "a")
			<-hold
			c.Close()
		})},
		Guest: func(net.Addr) (string, error) {
			if name := guest.Load().(string); name != "" {
				return name, nil
			}
			return "", errors.New("no guest")
		},
	})
	if got := session(t, relay, "x"); got != "" {
		t.Errorf("who is no guest got %q", got)
	}
	served := func() net.Conn {
		c, err := net.Dial("tcp", relay)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(time.Minute))
		if n, err := c.Read(make([]byte, 1)); n != 1 {
			t.Errorf("a session is refused: %v", err)
		}
		return c
	}
	ended := func(c net.Conn) bool {
		c.SetDeadline(time.Now().Add(time.Minute))
		_, err := c.Read(make([]byte, 1))
		return err == io.EOF || errors.Is(err, unix.ECONNRESET)
	}
	guest.Store("one")
	var all []net.Conn
	for range maxPerGuest + 2 {
		all = append(all, served())
	}
	guest.Store("another")
	served()
	if !ended(all[0]) || !ended(all[1]) {
		t.Error("a guest has as many sessions as it likes")
	}
	all[2].SetDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := all[2].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a session that the limit bears has ended: %v", err)
	}
}

// A session that carries nothing ends, and one that carries something now and then does not.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		guest, ours := net.Pipe()
		broker, theirs := net.Pipe()
		began, ended := time.Now(), make(chan time.Duration)
		go func() {
			exchange(t.Context(), ours, theirs)
			ended <- time.Since(began)
		}()
		for range 3 {
			time.Sleep(idleTime * 3 / 4)
			go guest.Write([]byte("x"))
			if _, err := io.ReadFull(broker, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		if took := <-ended; took != 3*idleTime*3/4+idleTime {
			t.Errorf("ended after %v", took)
		}
	})
}

// What one side says and closes is still carried when the other has closed its own half.
func TestHalfClosed(t *testing.T) {
	relay := start(t, Config{Brokers: []string{listen(t, func(c net.Conn) {
		all, _ := io.ReadAll(c)
		c.Write(bytes.ToUpper(all))
		c.Close()
	})}})
	if got := session(t, relay, "abc"); got != "ABC" {
		t.Errorf("%q came back", got)
	}
}

func TestVsockGuest(t *testing.T) {
	for _, a := range []net.Addr{
		&net.TCPAddr{}, &vsock.Addr{ContextID: vsock.Host, Port: 1}, &vsock.Addr{ContextID: vsock.Local, Port: 1},
		&vsock.Addr{ContextID: unix.VMADDR_CID_ANY, Port: 1}, &vsock.Addr{ContextID: 3, Port: 1024},
	} {
		if name, err := VsockGuest(a); err == nil {
			t.Errorf("%v is guest %s", a, name)
		}
	}
	if name, err := VsockGuest(&vsock.Addr{ContextID: 3, Port: 1023}); name != "CID 3" || err != nil {
		t.Errorf("%q, %v", name, err)
	}
}

// A broker that takes connections and hangs up, as one does whose realm is locked, does not keep guests from the next.
func TestBrokerThatHangsUp(t *testing.T) {
	locked := listen(t, func(c net.Conn) { c.Close() })
	relay := start(t, Config{Brokers: []string{locked, listen(t, says("open:"))}})
	for range 3 {
		c, err := net.Dial("tcp", relay)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(time.Minute))
		n, _ := c.Read(make([]byte, 1))
		c.Close()
		if n == 1 {
			return
		}
	}
	t.Error("the guest asks again and again, and always the same broker")
}

// lines counts the lines of a log.
type lines struct{ n atomic.Int32 }

func (l *lines) Write(p []byte) (int, error) { l.n.Add(1); return len(p), nil }

// Guests do not fill the log with what they are refused.
func TestRefusalsAreSaidOnce(t *testing.T) {
	said := &lines{}
	relay := start(t, Config{
		Brokers: []string{"127.0.0.1:1"}, Log: slog.New(slog.NewTextHandler(said, nil)),
		Guest: func(net.Addr) (string, error) { return "", errors.New("no guest") },
	})
	for range 20 {
		session(t, relay, "")
	}
	if n := said.n.Load(); n != 1 {
		t.Errorf("20 connections of nobody are %d lines", n)
	}
	relay = start(t, Config{Brokers: []string{"127.0.0.1:1"}, Log: slog.New(slog.NewTextHandler(said, nil))})
	said.n.Store(0)
	for range 4 * sessionBurst {
		session(t, relay, "")
	}
	if n := said.n.Load(); n > 2*sessionBurst {
		t.Errorf("%d sessions of one guest are %d lines", 4*sessionBurst, n)
	}
}
