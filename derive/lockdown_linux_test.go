package derive

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/internal/memtest"
	"keybroker/internal/need"
)

func init() {
	programs["forbidden"] = forbidden
	programs["broker"] = brokerLike
	programs["peek"] = peek
}

// What a keyholder must not be able to do, whoever gets to run code in it, and what its runtime must.
var actions = map[string]func() error{
	"open":      func() error { return second(unix.Open("/dev/null", unix.O_RDONLY, 0)) },
	"openat2":   func() error { return second(unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{})) },
	"socket":    func() error { return second(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)) },
	"connect":   func() error { return unix.Connect(HolderSocketFD, &unix.SockaddrUnix{Name: "/x"}) },
	"sendmsg":   func() error { return unix.Sendto(HolderSocketFD, nil, 0, nil) },
	"execve":    func() error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	"ptrace":    func() error { return unix.PtraceAttach(1) },
	"vm_readv":  func() error { return second(unix.ProcessVMReadv(os.Getppid(), nil, nil, 0)) },
	"kill":      func() error { return unix.Kill(os.Getppid(), 0) },
	"tgkill":    func() error { return unix.Tgkill(os.Getppid(), os.Getppid(), 0) },
	"dup":       func() error { return second(unix.Dup(HolderSocketFD)) },
	"fork":      func() error { return errno(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0) },
	"dumpable":  func() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) },
	"limits":    func() error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1}) },
	"read 0":    func() error { return second(unix.Read(0, make([]byte, 1))) },
	"write 1":   func() error { return second(unix.Write(1, []byte("x"))) },
	"ioctl":     func() error { return second(unix.IoctlGetInt(HolderSocketFD, unix.TIOCINQ)) },
	"mmap exec": func() error { return mapAnonymous(unix.PROT_READ | unix.PROT_EXEC) },
	"mmap file": func() error {
		return errno(unix.SYS_MMAP, 0, 4096, unix.PROT_READ, unix.MAP_SHARED, HolderSocketFD)
	},
	"mprotect exec": func() error {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		return unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
	},
	"nothing forbidden": exerciseRuntime,
}

func errno(nr uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, e := unix.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); e != 0 {
		return e
	}
	return nil
}

func mapAnonymous(prot int) error {
	return second(unix.Mmap(-1, 0, 4096, prot, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS))
}

// exerciseRuntime makes Go's runtime do what a keyholder that lives for months may see: threads, collections, memory that
// is given back, timers, preemption.
func exerciseRuntime() error {
	runtime.GOMAXPROCS(4)
	var wg sync.WaitGroup
	for range 40 {
		wg.Go(func() {
			runtime.LockOSThread() // the thread ends with the goroutine
			garbage := make([][]byte, 0, 100)
			for range 100 {
				garbage = append(garbage, make([]byte, 100<<10))
			}
			runtime.GC()
			<-time.After(time.Millisecond)
			runtime.KeepAlive(garbage)
		})
	}
	spin := time.Now().Add(50 * time.Millisecond)
	for time.Now().Before(spin) { // long enough to be preempted by a signal
	}
	wg.Wait()
	runtime.GC()
	return nil
}

// forbidden locks down as a keyholder does and then does one thing more.
func forbidden(args []string) error {
	if _, err := openAndLockDown(HolderPageFD, HolderSocketFD); err != nil {
		return err
	}
	err := actions[args[0]]()
	_, writeErr := unix.Write(HolderSocketFD, fmt.Append(nil, "did it: ", err)) // and was not stopped
	return writeErr
}

func TestForbiddenCalls(t *testing.T) {
	page := testPage(t, testMaster(t, 0))
	for name := range actions {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, err := startProcess(page, []string{"/proc/self/exe", "forbidden", name})
			if err != nil {
				t.Fatal(err)
			}
			defer h.conn.Close()
			_ = h.conn.SetReadDeadline(time.Now().Add(patience))
			said, _ := io.ReadAll(h.conn)
			err = h.cmd.Wait()
			if name == "nothing forbidden" {
				if err != nil || string(said) != "did it: <nil>" {
					t.Errorf("said %q, ended with %v", said, err)
				}
				return
			}
			if name == "open" && len(libraryAttempts) > 0 {
				if !strings.HasPrefix(string(said), "did it: function not implemented") {
					t.Errorf("said %q, ended with %v, want a call that fails", said, err)
				}
				return
			}
			status, _ := h.cmd.ProcessState.Sys().(syscall.WaitStatus)
			if !status.Signaled() || status.Signal() != unix.SIGSYS || len(said) > 0 {
				t.Errorf("said %q, ended with %v, want the signal of a forbidden call", said, err)
			}
		})
	}
}

func statusField(t *testing.T, path, field string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			return strings.TrimSpace(rest)
		}
	}
	t.Fatalf("%s has no %s", path, field)
	return ""
}

func TestHolderIsLockedDown(t *testing.T) {
	page := testPage(t, testMaster(t, 0))
	h := testHolder(t, page)
	proc := fmt.Sprintf("/proc/%d", h.PID())
	tasks, err := filepath.Glob(proc + "/task/*/status")
	if err != nil || len(tasks) == 0 {
		t.Fatalf("found no threads: %v", err)
	}
	for _, task := range tasks {
		for field, want := range map[string]string{"Seccomp:": "2", "NoNewPrivs:": "1"} {
			if got := statusField(t, task, field); got != want {
				t.Errorf("%s: %s %s, want %s", task, field, got, want)
			}
		}
	}
	if got := statusField(t, proc+"/limits", "Max core file size"); !strings.HasPrefix(got, "0 ") {
		t.Errorf("core dumps: %s", got)
	}
	need.Root(t) // who alone sees the rest of a keyholder
	if env, err := os.ReadFile(proc + "/environ"); err != nil || strings.ReplaceAll(string(env), "\x00", "") != "GOMAXPROCS=1" {
		t.Errorf("environment %q, %v", env, err)
	}
	checkDescriptors(t, proc)
	checkPageMapping(t, proc, page)
}

func checkDescriptors(t *testing.T, proc string) {
	t.Helper()
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, err := os.Readlink(proc + "/fd/" + fd.Name())
		if err != nil {
			t.Fatal(err)
		}
		ok := fd.Name() == "2" || fd.Name() == "4" && strings.HasPrefix(target, "socket:") ||
			target == "anon_inode:[eventpoll]" || target == "anon_inode:[eventfd]"
		if !ok {
			t.Errorf("descriptor %s is open: %s", fd.Name(), target)
		}
	}
}

func checkPageMapping(t *testing.T, proc string, page *os.File) {
	t.Helper()
	kind, err := PageKind(page)
	if err != nil {
		t.Fatal(err)
	}
	if kind != PageSecret {
		return
	}
	maps, err := os.ReadFile(proc + "/maps")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for line := range strings.Lines(string(maps)) {
		if strings.Contains(line, "secretmem") {
			found = true
			if !strings.Contains(line, " r--s ") {
				t.Errorf("the page is mapped as %s", line)
			}
		}
	}
	if !found {
		t.Error("the page is not mapped")
	}
}

// command runs the test binary as one of its programs; as an ordinary user if this is root, to whom nothing is closed.
func command(t *testing.T, ordinary bool, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Stderr = os.Stderr
	if ordinary && os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	return cmd
}

// peek tries to read its own keyholder's memory and page.
func peek([]string) error {
	h, err := StartHolder(context.Background(), os.NewFile(3, "page"), HolderConfig{Command: holderCommand})
	if err != nil {
		return err
	}
	defer h.Close()
	for _, file := range []string{"mem", "maps", "fd/4", "environ"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/%s", h.PID(), file))
		if !errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("opening %s: %v, %w", file, f, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/mem", h.PID()), &st); err != nil || st.Uid != 0 {
		return fmt.Errorf("mem is owned by %d: %w", st.Uid, err)
	}
	if err := unix.PtraceAttach(h.PID()); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("tracing: %w", err)
	}
	_, err = h.ServiceKey(context.Background(), 1, "a", 1, 32)
	return err
}

// The broker's own user cannot look into the keyholder.
func TestHolderIsUnreadable(t *testing.T) {
	cmd := command(t, true, "peek")
	cmd.ExtraFiles = []*os.File{testPage(t, testMaster(t, 0))}
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
}

// brokerLike does what a broker does: it gets a page, starts a keyholder from it, closes it, uses keys, signs. Its first
// argument says what to plant.
func brokerLike(args []string) error {
	marker := sha256.Sum256([]byte(args[0]))
	page := os.NewFile(3, "page")
	h, err := StartHolder(context.Background(), page, HolderConfig{Command: holderCommand})
	if err != nil {
		return err
	}
	if err := page.Close(); err != nil {
		return err
	}
	for i := range 100 {
		k, err := h.ServiceKey(context.Background(), 1, fmt.Sprint("db-", i), 1, 32)
		if err != nil {
			return err
		}
		defer runtime.KeepAlive(k)
		if _, err := h.Sign(context.Background(), LabelAudit, []byte{byte(i)}); err != nil {
			return err
		}
	}
	fmt.Println(h.PID())
	_, err = io.Copy(io.Discard, os.Stdin) // until the test has looked
	runtime.KeepAlive(&marker)
	return err
}

// startBroker returns a running brokerLike and its keyholder's process id.
func startBroker(t *testing.T, page *os.File) (cmd *exec.Cmd, holder int) {
	t.Helper()
	cmd = command(t, false, "broker", "marker")
	cmd.ExtraFiles = []*os.File{page}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	holder, err = strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return cmd, holder
}

// No master, nothing extracted from one and no seed is in a broker's memory; keys that it asked for are.
func TestBrokerMemory(t *testing.T) {
	m := testMaster(t, 0)
	s := testSchedule(t, 0)
	broker, holder := startBroker(t, testPage(t, m))
	prk, _ := s.prk.octets()
	seed, _ := s.derive(IdentityInfo(1), 32)
	signer, _ := s.signer.octets()
	marker := sha256.Sum256([]byte("marker"))
	key := service("db-0", 1, 32).derive(t, s)
	needles := map[string][]byte{
		"master": octetsOf(t, m), "PRK": prk, "seed": seed, "private key": signer, "PRK, inner pad": padded(prk, 0x36),
		"PRK, outer pad": padded(prk, 0x5c), "marker": marker[:], "service's key": key,
	}
	found, err := memtest.Scan(broker.Process.Pid, needles)
	if err != nil || !slices.Equal(found, []string{"marker", "service's key"}) {
		t.Errorf("the broker's memory has %q, expected the marker and the service's key: %v", found, err)
	}
	if os.Getuid() != 0 {
		return // a keyholder's memory is root's alone to read
	}
	found, err = memtest.Scan(holder, needles)
	if err != nil || slices.Contains(found, "master") || !slices.Contains(found, "private key") {
		t.Errorf("the keyholder's memory has %q, expected the private key and no master: %v", found, err)
	}
}

func padded(key []byte, pad byte) []byte {
	out := bytes.Clone(key)
	for i := range out {
		out[i] ^= pad
	}
	return out
}

// A keyholder does not outlive its broker, however that ended.
func TestHolderEndsWithItsBroker(t *testing.T) {
	broker, holder := startBroker(t, testPage(t, testMaster(t, 0)))
	fd, err := unix.PidfdOpen(holder, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := broker.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	n, err := 0, error(unix.EINTR)
	for err == unix.EINTR {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
	}
	if err != nil || n != 1 {
		t.Errorf("the keyholder lives on: %v", err)
	}
}
