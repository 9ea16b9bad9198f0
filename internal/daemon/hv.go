package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"keybroker/hypervisor"
	"keybroker/hypervisor/libvirt"
	"keybroker/inject"
)

// hypervisorState is what status shows of the connection to libvirt.
type hypervisorState struct {
	mu     sync.Mutex
	socket string // "" while there is no connection
	why    string
}

func (h *hypervisorState) set(socket, why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.socket, h.why = socket, why
}

func (h *hypervisorState) status() LibvirtStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	return LibvirtStatus{Connected: h.socket != "", Socket: h.socket, Why: h.why}
}

// watchHypervisor follows libvirt's events until ctx ends. Hooks say what starts; events say what resets and ends, and the
// list after each connection says what was missed.
func (b *Broker) watchHypervisor(ctx context.Context) {
	if len(b.cfg.Libvirt) == 0 {
		b.hv.set("", "libvirt = [] in broker.toml: this host has no VMs")
		return
	}
	b.hv.set("", "connecting")
	if err := b.libvirt.Watch(ctx, b.hypervisorEvent); err != nil && !errors.Is(err, context.Canceled) {
		b.log.Error("following libvirt", "err", err)
	}
}

func (b *Broker) hypervisorEvent(e libvirt.Event) {
	b.log.Debug("libvirt", "kind", e.Kind, "vm", e.Name, "change", e.Change, "origin", e.Origin)
	switch e.Kind {
	case libvirt.Connected:
		b.hv.set(e.Socket, "")
		b.log.Info("connected to libvirt", "socket", e.Socket, "running", len(e.Domains))
		b.reconcile(e.Domains)
	case libvirt.Disconnected:
		b.hv.set("", e.Err.Error())
		b.log.Warn("libvirt is gone; VMs get no key until it is back", "err", e.Err)
	case libvirt.Reboot:
		b.reset(e.UUID)
	case libvirt.Lifecycle:
		b.lifecycle(e)
	case libvirt.Unplugged:
		b.unplugged(e)
	}
}

// reset is the guest's own reboot: no hook is called, and the event may come twice within a moment. Its connection is dropped
// also where it had not used its ticket: nobody is at the other end any more.
func (b *Broker) reset(uuid string) {
	x := b.guests.get(uuid)
	if x == nil {
		return
	}
	b.ticket(uuid, "reset", (*hypervisor.Ticket).Reset)
	x.restart(true)
}

// unplugged takes the ticket of a guest that has lost its vsock device: its CID may be anybody's from now on.
func (b *Broker) unplugged(e libvirt.Event) {
	x := b.guests.get(e.UUID)
	if x == nil || !b.lostVsock(x, e.Device) {
		return
	}
	if b.ticket(e.UUID, "vsock device unplugged", (*hypervisor.Ticket).Revoke) {
		b.log.Warn("a VM's vsock device was unplugged; it gets no more keys in this boot", "vm", x.domain.Name, "cid", x.domain.CID)
	}
	x.revoked(inject.Refusal{
		Code: inject.CodeNoTicket, Reason: "its vsock device was unplugged",
		Next: fmt.Sprintf("plug one with CID %d in and reboot the VM, or stop and start it", x.domain.CID),
	})
}

// lostVsock says whether the device that a guest has lost was its vsock. An administrator's own name for a device does not tell,
// so libvirt is asked what is left.
func (b *Broker) lostVsock(x *guest, device string) bool {
	if !strings.HasPrefix(device, libvirt.UserDevice) {
		return device == libvirt.VsockDevice
	}
	d, err := b.live(b.running, x.domain.UUID)
	if err != nil { // each release asks again
		b.log.Warn("a VM lost a device, and libvirt cannot say whether it was its vsock", "vm", x.domain.Name, "device", device, "err", err)
		return false
	}
	return d.CID != x.domain.CID
}

// lifecycle takes libvirt's own word on starts and ends, which confirms the hook's or stands in for it.
func (b *Broker) lifecycle(e libvirt.Event) {
	x := b.guests.get(e.UUID)
	if x != nil && !x.process.Alive() {
		boot := x.boot()
		b.ticket(e.UUID, "process ended", func(t *hypervisor.Ticket) bool { return t.Gone(boot) })
		b.guests.end(e.UUID, x)
		x = nil
	}
	switch {
	case e.Change == libvirt.Stopped:
		b.guests.keepUnreadable(func(uuid string) bool { return uuid != e.UUID })
	case e.Change == libvirt.Started && x != nil:
		b.ticket(e.UUID, "started", func(t *hypervisor.Ticket) bool { return t.Observed(e.Origin) })
		x.restart(false) // who asked while libvirt was not done with the start may ask again
	case e.Change == libvirt.Started, e.Change == libvirt.Resumed && x == nil: // a restored guest starts paused
		b.missed(e)
	}
}

// missed takes in a domain whose hook did not reach this broker. Asking libvirt about it here is free: no hook runs now.
func (b *Broker) missed(e libvirt.Event) {
	d, err := b.live(b.running, e.UUID)
	if err != nil {
		b.log.Warn("a VM started that cannot be looked up", "vm", e.Name, "err", err)
		b.findUnreadable(b.running, e.UUID)
		return
	}
	b.takeIn(d, "started", func(t *hypervisor.Ticket, boot hypervisor.Boot, seen hypervisor.Origin, gap hypervisor.AfterGap) bool {
		if e.Origin != hypervisor.OriginUnknown {
			seen = e.Origin
		}
		return t.Started(boot, seen, gap)
	})
}

// findUnreadable shows in status that a domain could not be looked up, where its definition is the reason.
func (b *Broker) findUnreadable(ctx context.Context, uuid string) {
	running, err := b.libvirt.List(ctx)
	if err != nil {
		return
	}
	for _, d := range running {
		if d.UUID == uuid && d.Problem != "" {
			b.guests.addUnreadable(d)
		}
	}
}

// reconcile compares libvirt's list with what the broker knows. Whatever ran during the gap may have reset unseen.
func (b *Broker) reconcile(running []hypervisor.Domain) {
	known, unreadable := map[string]bool{}, map[string]bool{}
	for _, d := range running {
		known[d.UUID] = true
		if d.Problem != "" {
			b.log.Warn("a VM whose definition cannot be read gets no key", "vm", d.Name, "problem", d.Problem)
			unreadable[d.UUID] = true
			b.guests.addUnreadable(d)
			continue
		}
		b.takeIn(d, "gap in events", (*hypervisor.Ticket).Gap)
	}
	for _, x := range b.guests.list() {
		if !known[x.domain.UUID] && !x.process.Alive() {
			b.guests.end(x.domain.UUID, x)
		}
	}
	b.guests.keepUnreadable(func(uuid string) bool { return unreadable[uuid] })
	b.endMissing(known)
}

// takeIn begins with a running domain that has our metadata and that the hook has not announced.
func (b *Broker) takeIn(d hypervisor.Domain, cause string, news ticketNews) {
	if !d.Metadata {
		return
	}
	if err := b.begin(d, cause, news); err != nil {
		b.log.Warn("a running VM gets no key", "vm", d.Name, "err", err)
	}
}

// endMissing takes the tickets of domains that ended while nobody watched.
func (b *Broker) endMissing(running map[string]bool) {
	for _, uuid := range b.ticketed() {
		if !running[uuid] && b.guests.get(uuid) == nil {
			b.ticket(uuid, "not running", (*hypervisor.Ticket).Stopped)
		}
	}
}

// errNoVsock is why a running domain is never dialled.
var errNoVsock = errors.New("it has no vsock device: add <vsock model='virtio'><cid auto='yes'/></vsock> to its <devices>")
