package vsockconn

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/mdlayher/socket"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// net/http reads ahead in the background and ends that by a deadline: an error that is no net.Error would end the connection.
func TestDeadlineIsNetError(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	s, err := socket.New(fds[0], "test")
	if err != nil {
		t.Fatal(err)
	}
	c := &conn{Conn: s}
	defer c.Close()
	if err := c.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	_, err = c.Read(make([]byte, 1))
	if timeout, ok := err.(net.Error); !ok || !timeout.Timeout() {
		t.Errorf("%v (%T), expected a net.Error that is a timeout", err, err)
	}
	if !os.IsTimeout(err) {
		t.Errorf("%v is no timeout", err)
	}
}

func TestBindTakesLowPorts(t *testing.T) {
	const but = 720
	taken := map[uint32]bool{}
	for range 3 {
		s, err := socket.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock", nil)
		if err != nil {
			t.Skipf("needs the kernel's vsock (modprobe vsock): %v", err)
		}
		defer s.Close()
		port, err := bind(s, but)
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			t.Skip("needs root, for a vsock port below 1024")
		}
		if err != nil || port < lowest || port > highest || port == but || taken[port] {
			t.Errorf("port %d, %v; expected a free one below 1024", port, err)
		}
		taken[port] = true
	}
}

// Whoever boots again must find another port than it had: each time the same would do for none.
func TestBindBeginsAnywhere(t *testing.T) {
	seen := map[uint32]bool{}
	for range 8 {
		s, err := socket.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock", nil)
		if err != nil {
			t.Skipf("needs the kernel's vsock (modprobe vsock): %v", err)
		}
		port, err := bind(s, 0)
		s.Close()
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			t.Skip("needs root, for a vsock port below 1024")
		}
		if err != nil {
			t.Fatal(err)
		}
		seen[port] = true
	}
	if len(seen) < 2 {
		t.Errorf("it began at %v every time", seen)
	}
}

func TestDialComesFromALowPort(t *testing.T) {
	const local, port = 1, 7720
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a vsock port below 1024")
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		t.Skipf("needs the kernel's vsock (modprobe vsock_loopback): %v", err)
	}
	defer l.Close()
	c, err := Dial(t.Context(), local, port)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, context.DeadlineExceeded) {
		t.Skipf("needs vsock within the machine (modprobe vsock_loopback): %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if from := peer.RemoteAddr().(*vsock.Addr); from.Port == 0 || from.Port > 1023 || from.Port != c.LocalAddr().(*vsock.Addr).Port {
		t.Errorf("from %v, expected a port below 1024", from)
	}
	peer.Close()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
	l.Close()
	if c, err := Dial(t.Context(), local, port); err == nil {
		c.Close()
		t.Error("nobody listens, and somebody answers")
	}
}
