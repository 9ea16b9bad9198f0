package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"keybroker/derive"
	"keybroker/hypervisor"
	"keybroker/hypervisor/libvirt"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/policy"
	"keybroker/internal/store"
)

// door is what the release protocol knows of a connection to this guest. The guest's identity is the connection's other end:
// a CID that the broker dialled because libvirt gave it to this domain's process.
func (x *guest) door() inject.Door {
	return inject.Door{
		Tier: inject.TierVM,
		Offer: func(context.Context, string) (string, []string, error) {
			select { // it asks now: what it was to be told before is settled
			case <-x.hint:
			default:
			}
			return x.domain.UUID, x.domain.Offered, nil
		},
		Decide:  x.decide,
		Acked:   x.acked,
		Refused: func(_ context.Context, c *inject.Claim, r inject.Refusal) { x.refuse(c, "", r) },
		Hints:   x.hint,
	}
}

// decide checks, records and grants, in the order of docs/protocol.md; the first failure ends it, and is recorded too.
func (x *guest) decide(ctx context.Context, c *inject.Claim) (*inject.Grant, error) {
	g, rule, err := x.decision(ctx, c)
	if err != nil {
		return nil, x.refuse(c, rule, inject.AsRefusal(err))
	}
	return g, nil
}

func (x *guest) decision(ctx context.Context, c *inject.Claim) (g *inject.Grant, rule string, err error) {
	if !x.asks.Allow() {
		return nil, "", refusal(inject.CodeBusy, "this VM asks too often")
	}
	if err := x.live(ctx, c.Subject); err != nil {
		return nil, "", err
	}
	p := x.b.policy()
	entry, rule, err := x.entry(p, c)
	if err != nil {
		return nil, rule, err
	}
	holder, err := x.b.realm.current()
	if err != nil {
		return nil, rule, err
	}
	grants, err := x.take(entry, c)
	if err != nil {
		return nil, rule, err
	}
	if err := x.record(c, p, entry, rule, grants); err != nil {
		return nil, rule, err
	}
	if err := x.live(ctx, c.Subject); err != nil { // once more: it may have ended while the record was written
		return nil, rule, err
	}
	if rule, err := x.still(c, entry, grants); err != nil {
		return nil, rule, err
	}
	g, err = derived(ctx, holder, inject.TierVM, entry, grants)
	if err == nil {
		x.released(c, entry.Subject, grants)
	}
	return g, rule, err
}

// still holds what was granted to what is in force now: libvirt may have taken seconds to answer, and who denied the VM meanwhile,
// or changed the policy, was told that it is done.
func (x *guest) still(c *inject.Claim, entry *policy.VM, grants []granted) (rule string, err error) {
	now, rule, err := x.entry(x.b.policy(), c)
	if err != nil {
		return rule, err
	}
	for _, g := range grants {
		key, d := now.Key(g.key.Name)
		if !d.Allow {
			return rule, decisionRefusal(d)
		}
		if now.Subject != entry.Subject || key.Length != g.key.Length {
			return rule, inject.Refusal{Code: inject.CodeKeyNotAllowed, Reason: "the policy has changed meanwhile", Next: "the guest may ask again"}
		}
	}
	r, err := x.b.vm(x.domain.UUID)
	if err != nil {
		return rule, err
	}
	changed, err := r.Ticket.Take(hypervisor.Receiver(c.Receiver)) // of a copy: what take did, once more, changes nothing
	switch {
	case err != nil:
		return rule, ticketRefusal(err, x.domain.Name)
	case changed || !x.boot().SameProcess(r.Ticket.Boot):
		return rule, refusal(inject.CodeNoTicket, "the ticket has changed meanwhile")
	}
	return rule, nil
}

// live asks libvirt who has this CID now, and the kernel whether the process that we hold still lives.
func (x *guest) live(ctx context.Context, subject string) error {
	if subject != x.domain.UUID {
		return refusal(inject.CodePeerMismatch, "the request is for %s, this connection is to %s", subject, x.domain.UUID)
	}
	if !x.process.Alive() {
		return refusal(inject.CodePeerMismatch, "the process of this domain has ended")
	}
	d, err := x.b.live(ctx, x.domain.UUID)
	switch {
	case errors.Is(err, libvirt.ErrNotRunning), errors.Is(err, libvirt.ErrNotFound), errors.Is(err, libvirt.ErrAddressTaken):
		return inject.Refusal{Code: inject.CodePeerMismatch, Reason: "libvirt does not give this CID to this domain alone, running", Cause: err}
	case err != nil:
		return inject.Refusal{Code: inject.CodeHypervisor, Reason: "libvirt cannot be asked about this domain", Next: "`keybroker status` says why; the guest may ask again", Cause: err}
	}
	switch {
	case d.CID != x.domain.CID || d.CID <= 2:
		return refusal(inject.CodePeerMismatch, "libvirt gives this domain CID %d, the connection is to CID %d", d.CID, x.domain.CID)
	case !x.process.Alive():
		return refusal(inject.CodePeerMismatch, "the process of this domain has ended")
	}
	return nil
}

// entry finds the policy's entry for this domain as it is now, and holds tier and kind to it.
func (x *guest) entry(p *policy.Policy, c *inject.Claim) (*policy.VM, string, error) {
	if c.Kind != inject.KindNone || len(c.Evidence) > 0 {
		return nil, "", refusal(inject.CodeWrongKind, "tier %s takes no evidence, got kind %q", inject.TierVM, c.Kind)
	}
	entry, d := p.VM(x.claims(c.Tier))
	if !d.Allow {
		return nil, d.Rule, decisionRefusal(d)
	}
	return entry, d.Rule, x.b.notDenied(x.domain.UUID, x.domain.Name)
}

// notDenied holds that no administrator denied a VM.
func (b *Broker) notDenied(uuid, name string) error {
	r, err := b.vm(uuid)
	if err == nil && r.Denied {
		err = inject.Refusal{Code: inject.CodeDenied, Reason: "an administrator denied this VM", Next: "`keybroker vm allow " + name + "` ends that"}
	}
	return err
}

func (x *guest) claims(tier string) policy.VMClaims {
	return policy.VMClaims{UUID: x.domain.UUID, Name: x.domain.Name, Tier: tier, Host: x.b.host}
}

// decisionRefusal makes the policy's answer a refusal; what the policy expected stays on this side.
func decisionRefusal(d policy.Decision) inject.Refusal {
	r := inject.Refusal{Code: inject.Code(d.Code), Reason: d.Reason, Rule: d.Rule}
	if d.Expected != "" {
		r.Cause = errors.New("expected " + d.Expected)
	}
	return r
}

// granted is one key that take allowed.
type granted struct {
	key        policy.Key
	epoch      uint32
	generation uint32
	create     bool
}

// take gives the ticket to the receiver and settles every key and epoch, in one transaction: all of it or nothing.
func (x *guest) take(entry *policy.VM, c *inject.Claim) (grants []granted, err error) {
	replaced := false
	after, err := x.b.changeVM(x.domain.UUID, func(tx store.Tx, r *vmRecord) (bool, error) {
		before := r.Ticket.Replacements
		if boot := x.boot(); !boot.SameProcess(r.Ticket.Boot) {
			return false, refusal(inject.CodeNoTicket, "this boot (%v) has no ticket", boot)
		}
		if _, err := r.Ticket.Take(hypervisor.Receiver(c.Receiver)); err != nil {
			return false, ticketRefusal(err, x.domain.Name)
		}
		replaced = r.Ticket.Replacements > before
		var err error
		if grants, err = grantsOf(tx, entry, c.Want); err != nil {
			return false, err
		}
		r.Name = x.domain.Name
		r.Releases++
		r.LastRelease = time.Now().UTC()
		return true, nil
	})
	if replaced && err == nil {
		x.b.recordTicket(x.domain.UUID, "another receiver before the first acknowledgement", after.Ticket)
	}
	return grants, err
}

func wantedNames(c *inject.Claim) []string {
	names := make([]string, len(c.Want))
	for n, w := range c.Want {
		names[n] = w.Name
	}
	return names
}

func ticketRefusal(err error, name string) error {
	r := inject.Refusal{Code: inject.CodeNoTicket, Reason: "this boot has no right to keys (restored, after a gap, or revoked)", Cause: err,
		Next: "reboot the VM, or `keybroker vm allow " + name + "`"}
	if errors.Is(err, hypervisor.ErrReceiverTaken) {
		r.Code, r.Reason = inject.CodeReceiverTaken, "another receiver of this boot has the keys"
	}
	return r
}

// grantsOf settles every key that is wanted, or none.
func grantsOf(tx store.Tx, entry *policy.VM, want []inject.Want) (grants []granted, err error) {
	for _, w := range want {
		one, err := grantOf(tx, entry, w)
		if err != nil {
			return nil, err
		}
		grants = append(grants, one)
	}
	return grants, nil
}

func grantOf(tx store.Tx, entry *policy.VM, w inject.Want) (granted, error) {
	key, d := entry.Key(w.Name)
	if !d.Allow {
		return granted{}, decisionRefusal(d)
	}
	at := vmEpochKey(entry.Subject, w.Name)
	e, err := getEpoch(tx, at)
	if err != nil {
		return granted{}, err
	}
	n, err := e.pick(w.Epoch)
	if err != nil {
		return granted{}, err
	}
	return granted{key: key, epoch: n, generation: e.Generation, create: e.mayCreate(n)}, nil
}

// record writes the audit record of a release; it is on disk when record returns.
func (x *guest) record(c *inject.Claim, p *policy.Policy, entry *policy.VM, rule string, grants []granted) error {
	return x.b.recordRelease(x.auditRecord(c), rule, p, entry, grants)
}

// auditRecord fills in what every record about a claim of this guest says.
func (x *guest) auditRecord(c *inject.Claim) audit.Record {
	r := claimRecord(c)
	r.Subject, r.Peer = x.domain.UUID, fmt.Sprintf("cid %d", x.domain.CID)
	r.Instance, r.Policy = x.boot().String(), x.b.policy().Digest()
	return r
}

// claimRecord is what a claim itself says.
func claimRecord(c *inject.Claim) audit.Record {
	r := audit.Record{Tier: c.Tier, Kind: c.Kind}
	for _, w := range c.Want {
		r.Names, r.Epochs = append(r.Names, w.Name), append(r.Epochs, w.Epoch)
	}
	if c.Transcript != (inject.Transcript{}) {
		r.Transcript, r.Receiver = fmt.Sprintf("%x", c.Transcript), fmt.Sprintf("%x", c.Receiver)
		r.Evidence = evidenceDigest(c.Evidence)
	}
	return r
}

// derived asks the keyholder for the keys, in the order of the claim.
func derived(ctx context.Context, h *derive.Holder, tier string, entry *policy.VM, grants []granted) (*inject.Grant, error) {
	g := &inject.Grant{}
	for _, one := range grants {
		id := derive.VMKeyID{Tier: tier, Subject: entry.Subject, Name: one.key.Name, Epoch: one.epoch, Length: one.key.Length}
		k, err := h.VMKey(ctx, one.generation, id)
		if err != nil {
			return nil, fmt.Errorf("deriving %q: %w", one.key.Name, err)
		}
		g.Keys = append(g.Keys, inject.GrantedKey{Name: one.key.Name, Epoch: one.epoch, Key: k, Create: one.create, LUKS: pins(one.key.LUKS)})
	}
	return g, nil
}

func pins(l *policy.LUKS) *inject.LUKSPins {
	if l == nil {
		return nil
	}
	return &inject.LUKSPins{Cipher: l.Cipher, KeySize: l.KeySize, SectorSize: l.SectorSize}
}

// handedOut is what a claim got: its acknowledgement is about these keys, whatever the policy says by then.
type handedOut struct {
	claim   *inject.Claim
	subject string
	grants  []granted
}

func (x *guest) released(c *inject.Claim, subject string, grants []granted) {
	x.mu.Lock()
	x.keys, x.handed = wantedNames(c), handedOut{c, subject, grants}
	x.mu.Unlock()
	x.set(VMReleased, nil)
	x.b.metrics.released(inject.TierVM)
	x.b.log.Info("released", "vm", x.domain.Name, "keys", wantedNames(c), "cid", x.domain.CID)
}

// refuse records a refusal and returns what the guest is told. Repeated ones are counted in the audit.
func (x *guest) refuse(c *inject.Claim, rule string, r inject.Refusal) inject.Refusal {
	if len(c.Want) > 0 {
		x.mu.Lock()
		x.keys = wantedNames(c)
		x.mu.Unlock()
	}
	if state := x.shown(); state == VMReleased || state == VMQuiet { // an intruder does not hide that the VM has its keys
		x.set(state, &r)
	} else {
		x.set(VMRefused, &r)
	}
	record := x.auditRecord(c)
	record.Event, record.Decision, record.Code = audit.EventRefusal, audit.Refused, string(r.Code)
	record.Rule, record.Reason = rule, r.Reason
	x.b.refused(inject.TierVM, x.domain.UUID, record, r.Cause)
	return r
}

// acked takes the receiver's word on what became of its keys.
func (x *guest) acked(_ context.Context, c *inject.Claim, outcomes []inject.Outcome) error {
	x.mu.Lock()
	handed := x.handed
	x.mu.Unlock()
	if handed.claim != c {
		return refusal(inject.CodeMalformed, "not of this VM's last release")
	}
	good, sinks := judge(c, outcomes)
	_, err := x.b.changeVM(x.domain.UUID, func(tx store.Tx, r *vmRecord) (bool, error) {
		r.Sinks = sinks
		if good {
			if _, err := r.Ticket.Ack(hypervisor.Receiver(c.Receiver)); err != nil {
				return false, ticketRefusal(err, x.domain.Name)
			}
		}
		return true, handed.settle(tx, outcomes)
	})
	if err != nil {
		return err
	}
	x.b.recordAck(x.auditRecord(c), sinks)
	x.b.log.Info("acknowledged", "vm", x.domain.Name, "sinks", sinks, "complete", good)
	return nil
}

// judge says whether every wanted key is where it belongs, and describes the sinks.
func judge(c *inject.Claim, outcomes []inject.Outcome) (good bool, sinks []string) {
	good = len(outcomes) == len(c.Want)
	for n, o := range outcomes {
		good = good && o.OK && n < len(c.Want) && o.Name == c.Want[n].Name
		sink := o.Sink
		switch {
		case o.Opened:
			sink += " open"
		case !o.OK:
			sink += " failed"
		}
		sinks = append(sinks, sink)
	}
	return good, sinks
}

// settle remembers which epochs were opened: from then on nothing is formatted with them.
func (h handedOut) settle(tx store.Tx, outcomes []inject.Outcome) error {
	for _, o := range outcomes {
		if !o.Opened || !slices.ContainsFunc(h.grants, func(g granted) bool { return g.key.Name == o.Name && g.epoch == o.Epoch }) {
			continue
		}
		at := vmEpochKey(h.subject, o.Name)
		e, err := getEpoch(tx, at)
		if err != nil {
			return err
		}
		if o.Epoch <= e.Current && o.Epoch > e.Opened {
			e.Opened = o.Epoch
			if err := put(tx, bucketEpochs, at, &e); err != nil {
				return err
			}
		}
	}
	return nil
}
