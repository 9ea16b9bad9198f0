package daemon

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// A socket whose process is ending is waited for, and then taken; one that somebody serves is not.
func TestListenUnix(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "x.sock")
	dying, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	dying.(*net.UnixListener).SetUnlinkOnClose(false)
	go func() {
		for range 2 {
			if c, err := dying.Accept(); err == nil {
				c.Close()
			}
		}
		dying.Close()
	}()
	l, err := listenUnix(path, 0o600)
	if err != nil {
		t.Fatalf("after a process that was ending: %v", err)
	}
	defer l.Close()
	if second, err := listenUnix(path, 0o600); err == nil || !strings.Contains(err.Error(), "another process serves "+path) {
		t.Errorf("a socket that is served: %v, %v", second, err)
	}
}
