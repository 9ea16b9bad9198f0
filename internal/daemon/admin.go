package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/hypervisor"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/store"
)

// adminRoutes serve admin.sock. Its mode lets root and one group in; what changes something wants root, the broker's own
// user, or an administrator that broker.toml names.
func (b *Broker) adminRoutes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		answerJSON(w, http.StatusOK, b.status())
	})
	mux.HandleFunc("GET /v1/explain", b.explain)
	mux.HandleFunc("GET /v1/vm/{vm}", b.showVM)
	mux.Handle("GET /metrics", b.metrics.handler())
	mux.HandleFunc("POST /v1/vm/{vm}/allow", b.change(b.allowVM))
	mux.HandleFunc("POST /v1/vm/{vm}/deny", b.change(b.denyVM))
	mux.HandleFunc("POST /v1/lock", b.change(func(r *http.Request) error { b.checkpoint(); return b.realm.lock(administratorOf(r)) }))
	mux.HandleFunc("POST /v1/unlock", b.change(func(*http.Request) error { b.realm.tryAgain(); return nil }))
	mux.HandleFunc("POST /v1/realm-changed", b.change(b.realmChanged))
	return mux
}

type peerKey struct{}

// withPeer keeps the uid that the kernel gives for the other end of a Unix socket.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }) != nil || err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, *cred)
}

// change guards a route that changes something: the caller must be an administrator.
func (b *Broker) change(f func(*http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		cred, ok := r.Context().Value(peerKey{}).(unix.Ucred)
		if !ok || !b.administrator(cred.Uid) {
			answerRefusal(w, inject.Refusal{Code: inject.CodeDenied, Reason: "only root and administrators change things", Next: "run it as root, or add the user to [admin] users in broker.toml"})
			return
		}
		peerOf(r.Context()).changes.Store(true)
		err := f(r)
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTime)) // what it did, which may have waited for the disk, is to be told
		log := b.log.With("uid", cred.Uid, "request", r.Method+" "+r.URL.Path)
		if err != nil {
			log = log.With("err", err)
		}
		log.Info("administration")
		if err != nil {
			answerRefusal(w, adminRefusal(err))
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}
}

// adminRefusal shows an administrator the cause itself.
func adminRefusal(err error) inject.Refusal {
	if r := (inject.Refusal{}); errors.As(err, &r) {
		return r
	}
	return inject.Refusal{Code: inject.CodeInternal, Reason: err.Error()}
}

// administratorOf names who asked, for the audit.
func administratorOf(r *http.Request) string {
	cred, ok := r.Context().Value(peerKey{}).(unix.Ucred)
	if !ok {
		return "nobody known"
	}
	return fmt.Sprintf("uid %d", cred.Uid)
}

func answerRefusal(w http.ResponseWriter, r inject.Refusal) { answerJSON(w, r.Code.HTTPStatus(), r) }

func (b *Broker) administrator(uid uint32) bool {
	if uid == 0 || int(uid) == os.Geteuid() {
		return true
	}
	own := strconv.FormatUint(uint64(uid), 10)
	return slices.ContainsFunc(b.cfg.Admin.Users, func(name string) bool {
		if name == own {
			return true
		}
		u, err := user.Lookup(name)
		return err == nil && u.Uid == own
	})
}

// findVM takes the UUID, or a name that one VM has, of a domain that runs, is in the policy or was seen before.
func (b *Broker) findVM(nameOrUUID string) (string, error) {
	uuids, err := b.lookUpVM(nameOrUUID)
	switch {
	case err != nil:
		return "", err
	case len(uuids) == 0:
		return "", inject.Refusal{Code: inject.CodeUnknownPeer, Reason: fmt.Sprintf("no VM %.64q with keybroker's metadata was seen", nameOrUUID), Next: "`keybroker vm list` shows them"}
	case len(uuids) > 1:
		return "", inject.Refusal{Code: inject.CodeUnknownPeer, Reason: fmt.Sprintf("%.64q is the name of %d VMs: %v", nameOrUUID, len(uuids), uuids), Next: "give the UUID"}
	}
	return uuids[0], nil
}

// lookUpVM lists the UUIDs that findVM chooses from, in order.
func (b *Broker) lookUpVM(nameOrUUID string) ([]string, error) {
	// A name means the VM that runs under it, or else the one that the policy knows by it, or else one that was seen: a domain that
	// is defined anew under its old name has another UUID, and the record of the old one stays.
	var running, known, seen []string
	note := func(to *[]string, uuid, name string) {
		if (uuid == nameOrUUID || name == nameOrUUID) && !slices.Contains(*to, uuid) {
			*to = append(*to, uuid)
		}
	}
	for _, x := range b.guests.list() {
		note(&running, x.domain.UUID, x.domain.Name)
	}
	for _, v := range b.guests.listUnreadable() {
		note(&running, v.UUID, v.Name)
	}
	for _, entry := range b.policy().Find(nameOrUUID) {
		note(&known, entry.UUID, entry.Name)
	}
	err := b.store.View(func(tx store.Tx) error {
		return tx.ForEach(bucketVMs, func(uuid string, _ []byte) error {
			var r vmRecord
			_, err := get(tx, bucketVMs, uuid, &r)
			note(&seen, uuid, r.Name)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	if slices.Contains(slices.Concat(running, known, seen), nameOrUUID) {
		return []string{nameOrUUID}, nil
	}
	for _, uuids := range [][]string{running, known, seen} {
		if len(uuids) > 0 {
			slices.Sort(uuids)
			return uuids, nil
		}
	}
	return nil, nil
}

// allowVM ends a denial and gives the running boot a ticket by hand. The record of it is on disk before the store has it.
func (b *Broker) allowVM(r *http.Request) error {
	uuid, err := b.findVM(r.PathValue("vm"))
	if err != nil {
		return err
	}
	create := r.URL.Query().Get("create") == "1"
	cause := "allowed by hand, by " + administratorOf(r)
	if create {
		cause += ", and may format a blank volume"
	}
	_, err = b.changeVM(uuid, func(tx store.Tx, v *vmRecord) (changed bool, err error) {
		if changed, err = b.allow(tx, uuid, v, create); err != nil {
			return false, err
		}
		if err := b.appendTicket(uuid, cause, v.Ticket, audit.Durable); err != nil {
			return false, inject.Refusal{Code: inject.CodeAudit, Reason: "no audit record can be written, so nothing is changed: " + err.Error(), Cause: err}
		}
		return changed, nil
	})
	if errors.Is(err, hypervisor.ErrNotRunning) {
		return inject.Refusal{Code: inject.CodeNoTicket, Reason: "this VM is not running; its next boot has a ticket"}
	}
	if err != nil {
		return err
	}
	if x := b.guests.get(uuid); x != nil {
		x.restart(false)
	}
	return nil
}

func (b *Broker) allow(tx store.Tx, uuid string, v *vmRecord, create bool) (changed bool, err error) {
	if create {
		if err := b.forgetOpened(tx, uuid); err != nil {
			return false, err
		}
	}
	denied := v.Denied || create
	v.Denied = false
	if b.tierOf(uuid) == inject.TierSNP {
		if !denied {
			err = inject.Refusal{Code: inject.CodeNoTicket, Reason: "this VM is not denied, and tier snp has no tickets: each boot proves itself", Next: "for another receiver reboot the VM"}
		}
		return denied, err
	}
	changed, err = v.Ticket.Allow()
	if errors.Is(err, hypervisor.ErrNotRunning) && denied {
		return true, nil // the denial ends; the next boot has its ticket
	}
	return changed || denied, err
}

// forgetOpened lets the VM's next release say once more that a blank volume may be formatted: it has a new disk.
func (b *Broker) forgetOpened(tx store.Tx, uuid string) error {
	entries := b.policy().Find(uuid)
	if len(entries) != 1 {
		return inject.Refusal{Code: inject.CodeNoPolicy, Reason: "this VM has no policy entry", Next: "add one to policy.toml"}
	}
	for _, key := range entries[0].Keys {
		at := vmEpochKey(entries[0].Subject, key.Name)
		e, err := getEpoch(tx, at)
		if err != nil {
			return err
		}
		if e.Opened == 0 {
			continue
		}
		e.Opened = 0
		if err := put(tx, bucketEpochs, at, &e); err != nil {
			return err
		}
	}
	return nil
}

// denyVM takes a VM's right to keys. It takes it also when the audit fails, and says so.
func (b *Broker) denyVM(r *http.Request) error {
	uuid, err := b.findVM(r.PathValue("vm"))
	if err != nil {
		return err
	}
	var unrecorded error
	_, err = b.changeVM(uuid, func(_ store.Tx, v *vmRecord) (bool, error) {
		v.Denied = true
		if x := b.guests.get(uuid); x != nil {
			v.Name = x.domain.Name
		}
		v.Ticket.Revoke()
		unrecorded = b.appendTicket(uuid, "denied by hand, by "+administratorOf(r), v.Ticket, audit.Durable)
		return true, nil
	})
	if err == nil && unrecorded != nil {
		err = fmt.Errorf("the VM is denied, and the audit does not say so: %w", unrecorded)
	}
	return err
}

// status gathers what `keybroker status` shows.
func (b *Broker) status() Status {
	s := Status{
		Version: b.version, PID: os.Getpid(), Started: b.since, Listen: b.listen, Realm: b.realmStatus(), Hypervisor: b.hv.status(),
		VMs: b.vmStatus(), Warnings: []string{}, Counters: b.services.counters(),
	}
	p := b.rules.Load()
	s.Policy = PolicyStatus{Digest: p.Digest(), Loaded: p.at, Services: len(p.Services()), VMs: len(p.VMs()), Rejected: p.rejected}
	s.Audit = b.auditStatus()
	s.Warnings = append(s.Warnings, b.warnings(s)...)
	return s
}

// warnings is what an administrator should mend.
func (b *Broker) warnings(s Status) []string {
	var w []string
	if s.Policy.Rejected != "" {
		w = append(w, "the policy on disk is not taken, an older one is in force: "+s.Policy.Rejected)
	}
	if s.Realm.HolderIn == "memfd" {
		w = append(w, "the keyholder's page is ordinary locked memory: this kernel has no memfd_secret (Linux 6.5 or secretmem.enable=1)")
	}
	if s.Realm.State == realmOpen && len(s.Realm.Slots) == 1 && s.Realm.Slots[0].Kind == "tpm2" {
		w = append(w, "the realm has one slot, bound to this machine's TPM: `keybroker slot add passphrase`, or it dies with this mainboard")
	}
	if s.Realm.Trouble == "" && len(s.Realm.Slots) == 0 {
		w = append(w, "the realm has NO KEYSLOT: once it is closed nothing opens it again; restore realm.json from a copy")
	}
	if s.Realm.Trouble != "" {
		w = append(w, "the realm file: "+s.Realm.Trouble)
	}
	if s.Audit.Trouble != "" {
		w = append(w, "audit: "+s.Audit.Trouble)
	}
	return w
}

// vmStatus lists the running domains that have our metadata, or may have, and those that are off and denied, by name.
func (b *Broker) vmStatus() []VMStatus {
	all := append([]VMStatus{}, b.guests.listUnreadable()...)
	for _, x := range b.guests.list() {
		all = append(all, x.status())
	}
	all = append(all, b.attesting.list()...)
	all = append(all, b.deniedOff(all)...)
	slices.SortFunc(all, func(a, b VMStatus) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.UUID, b.UUID))
	})
	return all
}

func (x *guest) status() VMStatus {
	x.mu.Lock()
	v := VMStatus{
		UUID: x.domain.UUID, Name: x.domain.Name, Tier: inject.TierVM, CID: x.domain.CID, PID: x.process.PID,
		State: x.state, Keys: x.keys, Changed: x.changed, Sinks: []string{},
	}
	if x.refused != nil {
		v.Code, v.Why = string(x.refused.Code), x.refused.Reason
		if x.refused.Next != "" {
			v.Why = strings.TrimPrefix(v.Why+"; "+x.refused.Next, "; ")
		}
	}
	x.mu.Unlock()
	if v.Keys == nil {
		v.Keys = []string{}
	}
	r, err := x.b.vm(v.UUID)
	if err != nil {
		v.Why = "its state cannot be read: " + err.Error()
		return v
	}
	v.Ticket, v.Presumed, v.Releases, v.LastRelease, v.Denied = r.Ticket.String(), r.Ticket.Presumed, r.Releases, r.LastRelease, r.Denied
	switch {
	case v.State == VMReleased:
		v.Sinks = append(v.Sinks, r.Sinks...)
	case v.Why == "" && r.Ticket.Presumed && r.Ticket.FormerAcked:
		v.Why = "had its keys before the broker or libvirt was away; it may ask once more if it booted since"
	}
	if entries := x.b.policy().Find(v.UUID); len(entries) == 1 && entries[0].Subject != v.UUID {
		v.Subject = entries[0].Subject
	}
	return v
}
