package daemon

import (
	"context"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"keybroker/internal/vsockconn"
)

// DialGuest connects to a guest's vsock port from a source port below 1024, which is how the guest tells the broker from
// other processes of this host. It needs CAP_NET_BIND_SERVICE.
func DialGuest(ctx context.Context, cid, port uint32) (net.Conn, error) {
	return vsockconn.Dial(ctx, cid, port)
}

// checkVhost refuses a vhost-vsock device that more than root and one group may open: whoever can is any free CID. A host without
// the device has no VMs to serve.
func checkVhost(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil
	}
	if st.Mode&0o007 != 0 {
		return fmt.Errorf("%s has mode %04o, so that any user can take a VM's place: `chmod 660 %s` (and mend the udev rule), or libvirt = [] in broker.toml", path, st.Mode&0o777, path)
	}
	return nil
}
