package derive

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"
)

// filterFlagTSyncESRCH makes a filter that could not be put on every thread an error. Without it the kernel returns the id
// of the thread instead, which the library takes for success. See seccomp(2), SECCOMP_FILTER_FLAG_TSYNC_ESRCH.
const filterFlagTSyncESRCH = seccomp.FilterFlag(1 << 4)

// actionENOSYS answers a call as a kernel without it does.
const actionENOSYS = seccomp.Action(uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.ENOSYS))

// makeUnreadable keeps this process out of core dumps and its memory from processes of the same user.
func makeUnreadable() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbidding core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbidding traces: %w", err)
	}
	return nil
}

// lockDown closes every descriptor but the socket, standard error and the runtime's own poller, and installs the filter on
// all threads.
func lockDown(socketFD int) error {
	if err := makePoller(); err != nil {
		return err
	}
	wakers, err := closeOthers(socketFD)
	if err != nil {
		return err
	}
	if len(wakers) == 0 {
		return errors.New("the runtime's poller was not found")
	}
	// The filter goes from the thread that forbade new privileges to all others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return seccomp.LoadFilter(seccomp.Filter{
		NoNewPrivs: true,
		Flag:       seccomp.FilterFlagTSync | filterFlagTSyncESRCH,
		Policy:     holderPolicy(socketFD, wakers),
	})
}

// makePoller makes Go's runtime create its poller, which it does with its first pollable file or timer (and its scavenger
// has one): later it would need calls that are gone by then.
func makePoller() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	return errors.Join(r.Close(), w.Close())
}

// closeOthers closes what is not needed and returns the descriptors by which the runtime wakes its poller.
func closeOthers(socketFD int) (wakers []int, err error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("looking for open descriptors: %w", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd == socketFD || fd == unix.Stderr {
			continue
		}
		switch target, _ := os.Readlink("/proc/self/fd/" + e.Name()); target {
		case "anon_inode:[eventpoll]":
		case "anon_inode:[eventfd]":
			wakers = append(wakers, fd)
		default:
			// EBADF: the descriptor that the directory was read by.
			if err := unix.Close(fd); err != nil && !errors.Is(err, unix.EBADF) {
				return nil, fmt.Errorf("closing descriptor %d: %w", fd, err)
			}
		}
	}
	return wakers, nil
}

// holderPolicy allows reading and writing the socket, writing to standard error, and what Go's runtime does by itself:
// memory that is not executable, threads of this process, locks, time, signals to itself. Any other call kills the
// process.
func holderPolicy(socketFD int, wakers []int) seccomp.Policy {
	conditional := []seccomp.NameWithConditions{
		onlyIf("read", 0, seccomp.Equal, uint64(socketFD)),
		onlyIf("write", 0, seccomp.Equal, uint64(socketFD)),
		onlyIf("write", 0, seccomp.Equal, uint64(unix.Stderr)),
		onlyIf("clone", 0, seccomp.BitsSet, unix.CLONE_THREAD),
		onlyIf("tgkill", 0, seccomp.Equal, uint64(os.Getpid())),
		onlyIf("prctl", 0, seccomp.Equal, unix.PR_SET_VMA),
		onlyIf("mprotect", 2, seccomp.BitsNotSet, unix.PROT_EXEC),
		{Name: "mmap", Conditions: seccomp.ArgumentConditions{
			{Argument: 2, Operation: seccomp.BitsNotSet, Value: unix.PROT_EXEC},
			{Argument: 3, Operation: seccomp.BitsSet, Value: unix.MAP_ANONYMOUS},
		}},
	}
	for _, fd := range wakers {
		conditional = append(conditional,
			onlyIf("read", 0, seccomp.Equal, uint64(fd)), onlyIf("write", 0, seccomp.Equal, uint64(fd)))
	}
	return seccomp.Policy{
		DefaultAction: seccomp.ActionKillProcess,
		Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionAllow, Names: slices.Concat(runtimeCalls, libraryCalls), NamesWithCondtions: conditional},
			{Action: actionENOSYS, Names: libraryAttempts},
		},
	}
}

// runtimeCalls are the calls that need no look at their arguments: they reach nothing outside of the process.
var runtimeCalls = []string{
	"clock_gettime", "clock_nanosleep", "close", "epoll_pwait", "exit", "exit_group", "futex", "getpid", "getrandom",
	"gettid", "madvise", "munmap", "nanosleep", "restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn",
	"sched_yield", "sigaltstack",
}

func onlyIf(name string, argument uint32, op seccomp.Operation, value uint64) seccomp.NameWithConditions {
	return seccomp.NameWithConditions{
		Name:       name,
		Conditions: seccomp.ArgumentConditions{{Argument: argument, Operation: op, Value: value}},
	}
}
