package daemon

import (
	"context"
	"fmt"
	"os"
	"time"

	"keybroker/derive"
	"keybroker/internal/audit"
	"keybroker/internal/policy"
)

// loadedPolicy is the policy in force, and what became of the last attempt to read a newer one.
type loadedPolicy struct {
	*policy.Policy
	at       time.Time
	rejected string
}

func (b *Broker) policy() *policy.Policy { return b.rules.Load().Policy }

// loadPolicy reads the policy for the first time; a wrong one keeps the broker from starting.
func (b *Broker) loadPolicy() error {
	p, err := b.readPolicy()
	if err != nil {
		return err
	}
	b.rules.Store(&loadedPolicy{Policy: p, at: time.Now()})
	return nil
}

// readPolicy reads the policy, and refuses one whose promise this host would break: tier snp is to protect VMs from the host that
// runs them, and on a broker's own host the host has their keys.
func (b *Broker) readPolicy() (*policy.Policy, error) {
	p, err := policy.Load(b.source)
	if err != nil || len(b.cfg.Libvirt) == 0 || b.cfg.AllowLocalSNP {
		return p, err
	}
	for _, v := range p.VMs() {
		if v.Tier == derive.TierSNP {
			return nil, fmt.Errorf("%s: a VM of tier %s, on a broker whose host runs VMs: its keys would be on the host that it is to be protected from. "+
				"Run the broker elsewhere and `keybroker relay` here; or set libvirt = [] in broker.toml if this host runs no VMs; allow_local_snp = true accepts it", v.Rule, derive.TierSNP)
		}
	}
	return p, nil
}

func (b *Broker) reloadOn(ctx context.Context, signals <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
			b.reload()
		}
	}
}

// reload reads the policy anew, says what changed, and wakes the guests that may now have something to ask for. A policy that
// is wrong, or whose coming into force cannot be recorded, changes nothing.
func (b *Broker) reload() {
	old := b.rules.Load()
	p, err := b.readPolicy()
	if err == nil {
		_, err = b.audit.Append(audit.Record{Event: audit.EventPolicy, Reason: p.Digest(), Policy: p.Digest()}, audit.Durable)
	}
	if err != nil {
		b.log.Error("the new policy is not taken; the old one stays in force", "err", err)
		b.rules.Store(&loadedPolicy{Policy: old.Policy, at: old.at, rejected: err.Error()})
		return
	}
	changes := policy.Diff(old.Policy, p)
	b.rules.Store(&loadedPolicy{Policy: p, at: time.Now()})
	for _, line := range changes {
		b.log.Info("policy", "change", line)
	}
	b.log.Info("policy read", "digest", p.Digest(), "changes", len(changes))
	b.wakeGuests()
}

// wakeGuests lets every guest ask again: what refused it may have changed.
func (b *Broker) wakeGuests() {
	for _, x := range b.guests.list() {
		x.restart(false)
	}
}
