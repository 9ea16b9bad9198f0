package daemon

import (
	"log/slog"
	"path/filepath"
	"testing"

	"keybroker/hypervisor"
	"keybroker/hypervisor/libvirt"
	"keybroker/internal/store"
)

// A domain with a mistake in its metadata gets no key, and status says which mistake, for as long as it runs.
func TestUnreadableDomainIsShown(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b := &Broker{log: slog.New(slog.DiscardHandler), store: s}
	b.guests = newGuests(b)
	bad := hypervisor.Domain{UUID: "11111111-2222-3333-4444-555555555555", Name: "web1", Running: true, PID: 7, Problem: `unknown element "keys"`}

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
