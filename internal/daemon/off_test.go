package daemon

import (
	"slices"
	"testing"
	"time"

	"keybroker/internal/store"
)

// A VM that is off is shown by what is kept of it; in the list it stands only while it is denied.
func TestVMThatIsOff(t *testing.T) {
	b := newTestBroker(t, testVMPolicy, nil)
	last := time.Now().UTC().Truncate(time.Second)
	change := func(f func(store.Tx, *vmRecord) error) {
		t.Helper()
		if _, err := b.changeVM(testVM, func(tx store.Tx, r *vmRecord) (bool, error) { return true, f(tx, r) }); err != nil {
			t.Fatal(err)
		}
	}
	show := func() VMStatus {
		t.Helper()
		v, err := b.oneVM(testVM)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if v := show(); v.State != VMOff || !slices.Equal(v.Keys, []string{"disk"}) || !slices.Equal(v.Create, []string{"disk"}) || len(b.vmStatus()) != 0 {
		t.Errorf("in the policy alone: %+v, %d are listed", v, len(b.vmStatus()))
	}
	change(func(tx store.Tx, r *vmRecord) error {
		r.Name, r.LastRelease, r.Denied = "web1", last, true
		return put(tx, bucketEpochs, vmEpochKey(testVM, "disk"), &epochRecord{Current: 1, Generation: 1, Opened: 1})
	})
	if v := show(); v.Name != "web1" || !v.Denied || !v.LastRelease.Equal(last) || len(v.Create) != 0 || v.Code != "denied" {
		t.Errorf("seen and denied: %+v", v)
	}
	if all := b.vmStatus(); len(all) != 1 || all[0].State != VMOff || all[0].Name != "web1" {
		t.Errorf("listed: %+v", all)
	}
	x, _ := newTestGuest(t, b)
	b.guests.by[testVM] = x
	t.Cleanup(func() { delete(b.guests.by, testVM) })
	if all := b.vmStatus(); len(all) != 1 || all[0].State == VMOff || !all[0].Denied {
		t.Errorf("running and denied: %+v", all)
	}
}
