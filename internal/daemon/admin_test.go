package daemon

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"keybroker/hypervisor"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/policy"
	"keybroker/internal/store"
)

// byHand is an administrator's request about the VM.
func byHand(query string) *http.Request {
	r := httptest.NewRequest("POST", "/v1/vm/x"+query, nil)
	r.SetPathValue("vm", testVM)
	return r.WithContext(context.WithValue(r.Context(), peerKey{}, unix.Ucred{Uid: 1000, Pid: 7}))
}

// What gives a right is in the audit before the store has it, and is refused without a record; what takes one happens in any case.
func TestChangesByHandAreRecorded(t *testing.T) {
	b := newTestBroker(t, testVMPolicy, nil)
	newTestGuest(t, b)
	state := func() hypervisor.State {
		r, err := b.vm(testVM)
		if err != nil {
			t.Fatal(err)
		}
		if r.Denied {
			return "denied"
		}
		return r.Ticket.State
	}
	for _, c := range []struct {
		change func(*http.Request) error
		query  string
		want   hypervisor.State
		reason string
	}{
		{b.denyVM, "", "denied", "denied by hand, by uid 1000"},
		{b.allowVM, "", hypervisor.StateUnused, "allowed by hand, by uid 1000"},
		{b.allowVM, "?create=1", hypervisor.StateUnused, "allowed by hand, by uid 1000, and may format a blank volume"},
		{b.denyVM, "", "denied", "denied by hand, by uid 1000"},
	} {
		if err := c.change(byHand(c.query)); err != nil || state() != c.want {
			t.Errorf("%q: %v, %s", c.reason, err, state())
		}
		all := recorded(t, b, audit.Filter{Event: audit.EventTicket})
		if last := all[len(all)-1]; !strings.HasPrefix(last.Reason, c.reason+": ") || last.Subject != testVM || b.audit.Stats().Synced < last.Seq {
			t.Errorf("%q is recorded as %+v", c.reason, last)
		}
	}
	if err := b.audit.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.allowVM(byHand("")); !errors.Is(err, inject.Refusal{Code: inject.CodeAudit}) || state() != "denied" {
		t.Errorf("allowed without a record: %v, %s", err, state())
	}
	if _, err := b.changeVM(testVM, func(_ store.Tx, r *vmRecord) (bool, error) { r.Denied = false; return true, nil }); err != nil {
		t.Fatal(err)
	}
	if err := b.denyVM(byHand("")); err == nil || state() != "denied" {
		t.Errorf("denied without a record: %v, %s", err, state())
	}
}

// A policy comes into force once that is in the audit, or not at all.
func TestPolicyIsRecordedFirst(t *testing.T) {
	b := newTestBroker(t, "", nil)
	b.source = policy.Source{File: b.paths.PolicyFile, Required: true}
	write := func(text string) {
		if err := os.WriteFile(b.source.File, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		b.reload()
	}
	write("[[service]]\nname = \"db\"\nuid = [1]\n")
	all := recorded(t, b, audit.Filter{Event: audit.EventPolicy})
	if len(all) != 1 || all[0].Policy != b.policy().Digest() || len(b.policy().Services()) != 1 {
		t.Errorf("%+v, %d services", all, len(b.policy().Services()))
	}
	if err := b.audit.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	write("[[service]]\nname = \"db\"\nuid = [1]\n[[service]]\nname = \"web\"\nuid = [1]\n")
	if p := b.rules.Load(); len(p.Services()) != 1 || p.rejected == "" {
		t.Errorf("%d services are in force, %q", len(p.Services()), p.rejected)
	}
}
