package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/internal/config"
)

// Names under which systemd hands descriptors over: the socket units' FileDescriptorName, and the keyholder's page.
const (
	fdLocal  = "keybroker"
	fdHook   = "keybroker-hook"
	fdAdmin  = "keybroker-admin"
	fdUnlock = "keybroker-unlock"
	fdPage   = "keyholder-page"
)

// listenFDsStart is the first descriptor that systemd passes; see sd_listen_fds(3).
const listenFDsStart = 3

// passed are the descriptors that systemd gave to this process, by name.
type passed map[string][]*os.File

// takePassed collects systemd's descriptors and forgets the variables that name them, so that no child sees them.
func takePassed() passed {
	defer os.Unsetenv("LISTEN_PID")
	defer os.Unsetenv("LISTEN_FDS")
	defer os.Unsetenv("LISTEN_FDNAMES")
	pid, err := strconv.Atoi(os.Getenv("LISTEN_PID"))
	if err != nil || pid != os.Getpid() {
		return nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 64 {
		return nil
	}
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	files := passed{}
	for i := range n {
		fd := listenFDsStart + i
		unix.CloseOnExec(fd)
		name := "unknown"
		if i < len(names) {
			name = names[i]
		}
		files[name] = append(files[name], os.NewFile(uintptr(fd), name))
	}
	return files
}

// listeners are the broker's doors.
type listeners struct {
	unix, tcp []net.Listener // tier 1
	relay     []net.Listener // tier snp
	hook      net.Listener
	admin     net.Listener
	unlock    *os.File // the opener accepts on it, the broker never does
	unlockAt  string   // where this process made it; "" for systemd's
}

func (l *listeners) all() []net.Listener {
	all := slices.Concat(l.unix, l.tcp, l.relay)
	for _, x := range []net.Listener{l.hook, l.admin} {
		if x != nil {
			all = append(all, x)
		}
	}
	return all
}

func (l *listeners) close() {
	for _, x := range l.all() {
		x.Close()
	}
	if l.unlock != nil {
		l.unlock.Close()
	}
	l.removeUnlock()
}

// removeUnlock takes away the one socket that its listener's end leaves.
func (l *listeners) removeUnlock() {
	if l.unlockAt != "" {
		os.Remove(l.unlockAt)
	}
}

// addresses are where services find the broker.
func (l *listeners) addresses() []string {
	all := []string{}
	for _, x := range append(append([]net.Listener{}, l.tcp...), l.unix...) {
		all = append(all, x.Addr().String())
	}
	return all
}

// listen takes systemd's sockets where there are some, and makes the others itself.
func listen(c *config.Config, paths config.Paths, from passed, log *slog.Logger) (*listeners, error) {
	l := &listeners{}
	if err := errors.Join(l.open(c.Listen, paths, from, log), l.listenRelay(c.Relay.Listen, log)); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *listeners) open(addresses []netip.AddrPort, paths config.Paths, from passed, log *slog.Logger) error {
	if err := l.takeLocal(from[fdLocal]); err != nil {
		return err
	}
	if len(l.unix) == 0 {
		x, err := listenUnix(paths.Socket, 0o666)
		if err != nil {
			return err
		}
		l.unix = append(l.unix, x)
	}
	if len(l.tcp) == 0 {
		if err := l.listenTCP(addresses, log); err != nil {
			return err
		}
	}
	var err error
	if l.hook, err = takeOr(from[fdHook], paths.HookSocket, 0o600); err != nil {
		return err
	}
	if l.admin, err = takeOr(from[fdAdmin], paths.AdminSocket, 0o660); err != nil {
		return err
	}
	return l.openUnlock(from[fdUnlock], paths.UnlockSocket)
}

func (l *listeners) takeLocal(files []*os.File) error {
	for _, f := range files {
		x, err := net.FileListener(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("taking systemd's socket %s: %w", fdLocal, err)
		}
		if _, ok := x.(*net.UnixListener); ok {
			l.unix = append(l.unix, x)
		} else {
			l.tcp = append(l.tcp, x)
		}
	}
	return nil
}

func (l *listeners) listenTCP(addresses []netip.AddrPort, log *slog.Logger) error {
	for _, a := range addresses {
		x, err := net.Listen("tcp", a.String())
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
			log.Warn("not listening: this host has no such address", "address", a)
			continue
		}
		if err != nil {
			return fmt.Errorf("listening on %s (is another broker running? --listen chooses another port): %w", a, err)
		}
		l.tcp = append(l.tcp, x)
	}
	return nil
}

func (l *listeners) listenRelay(addresses []netip.AddrPort, log *slog.Logger) error {
	for _, a := range addresses {
		x, err := net.Listen("tcp", a.String())
		if err != nil {
			return fmt.Errorf("listening for relays on %s ([relay] listen in broker.toml): %w", a, err)
		}
		l.relay = append(l.relay, x)
		log.Info("listening for relays", "address", a)
	}
	return nil
}

// openUnlock keeps the listener as a file: it is inherited by the opener, and a passphrase never crosses this process.
func (l *listeners) openUnlock(files []*os.File, path string) error {
	if len(files) > 0 {
		l.unlock = files[0]
		return nil
	}
	x, err := listenUnix(path, 0o600)
	if err != nil {
		return err
	}
	defer x.Close()
	x.(*net.UnixListener).SetUnlinkOnClose(false)
	l.unlockAt = path
	l.unlock, err = x.(*net.UnixListener).File()
	return err
}

func takeOr(files []*os.File, path string, mode fs.FileMode) (net.Listener, error) {
	if len(files) == 0 {
		return listenUnix(path, mode)
	}
	defer files[0].Close()
	x, err := net.FileListener(files[0])
	if err != nil {
		return nil, fmt.Errorf("taking systemd's socket for %s: %w", path, err)
	}
	return x, nil
}

// dyingTime is how long a socket may be served yet by a process that ends: the opener of a broker that was killed outlives it by a
// moment.
const dyingTime = 2 * time.Second

// unserved says whether nobody listens on a socket, or nobody any more within dyingTime.
func unserved(path string) bool {
	for end := time.Now().Add(dyingTime); ; time.Sleep(50 * time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
		} else if !errors.Is(err, unix.EAGAIN) { // a full queue is somebody's
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

// listenUnix makes a socket with exactly this mode from its first moment on, in place of a dead one.
func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the folder of a socket: %w", err)
	}
	if !unserved(path) {
		return nil, fmt.Errorf("another process serves %s: stop it, or use --state-dir for a second broker", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("removing a dead socket: %w", err)
	}
	old := unix.Umask(0o777 &^ int(mode.Perm()))
	x, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	return x, nil
}
