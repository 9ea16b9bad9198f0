package caller

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"keybroker/internal/need"
)

var ctx = context.Background()

func TestTCP(t *testing.T) {
	need.Root(t)
	r := newResolver(t)
	for _, c := range []struct{ name, network, addr, dial string }{
		{"IPv4", "tcp4", "127.0.0.1:0", "dial tcp4 127.0.0.1:%d -"},
		{"IPv6", "tcp6", "[::1]:0", "dial tcp6 [::1]:%d -"},
		{"IPv4 to a socket of both", "tcp", "[::]:0", "dial tcp4 127.0.0.1:%d -"},
		{"IPv6 to a socket of both", "tcp", "[::]:0", "dial tcp6 [::1]:%d -"},
		{"IPv6 socket to IPv4", "tcp4", "127.0.0.1:0", "dial-mapped %d"},
		{"IPv6 socket to IPv4 to a socket of both", "tcp", "[::]:0", "dial-mapped %d"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := listen(t, c.network, c.addr)
			client := start(t, as(1001), nil, c.dial, l.Addr().(*net.TCPAddr).Port)
			got, err := r.FromTCP(accept[*net.TCPConn](t, l))
			if err != nil {
				t.Fatal(err)
			}
			if got.UID != 1001 || got.Transport != TCP {
				t.Errorf("got %+v", got)
			}
			if err := got.Still(ctx); err != nil {
				t.Errorf("still there: %v", err)
			}
			client.stop()
			if err := got.Still(ctx); !errors.Is(err, ErrGone) {
				t.Errorf("after the client has gone: %v", err)
			}
		})
	}
}

func TestCheckTCP(t *testing.T) {
	r := newResolver(t)
	if err := r.CheckTCP(); err != nil {
		t.Error(err)
	}
	r.Close()
	if err := r.CheckTCP(); err == nil {
		t.Error("a closed resolver answers")
	}
}

func TestRootIsRefusedOnTCP(t *testing.T) {
	need.Root(t)
	l := listen(t, "tcp", "127.0.0.1:0")
	start(t, nil, nil, "dial tcp %s -", l.Addr())
	if c, err := newResolver(t).FromTCP(accept[*net.TCPConn](t, l)); !errors.Is(err, ErrRoot) || c != nil {
		t.Errorf("got %v, %v", c, err)
	}
}

// A client that has closed before it is asked for is nobody, and not root, though the kernel may say uid 0.
func TestClientClosesBeforeQuery(t *testing.T) {
	r := newResolver(t)
	for name, closeClient := range map[string]func(*net.TCPConn) error{
		"close":      func(c *net.TCPConn) error { return c.Close() },
		"half close": func(c *net.TCPConn) error { return c.CloseWrite() },
		"reset":      func(c *net.TCPConn) error { return errors.Join(c.SetLinger(0), c.Close()) },
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t, "tcp", "127.0.0.1:0")
			client, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server := accept[*net.TCPConn](t, l)
			if err := closeClient(client.(*net.TCPConn)); err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, server) // until the end has arrived
			if c, err := r.FromTCP(server); !errors.Is(err, ErrGone) {
				t.Errorf("got %v, %v", c, err)
			}
		})
	}
}

// Between accept and answer the port passes to a socket of another user, or to another socket of the same.
func TestPortReused(t *testing.T) {
	need.Root(t)
	r := newResolver(t)
	for _, second := range []uint32{1002, 1001} {
		l := listen(t, "tcp", "127.0.0.1:0")
		one := start(t, as(1001), nil, "dial tcp %s -", l.Addr())
		server := accept[*net.TCPConn](t, l)
		first, err := r.FromTCP(server)
		if err != nil {
			t.Fatal(err)
		}
		port := server.RemoteAddr()
		one.stop()
		start(t, as(second), nil, "dial tcp %s %s", l.Addr(), port)
		again := accept[*net.TCPConn](t, l)
		if again.RemoteAddr().String() != port.String() {
			t.Fatalf("the second client has %s, not %s", again.RemoteAddr(), port)
		}
		if err := first.Still(ctx); !errors.Is(err, ErrGone) || !strings.Contains(err.Error(), "another socket") {
			t.Errorf("the port is that of uid %d now: %v", second, err)
		}
		if c, err := r.FromTCP(again); err != nil || c.UID != second {
			t.Errorf("the second client is %v, %v, want uid %d", c, err, second)
		}
		// Asked for only now, the first connection must not be taken for the second client, whose addresses are the same.
		if c, err := r.FromTCP(server); !errors.Is(err, ErrGone) {
			t.Errorf("the first connection is %v, %v", c, err)
		}
	}
}

// A socket can be given to another user while it is open.
func TestSocketChangesOwner(t *testing.T) {
	need.Root(t)
	r := newResolver(t)
	l := listen(t, "tcp", "127.0.0.1:0")
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	chown := func(uid int) {
		t.Helper()
		raw, err := client.(*net.TCPConn).SyscallConn()
		if err == nil {
			ctlErr := raw.Control(func(fd uintptr) { err = unix.Fchown(int(fd), uid, -1) })
			err = errors.Join(err, ctlErr)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	chown(1001)
	c, err := r.FromTCP(accept[*net.TCPConn](t, l))
	if err != nil || c.UID != 1001 {
		t.Fatalf("got %v, %v", c, err)
	}
	chown(1002)
	if err := c.Still(ctx); !errors.Is(err, ErrGone) {
		t.Errorf("now it is uid 1002's: %v", err)
	}
}

// The kernel answers a query for a client that has gone with a listener on the client's address.
func TestListenerOnClientsPort(t *testing.T) {
	need.Root(t)
	r := newResolver(t)
	l := listen(t, "tcp", "127.0.0.1:0")
	client := start(t, as(1001), nil, "dial tcp %s -", l.Addr())
	server := accept[*net.TCPConn](t, l)
	c, err := r.FromTCP(server)
	if err != nil {
		t.Fatal(err)
	}
	client.stop()
	start(t, as(1002), nil, "listen %s", server.RemoteAddr())
	if err := c.Still(ctx); !errors.Is(err, ErrGone) {
		t.Errorf("Still: %v", err)
	}
	if c, err := r.FromTCP(server); !errors.Is(err, ErrGone) {
		t.Errorf("FromTCP: %v, %v", c, err)
	}
}

// Sockets of another network namespace are not found, whatever addresses they have.
func TestOtherNetworkNamespace(t *testing.T) {
	need.Root(t)
	r := newResolver(t)
	if err := r.CheckTCP(); err != nil { // its netlink socket stays in this namespace
		t.Fatal(err)
	}
	client, server := make(chan net.Conn, 1), make(chan net.Conn, 1)
	errs := make(chan error, 1)
	go func() { errs <- connectInNewNamespace(client, server) }()
	if err := <-errs; err != nil {
		t.Fatal(err)
	}
	a, b := <-client, <-server
	defer a.Close()
	defer b.Close()
	if c, err := r.FromTCP(b.(*net.TCPConn)); !errors.Is(err, ErrGone) {
		t.Errorf("got %v, %v", c, err)
	}
}

// connectInNewNamespace makes a connection in a network namespace of its own. Its thread ends with it.
func connectInNewNamespace(client, server chan<- net.Conn) error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	a, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		return err
	}
	b, err := l.Accept()
	client <- a
	server <- b
	return err
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func TestUnix(t *testing.T) {
	need.Root(t)
	r := newResolver(t)
	l := listenUnix(t)
	client := start(t, as(1001), nil, "dial unix %s -", l.Addr())
	c, err := r.FromUnix(accept[*net.UnixConn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.NoUnit == noPidfd {
		t.Skip("needs Linux 6.5 or newer: " + noPidfd)
	}
	if c.UID != 1001 || c.PID != client.cmd.Process.Pid || c.Transport != Unix || c.NoUnit != "" {
		t.Errorf("got %+v", c)
	}
	if c.Unit() == "" {
		t.Error("no unit")
	}
	if err := c.Still(ctx); err != nil {
		t.Errorf("still there: %v", err)
	}
	client.stop()
	if err := c.Still(ctx); !errors.Is(err, ErrGone) {
		t.Errorf("after the client has gone: %v", err)
	}
	c.Close()
	if err := c.Still(ctx); err == nil {
		t.Error("after Close: no error")
	}
}

func TestUnixClientGoneBeforeQuery(t *testing.T) {
	r := newResolver(t)
	l := listenUnix(t)
	client := start(t, nil, nil, "dial unix %s -", l.Addr())
	conn := accept[*net.UnixConn](t, l)
	client.stop()
	if c, err := r.FromUnix(conn); !errors.Is(err, ErrGone) {
		t.Errorf("got %v, %v", c, err)
	}
}

func TestUnixRoot(t *testing.T) {
	need.Root(t)
	l := listenUnix(t)
	start(t, nil, nil, "dial unix %s -", l.Addr())
	if c, err := newResolver(t).FromUnix(accept[*net.UnixConn](t, l)); err != nil || c.UID != 0 {
		t.Errorf("got %v, %v", c, err)
	}
}

// serveIn accepts one connection from uid 1001 in a process with these attributes, and returns what it said of the caller.
func serveIn(t *testing.T, attr *syscall.SysProcAttr) string {
	t.Helper()
	need.Root(t)
	l := listenUnix(t)
	file, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	server := start(t, attr, []*os.File{file}, "accept")
	start(t, as(1001), nil, "dial unix %s -", l.Addr())
	return server.line()
}

// A process that has no PID here has a uid and no unit.
func TestUnixOtherPIDNamespace(t *testing.T) {
	got := serveIn(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID})
	if want := "unix uid 1001; no unit: " + noPID + "; match: false"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Where uids have no numbers they are all one: nobody.
func TestUnixOtherUserNamespace(t *testing.T) {
	got := serveIn(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}})
	if !strings.Contains(got, ErrUnknownUID.Error()) {
		t.Errorf("got %q", got)
	}
}

// makeCgroup makes a cgroup and returns its path in the hierarchy and its folder.
func makeCgroup(t *testing.T, r *Resolver, name string) (path string, dir *os.File) {
	t.Helper()
	if r.noCgroups != "" {
		t.Skip(r.noCgroups)
	}
	path = fmt.Sprintf("/keybroker-test-%d-%s", os.Getpid(), name)
	full := filepath.Join(r.cgroupRoot, path)
	if err := os.Mkdir(full, 0o755); err != nil {
		t.Skipf("needs to make cgroups: run as root with %s writable: %v", r.cgroupRoot, err)
	}
	t.Cleanup(func() {
		if err := os.Remove(full); err != nil {
			t.Error(err)
		}
	})
	dir, err := os.Open(full)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return path, dir
}

func TestMatchUnit(t *testing.T) {
	need.Root(t)
	r := newResolver(t)
	path, dir := makeCgroup(t, r, "a.service")
	other, _ := makeCgroup(t, r, "b.service")
	attr := as(1001)
	attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())

	ul, tl := listenUnix(t), listen(t, "tcp", "127.0.0.1:0")
	start(t, attr, nil, "dial unix %s -", ul.Addr())
	start(t, attr, nil, "dial tcp %s -", tl.Addr())
	overUnix, err := r.FromUnix(accept[*net.UnixConn](t, ul))
	if err != nil {
		t.Fatal(err)
	}
	defer overUnix.Close()
	overTCP, err := r.FromTCP(accept[*net.TCPConn](t, tl))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*Caller{overUnix, overTCP} {
		if c.NoUnit != "" || c.Unit() == "" {
			t.Errorf("%s: unit %q, no unit: %q", c.Transport, c.Unit(), c.NoUnit)
		}
		if !c.MatchUnit(path) {
			t.Errorf("%s: not in %s but in %s", c.Transport, path, c.Unit())
		}
		for _, wrong := range []string{other, "", "/", ".", "..", "/..", path + "/", "/" + path, other + "/.." + path, path[1:], path + "x", path[:len(path)-1],
			path + "/cgroup.procs", "/none.service", path + "\x00"} {
			if c.MatchUnit(wrong) {
				t.Errorf("%s: in %s matches %q", c.Transport, c.Unit(), wrong)
			}
		}
	}
	if overUnix.Unit() != path {
		t.Errorf("unit %q, want %q", overUnix.Unit(), path)
	}
}

// A unit that was stopped and started again has the path and is another cgroup: a socket of the old one is not in it.
func TestMatchUnitMadeAnew(t *testing.T) {
	need.Root(t)
	r := newResolver(t)
	path, _ := makeCgroup(t, r, "a.service")
	old, ok := r.cgroupID(path)
	if !ok {
		t.Fatal("the cgroup has no id")
	}
	full := filepath.Join(r.cgroupRoot, path)
	if err := errors.Join(os.Remove(full), os.Mkdir(full, 0o755)); err != nil {
		t.Fatal(err)
	}
	c := &Caller{Transport: TCP, from: r, sock: socket{cgroup: old}}
	if c.MatchUnit(path) {
		t.Error("the old cgroup's id matches the new one")
	}
}

func TestNew(t *testing.T) {
	if _, err := New(Config{CgroupRoot: t.TempDir()}); !errors.Is(err, errNoCgroups) {
		t.Errorf("a folder that is no cgroup hierarchy: %v", err)
	}
}

func TestStillHonoursContext(t *testing.T) {
	done, cancel := context.WithCancel(ctx)
	cancel()
	if err := (&Caller{Transport: Unix}).Still(done); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	r := newResolver(t)
	l := listen(t, "tcp", "127.0.0.1:0")
	var wg sync.WaitGroup
	for range 40 {
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn, want := accept[*net.TCPConn](t, l), client.LocalAddr().(*net.TCPAddr)
		wg.Go(func() {
			tup, err := clientTuple(conn)
			for range 50 {
				s, err2 := r.diag.lookup(tup)
				if err != nil || err2 != nil || int(s.uid) != os.Geteuid() || s.inode == 0 {
					t.Errorf("%s: %+v, %v, %v", want, s, err, err2)
				}
			}
		})
	}
	wg.Wait()
	if open := len(r.diag.idle); open > maxIdle {
		t.Errorf("%d netlink sockets are kept", open)
	}
}

// A reply is taken only if it answers the question; an error means that nothing is known.
func FuzzParseReply(f *testing.F) {
	asked := tuple{netip.MustParseAddrPort("127.0.0.1:33212"), netip.MustParseAddrPort("127.0.0.1:37661")}
	f.Add(sampleReply(asked), uint32(7))
	f.Add(append(sampleReply(asked), 0, 0, 0, 0), uint32(7))
	f.Fuzz(func(t *testing.T, b []byte, seq uint32) {
		s, err := parseReply(b, seq, asked)
		if err != nil {
			if s != (socket{}) {
				t.Fatalf("%+v beside %v", s, err)
			}
			return
		}
		if len(b) < replySize || b[headerSize+1] != tcpEstablished || binary.NativeEndian.Uint32(b[8:]) != seq || !sameAddrs(b[headerSize:], asked) {
			t.Fatalf("took %x", b)
		}
	})
}

// sampleReply is what the kernel answers.
func sampleReply(t tuple) []byte {
	b := make([]byte, replySize)
	putRequest(b[:requestSize], 7, t)
	msg := b[headerSize:]
	copy(msg[4:40], append([]byte{}, msg[8:44]...))
	msg[1] = tcpEstablished
	msg[64], msg[68] = 9, 1
	b = append(b, 12, 0, attrCgroupID, 0, 5, 0, 0, 0, 0, 0, 0, 0)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

func TestParseReply(t *testing.T) {
	asked := tuple{netip.MustParseAddrPort("127.0.0.1:33212"), netip.MustParseAddrPort("127.0.0.1:37661")}
	good := sampleReply(asked)
	want := socket{uid: 9, inode: 1, cgroup: 5}
	got, err := parseReply(good, 7, asked)
	got.cookie = 0
	if err != nil || got != want {
		t.Fatalf("got %+v, %v", got, err)
	}
	for name, change := range map[string]func(b []byte){
		"another question's": func(b []byte) { b[8]++ },
		"listening":          func(b []byte) { b[headerSize+1] = 10 },
		"half closed":        func(b []byte) { b[headerSize+1] = 5 },
		"another port":       func(b []byte) { b[headerSize+5]++ },
		"another peer":       func(b []byte) { b[headerSize+24+3]++ },
		"too long":           func(b []byte) { b[0] = 255 },
	} {
		b := append([]byte{}, good...)
		change(b)
		if s, err := parseReply(b, 7, asked); err == nil || s != (socket{}) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
}

// The path is one line of the file, whole: whoever may make cgroups chooses their names.
func FuzzUnifiedPath(f *testing.F) {
	f.Add([]byte("9:name=systemd:/a\n0::/system.slice/x.service\n"))
	f.Add([]byte("0::/a/0::/b\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p := unifiedPath(data)
		if p == "" {
			return
		}
		if p[0] != '/' || strings.Contains(p, "\n") || !strings.Contains("\n"+string(data)+"\n", "\n0::"+p+"\n") {
			t.Fatalf("%q from %q", p, data)
		}
	})
}
