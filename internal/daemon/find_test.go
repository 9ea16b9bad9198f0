package daemon

import (
	"testing"

	"keybroker/hypervisor"
	"keybroker/internal/store"
)

// A name means the VM that runs under it, whatever had it before.
func TestFindVM(t *testing.T) {
	const gone, entry, runs = "11111111-2222-3333-4444-555555555555", "22222222-2222-3333-4444-555555555555", "33333333-2222-3333-4444-555555555555"
	b := newStoreBroker(t)
	for _, uuid := range []string{gone, runs} {
		if _, err := b.changeVM(uuid, func(_ store.Tx, r *vmRecord) (bool, error) { r.Name = "web1"; return true, nil }); err != nil {
			t.Fatal(err)
		}
	}
	find := func(name, want string) {
		t.Helper()
		if got, err := b.findVM(name); got != want || (err == nil) != (want != "") {
			t.Errorf("%s is %q, %v, expected %q", name, got, err, want)
		}
	}
	setPolicy(t, b, "")
	find("web1", "") // two that were seen
	find("web2", "")
	find(gone, gone)
	setPolicy(t, b, "[[vm]]\nuuid = \""+entry+"\"\nname = \"web1\"\ntier = \"vm\"\nkeys = [\"disk\"]\n")
	find("web1", entry)
	b.guests.by[runs] = &guest{domain: hypervisor.Domain{UUID: runs, Name: "web1"}}
	find("web1", runs)
	b.guests.by[runs].domain.Name = entry // a name that is another's UUID
	find(entry, entry)
}
