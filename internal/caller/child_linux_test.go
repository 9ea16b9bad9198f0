package caller

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary runs itself as other users. What a child does is in the environment; it prints "ready" when it has done
// it, and goes on until its standard input ends.
const childEnv = "KEYBROKER_TEST_CHILD"

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		if err := childMain(strings.Fields(what)); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func childMain(args []string) error {
	switch args[0] {
	case "dial": // network, address, own address or -
		conn, err := dialFrom(args[1], args[2], args[3])
		if err != nil {
			return err
		}
		defer conn.Close()
	case "dial-mapped": // port: an IPv6 socket to an IPv4 address
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		sa := &unix.SockaddrInet6{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 1}}
		fmt.Sscan(args[1], &sa.Port)
		if err := unix.Connect(fd, sa); err != nil {
			return err
		}
	case "listen": // address
		l, err := net.Listen("tcp", args[1])
		if err != nil {
			return err
		}
		defer l.Close()
	case "accept": // a listening Unix socket is descriptor 3; says who connects
		return acceptOne()
	}
	fmt.Println("ready")
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if errors.Is(err, os.ErrClosed) || err == nil {
		return err
	}
	return nil
}

// dialFrom connects, and resets the connection when it is closed, so that its port is free at once.
func dialFrom(network, addr, from string) (net.Conn, error) {
	d := net.Dialer{}
	if from != "-" {
		local, err := net.ResolveTCPAddr(network, from)
		if err != nil {
			return nil, err
		}
		d.LocalAddr = local
	}
	conn, err := d.DialContext(context.Background(), network, addr)
	if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
		err = tcp.SetLinger(0)
	}
	return conn, err
}

func acceptOne() error {
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return err
	}
	fmt.Println("ready")
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	r, err := New(Config{})
	if err != nil {
		return err
	}
	c, err := r.FromUnix(conn.(*net.UnixConn))
	if err != nil {
		fmt.Println(err)
		return nil
	}
	fmt.Printf("%s uid %d; no unit: %s; match: %v\n", c.Transport, c.UID, c.NoUnit, c.MatchUnit("/a"))
	return nil
}

// A child is a process of this test binary.
type child struct {
	cmd *exec.Cmd
	in  interface{ Close() error }
	out *bufio.Reader
}

// start runs the test binary and waits until it is ready. Nil attributes are this process's user.
func start(t testing.TB, attr *syscall.SysProcAttr, files []*os.File, format string, args ...any) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe") // the binary's folder is closed to other users
	// The race detector makes a process wait a second at its end.
	cmd.Env = append(os.Environ(), childEnv+"="+fmt.Sprintf(format, args...), "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = attr
	cmd.ExtraFiles = files
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(c.stop)
	if line := c.line(); line != "ready" {
		t.Fatalf("the child said %q", line)
	}
	return c
}

func (c *child) line() string {
	s, _ := c.out.ReadString('\n')
	return strings.TrimSpace(s)
}

// stop ends the child and waits until it is reaped.
func (c *child) stop() {
	c.in.Close()
	c.cmd.Wait()
}

func as(uid uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
}

func newResolver(t testing.TB) *Resolver {
	t.Helper()
	r, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func listen(t testing.TB, network, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// listenUnix listens on an abstract name, which other users can reach.
func listenUnix(t testing.TB) net.Listener {
	t.Helper()
	return listen(t, "unix", fmt.Sprintf("@keybroker-test-%d-%d", os.Getpid(), time.Now().UnixNano()))
}

func accept[T net.Conn](t testing.TB, l net.Listener) T {
	t.Helper()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.(T)
}
