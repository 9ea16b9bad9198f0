package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/hypervisor"
	"keybroker/hypervisor/libvirt"
	"keybroker/inject"
	"keybroker/internal/policy"
)

// askLibvirt is how long libvirt may take to say how a VM is defined: while a hook runs it answers nobody.
const askLibvirt = 3 * time.Second

// Explanation is what `keybroker explain` shows: which rule would decide, and why. Nothing is released. The first line is the whole
// decision.
type Explanation struct {
	Allow bool     `json:"allow"`
	Lines []string `json:"lines"`
}

func (e *Explanation) add(format string, args ...any) {
	e.Lines = append(e.Lines, "  "+fmt.Sprintf(format, args...))
}

// explain says what would be decided, without deciding it. A name is a VM's before it is a service's, unless the query says who of
// the host would ask.
func (b *Broker) explain(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	of := q.Get("of")
	service := q.Has("uid") || q.Has("unit") || q.Has("via")
	if !service {
		uuids, err := b.lookUpVM(of)
		switch {
		case err != nil || len(uuids) > 1:
			if err == nil {
				_, err = b.findVM(of)
			}
			answerRefusal(w, adminRefusal(err))
			return
		case len(uuids) == 1:
			answerJSON(w, http.StatusOK, b.explainVM(r.Context(), uuids[0]))
			return
		}
	}
	if !service && len(b.policy().ExplainService(of, policy.Claims{})) == 0 {
		answerJSON(w, http.StatusOK, b.explainUnknown(r.Context(), of))
		return
	}
	answerJSON(w, http.StatusOK, b.explainService(r, of))
}

// explainUnknown is about what is neither running nor seen nor in the policy: only libvirt may know it.
func (b *Broker) explainUnknown(ctx context.Context, of string) Explanation {
	d, err := b.ask(ctx, of)
	if err == nil {
		return b.explainVM(ctx, d.UUID)
	}
	e := Explanation{Lines: []string{fmt.Sprintf("%.64q is neither a VM nor a service in the policy", of)}}
	if !errors.Is(err, libvirt.ErrNotFound) && len(b.cfg.Libvirt) > 0 {
		e.add("libvirt cannot be asked whether it is a VM's name: %v", err)
	}
	return e
}

// ask asks libvirt how a domain is defined, whether it runs or not.
func (b *Broker) ask(ctx context.Context, nameOrUUID string) (hypervisor.Domain, error) {
	ctx, cancel := context.WithTimeout(ctx, askLibvirt)
	defer cancel()
	return b.defined(ctx, nameOrUUID)
}

func (b *Broker) explainService(r *http.Request, name string) Explanation {
	q := r.URL.Query()
	unit := q.Get("unit")
	claims := policy.Claims{Via: policy.ViaUnix, Unit: unit, MatchUnit: func(path string) bool { return path == unit }}
	if unit == "" {
		claims.MatchUnit, claims.NoUnit = nil, "none was given"
	}
	if q.Get("via") == policy.ViaTCP {
		claims.Via = policy.ViaTCP
	}
	n, err := strconv.ParseUint(q.Get("uid"), 10, 32)
	own := err != nil
	if own {
		cred, _ := r.Context().Value(peerKey{}).(unix.Ucred)
		n = uint64(cred.Uid)
	}
	claims.UID = uint32(n)
	d := b.policy().Service(name, claims)
	if d.Allow && claims.UID == 0 && claims.Via == policy.ViaTCP {
		d = policy.Decision{Code: string(inject.CodeUnknownPeer), Reason: "root is served on the Unix socket alone"}
	}
	e := Explanation{Allow: d.Allow, Lines: []string{decisionLine("service "+name, d)}}
	if own {
		e.add("uid %d would ask, who runs this command; --uid names another", claims.UID)
	}
	for _, t := range b.policy().ExplainService(name, claims) {
		e.add("%s", t)
	}
	return e
}

func decisionLine(what string, d policy.Decision) string {
	if d.Allow {
		return what + ": allowed by " + d.Rule
	}
	return fmt.Sprintf("%s: refused, %s: %s", what, d.Code, d.WithoutAdvice())
}

// explainAttested says what a release in tier snp would end with, for evidence that passes.
func (b *Broker) explainAttested(uuid string) Explanation {
	claims := policy.VMClaims{UUID: uuid, Tier: inject.TierSNP, Host: b.host}
	entry, decision := b.policy().VM(claims)
	headline := decisionLine("VM "+uuid, decision)
	allow := decision.Allow
	if allow {
		headline += fmt.Sprintf(", for a report that passes under [[snp]] %s", entry.SNPName)
		err := b.notDenied(uuid, uuid)
		if err == nil {
			_, err = b.realm.current()
		}
		if err != nil {
			r := inject.AsRefusal(err)
			allow, headline = false, fmt.Sprintf("VM %s: refused, %s: %s", uuid, r.Code, r.Reason)
		}
	}
	e := Explanation{Allow: allow, Lines: []string{headline}}
	for _, t := range b.policy().ExplainVM(claims) {
		e.add("%s", t)
	}
	if entry != nil {
		e.add("keys %v of subject %s", entry.KeyNames(), entry.Subject)
	}
	if v, ok := b.attesting.get(uuid); ok && v.Code != "" {
		e.add("it was last refused with %s: %s; `keybroker audit query --subject %s` has what was expected and what came", v.Code, v.Why, uuid)
	}
	return e
}

// explainVM goes by the running domain, or else by libvirt's definition, as a start would.
func (b *Broker) explainVM(ctx context.Context, uuid string) Explanation {
	if b.tierOf(uuid) == inject.TierSNP {
		return b.explainAttested(uuid)
	}
	x := b.guests.get(uuid)
	var d hypervisor.Domain
	var err error
	if x != nil {
		d = x.domain
	} else {
		d, err = b.ask(ctx, uuid)
	}
	if err != nil {
		d = hypervisor.Domain{UUID: uuid}
		if entries := b.policy().Find(uuid); len(entries) == 1 {
			d.Name = entries[0].Name
		}
	}
	claims := policy.VMClaims{UUID: uuid, Name: d.Name, Tier: inject.TierVM, Host: b.host}
	entry, decision := b.policy().VM(claims)
	r, stored := b.vm(uuid)
	headline, allow := b.vmVerdict(d, err == nil, x, decision, r, stored)
	e := Explanation{Allow: allow, Lines: []string{headline}}
	for _, t := range b.policy().ExplainVM(claims) {
		e.add("%s", t)
	}
	if entry != nil {
		e.add("keys %v of subject %s", entry.KeyNames(), entry.Subject)
	}
	switch {
	case stored != nil:
	case r.Ticket.Boot != hypervisor.Boot{}:
		e.add("ticket of boot %v: %v", r.Ticket.Boot, r.Ticket)
	case x != nil:
		e.add("no boot of it was seen")
	}
	switch {
	case errors.Is(err, libvirt.ErrNotFound):
		e.add("libvirt has no domain with this UUID")
	case err != nil && len(b.cfg.Libvirt) > 0:
		e.add("libvirt cannot be asked how it is defined: %v", err)
	case x == nil && d.Running:
		e.add("it runs, and this broker knows nothing of its process; a VM that lost its metadata or vsock device has to be started anew")
	case x == nil:
		e.add("it does not run")
	}
	return e
}

// vmVerdict is the headline: what a release to this VM would end with now, or at its next start.
func (b *Broker) vmVerdict(d hypervisor.Domain, defined bool, x *guest, decision policy.Decision, r vmRecord, stored error) (line string, allow bool) {
	what := "VM " + d.UUID
	if d.Name != "" {
		what = fmt.Sprintf("VM %s (%s)", d.Name, d.UUID)
	}
	refused := func(code inject.Code, reason string) (string, bool) {
		return fmt.Sprintf("%s: refused, %s: %s", what, code, reason), false
	}
	switch {
	case d.Problem != "":
		return refused(inject.CodeBadMetadata, d.Problem)
	case defined && !d.Metadata:
		return refused(inject.CodeBadMetadata, "its definition has no metadata element of keybroker's, so the broker never asks about it")
	case !decision.Allow:
		return decisionLine(what, decision), false
	case stored != nil:
		return refused(inject.CodeInternal, "its state cannot be read: "+stored.Error())
	case r.Denied:
		return refused(inject.CodeDenied, "an administrator denied this VM; `keybroker vm allow "+cmp.Or(d.Name, d.UUID)+"` ends that")
	}
	if _, err := b.realm.current(); err != nil {
		return refused(inject.CodeLocked, inject.AsRefusal(err).Reason)
	}
	allowed := decisionLine(what, decision)
	switch t := r.Ticket; {
	case x == nil && d.Running:
		return refused(inject.CodePeerMismatch, "it runs, and this broker does not know its process")
	case x == nil:
		return allowed + ", when it starts", true
	case !x.boot().SameProcess(t.Boot), t.State == hypervisor.StateNone && !t.FormerMay:
		return refused(inject.CodeNoTicket, "this boot has no right to keys (restored, after a gap, or revoked): reboot the VM, or `keybroker vm allow "+d.Name+"`")
	case t.State == hypervisor.StateNone:
		return allowed + ", to the receiver alone that had its keys before", true
	case t.State == hypervisor.StateUsed && t.Acked:
		return allowed + ", to the receiver alone that has its keys in this boot", true
	}
	return allowed, true
}
