package daemon

import (
	"context"
	"testing"

	"keybroker/hypervisor"
	"keybroker/hypervisor/libvirt"
	"keybroker/inject"
)

// A domain with a mistake in its metadata gets no key, and status says which mistake, for as long as it runs.
func TestUnreadableDomainIsShown(t *testing.T) {
	b := newStoreBroker(t)
	bad := hypervisor.Domain{UUID: testVM, Name: "web1", Running: true, PID: 7, Problem: `unknown element "keys"`}

	b.reconcile([]hypervisor.Domain{bad})
	all := b.vmStatus()
	if len(all) != 1 || all[0].Name != "web1" || all[0].State != VMRefused || all[0].Code != "bad-metadata" || all[0].Why != bad.Problem {
		t.Fatalf("status has %+v", all)
	}
	since := all[0].Changed
	b.reconcile([]hypervisor.Domain{bad})
	if all = b.vmStatus(); len(all) != 1 || !all[0].Changed.Equal(since) {
		t.Errorf("said again, status has %+v", all)
	}
	b.lifecycle(libvirt.Event{Kind: libvirt.Lifecycle, Change: libvirt.Stopped, UUID: bad.UUID})
	if all = b.vmStatus(); len(all) != 0 {
		t.Errorf("after its end status has %+v", all)
	}
	b.reconcile([]hypervisor.Domain{bad})
	bad.Problem = ""
	b.reconcile([]hypervisor.Domain{bad})
	if all = b.vmStatus(); len(all) != 0 {
		t.Errorf("mended, status has %+v", all)
	}
}

// A guest that has lost its vsock device has no right to keys any more, and status says why; one that has lost another has.
// libvirt is asked only about devices that an administrator named.
func TestUnplugged(t *testing.T) {
	live := func(cid uint32) func() (hypervisor.Domain, error) {
		return func() (hypervisor.Domain, error) { return hypervisor.Domain{UUID: testVM, CID: cid}, nil }
	}
	stuck := func() (hypervisor.Domain, error) { return hypervisor.Domain{}, libvirt.ErrNotAnswering }
	for _, c := range []struct {
		device string
		live   func() (hypervisor.Domain, error) // nil: it is not asked
		lost   bool
	}{
		{device: "vsock0", lost: true},
		{device: "net0"},
		{device: "ua-mine", live: live(7)},
		{device: "ua-mine", live: live(0), lost: true},
		{device: "ua-mine", live: live(8), lost: true},
		{device: "ua-mine", live: stuck},
	} {
		b := newTestBroker(t, testVMPolicy, nil)
		asked := false
		b.live = func(context.Context, string) (hypervisor.Domain, error) { asked = true; return c.live() }
		x, _ := newTestGuest(t, b)
		x.state = VMAsking
		b.guests.by[testVM] = x
		dropped := false
		x.conn = func() { dropped = true }

		b.unplugged(libvirt.Event{Kind: libvirt.Unplugged, UUID: testVM, Name: "web1", Device: c.device})
		r, err := b.vm(testVM)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Ticket.State == hypervisor.StateNone; got != c.lost || dropped != c.lost || asked != (c.live != nil) {
			t.Errorf("%s: ticket %v, connection dropped: %v, libvirt asked: %v", c.device, r.Ticket, dropped, asked)
		}
		v := x.status()
		if shown := v.State == VMQuiet && v.Code == string(inject.CodeNoTicket) && v.Why == "its vsock device was unplugged; plug one with CID 7 in and reboot the VM, or stop and start it"; shown != c.lost {
			t.Errorf("%s: status has %s, %s, %q", c.device, v.State, v.Code, v.Why)
		}
	}
}
