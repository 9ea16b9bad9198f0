// Package libvirt is the client of the host's libvirt daemon: what runs here, under which vsock address, and what happens to
// it. It only reads, over the read-only socket, and trusts no connection to answer in time: whatever takes too long or looks
// odd ends the connection, never the caller.
package libvirt

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"keybroker/hypervisor"
)

// What a look-up can end with. Errors of this package wrap them.
var (
	// ErrNotAnswering says that libvirt is there and does not answer, as when it hangs or is stopped.
	ErrNotAnswering = errors.New("libvirt is not answering")
	// ErrNotFound says that libvirt knows no such domain.
	ErrNotFound = errors.New("libvirt knows no such domain")
	// ErrNotRunning says that the domain's guest does not run now: it is off, paused, or just starting.
	ErrNotRunning = errors.New("the domain is not running")
	// ErrAddressTaken says that two running domains have the vsock address.
	ErrAddressTaken = errors.New("another running domain has the same vsock address")
)

// Defaults of Config.
const (
	DefaultURI      = "qemu:///system"
	DefaultRunDir   = "/run/libvirt/qemu"
	DefaultTimeout  = 2 * time.Second
	DefaultPatience = 8 * time.Second
	DefaultPing     = 5 * time.Second
)

const (
	poolSize    = 4
	addressLife = time.Minute // how long another domain's address is believed
	minPause    = 100 * time.Millisecond
	maxPause    = 5 * time.Second
)

// Config says where libvirt is and how long to wait for it.
type Config struct {
	Sockets []string      // Unix sockets, of which the first with a listener is used; without any nothing is found
	URI     string        // the hypervisor; "" means DefaultURI
	RunDir  string        // where libvirt keeps NAME.pid; "" means DefaultRunDir
	Timeout time.Duration // for libvirt to show that it lives; 0 means DefaultTimeout
	// Patience is for one look-up in all, while libvirt lives: it holds a question while it starts any domain or runs any
	// hook. 0 means DefaultPatience.
	Patience time.Duration
	Ping     time.Duration // between two questions whether libvirt still answers, in Watch; 0 means DefaultPing
}

// Client asks libvirt. It connects when it is asked and holds a few connections. Its methods may be called concurrently.
type Client struct {
	cfg  Config
	pool chan *conn // poolSize tokens: a connection that was used before, or nil

	mu        sync.Mutex
	addresses map[running]address
}

// running names one run of one domain: libvirt counts its ID up with each start.
type running struct {
	uuid golibvirt.UUID
	id   int32
}

type address struct {
	cid  uint32
	read time.Time
}

// New returns a client. It does not connect yet.
func New(cfg Config) (*Client, error) {
	cfg.URI = orDefault(cfg.URI, DefaultURI)
	cfg.Timeout = orDefault(cfg.Timeout, DefaultTimeout)
	cfg.Patience = orDefault(cfg.Patience, DefaultPatience)
	cfg.Ping = orDefault(cfg.Ping, DefaultPing)
	cfg.RunDir = orDefault(cfg.RunDir, DefaultRunDir)
	if cfg.Timeout < 0 || cfg.Patience < 0 || cfg.Ping <= 0 {
		return nil, errors.New("making a libvirt client: a negative time")
	}
	c := &Client{cfg: cfg, pool: make(chan *conn, poolSize), addresses: map[running]address{}}
	for range poolSize {
		c.pool <- nil
	}
	return c, nil
}

func orDefault[T comparable](value, otherwise T) T {
	var zero T
	if value == zero {
		return otherwise
	}
	return value
}

// Close ends the connections that nobody uses now. It does not end Watch; that ends with its context.
func (c *Client) Close() {
	for range poolSize {
		select {
		case n := <-c.pool:
			if n != nil {
				n.close()
			}
			c.pool <- nil
		default:
		}
	}
}

// Live looks a domain up in libvirt's live state, now, within Config.Patience; if libvirt is stuck, it is ErrNotAnswering
// after about twice Config.Timeout. It returns it only while its guest runs, and
// with a vsock address only if no other running domain has the same. Another domain whose definition cannot be read counts as
// one without an address: the kernel itself gives no address to two guests, and one bad definition must not stop all others.
// PID and StartTime are those of its QEMU process by libvirt's pid file, or 0 if that cannot be read.
//
// While one of libvirt's hooks runs, libvirt may answer nobody: a hook must have returned before its domain can be looked up.
func (c *Client) Live(ctx context.Context, uuid string) (hypervisor.Domain, error) {
	var d hypervisor.Domain
	err := c.with(ctx, func(ctx context.Context, n *conn) error {
		var err error
		d, err = c.live(ctx, n, uuid)
		return err
	})
	if err != nil {
		return hypervisor.Domain{}, fmt.Errorf("looking up domain %s: %w", uuid, err)
	}
	c.addProcess(&d)
	return d, nil
}

// Defined looks a domain up by its name or UUID, whether it runs or not, within Config.Patience. Without one it is ErrNotFound.
func (c *Client) Defined(ctx context.Context, nameOrUUID string) (hypervisor.Domain, error) {
	var d hypervisor.Domain
	err := c.with(ctx, func(ctx context.Context, n *conn) error {
		dom, err := ask(ctx, c, n, func() (golibvirt.Domain, error) {
			if raw, err := hypervisor.UUIDBytes(nameOrUUID); err == nil {
				return n.rpc.DomainLookupByUUID(raw)
			}
			return n.rpc.DomainLookupByName(nameOrUUID)
		})
		if err == nil {
			d, err = c.describe(ctx, n, dom)
		}
		return known(err)
	})
	if err != nil {
		return hypervisor.Domain{}, fmt.Errorf("looking up domain %.64q: %w", nameOrUUID, err)
	}
	return d, nil
}

// List returns the domains that have a process now, within Config.Patience for each. A domain whose definition cannot be read
// is among them, with the reason in its Problem.
func (c *Client) List(ctx context.Context) ([]hypervisor.Domain, error) {
	var domains []hypervisor.Domain
	err := c.using(ctx, func(n *conn) error {
		var err error
		domains, err = c.list(ctx, n)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listing domains: %w", err)
	}
	return domains, nil
}

// with is using within Config.Patience in all.
func (c *Client) with(ctx context.Context, f func(context.Context, *conn) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.Patience, fmt.Errorf("no answer within %v", c.cfg.Patience))
	defer cancel()
	return c.using(ctx, func(n *conn) error { return f(ctx, n) })
}

// using runs f on a connection of the pool. If one from before turns out to be broken, f runs once more on a new one.
func (c *Client) using(ctx context.Context, f func(*conn) error) error {
	var n *conn
	select {
	case n = <-c.pool:
	case <-ctx.Done():
		return fmt.Errorf("%w: all connections are busy: %w", ErrNotAnswering, context.Cause(ctx))
	}
	defer func() { c.pool <- n }()
	if n != nil && n.usable() {
		err := f(n)
		if err == nil || n.usable() || errors.Is(err, ErrNotAnswering) {
			return err
		}
	}
	var err error
	if n, err = c.open(ctx); err != nil {
		return err
	}
	return f(n)
}

func (c *Client) live(ctx context.Context, n *conn, uuid string) (hypervisor.Domain, error) {
	raw, err := hypervisor.UUIDBytes(uuid)
	if err != nil {
		return hypervisor.Domain{}, err
	}
	dom, err := ask(ctx, c, n, func() (golibvirt.Domain, error) { return n.rpc.DomainLookupByUUID(raw) })
	if err != nil {
		return hypervisor.Domain{}, known(err)
	}
	d, err := c.describe(ctx, n, dom)
	switch {
	case err != nil:
		return hypervisor.Domain{}, known(err)
	case d.Problem != "":
		return hypervisor.Domain{}, errors.New(d.Problem)
	case d.UUID != uuid:
		return hypervisor.Domain{}, fmt.Errorf("libvirt answered for domain %s", d.UUID)
	case !d.Running || d.Paused:
		return hypervisor.Domain{}, ErrNotRunning
	case d.CID == 0:
		return d, nil
	}
	return d, c.alone(ctx, n, running{dom.UUID, dom.ID}, d.CID)
}

// known turns libvirt's word for an unknown domain into ours.
func known(err error) error {
	if golibvirt.IsNotFound(err) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

// describe reads a domain's state and live definition.
func (c *Client) describe(ctx context.Context, n *conn, dom golibvirt.Domain) (hypervisor.Domain, error) {
	state, err := ask(ctx, c, n, func() (golibvirt.DomainState, error) {
		s, _, err := n.rpc.DomainGetState(dom, 0)
		return golibvirt.DomainState(s), err
	})
	if err != nil {
		return hypervisor.Domain{}, err
	}
	xml, err := c.definition(ctx, n, dom)
	if err != nil {
		return hypervisor.Domain{}, err
	}
	d, err := hypervisor.ParseDomain([]byte(xml))
	if err != nil {
		d.UUID, d.Name, d.Problem = formatUUID(dom.UUID), dom.Name, err.Error()
	}
	d.Running = state != golibvirt.DomainShutoff && state != golibvirt.DomainCrashed && state != golibvirt.DomainNostate
	d.Paused = d.Running && state != golibvirt.DomainRunning && state != golibvirt.DomainBlocked
	return d, nil
}

func (c *Client) definition(ctx context.Context, n *conn, dom golibvirt.Domain) (string, error) {
	return ask(ctx, c, n, func() (string, error) { return n.rpc.DomainGetXMLDesc(dom, 0) })
}

func (c *Client) list(ctx context.Context, n *conn) ([]hypervisor.Domain, error) {
	active, err := c.active(ctx, n)
	if err != nil {
		return nil, err
	}
	domains := make([]hypervisor.Domain, 0, len(active))
	for _, dom := range active {
		d, err := c.describe(ctx, n, dom)
		switch {
		case golibvirt.IsNotFound(err):
			continue // it has ended since
		case aboutDomain(err):
			d = hypervisor.Domain{UUID: formatUUID(dom.UUID), Name: dom.Name, Running: true, Problem: err.Error()}
		case err != nil:
			return nil, err
		}
		c.addProcess(&d)
		domains = append(domains, d)
	}
	return domains, nil
}

func (c *Client) active(ctx context.Context, n *conn) ([]golibvirt.Domain, error) {
	return ask(ctx, c, n, func() ([]golibvirt.Domain, error) {
		domains, _, err := n.rpc.ConnectListAllDomains(1, golibvirt.ConnectListDomainsActive)
		return domains, err
	})
}

// alone makes sure that of the domains that run now, this one is among them and no other has its address. The addresses of
// others are believed for a while, but not against it.
func (c *Client) alone(ctx context.Context, n *conn, self running, cid uint32) error {
	active, err := c.active(ctx, n)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(active, func(d golibvirt.Domain) bool { return self == running{d.UUID, d.ID} }) {
		return ErrNotRunning
	}
	c.forget(active)
	for _, other := range active {
		if self == (running{other.UUID, other.ID}) {
			continue
		}
		theirs, fresh, err := c.addressOf(ctx, n, other, false)
		if err == nil && theirs == cid && !fresh {
			theirs, _, err = c.addressOf(ctx, n, other, true)
		}
		switch {
		case aboutDomain(err):
		case err != nil:
			return fmt.Errorf("reading the vsock address of domain %s: %w", other.Name, err)
		case theirs == cid:
			return fmt.Errorf("%w: CID %d is that of domain %s too", ErrAddressTaken, cid, other.Name)
		}
	}
	return nil
}

// aboutDomain says whether an error is libvirt's own about the domain that it was asked about, and not the connection's.
func aboutDomain(err error) bool { return errors.As(err, new(golibvirt.Error)) }

// addressOf returns another domain's vsock address, 0 for none or where its definition cannot be read, and whether libvirt was asked for it just now.
func (c *Client) addressOf(ctx context.Context, n *conn, dom golibvirt.Domain, now bool) (cid uint32, fresh bool, err error) {
	key := running{dom.UUID, dom.ID}
	c.mu.Lock()
	a, ok := c.addresses[key]
	c.mu.Unlock()
	if ok && !now && time.Since(a.read) < addressLife {
		return a.cid, false, nil
	}
	xml, err := c.definition(ctx, n, dom)
	if err != nil {
		return 0, true, err
	}
	if cid, err = hypervisor.ParseCID([]byte(xml)); err != nil {
		cid = 0 // List says what is wrong with it
	}
	c.mu.Lock()
	c.addresses[key] = address{cid, time.Now()}
	c.mu.Unlock()
	return cid, true, nil
}

// forget drops the addresses of domains that run no more.
func (c *Client) forget(active []golibvirt.Domain) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.addresses) <= len(active) {
		return
	}
	keep := make(map[running]address, len(active))
	for _, d := range active {
		key := running{d.UUID, d.ID}
		if a, ok := c.addresses[key]; ok {
			keep[key] = a
		}
	}
	c.addresses = keep
}

// addProcess fills in the domain's process where libvirt's pid file and the process can be read and belong to it.
func (c *Client) addProcess(d *hypervisor.Domain) {
	pid, err := hypervisor.ReadPIDFile(c.PIDFile(d.Name))
	if err != nil {
		return
	}
	p, err := hypervisor.OpenProcess(pid)
	if err != nil {
		return
	}
	defer p.Close()
	if !errors.Is(p.Runs(d.UUID, d.Name), hypervisor.ErrOtherProcess) {
		d.PID, d.StartTime = p.PID, p.StartTime
	}
}

// PIDFile returns where libvirt writes the process number of a running domain.
func (c *Client) PIDFile(name string) string { return filepath.Join(c.cfg.RunDir, name+".pid") }

func formatUUID(u golibvirt.UUID) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
