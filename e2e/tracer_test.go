package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// strace's injection counts each thread and each kind of call by itself. A Go program's goroutines change threads as they like, so
// it cannot name "the Nth of the process"; this tracer does, and nothing else: it counts the calls that change something outside
// of the process, over all its threads, and kills the process when it enters the Nth, which is then not executed.

// tracerWish in the environment makes the test's program the tracer of the command or the process ids in its arguments.
const tracerWish = "KEYBROKER_E2E_TRACER"

func TestMain(m *testing.M) {
	if n := os.Getenv(tracerWish); n != "" {
		os.Unsetenv(tracerWish)
		os.Exit(traceMain(n, os.Args[1:]))
	}
	os.Exit(m.Run())
}

// counted are the calls by which a process changes files or tells others something.
var counted = map[uint64]string{
	unix.SYS_WRITE: "write", unix.SYS_PWRITE64: "pwrite64", unix.SYS_WRITEV: "writev", unix.SYS_PWRITEV: "pwritev",
	unix.SYS_PWRITEV2: "pwritev2", unix.SYS_SENDTO: "sendto", unix.SYS_SENDMSG: "sendmsg", unix.SYS_SENDMMSG: "sendmmsg",
	unix.SYS_SENDFILE: "sendfile", unix.SYS_COPY_FILE_RANGE: "copy_file_range",
	unix.SYS_FSYNC: "fsync", unix.SYS_FDATASYNC: "fdatasync", unix.SYS_SYNC_FILE_RANGE: "sync_file_range",
	unix.SYS_FTRUNCATE: "ftruncate", unix.SYS_FALLOCATE: "fallocate",
	unix.SYS_RENAME: "rename", unix.SYS_RENAMEAT: "renameat", unix.SYS_RENAMEAT2: "renameat2",
	unix.SYS_LINK: "link", unix.SYS_LINKAT: "linkat", unix.SYS_UNLINK: "unlink", unix.SYS_UNLINKAT: "unlinkat",
	unix.SYS_MKDIR: "mkdir", unix.SYS_MKDIRAT: "mkdirat", unix.SYS_FCHOWN: "fchown", unix.SYS_FCHOWNAT: "fchownat",
}

// A point is one counted call.
type point struct {
	pid  int
	call string // and what its descriptor is
}

func (p point) String() string { return fmt.Sprintf("%d %s", p.pid, p.call) }

// The tracer's report on its descriptor 3 is lines: "attached", "point PID CALL" for each counted call, "killed PID" when the
// process has died of it, and "exited PID STATUS" of one that ended by itself.
type tracer struct {
	report *os.File
	nth    int // 0: count alone
	count  int
	victim int
	tgid   map[int]int // by thread
}

const traceOptions = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC

func traceMain(nth string, args []string) int {
	runtime.LockOSThread() // a tracer is a thread
	n, err := strconv.Atoi(nth)
	t := &tracer{report: os.NewFile(3, "report"), nth: n, tgid: map[int]int{}}
	unix.CloseOnExec(3)
	if err == nil && args[0] == "-p" {
		err = t.seizeAll(args[1:])
	} else if err == nil {
		err = t.launch(args)
	}
	if err == nil {
		err = t.loop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tracer:", err)
		return 1
	}
	return 0
}

// seizeAll takes every thread of running processes.
func (t *tracer) seizeAll(pids []string) error {
	for _, text := range pids {
		pid, err := strconv.Atoi(text)
		if err != nil {
			return err
		}
		for more := true; more; { // threads that begin meanwhile come by themselves, or in the next round
			threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
			if err != nil || len(threads) == 0 {
				return fmt.Errorf("no process %d", pid)
			}
			more = false
			for _, path := range threads {
				tid, err := strconv.Atoi(filepath.Base(path))
				if err != nil {
					return err
				}
				if t.tgid[tid] != 0 {
					continue
				}
				more = true
				t.tgid[tid] = pid
				_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, traceOptions, 0, 0)
				if errno == unix.EPERM || errno == unix.ESRCH { // it is traced already, being a thread's child; or it has ended
					continue
				}
				if errno != 0 {
					return fmt.Errorf("seizing thread %d: %w", tid, errno)
				}
				if err := unix.PtraceInterrupt(tid); err != nil && !errors.Is(err, unix.ESRCH) {
					return fmt.Errorf("stopping thread %d: %w", tid, err)
				}
			}
		}
	}
	fmt.Fprintln(t.report, "attached")
	return nil
}

// launch starts a command, stopped before its first instruction.
func (t *tracer) launch(args []string) error {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	pid, err := syscall.ForkExec(path, args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Ptrace: true}})
	if err != nil {
		return err
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return err
	}
	t.tgid[pid] = pid
	if err := unix.PtraceSetOptions(pid, traceOptions|unix.PTRACE_O_EXITKILL); err != nil {
		return err
	}
	fmt.Fprintln(t.report, "attached")
	return unix.PtraceSyscall(pid, 0)
}

// loop lets the threads run from call to call, until all have ended or the victim has.
func (t *tracer) loop() error {
	for {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return nil
		case err != nil:
			return err
		case status.Exited() || status.Signaled():
			if tid == t.victim && status.Signal() == unix.SIGKILL {
				fmt.Fprintln(t.report, "killed", tid)
				return nil
			}
			if status.Exited() && t.tgid[tid] == tid {
				fmt.Fprintln(t.report, "exited", tid, status.ExitStatus())
			}
			continue
		}
		signal := t.stopped(tid, status)
		if err := unix.PtraceSyscall(tid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("continuing thread %d: %w", tid, err)
		}
	}
}

// stopped looks at why a thread stopped, and returns the signal to deliver to it.
func (t *tracer) stopped(tid int, status unix.WaitStatus) int {
	signal, known := status.StopSignal(), t.tgid[tid] != 0
	if !known {
		t.tgid[tid] = threadGroup(tid)
	}
	switch {
	case signal == unix.SIGTRAP|0x80:
		t.atCall(tid)
		return 0
	case int(status)>>16 != 0, signal == unix.SIGSTOP && !known: // a new thread, an exec
		return 0
	}
	return int(signal)
}

func threadGroup(tid int) int {
	content, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	for line := range strings.Lines(string(content)) {
		if text, ok := strings.CutPrefix(line, "Tgid:"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(text))
			return n
		}
	}
	return tid
}

// ptraceGetSyscallInfo and what follows are of ptrace(2).
const (
	ptraceGetSyscallInfo = 0x420e
	syscallInfoEntry     = 1
)

func (t *tracer) atCall(tid int) {
	var info [88]byte // op, arch, instruction and stack pointer, number, six arguments
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceGetSyscallInfo, uintptr(tid), uintptr(len(info)), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 || info[0] != syscallInfoEntry || t.victim != 0 {
		return
	}
	name := counted[binary.LittleEndian.Uint64(info[24:])]
	if name == "" {
		return
	}
	pid, fd := t.tgid[tid], int32(binary.LittleEndian.Uint64(info[32:]))
	target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
	if target == "anon_inode:[eventfd]" || fd == 2 && name == "write" { // Go's scheduler wakes itself; what it says in its log
		return
	}
	if err == nil {
		name += " " + shortName(target)
	}
	t.count++
	fmt.Fprintln(t.report, "point", pid, name)
	if t.count == t.nth {
		t.victim = pid
		unix.Kill(pid, unix.SIGKILL)
	}
}

// shortName is a descriptor's file without its folder, or "socket" or "pipe".
func shortName(target string) string {
	if kind, _, ok := strings.Cut(target, ":["); ok {
		return kind
	}
	return filepath.Base(target)
}

// A trace is a tracer at work.
type trace struct {
	t      *testing.T
	cmd    *exec.Cmd
	lines  chan string // closed when the tracer has ended
	points []point     // filled by wait
	killed int         // the process that was killed, or 0; filled by wait
	exits  map[int]int // status by process of those that ended by themselves; filled by wait
	output strings.Builder
}

// traced starts a tracer that kills at the nth counted call, or never when that is 0. The arguments are a command, or -p and
// process ids.
func traced(ctx context.Context, t *testing.T, nth int, args ...string) *trace {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	tr := &trace{t: t, cmd: exec.CommandContext(ctx, self, args...), lines: make(chan string, 1<<16), exits: map[int]int{}}
	tr.cmd.Env = append(os.Environ(), tracerWish+"="+strconv.Itoa(nth), "GORACE=atexit_sleep_ms=0") // else a second more at its end
	tr.cmd.ExtraFiles = []*os.File{write}
	tr.cmd.Stdout, tr.cmd.Stderr = &tr.output, &tr.output
	tr.cmd.WaitDelay = time.Second // whoever holds the output open
	err = tr.cmd.Start()
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.cmd.Process.Kill() })
	attached := make(chan bool, 1)
	go func() {
		defer close(tr.lines)
		defer close(attached)
		for in := bufio.NewScanner(read); in.Scan(); {
			if in.Text() == "attached" {
				attached <- true
				continue
			}
			tr.lines <- in.Text()
		}
	}()
	if !<-attached {
		tr.cmd.Wait()
		out := tr.output.String()
		if strings.Contains(out, unix.EPERM.Error()) && os.Getenv("KEYBROKER_LAB") == "" && os.Getenv("CI") != "true" {
			t.Skip("ptrace is forbidden here; as root, or with kernel.yama.ptrace_scope at most 2, it is not")
		}
		t.Fatalf("the tracer did not begin: %s", out)
	}
	return tr
}

// settle waits until there was no further call for a while, or the tracer has ended, and reports whether it has.
func (tr *trace) settle(quiet time.Duration) (ended bool) {
	tr.t.Helper()
	for {
		select {
		case line, more := <-tr.lines:
			if !more {
				return true
			}
			tr.read(line)
		case <-time.After(quiet):
			return false
		}
	}
}

// wait waits for the tracer's end: it has killed, or all that it traced has ended.
func (tr *trace) wait() {
	tr.t.Helper()
	for line := range tr.lines {
		tr.read(line)
	}
	tr.cmd.Wait()
	if out := tr.output.String(); strings.Contains(out, "tracer:") {
		tr.t.Fatal(out)
	}
}

func (tr *trace) read(line string) {
	var p point
	if n, _ := fmt.Sscanf(line, "killed %d", &tr.killed); n == 1 {
		return
	}
	var pid, status int
	if n, _ := fmt.Sscanf(line, "exited %d %d", &pid, &status); n == 2 {
		tr.exits[pid] = status
		return
	}
	if n, _ := fmt.Sscanf(line, "point %d", &p.pid); n != 1 {
		tr.t.Fatalf("the tracer says %q", line)
	}
	_, p.call, _ = strings.Cut(strings.TrimPrefix(line, "point "), " ")
	tr.points = append(tr.points, p)
}
