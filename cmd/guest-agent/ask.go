//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"keybroker/inject"
	"keybroker/inject/sink"
)

// ask fetches the keys of some goals, puts them into their sinks and acknowledges. Where a volume turns out to be of an
// earlier epoch, it asks a second time, for that one as well.
func (a *agent) ask(ctx context.Context, session *inject.Session, goals []*goal) error {
	for range 2 {
		d, err := a.fetch(ctx, session, goals)
		if err != nil {
			a.explain(err, goals)
			for _, g := range goals {
				g.older = 0 // what a disk said of its epoch is no reason to be refused for ever
			}
			return err
		}
		outcomes, again := a.deliver(ctx, d, goals)
		d.Wipe()
		if len(outcomes) > 0 {
			a.acknowledge(ctx, d, outcomes)
		}
		if !again {
			return nil
		}
	}
	return nil
}

// fetch is one handshake, with a deadline of its own.
func (a *agent) fetch(ctx context.Context, session *inject.Session, goals []*goal) (*inject.Delivery, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	c, err := session.Challenge(ctx)
	if err != nil {
		return nil, err
	}
	a.console.mark(stepChallenged)
	var want []inject.Want
	for _, g := range goals {
		want = append(want, g.want()...)
	}
	d, err := session.Release(ctx, c, want)
	if err == nil {
		a.console.mark(stepReleased)
	}
	return d, err
}

// explain says why there are no keys, and what the agent does now.
func (a *agent) explain(err error, goals []*goal) {
	text := err.Error()
	kind, next := "ask ", "waiting on"
	switch {
	case refused(err):
		kind = "refused " // a kind of its own: what keeps the keys away is said even right after a connection's trouble
		text, next = "refused: "+text, "asking again"
	case errors.Is(err, inject.ErrNotPinned):
		next = "waiting on; if the broker's identity has changed, `keybroker identity` on the host prints the pin to configure"
	case errors.Is(err, inject.ErrEvidence):
		next = "trying again"
	case a.config.Tier == inject.TierSNP && errors.Is(err, io.ErrUnexpectedEOF):
		next = "dialling again; a relay that reaches no broker hangs up like that"
	case errors.Is(err, inject.ErrSubject):
		next = "waiting on; subject in the configuration overrides the firmware's UUID"
	case errors.Is(err, context.DeadlineExceeded):
		text = "the broker's answer took too long"
	}
	a.last = text
	a.console.sayOnce(kind+names(goals), "%s: %s (%s)", names(goals), text, next)
}

// deliver puts keys into their sinks. again: an earlier epoch's key is needed to finish.
func (a *agent) deliver(ctx context.Context, d *inject.Delivery, goals []*goal) (outcomes []inject.Outcome, again bool) {
	for _, g := range goals {
		outcome, result, err := g.put(ctx, d.Subject, d.Keys)
		if need := (*sink.NeedEpochError)(nil); errors.As(err, &need) {
			a.console.say("%s: %v", g.Name, err)
			again = true
			continue
		}
		if err == nil {
			g.held(outcome.Epoch)
			err = a.state.save()
		}
		if outcome.Name != "" {
			outcomes = append(outcomes, outcome)
		}
		if err != nil {
			a.failed(g, err)
			continue
		}
		a.console.mark(stepHeld)
		a.sayHeld(g, outcome, result)
	}
	return outcomes, again
}

// failed says that a key did not get into its sink. Where waiting does not mend that and the key must be there, it is the end.
func (a *agent) failed(g *goal, err error) {
	a.last = err.Error()
	if g.missing() && definite(err) {
		a.fatal = fmt.Errorf("key %s, %s: %w", g.Name, g.shortPlace(), err)
		return
	}
	a.console.sayOnce("sink "+g.Name, "%s: error: %v", g.Name, err)
}

func (a *agent) sayHeld(g *goal, o inject.Outcome, r sink.Result) {
	if r.Formatted {
		a.console.say("%s: %s was blank and has been formatted", g.Name, g.Device)
	}
	if r.Leftover != nil {
		a.console.say("%s: warning: an earlier epoch's keyslot is still in the volume: %v", g.Name, r.Leftover)
	}
	what := "put into " + g.shortPlace()
	switch {
	case g.Sink == sinkLUKS && r.Already:
		what = "is open: " + r.Place
	case g.Sink == sinkLUKS:
		what = "opened " + r.Place
	case r.Already:
		what = "is in " + g.shortPlace()
	}
	a.console.say("%s: %s, epoch %d, %s after the start", g.Name, what, o.Epoch, a.console.age())
}

// acknowledge tells the broker what became of the keys. If that does not arrive, the next push asks again.
func (a *agent) acknowledge(ctx context.Context, d *inject.Delivery, outcomes []inject.Outcome) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	if err := d.Ack(ctx, outcomes); err != nil {
		a.console.sayOnce("ack", "warning: the broker did not take the acknowledgement: %v (it will be told at its next push)", err)
		return
	}
	a.console.mark(stepAcknowledged)
	for _, o := range outcomes {
		for _, g := range a.goals {
			if g.Name == o.Name && o.OK {
				g.record.Acked = true
			}
		}
	}
	if err := a.state.save(); err != nil {
		a.console.say("warning: %v", err)
	}
}
