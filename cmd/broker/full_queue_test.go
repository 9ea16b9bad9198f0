package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fullSocket listens at a path with a queue of connections that has no place left.
func fullSocket(t *testing.T) (path string, l net.Listener) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "full.sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	if l, err = net.FileListener(f); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		c, err := net.Dial("unix", path)
		if errors.Is(err, unix.EAGAIN) {
			return path, l
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the queue has room for everybody")
	return "", nil
}

// A broker whose queue of connections is full, by whoever fills it, is waited for.
func TestFullQueueIsWaitedFor(t *testing.T) {
	path, l := fullSocket(t)
	answered := make(chan error, 1)
	go func() {
		_, err := request(t.Context(), path, http.MethodGet, "/")
		answered <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := request(ctx, path, http.MethodGet, "/"); err == nil || ctx.Err() == nil {
		t.Errorf("%v, before the time was over", err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	defer server.Close()
	go server.Serve(l)
	if err := <-answered; err != nil {
		t.Errorf("who waited for a place: %v", err)
	}
}
