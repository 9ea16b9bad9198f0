package libvirt

import (
	"context"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"keybroker/hypervisor"
)

// Kind says what an Event tells.
type Kind int

// The kinds of events.
const (
	// Connected: events come from now on, and Domains is what runs. What happened before is not known: a gap, even the first time.
	Connected Kind = iota + 1
	// Disconnected: no events come until the next Connected. Err says why. It comes again when the reason changes.
	Disconnected
	// Lifecycle: Change has happened to the domain.
	Lifecycle
	// Reboot: the guest was reset in its running process, by itself or from outside. It comes twice for one reboot under some firmware.
	Reboot
	// Unplugged: the running domain has lost a device, by libvirt's name for it in Device.
	Unplugged
)

// VsockDevice is the name that libvirt itself gives to a domain's vsock device. An administrator's own begins with UserDevice.
const (
	VsockDevice = "vsock0"
	UserDevice  = "ua-"
)

// Change is what has happened to a domain.
type Change string

// The changes that are told.
const (
	Started   Change = "started" // Origin says how
	Suspended Change = "suspended"
	Resumed   Change = "resumed"
	Shutdown  Change = "shutdown" // the guest has ended; stopped follows
	Stopped   Change = "stopped"
	Crashed   Change = "crashed"
)

var changes = map[golibvirt.DomainEventType]Change{
	golibvirt.DomainEventStarted:   Started,
	golibvirt.DomainEventSuspended: Suspended,
	golibvirt.DomainEventResumed:   Resumed,
	golibvirt.DomainEventShutdown:  Shutdown,
	golibvirt.DomainEventStopped:   Stopped,
	golibvirt.DomainEventCrashed:   Crashed,
}

var origins = map[golibvirt.DomainEventStartedDetailType]hypervisor.Origin{
	golibvirt.DomainEventStartedBooted:       hypervisor.OriginCold,
	golibvirt.DomainEventStartedMigrated:     hypervisor.OriginMigrate,
	golibvirt.DomainEventStartedRestored:     hypervisor.OriginRestore,
	golibvirt.DomainEventStartedFromSnapshot: hypervisor.OriginSnapshot,
}

// Event is one piece of news.
type Event struct {
	Kind    Kind
	Socket  string              // Connected: the socket that answered
	Domains []hypervisor.Domain // Connected: as List returns them
	Err     error               // Disconnected
	UUID    string              // Lifecycle, Reboot, Unplugged: whose it is
	Name    string              // the same
	Change  Change              // Lifecycle
	Origin  hypervisor.Origin   // Lifecycle with Started; a start from a snapshot may or may not bring memory with it
	Device  string              // Unplugged
}

// Watch calls emit with what happens, one event at a time and in each domain's order, until ctx ends; it returns ctx's error.
// It connects again for ever, with a growing pause. It subscribes before it lists, so that events may tell again what
// Connected has told. A libvirt that does not answer is found out by asking it something every Config.Ping. emit may take
// its time: events wait in memory, and nothing else waits for them.
func (c *Client) Watch(ctx context.Context, emit func(Event)) error {
	told, pause := "", minPause
	for {
		connected, err := c.watch(ctx, emit)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if connected || told != err.Error() {
			told = err.Error()
			emit(Event{Kind: Disconnected, Err: err})
		}
		if connected {
			pause = minPause
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, maxPause)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// watch is one connection's life. Its error is never nil.
func (c *Client) watch(ctx context.Context, emit func(Event)) (connected bool, err error) {
	n, err := c.open(ctx)
	if err != nil {
		return false, err
	}
	defer n.close()
	stop := context.AfterFunc(ctx, n.close)
	defer stop()
	lifecycle, err := c.subscribe(ctx, n, golibvirt.DomainEventIDLifecycle)
	if err != nil {
		return false, err
	}
	reboot, err := c.subscribe(ctx, n, golibvirt.DomainEventIDReboot)
	if err != nil {
		return false, err
	}
	unplugged, err := c.subscribe(ctx, n, golibvirt.DomainEventIDDeviceRemoved)
	if err != nil {
		return false, err
	}
	domains, err := c.list(ctx, n)
	if err != nil {
		return false, err
	}
	go c.keepAsking(ctx, n)
	emit(Event{Kind: Connected, Socket: n.socket, Domains: domains})
	return true, n.pass(lifecycle, reboot, unplugged, emit)
}

// pass hands events on until the connection is over.
func (n *conn) pass(lifecycle, reboot, unplugged <-chan any, emit func(Event)) error {
	for {
		select {
		case e, ok := <-lifecycle:
			if !ok {
				lifecycle = nil // the connection is ending, and dead says why
			}
			if m, is := e.(*golibvirt.DomainEventCallbackLifecycleMsg); is {
				emitLifecycle(m.Msg, emit)
			}
		case e, ok := <-reboot:
			if !ok {
				reboot = nil
			}
			if m, is := e.(*golibvirt.DomainEventCallbackRebootMsg); is {
				emit(Event{Kind: Reboot, UUID: formatUUID(m.Msg.Dom.UUID), Name: m.Msg.Dom.Name})
			}
		case e, ok := <-unplugged:
			if !ok {
				unplugged = nil
			}
			if m, is := e.(*golibvirt.DomainEventCallbackDeviceRemovedMsg); is {
				emit(Event{Kind: Unplugged, UUID: formatUUID(m.Msg.Dom.UUID), Name: m.Msg.Dom.Name, Device: m.Msg.DevAlias})
			}
		case <-n.wire.dead:
			return n.wire.err
		}
	}
}

func emitLifecycle(m golibvirt.DomainEventLifecycleMsg, emit func(Event)) {
	change, told := changes[golibvirt.DomainEventType(m.Event)]
	if !told {
		return
	}
	e := Event{Kind: Lifecycle, UUID: formatUUID(m.Dom.UUID), Name: m.Dom.Name, Change: change}
	if change == Started {
		e.Origin = origins[golibvirt.DomainEventStartedDetailType(m.Detail)]
	}
	emit(e)
}

// subscribe starts one stream of events. go-libvirt stops for ever if a subscription is cancelled while an event comes in,
// and leaks it if it is not cancelled at all; so it is cancelled when the connection is over and its reader has returned for good.
func (c *Client) subscribe(ctx context.Context, n *conn, id golibvirt.DomainEventID) (<-chan any, error) {
	return call(ctx, n, c.cfg.Timeout, func() (<-chan any, error) {
		life, cancel := context.WithCancel(context.WithoutCancel(ctx))
		events, err := n.rpc.SubscribeEvents(life, id, nil)
		if err != nil {
			cancel()
			return nil, err
		}
		go func() {
			<-n.wire.dead
			<-n.wire.readerGone
			cancel()
			for range events { // its sender would wait for ever with what nobody takes any more
			}
		}()
		return events, nil
	})
}

// keepAsking ends the connection when libvirt stops answering. A stopped process keeps its sockets open and says nothing.
func (c *Client) keepAsking(ctx context.Context, n *conn) {
	ticker := time.NewTicker(c.cfg.Ping)
	defer ticker.Stop()
	for {
		select {
		case <-n.wire.dead:
			return
		case <-ticker.C:
		}
		if _, err := call(ctx, n, c.cfg.Timeout, n.rpc.ConnectGetLibVersion); err != nil {
			n.wire.fail(err)
			return
		}
	}
}
