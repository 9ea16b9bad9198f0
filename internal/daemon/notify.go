package daemon

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// notify tells systemd a state, if it is there; see sd_notify(3).
func notify(state string) { daemon.SdNotify(false, state) }

// storeFD puts f in systemd's descriptor store, from where it comes back after a restart, upgrade or crash.
// It reports false where there is no systemd to keep it.
func storeFD(name string, f *os.File) (bool, error) {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return false, nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("opening a socket to systemd: %w", err)
	}
	defer unix.Close(fd)
	message := []byte("FDSTORE=1\nFDNAME=" + name)
	if err := unix.Sendmsg(fd, message, unix.UnixRights(int(f.Fd())), &unix.SockaddrUnix{Name: address}, 0); err != nil {
		return false, fmt.Errorf("handing a descriptor to systemd: %w", err)
	}
	return true, nil
}

// forgetFD takes what storeFD kept out of the store.
func forgetFD(name string) { notify("FDSTOREREMOVE=1\nFDNAME=" + name) }

// watchdog tells systemd that healthy still returns in time, at half the interval that the unit asks for.
func watchdog(ctx context.Context, healthy func() bool) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return
	}
	tick := time.NewTicker(interval / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if healthy() {
				notify(daemon.SdNotifyWatchdog)
			}
		}
	}
}
