package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"keybroker/internal/config"
)

// adminBroker answers GET /v1/status with one state after the other, the last one for ever.
func adminBroker(t *testing.T, states ...string) (g *globals, asked *atomic.Int32) {
	t.Helper()
	g, asked = &globals{stateDir: t.TempDir()}, new(atomic.Int32)
	paths, err := config.PathsUnder(g.stateDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(paths.AdminSocket), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", paths.AdminSocket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n := min(int(asked.Add(1)), len(states)) - 1
		fmt.Fprintf(w, `{"realm":{"state":%q,"why":"because"}}`, states[n])
	})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return g, asked
}

// What follows `keybroker unlock` finds a broker that has its keyholder.
func TestUnlockWaitsForTheBroker(t *testing.T) {
	g, asked := adminBroker(t, "waiting", "waiting", "opening", "open")
	if err := g.waitUntilOpen(t.Context()); err != nil || asked.Load() != 4 {
		t.Errorf("asked %d times, %v", asked.Load(), err)
	}
	g, _ = adminBroker(t, "waiting", "locked")
	if err := g.waitUntilOpen(t.Context()); err == nil || !strings.Contains(err.Error(), "because") {
		t.Errorf("a keyholder that does not start: %v", err)
	}
	g, _ = adminBroker(t, "waiting")
	stop := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if err := g.waitUntilOpen(ctx); !errors.Is(err, stop) {
		t.Errorf("interrupted: %v", err)
	}
}
