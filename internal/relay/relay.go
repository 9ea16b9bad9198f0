// Package relay is the relay: on a host that must not open a realm it copies its guests' sessions to brokers elsewhere. It parses
// nothing and vouches for nobody; what passes it is sealed to the guest, and proves by itself whose it is.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

const (
	maxSessions  = 512
	maxPerGuest  = 4
	sessionEvery = time.Second // a guest may begin a session this often,
	sessionBurst = 10          // after so many at once
	// refusedEvery is how often the log says that a guest is refused, however often it comes.
	refusedEvery = time.Minute
	// maxOctets is how much one session may carry each way: a guest that waits for news for a month stays far below it.
	maxOctets = 64 << 20
	// idleTime is how long a session may carry nothing: twice what a broker holds a request for news.
	idleTime = 2 * time.Minute
	// headStart is what one broker has before the next is tried as well.
	headStart   = 25 * time.Millisecond
	dialTimeout = 5 * time.Second
	acceptPause = 100 * time.Millisecond
)

// Config is what a relay is made of. Every field is required.
type Config struct {
	// Brokers are their addresses, tried in this order, but for the last that answered, which comes first.
	Brokers []string
	// Guest names the guest that a connection comes from, for limits and the log; an error refuses it.
	Guest func(net.Addr) (string, error)
	Dial  func(ctx context.Context, broker string) (net.Conn, error)
	Log   *slog.Logger
}

// VsockGuest names the guest behind a vsock connection: a context id that is a guest's, and a port that only its root has.
func VsockGuest(a net.Addr) (string, error) {
	v, ok := a.(*vsock.Addr)
	switch {
	case !ok || v.ContextID <= vsock.Host || v.ContextID == unix.VMADDR_CID_ANY:
		return "", errors.New("not a guest")
	case v.Port >= 1024:
		return "", errors.New("a port of any process of the guest, expected one below 1024")
	}
	return fmt.Sprintf("CID %d", v.ContextID), nil
}

// Relay copies sessions. It is safe for concurrent use.
type Relay struct {
	cfg Config

	nobody rate.Sometimes // says who is no guest

	mu      sync.Mutex
	brokers []string
	open    map[string][]*relayed // of each guest, the oldest first
	all     int
	rates   map[string]*pace
}

// pace is how often a guest may begin a session, and how often the log says that it may not.
type pace struct {
	*rate.Limiter
	refused rate.Sometimes
}

// New returns a relay to at least one broker.
func New(cfg Config) (*Relay, error) {
	if len(cfg.Brokers) == 0 {
		return nil, errors.New("a relay needs at least one broker")
	}
	return &Relay{
		cfg: cfg, brokers: append([]string{}, cfg.Brokers...), open: map[string][]*relayed{}, rates: map[string]*pace{},
		nobody: rate.Sometimes{Interval: refusedEvery},
	}, nil
}

// Serve relays what comes in until ctx ends; sessions end with it, and their guests ask again.
func (r *Relay) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var sessions sync.WaitGroup
	defer sessions.Wait()
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			sessions.Go(func() { r.serve(ctx, c) })
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accepting guests: %w", err)
		default:
			r.cfg.Log.Warn("accepting a guest", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
		}
	}
}

func (r *Relay) serve(ctx context.Context, guest net.Conn) {
	defer guest.Close()
	ctx, end := context.WithCancel(ctx)
	defer end()
	s := &relayed{end}
	name, err := r.cfg.Guest(guest.RemoteAddr())
	say := &r.nobody
	if err == nil {
		say, err = r.admit(name, s)
	}
	if err != nil {
		say.Do(func() {
			r.cfg.Log.Warn("refused; of others in the next minute nothing is said", "peer", guest.RemoteAddr().String(), "err", err)
		})
		return
	}
	defer r.leave(name, s)
	began := time.Now()
	broker, address, err := r.dial(ctx)
	if err != nil {
		r.cfg.Log.Warn("no broker answers", "guest", name, "err", err)
		return
	}
	defer broker.Close()
	r.cfg.Log.Info("relaying", "guest", name, "broker", address, "connected_after", time.Since(began).Round(time.Millisecond))
	up, down, hungUp := exchange(ctx, guest, broker)
	if hungUp {
		r.demote(address)
		r.cfg.Log.Warn("a broker hangs up without a word: its realm is locked, or it has too many sessions", "guest", name, "broker", address)
	}
	r.cfg.Log.Info("relayed", "guest", name, "broker", address, "up", up, "down", down, "after", time.Since(began).Round(time.Millisecond))
}

// relayed is a session that is open, and can be ended.
type relayed struct{ end context.CancelFunc }

// admit counts a session, or says which limit it exceeds, and how often that is to be said. A guest that has too many loses its
// oldest: the host does not notice that a guest was reset, so they may be of boots that are over.
func (r *Relay) admit(guest string, s *relayed) (say *rate.Sometimes, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.rates[guest]
	if p == nil {
		r.forget()
		p = &pace{rate.NewLimiter(rate.Every(sessionEvery), sessionBurst), rate.Sometimes{Interval: refusedEvery}}
		r.rates[guest] = p
	}
	switch {
	case r.all >= maxSessions:
		return &p.refused, fmt.Errorf("there are %d sessions already", r.all)
	case !p.Allow():
		return &p.refused, errors.New("this guest begins sessions too often")
	}
	if open := r.open[guest]; len(open) >= maxPerGuest {
		open[0].end()
		r.open[guest] = open[1:]
	}
	r.open[guest] = append(r.open[guest], s)
	r.all++
	return nil, nil
}

// forget drops the rates of guests that have no session and could begin as many as they like.
func (r *Relay) forget() {
	for guest, l := range r.rates {
		if len(r.open[guest]) == 0 && l.Tokens() >= sessionBurst {
			delete(r.rates, guest)
		}
	}
}

func (r *Relay) leave(guest string, s *relayed) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all--
	r.open[guest] = slices.DeleteFunc(r.open[guest], func(o *relayed) bool { return o == s })
	if len(r.open[guest]) == 0 {
		delete(r.open, guest)
	}
}

// order is in which order the brokers are tried now, and prefer puts one in front.
func (r *Relay) order() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string{}, r.brokers...)
}

func (r *Relay) prefer(broker string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := []string{broker}
	for _, b := range r.brokers {
		if b != broker {
			next = append(next, b)
		}
	}
	r.brokers = next
}

// demote puts a broker last: it takes connections and serves nobody, and another may.
func (r *Relay) demote(broker string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := slices.Index(r.brokers, broker); n >= 0 {
		r.brokers = append(slices.Delete(r.brokers, n, n+1), broker)
	}
}

type dialled struct {
	conn    net.Conn
	address string
	err     error
}

// dial returns the first broker's connection that is made. Each is tried a moment after the one before it, or at once when that one
// has failed, so that a dead one costs no more than the moment.
func (r *Relay) dial(ctx context.Context) (net.Conn, string, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	order := r.order()
	results := make(chan dialled, len(order))
	begun, failed := 0, []error{}
	for {
		if begun < len(order) {
			address := order[begun]
			begun++
			go func() {
				c, err := r.cfg.Dial(ctx, address)
				results <- dialled{c, address, err}
			}()
		}
		var next <-chan time.Time
		if begun < len(order) {
			next = time.After(headStart)
		}
		select {
		case <-next:
		case d := <-results:
			if d.err == nil {
				r.prefer(d.address)
				go closeLate(results, begun-len(failed)-1)
				return d.conn, d.address, nil
			}
			failed = append(failed, fmt.Errorf("%s: %w", d.address, d.err))
			if len(failed) == len(order) {
				return nil, "", errors.Join(failed...)
			}
		}
	}
}

// closeLate closes what is connected after another was.
func closeLate(results <-chan dialled, n int) {
	for range n {
		if d := <-results; d.err == nil {
			d.conn.Close()
		}
	}
}

// exchange copies both ways until both sides have ended, either is silent for too long, or ctx ends, and returns how many octets
// went from a to b and from b to a, and whether b was the first to end, and said nothing.
func exchange(ctx context.Context, a, b net.Conn) (up, down int64, hungUp bool) {
	end := func() { a.Close(); b.Close() }
	stop := context.AfterFunc(ctx, end)
	defer stop()
	idle := time.AfterFunc(idleTime, end)
	defer idle.Stop()
	var both sync.WaitGroup
	first := make(chan net.Conn, 2)
	both.Go(func() { up = flow(b, a, idle, first) })
	both.Go(func() {
		if down = flow(a, b, idle, first); down == 0 {
			end() // nothing that the guest may say yet would be answered
		}
	})
	both.Wait()
	return up, down, <-first == b && down == 0 && ctx.Err() == nil
}

// flow copies one way, and tells the receiving side of the end. Where it cannot write, the other way has no use either.
func flow(to, from net.Conn, idle *time.Timer, ended chan<- net.Conn) (n int64) {
	n, err := io.Copy(watched{to, idle}, io.LimitReader(from, maxOctets))
	ended <- from
	half, ok := to.(interface{ CloseWrite() error })
	if err != nil || n == maxOctets || !ok || half.CloseWrite() != nil {
		to.Close()
		from.Close()
	}
	return n
}

// watched puts the end of a session off with whatever it carries.
type watched struct {
	to   io.Writer
	idle *time.Timer
}

func (w watched) Write(p []byte) (int, error) {
	w.idle.Reset(idleTime)
	return w.to.Write(p)
}
