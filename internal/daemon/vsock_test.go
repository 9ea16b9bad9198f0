package daemon

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// net/http reads ahead in the background and ends that by a deadline: an error that is no net.Error would end the connection.
func TestGuestConnDeadlineIsNetError(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	s, err := socket.New(fds[0], "test")
	if err != nil {
		t.Fatal(err)
	}
	c := &guestConn{Conn: s}
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
