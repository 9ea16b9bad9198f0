package derive

import (
	"errors"
	"fmt"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

// ServeHolder is the whole life of a keyholder process: it maps the filled page that it inherited as pageFD, gives up every
// right that it does not need, and answers on the stream socket that it inherited as socketFD until the other side closes.
// Then it returns nil. The other side is told of an error too, by its status.
//
// It changes the process for good (it cannot open, connect, execute or be traced, and every other descriptor but standard
// error is closed), so a program calls it for nothing else, before anything else, and exits when it returns. Signals that
// ask a process to end are ignored: a terminal or service manager sends them to the broker as well, which still has
// requests to finish; the keyholder ends when the broker does.
func ServeHolder(pageFD, socketFD int) error {
	if err := checkSocket(socketFD); err != nil {
		return err
	}
	k, err := openAndLockDown(pageFD, socketFD)
	if err != nil {
		return errors.Join(err, writeAll(socketFD, appendAnswer(nil, statusOf(err), nil)))
	}
	return k.serve(socketFD)
}

func checkSocket(fd int) error {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err == nil && kind != unix.SOCK_STREAM {
		err = fmt.Errorf("its type is %d", kind)
	}
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		return fmt.Errorf("descriptor %d is not the broker's stream socket (%w): the broker starts the keyholder, nobody else",
			fd, err)
	}
	return nil
}

// openAndLockDown shuts the process before the secret is in it, and takes its rights away before it answers anybody.
func openAndLockDown(pageFD, socketFD int) (*keyring, error) {
	debug.SetTraceback("none")
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2)
	// One request loop wants one processor, and a number that was set keeps the runtime from looking for a better one in
	// files that it will not be able to read.
	runtime.GOMAXPROCS(1)
	if err := makeUnreadable(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLockdown, err)
	}
	page, err := mapPage(pageFD)
	if err != nil {
		return nil, err
	}
	if err := unix.Close(pageFD); err != nil {
		return nil, fmt.Errorf("closing the secret page: %w", err)
	}
	k, err := newKeyring(page)
	if err != nil {
		return nil, err
	}
	if err := lockDown(socketFD); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLockdown, err)
	}
	return k, nil
}

// serve answers everything that has come with one write for each read, so that a busy broker pays for few calls.
func (k *keyring) serve(fd int) error {
	// Room for the longest request beside what one read brings of others.
	in := make([]byte, 4+maxRequest+64<<10)
	var out []byte
	have := 0
	for {
		n, err := readSome(fd, in[have:])
		if err != nil || n == 0 {
			return err
		}
		answers, rest, err := k.answerAll(out[:0], in[:have+n])
		writeErr := writeAll(fd, answers)
		if errors.Is(writeErr, unix.EPIPE) {
			return err // nobody is left to read them
		}
		if err != nil || writeErr != nil {
			return errors.Join(err, writeErr)
		}
		clear(answers)
		out = answers
		have = copy(in, rest)
	}
}

// readSome returns 0 when the other side is gone, however it went.
func readSome(fd int, b []byte) (int, error) {
	for {
		switch n, err := unix.Read(fd, b); err {
		case nil:
			return n, nil
		case unix.EINTR:
		case unix.ECONNRESET:
			return 0, nil
		default:
			return 0, fmt.Errorf("reading requests: %w", err)
		}
	}
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("writing answers: %w", err)
		}
		b = b[max(n, 0):]
	}
	return nil
}
