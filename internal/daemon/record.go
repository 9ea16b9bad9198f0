package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"keybroker/derive"
	"keybroker/hypervisor"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/policy"
	"keybroker/internal/store"
)

// closeTime bounds the last checkpoint at the broker's end.
const closeTime = 5 * time.Second

// openAudit continues the audit log. While the realm is not open the log has no checkpoints; everything else is recorded.
func (b *Broker) openAudit(realm string) (err error) {
	a := b.cfg.Audit
	b.syncAlways = a.Sync == 0
	b.audit, err = audit.Open(audit.Config{
		Dir: b.paths.AuditDir, Realm: realm,
		Sign: func(ctx context.Context, fields ...[]byte) ([]byte, error) {
			return b.realm.sign(ctx, derive.LabelAudit, fields...)
		},
		LoadHead:  func() (audit.Head, error) { return LoadHead(b.store) },
		SaveHead:  func(h audit.Head) error { return SaveHead(b.store, h) },
		SyncEvery: a.Sync, Reserve: a.Reserve, MaxFile: a.MaxFile, Logger: b.log,
		Regained: func() { signal(b.space) },
	})
	if err == nil {
		b.refusals = audit.NewCoalescer(audit.CoalescerConfig{Append: b.audit.Append})
		b.strangers = audit.NewCoalescer(audit.CoalescerConfig{Append: b.audit.Append})
	}
	return err
}

// LoadHead returns the audit log's head as the store keeps it; the zero head when there is none yet.
func LoadHead(s *store.Store) (h audit.Head, err error) {
	var octets []byte
	err = s.View(func(tx store.Tx) error {
		octets, err = tx.Get(audit.HeadBucket, audit.HeadKey)
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return audit.Head{}, nil
	}
	if err != nil {
		return audit.Head{}, err
	}
	return audit.ParseHead(string(octets))
}

// SaveHead keeps the audit log's head in the store, on disk when it returns.
func SaveHead(s *store.Store, h audit.Head) error {
	return s.Update(func(tx store.Tx) error { return tx.Put(audit.HeadBucket, audit.HeadKey, []byte(h.String())) })
}

// recordEvent writes what the broker itself does; the record is on disk when it returns.
func (b *Broker) recordEvent(event audit.Event, detail string) error {
	_, err := b.audit.Append(audit.Record{Event: event, Reason: detail, Policy: b.policy().Digest()}, audit.Durable)
	return err
}

// recordStart writes that the broker runs. On a full disk it runs all the same, and gives out no key: who frees the disk should not
// have to start it as well.
func (b *Broker) recordStart() (unrecorded bool, err error) {
	err = b.recordEvent(audit.EventStart, b.version)
	if errors.Is(err, audit.ErrNoSpace) {
		b.log.Error("the disk is full: no key is released until there is room for the audit log", "folder", b.paths.AuditDir, "err", err)
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("writing the audit: %w", err)
	}
	return false, nil
}

// recordTicket writes that a boot's right to keys changed, and why.
func (b *Broker) recordTicket(uuid, cause string, t hypervisor.Ticket) {
	if err := b.appendTicket(uuid, cause, t, audit.Written); err != nil {
		b.log.Error("writing the audit", "err", err)
	}
}

func (b *Broker) appendTicket(uuid, cause string, t hypervisor.Ticket, how audit.Durability) error {
	r := audit.Record{Event: audit.EventTicket, Tier: b.tierOf(uuid), Subject: uuid, Instance: t.Boot.String(), Reason: cause + ": " + t.String()}
	_, err := b.audit.Append(r, how)
	return err
}

// recordRelease writes the record of a release to a VM; it is on disk when recordRelease returns. No record, no key.
func (b *Broker) recordRelease(r audit.Record, rule string, p *policy.Policy, entry *policy.VM, grants []granted) error {
	r.Event, r.Decision, r.Rule, r.Policy = audit.EventRelease, audit.Granted, rule, p.Digest()
	if entry.Subject != entry.UUID {
		r.Reason = "keys of subject " + entry.Subject
	}
	for n, g := range grants {
		r.Epochs[n] = g.epoch
	}
	if _, err := b.audit.Append(r, audit.Durable); err != nil {
		return unrecordedRelease(err)
	}
	return nil
}

func unrecordedRelease(err error) inject.Refusal {
	return inject.Refusal{Code: inject.CodeAudit, Reason: "no audit record can be written, so no key is released", Cause: err}
}

// recordAck writes what became of released keys.
func (b *Broker) recordAck(r audit.Record, sinks []string) {
	r.Event, r.Reason = audit.EventAck, fmt.Sprint(sinks)
	if _, err := b.audit.Append(r, audit.Written); err != nil {
		b.log.Error("writing the audit", "err", err)
	}
}

// refused counts a refusal and records it; repeated ones of one peer are folded into one record.
func (b *Broker) refused(tier, peer string, r audit.Record, cause error) {
	b.metrics.refused(tier, inject.Code(r.Code))
	fold := b.refusals
	if tier == inject.TierSNP {
		fold = b.strangers
	}
	written, err := fold.Refuse(peer, r)
	if err != nil {
		b.log.Error("writing the audit", "err", err)
	}
	if written { // the journal is no more of a peer's to fill than the audit is
		b.log.Warn("refused", refusedAttrs(tier, r, cause)...)
	}
}

// refusedAttrs are what the journal says of a refusal, without what there is nothing to say of.
func refusedAttrs(tier string, r audit.Record, cause error) []any {
	attrs := []any{"tier", tier, "code", r.Code}
	for _, a := range [][2]string{{"subject", r.Subject}, {"reason", r.Reason}, {"rule", r.Rule}} {
		if a[1] != "" {
			attrs = append(attrs, a[0], a[1])
		}
	}
	if cause != nil {
		attrs = append(attrs, "cause", cause)
	}
	return attrs
}

// hookRecord is the record of a start that is refused.
func (b *Broker) hookRecord(e hypervisor.HookEvent, r inject.Refusal) audit.Record {
	return audit.Record{
		Event: audit.EventRefusal, Decision: audit.Refused, Code: string(r.Code), Reason: r.Reason, Rule: r.Rule,
		Tier: inject.TierVM, Subject: e.UUID, Names: e.Offered, Policy: b.policy().Digest(),
	}
}

func evidenceDigest(evidence []byte) string {
	if len(evidence) == 0 {
		return ""
	}
	d := sha256.Sum256(evidence)
	return hex.EncodeToString(d[:])
}

// wakeOnSpace lets guests ask again that were refused while the audit log had no room: they do not look by themselves for a minute.
// A start for which there was none is recorded then.
func (b *Broker) wakeOnSpace(ctx context.Context, unrecorded bool) {
	for {
		select {
		case <-b.space:
			if unrecorded {
				unrecorded = b.recordEvent(audit.EventStart, b.version+"; the disk was full then") != nil
			}
			b.wakeGuests()
		case <-ctx.Done():
			return
		}
	}
}

// checkpoint signs the log so far: what was written while the realm was locked, and what came before it is.
func (b *Broker) checkpoint() {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	if err := b.audit.Checkpoint(ctx); err != nil {
		b.log.Warn("the audit log has no checkpoint here", "err", err)
	}
}

func (b *Broker) auditStatus() AuditStatus {
	s := b.audit.Stats()
	a := AuditStatus{Seq: s.Head.Seq, Hash: s.Head.Hash.String(), Dropped: s.Dropped}
	switch {
	case s.Err != nil:
		a.Trouble = s.Err.Error()
	case s.Low:
		a.Trouble = "the disk is full: refusals are not recorded, releases use the reserve"
	case s.SaveError != nil:
		a.Trouble = "its head is not kept in the store: " + s.SaveError.Error()
	}
	return a
}
