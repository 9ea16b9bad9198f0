package daemon

import (
	"cmp"
	"net/http"

	"keybroker/inject"
	"keybroker/internal/store"
)

// showVM answers with one VM, whether it runs or not.
func (b *Broker) showVM(w http.ResponseWriter, r *http.Request) {
	uuid, err := b.findVM(r.PathValue("vm"))
	if err != nil {
		answerRefusal(w, adminRefusal(err))
		return
	}
	v, err := b.oneVM(uuid)
	if err != nil {
		answerRefusal(w, adminRefusal(err))
		return
	}
	answerJSON(w, http.StatusOK, v)
}

func (b *Broker) oneVM(uuid string) (v VMStatus, err error) {
	for _, unreadable := range b.guests.listUnreadable() {
		if unreadable.UUID == uuid {
			return unreadable, nil
		}
	}
	if x := b.guests.get(uuid); x != nil {
		v = x.status()
	} else if attested, ok := b.attesting.get(uuid); ok {
		v = attested
	} else {
		r, err := b.vm(uuid)
		if err != nil {
			return v, err
		}
		v = b.off(uuid, r)
	}
	v.Create, err = b.mayCreate(uuid)
	return v, err
}

// off is what the store and the policy know of a domain that does not run here.
func (b *Broker) off(uuid string, r vmRecord) VMStatus {
	v := VMStatus{
		UUID: uuid, Name: r.Name, Tier: b.tierOf(uuid), State: VMOff, Keys: []string{}, Sinks: []string{}, Ticket: r.Ticket.String(),
		Releases: r.Releases, LastRelease: r.LastRelease, Denied: r.Denied,
	}
	if entries := b.policy().Find(uuid); len(entries) == 1 {
		v.Keys, v.Name = entries[0].KeyNames(), cmp.Or(v.Name, entries[0].Name)
		if entries[0].Subject != uuid {
			v.Subject = entries[0].Subject
		}
	}
	if v.Tier == inject.TierSNP { // whether it runs is not known here
		v.State, v.Why = VMQuiet, "it has not asked since this broker started"
	}
	if v.Denied {
		v.Code, v.Why = string(inject.CodeDenied), "`keybroker vm allow "+cmp.Or(v.Name, v.UUID)+"` ends that"
	}
	return v
}

// tierOf is the tier of a VM's policy entry, and "vm" where it has none.
func (b *Broker) tierOf(uuid string) string {
	if entries := b.policy().Find(uuid); len(entries) == 1 {
		return entries[0].Tier
	}
	return inject.TierVM
}

// mayCreate lists the keys of a VM that never opened a volume in their current epoch.
func (b *Broker) mayCreate(uuid string) (names []string, err error) {
	entries := b.policy().Find(uuid)
	if len(entries) != 1 {
		return nil, nil
	}
	err = b.store.View(func(tx store.Tx) error {
		for _, name := range entries[0].KeyNames() {
			e, err := getEpoch(tx, vmEpochKey(entries[0].Subject, name))
			if err != nil {
				return err
			}
			if e.mayCreate(e.Current) {
				names = append(names, name)
			}
		}
		return nil
	})
	return names, err
}

// deniedOff lists the VMs that an administrator denied and that do not run: a denial lasts, and is to be seen.
func (b *Broker) deniedOff(running []VMStatus) []VMStatus {
	var all []VMStatus
	shown := map[string]bool{}
	for _, v := range running {
		shown[v.UUID] = true
	}
	err := b.store.View(func(tx store.Tx) error {
		return tx.ForEach(bucketVMs, func(uuid string, _ []byte) error {
			var r vmRecord
			if _, err := get(tx, bucketVMs, uuid, &r); err != nil {
				return err
			}
			if r.Denied && !shown[uuid] {
				all = append(all, b.off(uuid, r))
			}
			return nil
		})
	})
	if err != nil {
		b.log.Error("reading the store", "err", err)
	}
	return all
}
