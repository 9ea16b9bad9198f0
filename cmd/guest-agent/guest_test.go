//go:build linux

package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"keybroker/inject"
	"keybroker/internal/need"
)

// guest is an agent on a Unix socket in place of vsock.
type guest struct {
	t      *testing.T
	dir    string // on a tmpfs
	socket string
	config *config
	once   bool
	mu     sync.Mutex
	out    bytes.Buffer
	spoke  chan struct{} // there is something new in out
	result chan error
	stop   context.CancelFunc
	notes  []string
}

func newGuest(t *testing.T, pin inject.Pin, keys ...keyConfig) *guest {
	t.Helper()
	dir := memoryDir(t)
	g := &guest{t: t, dir: dir, spoke: make(chan struct{}, 1), socket: filepath.Join(dir, "vsock")}
	g.config = &config{Tier: "vm", Pins: []inject.Pin{pin}, Deadline: 20 * time.Second, Keys: keys}
	if err := g.config.setKeys(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.halt)
	return g
}

func (g *guest) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case g.spoke <- struct{}{}:
	default:
	}
	return g.out.Write(p)
}

func (g *guest) said() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.out.String()
}

// start runs an agent as serve does.
func (g *guest) start() *agent {
	g.t.Helper()
	s, err := openState(filepath.Join(g.dir, "state"), "boot-1")
	if err != nil {
		g.t.Fatal(err)
	}
	key, _, err := s.receiverKey()
	if err != nil {
		g.t.Fatal(err)
	}
	a := newAgent(g.config, s, newConsole(g), key)
	a.once = g.once
	a.notify = func(say string) { g.notes = append(g.notes, say) }
	os.Remove(g.socket)
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		g.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(g.t.Context())
	g.stop, g.result = stop, make(chan error, 1)
	go a.accept(ctx, l, func(net.Addr) bool { return true })
	go func() {
		err := a.resume()
		if err == nil {
			err = a.run(ctx)
		}
		stop()
		s.close()
		g.result <- err
	}()
	return a
}

// ended waits for the agent's end.
func (g *guest) ended() error {
	g.t.Helper()
	select {
	case err := <-g.result:
		g.result = nil
		return err
	case <-time.After(30 * time.Second):
		g.t.Fatalf("the agent does not end; it said:\n%s", g.said())
		return nil
	}
}

func (g *guest) halt() {
	if g.result != nil {
		g.stop()
		g.ended()
	}
}

func fileKey(name, path string) keyConfig {
	return keyConfig{Name: name, Sink: sinkFile, Path: path}
}

func (g *guest) holds(path string, want []byte) {
	g.t.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		g.t.Errorf("%s: %v, right octets: %v; the agent said:\n%s", path, err, bytes.Equal(got, want), g.said())
	}
}

// memoryDir is a folder in memory, where alone keys may be.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "keybroker-agent-test-")
	need.That(t, err == nil, "a tmpfs on /dev/shm: mount -t tmpfs tmpfs /dev/shm: %v", err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func keyPath(t *testing.T) string { return filepath.Join(memoryDir(t), "key") }

// waitFor waits until the agent has said something.
func waitFor(t *testing.T, g *guest, text string) {
	t.Helper()
	end := time.After(20 * time.Second)
	for !strings.Contains(g.said(), text) {
		select {
		case <-g.spoke:
		case <-end:
			t.Fatalf("the agent did not say %q but:\n%s", text, g.said())
		}
	}
}
