package daemon

import (
	"errors"
	"io"
	"net/http"

	"github.com/go-json-experiment/json"

	"keybroker/hypervisor"
	"keybroker/inject"
	"keybroker/internal/policy"
)

// hookRoutes serve libvirt's hook. Only root reaches hook.sock: whoever may announce a VM can get its keys.
func (b *Broker) hookRoutes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/hook", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, hypervisor.MaxHookEvent))
		if err != nil {
			http.Error(w, "reading the event", http.StatusBadRequest)
			return
		}
		e, err := hypervisor.ParseHookEvent(body)
		if err != nil {
			b.log.Warn("a hook event that cannot be read", "err", err)
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if refusal := b.hookEvent(e); refusal != nil {
			answerJSON(w, http.StatusForbidden, hypervisor.HookRefusal{Code: string(refusal.Code), Reason: refusal.Reason})
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}

// hookEvent takes libvirt's word about one domain. It never waits for libvirt, which waits for it. Only a start that
// contradicts the policy is refused.
func (b *Broker) hookEvent(e hypervisor.HookEvent) *inject.Refusal {
	b.log.Debug("hook", "operation", e.Operation, "vm", e.Name, "cid", e.CID, "pid", e.PID)
	if len(b.cfg.Libvirt) == 0 {
		b.log.Warn("a hook event on a host that has no VMs, by libvirt = [] in broker.toml", "vm", e.Name)
		return nil
	}
	if e.Late(hypervisor.BootTime()) {
		b.log.Warn("a hook event came too late; libvirt's own events tell the rest", "operation", e.Operation, "vm", e.Name)
		return nil
	}
	switch e.Operation {
	case hypervisor.OpPrepare:
		if r := b.contradiction(e); r != nil {
			return r
		}
		b.ticket(e.UUID, "prepare", (*hypervisor.Ticket).Prepare)
	case hypervisor.OpRestore:
		b.ticket(e.UUID, "restore", (*hypervisor.Ticket).RestoreBegin)
	case hypervisor.OpMigrate:
		b.ticket(e.UUID, "migration", (*hypervisor.Ticket).MigrateBegin)
	case hypervisor.OpStarted:
		b.started(e)
	case hypervisor.OpStopped, hypervisor.OpRelease:
		b.ticket(e.UUID, e.Operation, (*hypervisor.Ticket).Stopped)
		b.guests.end(e.UUID, nil)
	case hypervisor.OpReconnect, hypervisor.OpAttach:
		// libvirt's own list, which the watcher reads as soon as it is connected again, says the same and more
	}
	return nil
}

// contradiction is the refusal of a start whose definition is at odds with its policy entry. A domain without an entry may
// start: it gets no key, and its console says why.
func (b *Broker) contradiction(e hypervisor.HookEvent) *inject.Refusal {
	_, d := b.policy().VM(policy.VMClaims{UUID: e.UUID, Name: e.Name, Tier: inject.TierVM, Host: b.host})
	r := decisionRefusal(d)
	if d.Allow || r.Code == inject.CodeNoPolicy {
		return nil
	}
	b.refused(inject.TierVM, e.UUID, b.hookRecord(e, r), r.Cause)
	return &r
}

// started begins a boot: the process that the hook names runs the guest.
func (b *Broker) started(e hypervisor.HookEvent) {
	d := e.Domain()
	if err := b.begin(d, "start", (*hypervisor.Ticket).Started); err != nil {
		b.log.Error("a VM started that gets no keys", "vm", d.Name, "err", err)
	}
}

// ticketNews is what a ticket is told about a process that runs: Ticket.Started or Ticket.Gap.
type ticketNews = func(*hypervisor.Ticket, hypervisor.Boot, hypervisor.Origin, hypervisor.AfterGap) bool

// begin takes a domain's process in: it holds a pidfd, settles the ticket by news, and starts pushing.
func (b *Broker) begin(d hypervisor.Domain, cause string, news ticketNews) error {
	p, err := b.process(d)
	if err != nil {
		return err
	}
	boot, origin, gap := p.Boot(d.UUID), p.Origin(), b.afterGap(d)
	b.ticket(d.UUID, cause, func(t *hypervisor.Ticket) bool { return news(t, boot, origin, gap) })
	if x := b.guests.get(d.UUID); x != nil && x.boot() == boot && x.domain.CID == d.CID {
		p.Close()
		x.restart(false)
		return nil
	}
	if d.CID == 0 {
		p.Close()
		return errNoVsock
	}
	b.guests.begin(b.running, d, p)
	return nil
}

// process opens the process that runs a domain and checks that it does.
func (b *Broker) process(d hypervisor.Domain) (*hypervisor.Process, error) {
	pid := d.PID
	if pid == 0 {
		var err error
		if pid, err = hypervisor.ReadPIDFile(b.libvirt.PIDFile(d.Name)); err != nil {
			return nil, err
		}
	}
	p, err := hypervisor.OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	// Where /proc hides the arguments, the pid file that root wrote is all there is to go by.
	if err := p.Runs(d.UUID, d.Name); errors.Is(err, hypervisor.ErrOtherProcess) {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (b *Broker) afterGap(d hypervisor.Domain) hypervisor.AfterGap {
	entry, decision := b.policy().VM(policy.VMClaims{UUID: d.UUID, Name: d.Name, Tier: inject.TierVM, Host: b.host})
	if !decision.Allow {
		return hypervisor.GapAllow // it gets nothing anyway, and the guest learns why
	}
	return hypervisor.AfterGap(entry.AfterGap)
}

func answerJSON(w http.ResponseWriter, status int, v any) {
	octets, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "encoding the answer", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(octets) // the client may be gone
}
