package hypervisor

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"
)

const testUUID = "11111111-2222-3333-4444-555555555555"

var (
	boot1 = Boot{UUID: testUUID, PID: 100, StartTime: 5000}
	boot2 = Boot{UUID: testUUID, PID: 200, StartTime: 9000}
	recvA = Receiver{1}
	recvB = Receiver{2}
	recvC = Receiver{3}
	recvD = Receiver{4}
	recvE = Receiver{5}
)

// step is one call on a ticket and what a user of it relies on afterwards.
type step struct {
	what    string
	do      func(*Ticket) (bool, error)
	changed bool
	err     error
	state   string
}

func quietly(f func(*Ticket) bool) func(*Ticket) (bool, error) {
	return func(t *Ticket) (bool, error) { return f(t), nil }
}

func prepare(state string, changed bool) step {
	return step{"prepare", quietly((*Ticket).Prepare), changed, nil, state}
}

func restore(state string) step {
	return step{"restore", quietly((*Ticket).RestoreBegin), true, nil, state}
}

func migrate(state string) step {
	return step{"migrate", quietly((*Ticket).MigrateBegin), true, nil, state}
}

func started(b Boot, state string, changed bool) step {
	return startedAs(b, OriginUnknown, state, changed)
}

func startedAs(b Boot, seen Origin, state string, changed bool) step {
	return step{"started " + string(seen), func(t *Ticket) (bool, error) { return t.Started(b, seen, GapAllow), nil }, changed, nil, state}
}

func observed(o Origin, state string, changed bool) step {
	return step{"observed " + string(o), func(t *Ticket) (bool, error) { return t.Observed(o), nil }, changed, nil, state}
}

func reset(state string, changed bool) step {
	return step{"reset", quietly((*Ticket).Reset), changed, nil, state}
}

func gap(b Boot, p AfterGap, state string, changed bool) step {
	return step{"gap " + string(p), func(t *Ticket) (bool, error) { return t.Gap(b, OriginUnknown, p), nil }, changed, nil, state}
}

func stopped(state string, changed bool) step {
	return step{"stopped", quietly((*Ticket).Stopped), changed, nil, state}
}

func gone(b Boot, state string, changed bool) step {
	return step{"gone", func(t *Ticket) (bool, error) { return t.Gone(b), nil }, changed, nil, state}
}

func revoke(state string) step {
	return step{"revoke", quietly((*Ticket).Revoke), true, nil, state}
}

func allow(state string, changed bool, err error) step {
	return step{"allow", (*Ticket).Allow, changed, err, state}
}

func take(r Receiver, state string, changed bool, err error) step {
	return step{fmt.Sprint("take by ", r[0]), func(t *Ticket) (bool, error) { return t.Take(r) }, changed, err, state}
}

func ack(r Receiver, state string, changed bool, err error) step {
	return step{fmt.Sprint("ack by ", r[0]), func(t *Ticket) (bool, error) { return t.Ack(r) }, changed, err, state}
}

const (
	none, former, unused, presumed, used, acked = "none", "none, earlier receiver only", "unused", "presumed", "used", "used, acknowledged"
)

// coldAcked is a boot whose receiver A has its keys and has said so.
var coldAcked = []step{prepare(none, true), started(boot1, unused, true), take(recvA, used, true, nil), ack(recvA, acked, true, nil)}

func after(before []step, then ...step) []step { return append(append([]step{}, before...), then...) }

var ticketCases = map[string][]step{
	"a cold start gives a ticket to its first receiver, which may ask again": after(coldAcked,
		take(recvA, acked, false, nil), ack(recvA, acked, false, nil), take(recvB, acked, false, ErrReceiverTaken), ack(recvB, acked, false, ErrReceiverTaken)),
	"nothing before a start":              {take(recvA, none, false, ErrNoTicket), ack(recvA, none, false, ErrNoTicket), allow(none, false, ErrNotRunning), reset(none, false)},
	"the zero receiver gets nothing":      {prepare(none, true), started(boot1, unused, true), take(Receiver{}, unused, false, ErrNoTicket)},
	"acknowledging what nobody has taken": {prepare(none, true), started(boot1, unused, true), ack(recvA, unused, false, ErrNoTicket)},
	"three replacements before the first acknowledgement": {
		prepare(none, true), started(boot1, unused, true), take(recvA, used, true, nil), take(recvB, used, true, nil), take(recvC, used, true, nil),
		take(recvD, used, true, nil), take(recvE, used, false, ErrReceiverTaken), take(recvA, used, false, ErrReceiverTaken),
		ack(recvC, used, false, ErrReceiverTaken), take(recvD, used, false, nil), ack(recvD, acked, true, nil)},
	"hooks called twice": {
		prepare(none, true), prepare(none, false), started(boot1, unused, true), started(boot1, unused, false), take(recvA, used, true, nil),
		started(boot1, used, false), stopped(none, true), stopped(none, false), gone(boot1, none, false)},
	"a start that failed":                      {prepare(none, true), stopped(none, true), stopped(none, false), started(boot1, presumed, true)},
	"started without prepare is a gap":         {started(boot1, presumed, true), take(recvA, used, true, nil)},
	"the next cold start has a ticket":         after(coldAcked, stopped(none, true), take(recvA, none, false, ErrNoTicket), prepare(none, true), started(boot2, unused, true), take(recvB, used, true, nil)),
	"the next cold start, its end unseen":      after(coldAcked, prepare(acked, true), started(boot2, unused, true), take(recvB, used, true, nil)),
	"the kernel's word of the end comes late":  after(coldAcked, prepare(acked, true), gone(boot1, none, true), started(boot2, unused, true), gone(boot1, unused, false)),
	"a process that cannot be named is none":   {prepare(none, true), started(Boot{UUID: testUUID, PID: 7}, none, true)},
	"a reset gives one ticket, told twice":     after(coldAcked, reset(unused, true), reset(unused, false), take(recvB, used, true, nil), ack(recvB, acked, true, nil), take(recvA, acked, false, ErrReceiverTaken)),
	"a reset before anybody asked":             {prepare(none, true), started(boot1, unused, true), reset(unused, false)},
	"replacements begin anew after a reset":    {prepare(none, true), started(boot1, unused, true), take(recvA, used, true, nil), take(recvB, used, true, nil), reset(unused, true), take(recvA, used, true, nil), take(recvB, used, true, nil), take(recvC, used, true, nil), take(recvD, used, true, nil), take(recvE, used, false, ErrReceiverTaken)},
	"restore: only the old receiver":           after(coldAcked, stopped(none, true), restore(none), prepare(none, false), started(boot2, former, true), take(recvB, former, false, ErrNoTicket), take(recvA, former, false, nil), ack(recvA, former, false, nil)),
	"restore of a boot that had not said it":   {prepare(none, true), started(boot1, unused, true), take(recvA, used, true, nil), stopped(none, true), restore(none), started(boot2, former, true), take(recvB, former, false, ErrNoTicket), ack(recvA, former, true, nil)},
	"restore of what never asked":              {restore(none), prepare(none, false), started(boot1, none, true), take(recvA, none, false, ErrNoTicket), reset(unused, true), take(recvA, used, true, nil)},
	"a restored guest that resets":             after(coldAcked, stopped(none, true), restore(none), started(boot2, former, true), reset(unused, true), take(recvA, used, true, nil)),
	"migration in":                             {migrate(none), prepare(none, false), started(boot1, none, true), take(recvA, none, false, ErrNoTicket)},
	"migration away and back":                  after(coldAcked, stopped(none, true), migrate(none), prepare(none, false), started(boot2, former, true), take(recvA, former, false, nil)),
	"a saved receiver has no right after boot": after(coldAcked, stopped(none, true), prepare(none, true), started(boot2, unused, true), take(recvB, used, true, nil), ack(recvB, acked, true, nil), take(recvA, acked, false, ErrReceiverTaken)),
	"a restore that failed, then a cold start": {restore(none), prepare(none, false), startedAs(boot1, OriginCold, unused, true)},
	"a restore that no hook announced":         after(coldAcked, stopped(none, true), prepare(none, true), startedAs(boot2, OriginIncoming, former, true), take(recvB, former, false, ErrNoTicket)),
	"revert to a snapshot with memory":         after(coldAcked, stopped(none, true), prepare(none, true), startedAs(boot2, OriginCold, unused, true), observed(OriginSnapshot, former, true), observed(OriginSnapshot, former, false), take(recvB, former, false, ErrNoTicket), take(recvA, former, false, nil)),
	"libvirt confirms a boot":                  {prepare(none, true), started(boot1, unused, true), observed(OriginCold, unused, false), observed(OriginUnknown, unused, false)},
	"a revert observed after the reset":        {restore(none), started(boot1, none, true), reset(unused, true), observed(OriginRestore, unused, false)},
	"gap: one presumed ticket for a process":   after(coldAcked, gap(boot1, GapAllow, presumed, true), gap(boot1, GapAllow, presumed, false), take(recvB, used, true, nil), ack(recvB, acked, true, nil), gap(boot1, GapAllow, acked, false), take(recvC, acked, false, ErrReceiverTaken), take(recvA, acked, false, ErrReceiverTaken)),
	"gap: the old receiver disproves it":       after(coldAcked, gap(boot1, GapAllow, presumed, true), take(recvA, acked, true, nil), take(recvB, acked, false, ErrReceiverTaken), gap(boot1, GapAllow, presumed, true)),
	"gap: refused by policy":                   after(coldAcked, gap(boot1, GapRefuse, acked, false), gap(boot1, "", acked, false), take(recvB, acked, false, ErrReceiverTaken), stopped(none, true), gap(boot2, GapRefuse, none, true), gap(boot2, GapRefuse, none, false), take(recvB, none, false, ErrNoTicket)),
	"gap: nothing to presume while unused":     {prepare(none, true), started(boot1, unused, true), gap(boot1, GapAllow, unused, false)},
	"gap: a process never seen":                {gap(boot1, GapAllow, presumed, true), take(recvA, used, true, nil), ack(recvA, acked, true, nil), take(recvB, acked, false, ErrReceiverTaken)},
	"gap: another process than before":         after(coldAcked, gap(boot2, GapAllow, presumed, true), take(recvB, used, true, nil), ack(recvB, acked, true, nil), take(recvA, acked, false, ErrReceiverTaken)),
	"gap in the middle of a start":             {prepare(none, true), gap(boot1, GapAllow, presumed, true), started(boot1, unused, true), take(recvA, used, true, nil), ack(recvA, acked, true, nil), gap(boot1, GapAllow, presumed, true)},
	"gap in the middle of a restore":           after(coldAcked, stopped(none, true), restore(none), gap(boot2, GapAllow, presumed, true), started(boot2, former, true), take(recvB, former, false, ErrNoTicket), take(recvA, former, false, nil)),
	"gap in a start, used before it is told":   {prepare(none, true), gap(boot1, GapAllow, presumed, true), take(recvA, used, true, nil), ack(recvA, acked, true, nil), started(boot1, acked, true), take(recvB, acked, false, ErrReceiverTaken)},
	"gap in a restored boot":                   after(coldAcked, stopped(none, true), restore(none), started(boot2, former, true), gap(boot2, GapAllow, presumed, true), take(recvA, former, true, nil), take(recvB, former, false, ErrNoTicket)),
	"a reset after a gap, both seen":           after(coldAcked, gap(boot1, GapAllow, presumed, true), reset(presumed, false), take(recvB, used, true, nil), reset(unused, true), take(recvC, used, true, nil), ack(recvC, acked, true, nil), gap(boot1, GapAllow, acked, false)),
	"allowed by hand":                          after(coldAcked, allow(unused, true, nil), allow(unused, false, nil), take(recvA, unused, false, nil), take(recvB, used, true, nil), ack(recvB, acked, true, nil), take(recvA, acked, false, ErrReceiverTaken)),
	"allowed by hand after a restore":          after(coldAcked, stopped(none, true), restore(none), started(boot2, former, true), allow(unused, true, nil), take(recvA, unused, false, nil), take(recvB, used, true, nil)),
	"unplugged":                                after(coldAcked, revoke(none), take(recvA, none, false, ErrNoTicket), gap(boot1, GapAllow, none, false), reset(unused, true)),
	"migration away":                           after(coldAcked, stopped(none, true), take(recvA, none, false, ErrNoTicket), take(recvB, none, false, ErrNoTicket)),
}

func TestTicket(t *testing.T) {
	for title, steps := range ticketCases {
		t.Run(title, func(t *testing.T) {
			var ticket Ticket
			for i, s := range steps {
				before := ticket
				changed, err := s.do(&ticket)
				if !errors.Is(err, s.err) || (err == nil) != (s.err == nil) {
					t.Fatalf("step %d, %s: error %v, want %v", i, s.what, err, s.err)
				}
				if changed != s.changed || changed != (ticket != before) {
					t.Fatalf("step %d, %s: changed %v, want %v; %#v", i, s.what, changed, s.changed, ticket)
				}
				if got := ticket.String(); got != s.state {
					t.Fatalf("step %d, %s: %q, want %q; %#v", i, s.what, got, s.state, ticket)
				}
			}
		})
	}
}

// A reset is a boot of its own, in the same process, for audit and for whoever compares.
func TestTicketResetIsANewBoot(t *testing.T) {
	var ticket Ticket
	ticket.Prepare()
	ticket.Started(boot1, OriginUnknown, GapAllow)
	first := ticket.Boot
	if _, err := ticket.Take(recvA); err != nil {
		t.Fatal(err)
	}
	ticket.Reset()
	if ticket.Boot == first || !ticket.Boot.SameProcess(first) || ticket.Boot.String() != testUUID+"/100/5000/1" {
		t.Errorf("boot %v after %v", ticket.Boot, first)
	}
}

func TestTicketJSON(t *testing.T) {
	var ticket Ticket
	ticket.RestoreBegin()
	ticket.Started(boot1, OriginUnknown, GapAllow)
	ticket.Reset()
	if _, err := ticket.Take(recvA); err != nil {
		t.Fatal(err)
	}
	ticket.Gap(boot1, OriginUnknown, GapAllow)
	data, err := json.Marshal(ticket)
	if err != nil {
		t.Fatal(err)
	}
	var back Ticket
	if err := json.Unmarshal(data, &back, json.RejectUnknownMembers(true)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(ticket, back); diff != "" {
		t.Error(diff)
	}
	if data, err := json.Marshal(Ticket{}); err != nil || string(data) != "{}" {
		t.Errorf("the zero ticket is %s, %v", data, err)
	}
	for _, bad := range []string{"AA", "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB", "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n", "*"} {
		var r Receiver
		if err := r.UnmarshalText([]byte(bad)); err == nil || r != (Receiver{}) {
			t.Errorf("%q is taken for a receiver", bad)
		}
	}
}

// auditor holds what any sequence of events must leave true, and knows of the ticket only what its callers are told. A true
// boot is a new process, a reset or a ticket by hand; gaps are none.
type auditor struct {
	t      *testing.T
	served map[Receiver]bool // since the last true boot
	acked  Receiver          // who acknowledged since the last true boot, and no gap after it
}

// newBoot forgets, but for the receiver whose memory came back.
func (a *auditor) newBoot(t Ticket) {
	a.served, a.acked = map[Receiver]bool{}, Receiver{}
	if t.FormerMay {
		a.served[t.Former] = true
	}
}

func (a *auditor) took(r Receiver, ticket Ticket) {
	if a.acked != (Receiver{}) && a.acked != r && !a.served[r] {
		a.t.Fatalf("a second receiver after the acknowledgement: %#v", ticket)
	}
	a.served[r] = true
	// The first and its replacements; once more for a gap, with what is left of the replacements; and one from saved memory.
	if most := 1 + MaxReplacements + 1 + 1; len(a.served) > most {
		a.t.Fatalf("keys for %d receivers in one boot: %+v", len(a.served), ticket)
	}
}

// FuzzTicket runs sequences of events in any order and checks what must hold after each.
func FuzzTicket(f *testing.F) {
	f.Add([]byte{0, 3, 16, 32, 17, 18, 19, 20})
	f.Add([]byte{0, 3, 16, 32, 10, 17, 33, 10, 18})
	f.Add([]byte{0, 3, 16, 32, 8, 1, 0, 4, 16, 17, 6, 17})
	f.Add([]byte{0, 10, 3, 16, 32, 12, 17, 14, 17})
	f.Fuzz(func(t *testing.T, events []byte) {
		if len(events) > 400 {
			return
		}
		play(t, events)
	})
}

// The same, over more sequences than the seeds: each of some events of the hypervisor, not all, so that long runs without a
// true boot are among them, and of receivers as they come.
func TestTicketRandomSequences(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 4000 {
		some := make([]byte, 1+random.IntN(6))
		for i := range some {
			some[i] = byte(random.UintN(16))
		}
		events := make([]byte, 80)
		for i := range events {
			events[i] = byte(16 + random.UintN(eventKinds-16))
			if i < 2 || random.IntN(2) == 0 {
				events[i] = some[random.IntN(len(some))]
			}
		}
		play(t, events)
	}
}

const eventKinds = 48

func play(t *testing.T, events []byte) {
	a := &auditor{t: t, served: map[Receiver]bool{}}
	var ticket Ticket
	for _, e := range events {
		before := ticket
		changed := a.apply(&ticket, e%eventKinds)
		if changed != (ticket != before) {
			t.Fatalf("event %d said changed %v: %#v, then %#v", e, changed, before, ticket)
		}
		invariants(t, ticket)
	}
	roundTrip(t, ticket)
}

// apply runs one event: 0 to 15 are the hypervisor's, 16 to 31 a receiver that asks, 32 to 47 one that acknowledges.
func (a *auditor) apply(ticket *Ticket, e byte) bool {
	r := Receiver{e&15 + 1}
	switch {
	case e >= 32:
		changed, err := ticket.Ack(r)
		if err == nil && !a.served[r] {
			a.t.Fatalf("an acknowledgement of keys that were never given: %#v", *ticket)
		}
		if err == nil && ticket.State == StateUsed {
			a.acked = r
		}
		return changed
	case e >= 16:
		changed, err := ticket.Take(r)
		if err == nil {
			a.took(r, *ticket)
		}
		return changed
	}
	return a.event(ticket, e)
}

func (a *auditor) event(ticket *Ticket, e byte) bool {
	boot, before := []Boot{boot1, boot2}[e&1], *ticket
	var changed bool
	switch e {
	case 0:
		changed = ticket.Prepare()
	case 1:
		changed = ticket.RestoreBegin()
	case 2:
		changed = ticket.MigrateBegin()
	case 3, 4:
		changed = ticket.Started(boot, OriginUnknown, GapAllow)
	case 5:
		changed = ticket.Started(boot, OriginIncoming, GapAllow)
	case 6, 7:
		changed = ticket.Reset()
	case 8:
		changed = ticket.Stopped()
	case 9:
		changed = ticket.Gone(boot)
	case 10, 11:
		changed = ticket.Gap(boot, OriginUnknown, GapAllow)
		a.acked = Receiver{}
	case 12:
		changed = ticket.Gap(boot, OriginUnknown, GapRefuse)
	case 13:
		changed = ticket.Observed(OriginSnapshot)
	case 14:
		changed, _ = ticket.Allow()
	case 15:
		changed = ticket.Revoke()
	}
	if ticket.Boot != before.Boot || e == 14 && changed {
		a.newBoot(*ticket)
	}
	if ticket.FormerMay && !before.FormerMay {
		a.served[ticket.Former] = true // memory that came back, as is known now
	}
	return changed
}

func invariants(t *testing.T, ticket Ticket) {
	switch {
	case ticket.State != StateNone && !ticket.Boot.known():
		t.Fatalf("a ticket without a boot: %#v", ticket)
	case (ticket.State == StateUsed) != (ticket.Receiver != Receiver{}):
		t.Fatalf("used without a receiver, or a receiver without use: %#v", ticket)
	case ticket.FormerMay && ticket.Former == Receiver{}:
		t.Fatalf("a right of nobody: %#v", ticket)
	}
}

func roundTrip(t *testing.T, ticket Ticket) {
	data, err := json.Marshal(ticket)
	if err != nil {
		t.Fatal(err)
	}
	var back Ticket
	if err := json.Unmarshal(data, &back, json.RejectUnknownMembers(true)); err != nil || back != ticket {
		t.Fatalf("the store gives back %#v of %#v: %v", back, ticket, err)
	}
}
