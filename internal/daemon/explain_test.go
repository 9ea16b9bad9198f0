package daemon

import (
	"context"
	"fmt"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"keybroker/hypervisor"
	"keybroker/hypervisor/libvirt"
	"keybroker/internal/store"
)

// explained asks as uid 1000 would.
func explained(t *testing.T, b *Broker, query string) Explanation {
	t.Helper()
	r := httptest.NewRequest("GET", "/v1/explain?"+query, nil)
	r = r.WithContext(context.WithValue(r.Context(), peerKey{}, unix.Ucred{Uid: 1000}))
	w := httptest.NewRecorder()
	b.explain(w, r)
	var e Explanation
	if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || len(e.Lines) == 0 {
		t.Fatalf("%s: %d %s %v", query, w.Code, w.Body, err)
	}
	return e
}

// The first line is what would really be decided, whatever the policy alone says.
func TestExplainVM(t *testing.T) {
	const named = "[[vm]]\nuuid = \"" + testVM + "\"\nname = \"web1\"\ntier = \"vm\"\nkeys = [\"disk\"]\n"
	b := newTestBroker(t, named, nil)
	defined := hypervisor.Domain{UUID: testVM, Name: "web1", Metadata: true}
	b.defined = func(_ context.Context, of string) (hypervisor.Domain, error) {
		if of != defined.UUID && of != defined.Name {
			return hypervisor.Domain{}, fmt.Errorf("looking up: %w", libvirt.ErrNotFound)
		}
		return defined, nil
	}
	check := func(of, want string, allow bool) {
		t.Helper()
		e := explained(t, b, "of="+of)
		if !strings.Contains(e.Lines[0], want) || e.Allow != allow || strings.Contains(strings.Join(e.Lines, "\n"), "keybroker explain") {
			t.Errorf("%s: %v %q, expected %v and %q first", of, e.Allow, e.Lines, allow, want)
		}
	}
	change := func(f func(*vmRecord)) {
		t.Helper()
		if _, err := b.changeVM(testVM, func(_ store.Tx, r *vmRecord) (bool, error) { f(r); return true, nil }); err != nil {
			t.Fatal(err)
		}
	}
	check("web1", "VM web1 ("+testVM+"): allowed by policy.toml:1 [[vm]] web1, when it starts", true)
	defined.Name = "web9" // as `virsh start` would say
	check("web1", "refused, wrong-vm-name", false)
	check("web9", "refused, wrong-vm-name", false)
	defined.Name, defined.Metadata = "web1", false
	check("web1", "refused, bad-metadata", false)
	defined.Metadata = true
	change(func(r *vmRecord) { r.Denied = true })
	check("web1", "refused, denied: an administrator denied this VM; `keybroker vm allow web1` ends that", false)
	change(func(r *vmRecord) { r.Denied = false })
	x, _ := newTestGuest(t, b)
	b.guests.by[testVM] = x
	t.Cleanup(func() { delete(b.guests.by, testVM) })
	check("web1", "allowed by policy.toml:1 [[vm]] web1", true)
	change(func(r *vmRecord) { r.Ticket.Revoke() })
	check("web1", "refused, no-ticket: this boot has no right to keys", false)
	if err := b.realm.lock("a test"); err != nil {
		t.Fatal(err)
	}
	check("web1", "refused, locked: the realm is not open", false)
	check("web2", `"web2" is neither a VM nor a service in the policy`, false)
}

func TestExplainService(t *testing.T) {
	b := newTestBroker(t, "[[service]]\nname = \"db\"\nuid = [0, 1000]\nvia = [\"tcp\"]\n[[service]]\nname = \"web\"\nuid = [1000]\nunit = [\"/a.service\"]\n", nil)
	for _, c := range []struct {
		query, want string
		allow       bool
	}{
		{"of=db", "refused, wrong-door", false},
		{"of=db&via=tcp", "allowed by policy.toml:1 [[service]] db", true},
		{"of=db&via=tcp&uid=1", "refused, wrong-uid", false},
		{"of=db&via=tcp&uid=0", "refused, unknown-peer", false},
		{"of=web", "refused, wrong-unit", false},
		{"of=web&unit=" + url.QueryEscape("/a.service"), "allowed by", true},
		{"of=none&uid=1", "refused, no-policy", false},
		{"of=none", "neither a VM nor a service", false},
	} {
		e := explained(t, b, c.query)
		all := strings.Join(e.Lines, "\n")
		if !strings.Contains(e.Lines[0], c.want) || e.Allow != c.allow || strings.Contains(all, "keybroker explain") || strings.Contains(all, "4294967295") {
			t.Errorf("%s: %v %q, expected %v and %q first", c.query, e.Allow, e.Lines, c.allow, c.want)
		}
	}
}
