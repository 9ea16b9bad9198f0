package daemon

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"keybroker/hypervisor"
	"keybroker/inject"
	"keybroker/internal/store"
)

const (
	soon     = 20 * time.Millisecond  // to the next attempt when the guest is up and its agent is not
	slowest  = 250 * time.Millisecond // most between attempts while the guest has something to ask for
	askEvery = time.Second            // a guest may ask for keys this often,
	askBurst = 20                     // after so many at once
	patience = 30 * time.Second       // most between attempts when it has all, and may want a further key one day
)

// guest is one running domain that has our metadata: its process, and the goroutine that pushes to it.
type guest struct {
	b       *Broker
	domain  hypervisor.Domain
	process *hypervisor.Process

	ctx    context.Context // ends with the domain, or the broker
	cancel context.CancelFunc
	asks   *rate.Limiter // releases: each costs an fsync and two looks at libvirt
	wake   chan struct{} // something changed: begin a boot window anew
	hint   chan struct{} // tells a connected receiver to ask again
	done   chan struct{}

	mu      sync.Mutex
	conn    context.CancelFunc // ends the connection that is open
	state   string
	changed time.Time
	refused *inject.Refusal
	keys    []string
	handed  handedOut // the last release
}

// guests are the running domains that have our metadata, and those of which nobody can tell.
type guests struct {
	b          *Broker
	mu         sync.Mutex
	by         map[string]*guest
	unreadable map[string]VMStatus // running domains whose definition cannot be read: they get no key, and status says why
}

func newGuests(b *Broker) *guests {
	return &guests{b: b, by: map[string]*guest{}, unreadable: map[string]VMStatus{}}
}

func (g *guests) get(uuid string) *guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.by[uuid]
}

func (g *guests) list() []*guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make([]*guest, 0, len(g.by))
	for _, x := range g.by {
		all = append(all, x)
	}
	return all
}

// begin starts pushing to a domain's process, in place of an earlier process of the same domain.
func (g *guests) begin(ctx context.Context, d hypervisor.Domain, p *hypervisor.Process) *guest {
	ctx, cancel := context.WithCancel(ctx)
	x := &guest{
		b: g.b, domain: d, process: p, ctx: ctx, cancel: cancel, state: VMWaiting, changed: time.Now(), keys: d.Offered,
		asks: rate.NewLimiter(rate.Every(askEvery), askBurst),
		wake: make(chan struct{}, 1), hint: make(chan struct{}, 1), done: make(chan struct{}),
	}
	g.mu.Lock()
	before := g.by[d.UUID]
	g.by[d.UUID] = x
	delete(g.unreadable, d.UUID)
	g.mu.Unlock()
	if before != nil {
		before.end()
	}
	go x.run()
	go x.watchProcess()
	return x
}

// addUnreadable shows a domain whose definition cannot be read, unless it is known from when it could.
func (g *guests) addUnreadable(d hypervisor.Domain) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.by[d.UUID] != nil || g.unreadable[d.UUID].Why == d.Problem {
		return
	}
	g.unreadable[d.UUID] = VMStatus{
		UUID: d.UUID, Name: d.Name, Tier: inject.TierVM, PID: d.PID, State: VMRefused, Keys: []string{}, Sinks: []string{},
		Code: string(inject.CodeBadMetadata), Why: d.Problem, Ticket: hypervisor.Ticket{}.String(), Changed: time.Now(),
	}
}

// keepUnreadable drops the domains whose definition could not be read, but for those that are still there.
func (g *guests) keepUnreadable(still func(uuid string) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	maps.DeleteFunc(g.unreadable, func(uuid string, _ VMStatus) bool { return !still(uuid) })
}

// listUnreadable lists the domains whose definition cannot be read.
func (g *guests) listUnreadable() []VMStatus {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Values(g.unreadable))
}

// end stops pushing to a domain. Only the process that the caller means is ended.
func (g *guests) end(uuid string, only *guest) {
	g.mu.Lock()
	x := g.by[uuid]
	if x == nil || (only != nil && x != only) {
		g.mu.Unlock()
		return
	}
	delete(g.by, uuid)
	g.mu.Unlock()
	x.end()
}

// endAll ends every connection, letting what is in flight be answered.
func (g *guests) endAll() {
	all := g.list()
	for _, x := range all {
		x.cancel() // all at once, and then wait
	}
	for _, x := range all {
		g.end(x.domain.UUID, x)
	}
}

func (x *guest) end() {
	x.cancel()
	<-x.done
	x.process.Close()
}

// watchProcess ends everything about a boot when its process does, whoever else forgets to say so.
func (x *guest) watchProcess() {
	select {
	case <-x.process.Done():
	case <-x.ctx.Done():
		return
	}
	x.cancel() // before anything that takes time: its CID may be anybody's now
	boot := x.boot()
	x.b.ticket(x.domain.UUID, "process ended", func(t *hypervisor.Ticket) bool { return t.Gone(boot) })
	x.b.guests.end(x.domain.UUID, x)
}

// boot is this process as tickets name it; resets are counted in the ticket.
func (x *guest) boot() hypervisor.Boot {
	return x.process.Boot(x.domain.UUID)
}

// restart begins a new boot window: the guest reset, or something that refused it has changed.
func (x *guest) restart(dropConnection bool) {
	if dropConnection {
		x.drop()
	}
	signal(x.wake)
	if x.wanted() { // who has all is not told to fetch it again
		signal(x.hint)
	}
}

// revoked ends the connection of a guest that has no right to keys any more, and shows why.
func (x *guest) revoked(why inject.Refusal) {
	x.set(VMQuiet, &why)
	x.drop()
}

// drop ends the connection that is open, if there is one.
func (x *guest) drop() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.conn != nil {
		x.conn()
	}
}

// signal leaves one note in c, which holds one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (x *guest) set(state string, r *inject.Refusal) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.state != state || (r != nil && (x.refused == nil || x.refused.Code != r.Code)) {
		x.changed = time.Now()
	}
	x.state, x.refused = state, r
}

// run dials the guest's agent and serves it until the domain or the broker ends: quickly while the guest may have something to
// ask for and its boot window is open, and patiently once it has its keys.
func (x *guest) run() {
	defer close(x.done)
	until, pause := time.Now().Add(x.b.cfg.VM.BootWindow), soon
	for {
		wanted := x.wanted()
		var retry <-chan time.Time // never, after a window in which nobody answered
		if wanted && time.Now().After(until) {
			x.set(VMGaveUp, nil)
		} else {
			served, answered := x.attempt(x.ctx)
			pause = next(pause, x.wanted(), served, answered)
			retry = time.After(pause)
		}
		select {
		case <-retry:
		case <-x.wake:
			until, pause = time.Now().Add(x.b.cfg.VM.BootWindow), soon
			x.set(VMWaiting, nil)
		case <-x.ctx.Done():
			return
		}
	}
}

// next is the pause before the next attempt.
func next(pause time.Duration, wanted, served, answered bool) time.Duration {
	switch {
	case wanted && answered && !served:
		return soon
	case wanted:
		return min(2*pause, slowest)
	}
	return min(max(2*pause, time.Second), patience)
}

// wanted says whether the guest may have something to ask for, and otherwise shows why not.
func (x *guest) wanted() bool {
	r, err := x.b.vm(x.domain.UUID)
	if err != nil {
		x.b.log.Error("reading the store", "err", err)
		return true
	}
	t := r.Ticket
	switch {
	case t.State == hypervisor.StateUnused, t.State == hypervisor.StateUsed && !t.Acked, t.FormerMay && !t.FormerAcked:
		return true
	case t.State == hypervisor.StateUsed:
		x.settle(VMReleased)
	default:
		x.settle(VMQuiet)
	}
	return false
}

// settle shows a state that stands whatever a later receiver was refused.
func (x *guest) settle(state string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.state != state {
		x.state, x.changed = state, time.Now()
	}
}

// attempt dials once and serves the connection. answered says that the guest's kernel is up.
func (x *guest) attempt(ctx context.Context) (served, answered bool) {
	issuer, err := x.b.issuer()
	if err != nil {
		r := inject.AsRefusal(err)
		x.set(VMRefused, &r)
		return false, false
	}
	conn, err := x.b.dial(ctx, x.domain.CID, inject.Port)
	if err != nil {
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EAFNOSUPPORT) {
			x.b.log.Error("the broker cannot dial guests", "vm", x.domain.Name, "err", err)
		}
		return false, errors.Is(err, unix.ECONNRESET)
	}
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	x.mu.Lock()
	x.conn = cancel
	x.mu.Unlock()
	if x.shown() == VMWaiting {
		x.set(VMAsking, nil)
	}
	x.b.metrics.sessions.Inc()
	defer x.b.metrics.sessions.Dec()
	if err := issuer.Serve(inner, conn, x.door()); err != nil {
		x.b.log.Warn("serving a guest", "vm", x.domain.Name, "err", err)
	}
	return true, true
}

func (x *guest) shown() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.state
}

// ticket lets f change a domain's ticket and records the change. It reports whether there was one.
func (b *Broker) ticket(uuid, cause string, f func(t *hypervisor.Ticket) bool) (changed bool) {
	var before hypervisor.Ticket
	r, err := b.changeVM(uuid, func(_ store.Tx, r *vmRecord) (bool, error) {
		before = r.Ticket
		changed = f(&r.Ticket)
		if r.Ticket.State == hypervisor.StateUnused && before.State != hypervisor.StateUnused {
			r.Releases = 0
		}
		return changed, nil
	})
	if err != nil {
		b.log.Error("writing the store", "err", err)
		return false
	}
	if changed && before.String() != r.Ticket.String() {
		b.recordTicket(uuid, cause, r.Ticket)
	}
	return changed
}

// ticketed lists the domains that hold or await a ticket, as the store has it.
func (b *Broker) ticketed() (uuids []string) {
	err := b.store.View(func(tx store.Tx) error {
		return tx.ForEach(bucketVMs, func(uuid string, _ []byte) error {
			var r vmRecord
			if _, err := get(tx, bucketVMs, uuid, &r); err != nil {
				return err
			}
			if r.Ticket.Boot != (hypervisor.Boot{}) {
				uuids = append(uuids, uuid)
			}
			return nil
		})
	})
	if err != nil {
		b.log.Error("reading the store", "err", err)
	}
	return uuids
}
