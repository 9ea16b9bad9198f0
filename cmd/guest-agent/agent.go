//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"keybroker/inject"
)

const (
	handshakeTime = 30 * time.Second // for challenge and release, and again for the acknowledgement
	firstPause    = 250 * time.Millisecond
	lastPause     = 15 * time.Second
)

// Steps on the way to the keys, as the console names them.
const (
	stepListening    = "listening"
	stepConnected    = "connected"
	stepChallenged   = "challenge"
	stepReport       = "report"
	stepReleased     = "release"
	stepHeld         = "in its sink"
	stepAcknowledged = "acknowledged"
)

// agent meets the broker and puts the keys that it brings into their sinks. In tier vm it waits to be dialled, in tier snp it
// dials. One goroutine runs it; further ones only accept or make connections and wait for hints.
type agent struct {
	config   *config
	console  *console
	state    *state
	receiver *inject.Receiver
	platform *platform // in tier snp
	goals    []*goal
	once     bool             // end when the keys are in their sinks
	notify   func(say string) // tells the service manager

	conns    chan net.Conn // accepted from the host, or dialled
	troubles chan error    // why there is none
	parked   *parked       // a broker that refused, and may have a hint later
	pause    time.Duration // before asking again
	last     string        // why keys are missing, for the last line
	fatal    error         // a sink's refusal that no waiting mends
}

func newAgent(c *config, s *state, out *console, key *inject.ReceiverKey) *agent {
	a := &agent{config: c, console: out, state: s, conns: make(chan net.Conn), troubles: make(chan error), notify: func(string) {}, pause: firstPause}
	a.receiver = &inject.Receiver{Tier: c.Tier, Subject: c.Subject, Pins: c.Pins, Key: key}
	if c.Tier == inject.TierSNP {
		a.platform = newPlatform(out)
		a.receiver.Attest = a.platform.attest
	}
	for _, k := range c.Keys {
		a.goals = append(a.goals, newGoal(k, s))
	}
	return a
}

// errStopped: somebody ended the agent.
var errStopped = errors.New("stopped")

// resume takes up what an earlier run in this boot left, and says so.
func (a *agent) resume() error {
	for _, g := range a.goals {
		err := g.resume()
		if err != nil && !g.Optional {
			return fmt.Errorf("key %s: %w", g.Name, err)
		}
		if err != nil {
			a.console.say("%s: error: %v", g.Name, err)
			g.record.Held = false
			continue
		}
		if g.record.Held {
			a.console.say("%s: is there already, epoch %d, %s", g.Name, g.record.Epoch, g.place())
		}
	}
	return nil
}

// run serves connections until ctx ends, or, with once, until every key that must be there is. It returns nil only if none of
// those is missing.
func (a *agent) run(ctx context.Context) error {
	defer a.unpark()
	deadline := time.NewTimer(a.config.Deadline - time.Since(a.console.start))
	defer deadline.Stop()
	ready := false
	for {
		if a.fatal != nil {
			return a.fatal
		}
		missing := a.missing()
		if len(missing) == 0 && !ready {
			ready = true
			deadline.Stop()
			a.console.say("ready: every key that must be there is in its sink, %s after the start", a.console.age())
			a.console.sayTimes()
			a.notify("READY=1\nSTATUS=every key that must be there is in its sink")
			if a.once {
				return nil
			}
		}
		if err := a.step(ctx, deadline.C); err != nil {
			return a.end(err, missing)
		}
	}
}

// errDeadline: the configured time is over.
var errDeadline = errors.New("the deadline is over")

// step waits for the next thing that happens and does what it calls for.
func (a *agent) step(ctx context.Context, deadline <-chan time.Time) error {
	select {
	case <-ctx.Done():
		return errStopped
	case <-deadline:
		if len(a.missing()) > 0 {
			return errDeadline
		}
	case err := <-a.troubles:
		a.last = err.Error()
	case conn := <-a.conns:
		a.greet(a.untilDeadline(ctx), conn)
	case err := <-a.parked.wake():
		p := a.parked
		a.parked = nil
		if err != nil {
			p.close()
			return nil
		}
		a.converse(a.untilDeadline(ctx), p.session, p.conn, p.hinted)
	}
	return nil
}

// untilDeadline ends with the deadline too, as long as keys are missing: no single conversation outlasts it.
func (a *agent) untilDeadline(ctx context.Context) context.Context {
	if len(a.missing()) == 0 {
		return ctx
	}
	ctx, cancel := context.WithDeadline(ctx, a.console.start.Add(a.config.Deadline))
	context.AfterFunc(ctx, cancel)
	return ctx
}

// end makes the last line of an agent that was stopped, or whose time is over.
func (a *agent) end(err error, missing []*goal) error {
	if len(missing) == 0 && errors.Is(err, errStopped) {
		return nil
	}
	why := a.last
	if why == "" {
		why = "no broker came"
	}
	return fmt.Errorf("%w, %s after the start, without %s; last: %s", err, a.console.age(), names(missing), why)
}

func (a *agent) missing() []*goal {
	var missing []*goal
	for _, g := range a.goals {
		if g.missing() {
			missing = append(missing, g)
		}
	}
	return missing
}

// unsettled are the goals that are still to be fetched, or acknowledged.
func (a *agent) unsettled(optional bool) []*goal {
	return slices.DeleteFunc(a.goalsOf(optional), (*goal).settled)
}

func (a *agent) goalsOf(optional bool) []*goal {
	var goals []*goal
	for _, g := range a.goals {
		if g.Optional == optional {
			goals = append(goals, g)
		}
	}
	return goals
}

// sayWaiting is the first line: for what, from whom, where.
func (a *agent) sayWaiting() {
	goals := a.missing()
	if len(goals) == 0 {
		return
	}
	how := "waiting for the broker (%s) on vsock port %d for %s, since %s; for %s at most"
	if a.config.Tier == inject.TierSNP {
		how = "dialling the broker (%s) at the host, CID 2, vsock port %d, for %s, since %s; for %s at most"
	}
	a.console.say(how, shortPins(a.config.Pins), inject.Port, names(goals), a.console.age(), a.config.Deadline)
	a.notify("STATUS=waiting for the broker for " + names(goals))
}

func shortPins(pins []inject.Pin) string {
	s := "pin"
	for _, p := range pins {
		s += " " + p.String()[:len("ed25519:")+8] + "..."
	}
	return s
}

// greet begins with a connection.
func (a *agent) greet(ctx context.Context, conn net.Conn) {
	session, err := a.receiver.Session(conn)
	if err != nil {
		conn.Close()
		a.fatal = err
		return
	}
	a.pause = firstPause
	a.console.mark(stepConnected)
	a.converse(ctx, session, conn, false)
}

// converse asks for what is missing: first all that must be there at once, then what may be there one by one, so that one
// that is not allowed keeps no other away. When nothing is missing it keeps the connection for a hint that there is something
// new, and fetches everything when one comes.
func (a *agent) converse(ctx context.Context, session *inject.Session, conn net.Conn, hinted bool) {
	defer func() {
		if a.parked == nil || a.parked.conn != conn {
			conn.Close()
		}
	}()
	if !a.awaitDevices(ctx) {
		return
	}
	must, may := a.unsettled(false), a.unsettled(true)
	if len(must) == 0 && len(may) == 0 {
		if !hinted {
			a.park(ctx, session, conn)
			return
		}
		must, may = a.goalsOf(false), a.goalsOf(true)
	}
	if len(must) > 0 {
		err := a.ask(ctx, session, must)
		if err != nil && !refused(err) || a.fatal != nil {
			return
		}
		if err != nil || len(a.missing()) > 0 {
			a.park(ctx, session, conn)
			return
		}
	}
	for _, g := range may {
		if !g.ready() {
			a.console.sayOnce("device "+g.Name, "%s: %s is not there; the key is optional", g.Name, g.Device)
			continue
		}
		if err := a.ask(ctx, session, []*goal{g}); err != nil && !refused(err) {
			return
		}
	}
	a.park(ctx, session, conn)
}

func refused(err error) bool {
	r := inject.Refusal{}
	return errors.As(err, &r)
}

// awaitDevices waits until the devices of all missing keys are there: the kernel and udev may not be done with them.
func (a *agent) awaitDevices(ctx context.Context) bool {
	for _, g := range a.missing() {
		wait := 5 * time.Millisecond
		for !g.ready() {
			a.last = "device " + g.Device + " is not there"
			a.console.sayOnce("device "+g.Name, "%s: waiting for %s to appear", g.Name, g.Device)
			select {
			case <-ctx.Done():
				return false
			case <-time.After(wait):
			}
			wait = min(2*wait, 200*time.Millisecond)
		}
	}
	return true
}

// parked is a connection whose broker refused, or has given all there is: it may say later that asking again helps.
type parked struct {
	session *inject.Session
	conn    net.Conn
	cancel  context.CancelFunc
	hinted  bool // set before done
	done    chan error
}

// park keeps one such connection, the latest.
func (a *agent) park(ctx context.Context, session *inject.Session, conn net.Conn) {
	a.unpark()
	ctx, cancel := context.WithCancel(ctx)
	p := &parked{session: session, conn: conn, cancel: cancel, done: make(chan error, 1)}
	pause := a.pause
	a.pause = min(2*a.pause, lastPause)
	go func() {
		until := time.Now().Add(pause)
		var err error
		if p.hinted, err = session.Wait(ctx); err == nil {
			select {
			case <-time.After(time.Until(until)):
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		p.done <- err
	}()
	a.parked = p
}

// wake tells the end of the wait: nil for a hint, or for a minute without one.
func (p *parked) wake() <-chan error {
	if p == nil {
		return nil
	}
	return p.done
}

func (p *parked) close() {
	p.cancel()
	p.conn.Close()
}

func (a *agent) unpark() {
	if a.parked != nil {
		a.parked.close()
		a.parked = nil
	}
}
