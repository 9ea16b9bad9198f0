// Package daemon is the running broker: it opens the realm, listens on every door, and decides, records and delivers.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"keybroker/attest/snp"
	"keybroker/attest/snp/endorsements"
	"keybroker/hypervisor"
	"keybroker/hypervisor/libvirt"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/config"
	"keybroker/internal/policy"
	"keybroker/internal/store"
	"keybroker/seal"
)

const (
	// drainTime is how long requests that are in flight at the end may take.
	drainTime = 10 * time.Second
)

// Config is what a broker is made of. Every field is required.
type Config struct {
	Settings *config.Config
	Paths    config.Paths
	Policy   policy.Source
	Version  string
	Log      *slog.Logger
	// Describe says in a few words what a keyslot is bound to.
	Describe func(seal.Slot) string
	// Reload tells to read the policy anew; SIGHUP, usually.
	Reload <-chan os.Signal
	// Roots are those that evidence of tier snp may lead to: AMD's, but in tests.
	Roots []snp.Root
}

// Broker is one running broker.
type Broker struct {
	cfg     *config.Config
	paths   config.Paths
	source  policy.Source
	version string
	log     *slog.Logger
	host    string
	since   time.Time

	rules    atomic.Pointer[loadedPolicy]
	file     *seal.File // as it was at the start
	slots    knownSlots
	describe func(seal.Slot) string
	store    *store.Store
	audit    *audit.Log
	refusals *audit.Coalescer
	// strangers folds the refusals of tier snp, whose peers are as many as a network has: those of this host keep their places.
	strangers *audit.Coalescer
	space     chan struct{} // the audit log has room again

	syncAlways bool // a service's key waits until its record is on disk
	realm      *realm
	guests     *guests
	libvirt    *libvirt.Client
	hv         hypervisorState
	metrics    *metrics
	services   *services
	attesting  *attesting
	dial       func(ctx context.Context, cid, port uint32) (net.Conn, error)
	live       func(ctx context.Context, uuid string) (hypervisor.Domain, error)       // libvirt.Live
	defined    func(ctx context.Context, nameOrUUID string) (hypervisor.Domain, error) // libvirt.Defined

	listen  []string        // addresses for services
	running context.Context // ends when the broker stops
}

// Run is a broker's whole life. It returns nil after ctx ended and everything in flight was answered.
func Run(ctx context.Context, c Config) error {
	from := takePassed()
	b, l, err := open(c, from)
	if err != nil {
		return err
	}
	defer b.close()
	defer l.removeUnlock()
	return b.serve(ctx, l, from, c.Reload)
}

// open makes a broker that does not run yet, and its listeners.
func open(c Config, from passed) (*Broker, *listeners, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, nil, fmt.Errorf("asking for this host's name: %w", err)
	}
	b := &Broker{
		cfg: c.Settings, paths: c.Paths, source: c.Policy, version: c.Version, log: c.Log, host: host,
		describe: c.Describe, since: time.Now(), dial: DialGuest, space: make(chan struct{}, 1),
	}
	if err := b.loadPolicy(); err != nil {
		return nil, nil, err
	}
	if len(c.Settings.Libvirt) > 0 {
		if err := checkVhost("/dev/vhost-vsock"); err != nil {
			return nil, nil, err
		}
	}
	if b.file, err = loadRealm(c.Paths.Realm); err != nil {
		return nil, nil, err
	}
	if err := makeStateDir(c.Paths); err != nil {
		return nil, nil, err
	}
	if len(c.Settings.Relay.Listen) > 0 {
		if err := endorsements.Make(c.Paths.Endorsements); err != nil {
			return nil, nil, err
		}
	}
	b.slots.slots = b.file.Slots()
	for _, w := range c.Settings.Warnings() {
		c.Log.Warn(w, "file", c.Settings.File)
	}
	if lostStore(c.Paths) {
		c.Log.Warn("there is an audit log and no store: its head, denials of VMs and which volumes exist are lost, and blank disks are formatted again", "store", c.Paths.Store)
	}
	if b.store, err = store.Open(c.Paths.Store); err != nil {
		return nil, nil, err
	}
	l, err := listen(c.Settings, c.Paths, from, c.Log)
	if err != nil {
		b.store.Close()
		return nil, nil, err
	}
	b.listen = l.addresses()
	for _, a := range b.listen {
		c.Log.Info("listening", "address", a)
	}
	b.realm = newRealm(c.Settings, c.Paths.Realm, l.unlock, c.Log)
	if err := b.openAudit(b.file.RealmID().String()); err != nil {
		l.close()
		b.store.Close()
		return nil, nil, err
	}
	b.realm.events = b.recordEvent
	b.realm.opened = func() {
		b.checkpoint()
		b.wakeGuests()
	}
	b.guests = newGuests(b)
	b.metrics = newMetrics(func() float64 {
		if _, err := b.realm.current(); err != nil {
			return 0
		}
		return 1
	})
	if b.services, err = newServices(b); err != nil {
		return nil, nil, err
	}
	if err := b.services.conns.callers.CheckTCP(); err != nil {
		c.Log.Warn("services on TCP will be refused; the Unix socket works", "err", err)
	}
	if b.attesting, err = newAttesting(b, c.Roots); err != nil {
		return nil, nil, err
	}
	if b.libvirt, err = libvirt.New(libvirt.Config{Sockets: c.Settings.Libvirt}); err != nil {
		return nil, nil, err
	}
	b.live, b.defined = b.libvirt.Live, b.libvirt.Defined
	return b, l, nil
}

func loadRealm(path string) (*seal.File, error) {
	f, err := seal.Load(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no realm yet: `keybroker init --slot tpm2` makes %s", path)
	}
	return f, err
}

// lostStore reports whether a broker ran here whose store is gone.
func lostStore(p config.Paths) bool {
	_, err := os.Lstat(p.Store)
	files, _ := filepath.Glob(filepath.Join(p.AuditDir, "audit-*.jsonl"))
	return errors.Is(err, fs.ErrNotExist) && len(files) > 0
}

func makeStateDir(p config.Paths) error {
	for _, dir := range []string{p.StateDir, p.AuditDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("making the state folder: %w", err)
		}
	}
	return nil
}

func (b *Broker) close() {
	b.libvirt.Close()
	b.refusals.Close()
	b.strangers.Close()
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	if err := b.audit.Close(ctx); err != nil {
		b.log.Error("closing the audit log", "err", err)
	}
	b.realm.close()
	if err := b.store.Close(); err != nil {
		b.log.Error("closing the store", "err", err)
	}
}

// serve runs everything until ctx ends or something that the broker cannot do without fails.
func (b *Broker) serve(ctx context.Context, l *listeners, from passed, reload <-chan os.Signal) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	b.running = ctx
	unrecorded, err := b.recordStart()
	if err != nil {
		l.close()
		return err
	}
	var parts sync.WaitGroup
	ready := make(chan struct{})
	services, servers := b.servers(l)
	for _, s := range services {
		parts.Go(func() { s.run(ctx, ready, fail) }) // who asks while the realm is being opened waits in the socket
	}
	for _, s := range servers {
		parts.Go(func() { s.run(ctx, nil, fail) })
	}
	parts.Go(func() {
		err := b.realm.run(ctx, from.first(fdPage), func() {
			close(ready)
			notify(daemon.SdNotifyReady)
		})
		if err != nil {
			fail(err)
		}
	})
	for _, x := range l.relay {
		parts.Go(func() {
			if err := b.attesting.serve(ctx, x); err != nil {
				fail(fmt.Errorf("serving relays on %s: %w", x.Addr(), err))
			}
		})
	}
	parts.Go(func() { b.watchHypervisor(ctx) })
	parts.Go(func() { b.reloadOn(ctx, reload) })
	parts.Go(func() { b.wakeOnSpace(ctx, unrecorded) })
	parts.Go(func() { watchdog(ctx, b.healthy) })

	<-ctx.Done()
	notify(daemon.SdNotifyStopping)
	b.guests.endAll()
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	for _, s := range append(services, servers...) { // at once: none is to use up the time of another
		parts.Go(func() { s.stop(drain) })
	}
	parts.Wait()
	if err := b.recordEvent(audit.EventStop, ""); err != nil {
		b.log.Error("writing the audit", "err", err)
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

func (p passed) first(name string) *os.File {
	if files := p[name]; len(files) > 0 {
		return files[0]
	}
	return nil
}

// servers are those for services, and those for the host's administrators.
func (b *Broker) servers(l *listeners) (services, local []*server) {
	mine := b.services.conns
	services = []*server{
		newServer(b.services.door(policy.ViaUnix).Serve, mine, l.unix...),
		newServer(b.services.door(policy.ViaTCP).Serve, mine, l.tcp...),
	}
	hook := newLocalConns(localConns)
	hook.keep = func(admitted) bool { return true } // libvirt waits
	admin := newLocalConns(localPerCaller)
	local = []*server{
		newServer(b.local(b.hookRoutes(), hook).Serve, hook, l.hook),
		newServer(b.local(b.adminRoutes(), admin).Serve, admin, l.admin),
	}
	return services, local
}

// local is a server for the sockets that only this host's administrators, and who may read status, reach.
func (b *Broker) local(h http.Handler, c *conns) *http.Server {
	return withConns(&http.Server{
		Handler: served(h), ReadTimeout: 10 * time.Second, WriteTimeout: b.services.patience, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10,
		ConnContext: withPeer, ErrorLog: slog.NewLogLogger(b.log.Handler(), slog.LevelDebug),
	}, c)
}

// issuer serves the release protocol in the realm's name; while the realm is not open it has no identity, and says so.
func (b *Broker) issuer() (*inject.Issuer, error) {
	h, err := b.realm.current()
	if err != nil {
		return nil, err
	}
	return &inject.Issuer{Identity: h.Identity(), Sign: b.realm.sign, Log: b.log}, nil
}

// healthy is asked by the watchdog: the store answers.
func (b *Broker) healthy() bool {
	return b.store.View(func(store.Tx) error { return nil }) == nil
}
