package libvirt

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/go-cmp/cmp"

	"keybroker/hypervisor"
)

// watching runs Watch and returns its events; stop ends it and waits for it.
func watching(t *testing.T, c *Client) (events chan Event, stop func()) {
	events = make(chan Event, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- c.Watch(ctx, func(e Event) { events <- e }) }()
	var stopped bool
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Watch ended with %v", err)
		}
	}
	t.Cleanup(stop)
	return events, stop
}

func next(t *testing.T, events <-chan Event) Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case <-time.After(patient):
		t.Fatal("no event")
		return Event{}
	}
}

func TestWatch(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	events, _ := watching(t, s.client(Config{Timeout: patient}))
	if diff := cmp.Diff(Event{Kind: Connected, Socket: s.path, Domains: []hypervisor.Domain{web1.want(42)}}, next(t, events)); diff != "" {
		t.Fatal(diff)
	}
	s.set(func() {
		if list, last := slices.Index(s.calls, procListAll), lastIndex(s.calls, procRegister); list < last {
			t.Errorf("listed before subscribed: %v", s.calls)
		}
	})
	lifecycle := func(c Change, o hypervisor.Origin) Event {
		return Event{Kind: Lifecycle, UUID: web1.uuid, Name: web1.name, Change: c, Origin: o}
	}
	for _, x := range []struct {
		event, detail uint32
		want          Event
	}{
		{5, 2, lifecycle(Stopped, "")},
		{2, 0, lifecycle(Started, hypervisor.OriginCold)},
		{2, 1, lifecycle(Started, hypervisor.OriginMigrate)},
		{2, 2, lifecycle(Started, hypervisor.OriginRestore)},
		{2, 3, lifecycle(Started, hypervisor.OriginSnapshot)},
		{2, 9, lifecycle(Started, "")},
		{3, 0, lifecycle(Suspended, "")},
		{4, 0, lifecycle(Resumed, "")},
		{6, 1, lifecycle(Shutdown, "")},
		{8, 0, lifecycle(Crashed, "")},
	} {
		s.emit(web1, 0, 0)  // defined: not told
		s.emit(web1, 99, 0) // unknown: not told
		s.emit(web1, x.event, x.detail)
		if diff := cmp.Diff(x.want, next(t, events)); diff != "" {
			t.Error(diff)
		}
	}
	s.reboot(web1)
	s.reboot(web1)
	for range 2 {
		if diff := cmp.Diff(Event{Kind: Reboot, UUID: web1.uuid, Name: web1.name}, next(t, events)); diff != "" {
			t.Error(diff)
		}
	}
	s.unplug(web1, VsockDevice)
	if diff := cmp.Diff(Event{Kind: Unplugged, UUID: web1.uuid, Name: web1.name, Device: VsockDevice}, next(t, events)); diff != "" {
		t.Error(diff)
	}
}

func lastIndex(calls []uint32, proc uint32) int {
	last := -1
	for i, c := range calls {
		if c == proc {
			last = i
		}
	}
	return last
}

// libvirt's restarts, with and without a while in between in which nobody listens.
func TestWatchReconnects(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	events, _ := watching(t, s.client(Config{Timeout: patient}))
	for range 3 {
		if e := next(t, events); e.Kind != Connected || len(e.Domains) != 1 {
			t.Fatalf("%+v", e)
		}
		s.hangUp()
		if e := next(t, events); e.Kind != Disconnected || e.Err == nil {
			t.Fatalf("%+v", e)
		}
	}
}

func TestWatchNobodyThere(t *testing.T) {
	c, err := New(Config{Sockets: []string{t.TempDir() + "/none"}})
	if err != nil {
		t.Fatal(err)
	}
	events, _ := watching(t, c)
	if e := next(t, events); e.Kind != Disconnected || e.Err == nil {
		t.Errorf("%+v", e)
	}
	time.AfterFunc(4*minPause, func() { events <- Event{} })
	if e := next(t, events); e.Kind != 0 {
		t.Errorf("the same news twice: %+v", e)
	}
}

// A libvirt that is there and silent, as one that was sent SIGSTOP.
func TestWatchHungLibvirt(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	events, _ := watching(t, s.client(Config{Timeout: impatient, Ping: time.Millisecond}))
	for _, proc := range []uint32{procLibVersion, procAuthList, procOpen, procRegister, procListAll, procXML} {
		awaitEvent(t, events, func(e Event) bool { return e.Kind == Connected })
		s.set(func() { s.answer = stop(proc) })
		if proc != procLibVersion {
			s.hangUp()
		}
		awaitEvent(t, events, func(e Event) bool { return e.Kind == Disconnected && errors.Is(e.Err, ErrNotAnswering) })
		s.set(func() { s.answer = nil })
	}
}

// awaitEvent drops events until one is such.
func awaitEvent(t *testing.T, events <-chan Event, such func(Event) bool) Event {
	t.Helper()
	for {
		if e := next(t, events); such(e) {
			return e
		}
	}
}

// Events that come in at every moment of a connection's end leave nothing behind and stop nothing.
func TestWatchLeavesNothingBehind(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	before := runtime.NumGoroutine()
	flood := make(chan struct{})
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		for {
			select {
			case <-flood:
				return
			default:
				s.emit(web1, uint32(golibvirt.DomainEventResumed), 0)
				s.reboot(web1)
			}
		}
	}()
	for range 100 {
		c := s.client(Config{Timeout: patient})
		ctx, cancel := context.WithCancel(t.Context())
		told := 0
		err := c.Watch(ctx, func(e Event) {
			if told++; told == 5 {
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	close(flood)
	<-flooded
	s.hangUp()
	awaitGoroutines(t, before)
}
