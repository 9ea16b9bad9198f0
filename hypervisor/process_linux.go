package hypervisor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxPIDFile  = 32
	maxStat     = 4096
	maxCmdline  = 1 << 20
	ticksSecond = 100 // USER_HZ, the same on every Linux that runs here
)

// maxPID is the kernel's own limit.
const maxPID = 1 << 22

// ErrOtherProcess says that a process is not the one that runs this domain.
var ErrOtherProcess = errors.New("the process does not run this domain")

// Process holds on to one process by its pidfd, so that its number cannot come to mean another. Its methods may be called
// concurrently, but none after Close.
type Process struct {
	PID       int
	StartTime uint64 // field 22 of /proc/PID/stat, in clock ticks since the host's boot

	file  *os.File // the pidfd, in the runtime's poller
	watch sync.Once
	done  chan struct{}
}

// OpenProcess holds on to the process pid, which must be alive.
func OpenProcess(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("opening process %d: %w", pid, err)
	}
	p := &Process{PID: pid, file: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{})}
	p.StartTime, err = startTime(pid)
	if err == nil && !p.Alive() { // else the start time may be of a later process of that number
		err = os.ErrProcessDone
	}
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("opening process %d: %w", pid, err)
	}
	return p, nil
}

// Alive says whether the process has not ended yet.
func (p *Process) Alive() bool {
	alive := false
	conn, err := p.file.SyscallConn()
	if err != nil {
		return false
	}
	err = conn.Control(func(fd uintptr) { alive = !ended(fd) })
	return err == nil && alive
}

// ended asks the kernel; a pidfd is readable once its process has ended. What cannot be asked has ended.
func ended(fd uintptr) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err != nil || n != 0
	}
}

// Done returns a channel that is closed when the process has ended, or on Close. It holds no thread.
func (p *Process) Done() <-chan struct{} {
	p.watch.Do(func() {
		go func() {
			defer close(p.done)
			if conn, err := p.file.SyscallConn(); err == nil {
				_ = conn.Read(ended) // it fails only when the file is closed, which is an end too
			}
		}()
	})
	return p.done
}

// Close lets go of the process.
func (p *Process) Close() error { return p.file.Close() }

// Boot returns the boot of domain uuid that this process runs, with no resets seen.
func (p *Process) Boot(uuid string) Boot {
	return Boot{UUID: uuid, PID: p.PID, StartTime: p.StartTime}
}

// Runs reports by nil that the process's arguments name this domain, as QEMU's do, and by ErrOtherProcess that they name
// none or another. Any other error says that the arguments could not be read, as under hidepid.
func (p *Process) Runs(uuid, name string) error {
	args, err := p.arguments()
	if err != nil {
		return err
	}
	if !namesDomain(args, uuid, name) {
		return fmt.Errorf("checking process %d: %w", p.PID, ErrOtherProcess)
	}
	return nil
}

// Origin says by QEMU's arguments whether its guest booted (OriginCold) or came with its memory (OriginIncoming). It is
// OriginUnknown when they cannot be read.
func (p *Process) Origin() Origin {
	args, err := p.arguments()
	if err != nil {
		return OriginUnknown
	}
	for _, a := range args {
		if a == "-incoming" || a == "-loadvm" {
			return OriginIncoming
		}
	}
	return OriginCold
}

func (p *Process) arguments() ([]string, error) {
	data, err := readBounded(fmt.Sprintf("/proc/%d/cmdline", p.PID), maxCmdline)
	if err == nil && len(data) == 0 {
		err = errors.New("no arguments to be seen")
	}
	if err == nil && !p.Alive() {
		err = os.ErrProcessDone
	}
	if err != nil {
		return nil, fmt.Errorf("reading the arguments of process %d: %w", p.PID, err)
	}
	return strings.Split(string(bytes.TrimSuffix(data, []byte{0})), "\x00"), nil
}

// namesDomain looks for `-uuid UUID`, and only where there is none for `-name guest=NAME,...`. QEMU doubles a comma within a name.
func namesDomain(args []string, uuid, name string) bool {
	named := false
	for i := 0; i+1 < len(args); i++ {
		switch args[i] {
		case "-uuid":
			return args[i+1] == uuid
		case "-name":
			guest := "guest=" + strings.ReplaceAll(name, ",", ",,")
			named = args[i+1] == guest || strings.HasPrefix(args[i+1], guest+",") && !strings.HasPrefix(args[i+1], guest+",,")
		}
	}
	return named
}

// ReadPIDFile returns the number in a file such as /run/libvirt/qemu/NAME.pid.
func ReadPIDFile(path string) (int, error) {
	data, err := readBounded(path, maxPIDFile)
	if err != nil {
		return 0, fmt.Errorf("reading a pid file: %w", err)
	}
	pid, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 32)
	if err != nil || pid == 0 || pid > maxPID {
		return 0, fmt.Errorf("reading a pid file: %s holds no process number", path)
	}
	return int(pid), nil
}

// SinceStart returns how long this process has been running, to a hundredth of a second.
func SinceStart() (time.Duration, error) {
	start, err := startTime(os.Getpid())
	if err != nil {
		return 0, err
	}
	return BootTime() - time.Duration(start)*(time.Second/ticksSecond), nil
}

// BootTime returns the time since the host's boot, suspension included: the clock that process start times are in.
func BootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

func startTime(pid int) (uint64, error) {
	data, err := readBounded(fmt.Sprintf("/proc/%d/stat", pid), maxStat)
	if err != nil {
		return 0, err
	}
	return parseStartTime(data)
}

// parseStartTime finds field 22. Field 2 is the program's name in parentheses, which may hold anything; the last
// parenthesis ends it. See proc_pid_stat(5).
func parseStartTime(stat []byte) (uint64, error) {
	const field = 22 - 3 // the fields after the name begin with the third
	end := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[end+1:]))
	if end < 0 || len(fields) <= field {
		return 0, errors.New("reading a process's start time: too few fields in its stat")
	}
	n, err := strconv.ParseUint(fields[field], 10, 64)
	if err != nil || n == 0 {
		return 0, errors.New("reading a process's start time: no number in field 22 of its stat")
	}
	return n, nil
}

// readBounded reads a whole small file, and refuses one of more than most octets.
func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%s has more than %d octets", path, most)
	}
	return data, err
}
