package daemon

import (
	"errors"
	"net/http"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"keybroker/internal/audit"
	"keybroker/seal"
)

// knownSlots are the keyslots that the realm file had when it was looked at last.
type knownSlots struct {
	mu    sync.Mutex
	slots []seal.Slot
}

// SlotChanges says which keyslots came and went, one line each: what the audit log says of a change of the realm file.
func SlotChanges(before, after []seal.Slot) []string {
	var changes []string
	for _, s := range after {
		if !hasSlot(before, s.ID) {
			changes = append(changes, "added slot "+s.ID.String()+" ("+s.Kind+")")
		}
	}
	for _, s := range before {
		if !hasSlot(after, s.ID) {
			changes = append(changes, "removed slot "+s.ID.String()+" ("+s.Kind+")")
		}
	}
	return changes
}

func hasSlot(slots []seal.Slot, id seal.SlotID) bool {
	return slices.ContainsFunc(slots, func(s seal.Slot) bool { return s.ID == id })
}

// realmChanged records what a command changed in the realm file. The caller is not asked what: the file says it.
func (b *Broker) realmChanged(r *http.Request) error {
	b.slots.mu.Lock()
	defer b.slots.mu.Unlock()
	f, err := seal.Load(b.paths.Realm)
	if err != nil {
		return err
	}
	if f.RealmID() != b.file.RealmID() {
		return errors.New("the realm file is of another realm now; restart the broker to use it")
	}
	var caller *audit.Caller
	if cred, ok := r.Context().Value(peerKey{}).(unix.Ucred); ok {
		caller = &audit.Caller{UID: cred.Uid, PID: cred.Pid}
	}
	for _, change := range SlotChanges(b.slots.slots, f.Slots()) {
		if _, err := b.audit.Append(audit.Record{Event: audit.EventSlot, Reason: change, Caller: caller}, audit.Durable); err != nil {
			return err
		}
	}
	b.slots.slots = f.Slots()
	return nil
}
