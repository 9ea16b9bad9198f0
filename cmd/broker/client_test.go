package main

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"keybroker/internal/config"
)

// Only a broker on this host is asked for keys; whatever else stands behind --server is not even dialled.
func TestServerIsOnThisHost(t *testing.T) {
	for _, server := range []string{"127.0.0.1:7209", "[::1]:7209", "localhost:1", ""} {
		if err := checkServer(server); err != nil {
			t.Errorf("%q: %v", server, err)
		}
	}
	for _, server := range []string{"example.org:7209", "10.0.0.1:7209", "127.0.0.2:7209", "0.0.0.0:7209", ":7209", "127.0.0.1:http", "127.0.0.1:0",
		"127.0.0.1:65536", "127.0.0.1:", "127.0.0.1", "localhost", "[::1%lo]:7209", "user@localhost:7209", "http://127.0.0.1:7209"} {
		status, stdout, stderr := call(t, "--state-dir", t.TempDir(), "key", "get", "db", "--hex", "--server", server)
		if status != exitUsage || stdout != "" || !strings.Contains(stderr, "--server wants 127.0.0.1") {
			t.Errorf("%q: status %d, %q, %q", server, status, stdout, stderr)
		}
	}
}

// A socket whose other end hangs up without a word, as systemd's does for a masked service, is one that no broker serves.
func TestNobodyBehindTheSocket(t *testing.T) {
	for name, hangUp := range map[string]func(*net.UnixConn){
		"closed": func(c *net.UnixConn) {
			buffer := make([]byte, 4096)
			c.Read(buffer) // what is unread resets the connection
			c.Close()
		},
		"reset": func(c *net.UnixConn) { c.Close() },
	} {
		dir := t.TempDir()
		paths, err := config.PathsUnder(dir)
		if err != nil {
			t.Fatal(err)
		}
		paths.AdminSocket = filepath.Join(dir, "admin.sock")
		l, err := net.Listen("unix", paths.AdminSocket)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				hangUp(c.(*net.UnixConn))
			}
		}()
		_, err = request(t.Context(), paths.AdminSocket, "GET", "/v1/status")
		if h := (hintedError{}); !errors.As(err, &h) || err.Error() != "no broker serves "+paths.AdminSocket || !strings.Contains(h.hint, "systemctl start") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
