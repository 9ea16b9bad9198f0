package derive

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// socketPair returns a connected pair of stream sockets: ours for Go's poller, theirs to be inherited by a process that
// blocks on it.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_, _ = unix.Close(fds[0]), unix.Close(fds[1])
		return nil, nil, fmt.Errorf("making a socket non-blocking: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "keyholder"), os.NewFile(uintptr(fds[1]), "broker"), nil
}
