package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"golang.org/x/time/rate"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/caller"
	"keybroker/internal/policy"
	"keybroker/internal/store"
)

// foreign are the headers of a browser or a proxy. Neither is the service itself, and each would lend its uid to others: DNS
// rebinding, request forgery, forwarders.
var foreign = []string{"Origin", "Referer", "Via", "Forwarded", "X-Real-Ip"}

const (
	answerTime  = 10 * time.Second // for an answer to be taken: a caller that does not read is not waited for
	maxRefusing = 64               // connections that wait to be told why they get nothing
	lookAtDisk  = 100 * time.Millisecond
)

// services serve tier 1: keys of the host's own services.
type services struct {
	b        *Broker
	low      atomic.Bool  // the audit log lives on its reserve
	looked   atomic.Int64 // when that was seen, since the broker's start
	reserve  sync.Map     // uid -> *rate.Limiter
	callers  *caller.Resolver
	epochs   map[string]epochRecord // those of the store, which nothing changes while the broker runs
	released prometheus.Counter
	digest   atomic.Pointer[policyDigest]

	mu       sync.Mutex
	conns    map[net.Conn]*caller.Caller // whose each open connection is
	byUID    map[uint32]int              // how many each caller has
	refusing map[net.Conn]struct{}       // open connections that get nothing but a refusal
	answers  map[inject.Code]int         // refusals
	keys     atomic.Int64                // answers with a key
}

// policyDigest keeps the hexadecimal form of a policy's digest, which every record has.
type policyDigest struct {
	of  *policy.Policy
	hex string
}

func newServices(b *Broker) (*services, error) {
	collectLess()
	callers, err := caller.New(caller.Config{})
	if err != nil {
		return nil, err
	}
	epochs, err := serviceEpochs(b.store)
	if err != nil {
		return nil, err
	}
	return &services{
		b: b, callers: callers, epochs: epochs, released: b.metrics.releases.WithLabelValues("service"),
		conns: map[net.Conn]*caller.Caller{}, byUID: map[uint32]int{}, refusing: map[net.Conn]struct{}{}, answers: map[inject.Code]int{},
	}, nil
}

// collectLess lets the heap grow to five times what lives, unless GOGC says otherwise. Little lives in a broker, a few megabytes,
// so with Go's own setting a busy one collects hundreds of times a second, which was a tenth of its time.
func collectLess() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
}

// serviceEpochs reads the epochs of all services that ever had a second one.
func serviceEpochs(from *store.Store) (map[string]epochRecord, error) {
	epochs := map[string]epochRecord{}
	err := from.View(func(tx store.Tx) error {
		return tx.ForEach(bucketEpochs, func(key string, _ []byte) error {
			name, ok := strings.CutPrefix(key, serviceEpochKey(""))
			if !ok {
				return nil
			}
			e, err := getEpoch(tx, key)
			epochs[name] = e
			return err
		})
	})
	return epochs, err
}

// server makes the HTTP server of one door. A request has as long for all of it as for its header: none has a body.
func (s *services) server(via string) *http.Server {
	l := s.b.cfg.Limits
	return &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.route(w, r, via) }),
		ReadHeaderTimeout: l.HeaderTimeout, ReadTimeout: l.HeaderTimeout, WriteTimeout: answerTime, IdleTimeout: l.IdleTimeout,
		MaxHeaderBytes: 8 << 10,
		ConnContext:    s.identify, ConnState: s.closed, ErrorLog: slog.NewLogLogger(s.b.log.Handler(), slog.LevelDebug),
	}
}

// route does what a ServeMux would for two routes, and leaves out what takes one time: it matches, and neither redirects nor
// takes HEAD for a GET, which would release a key to nobody.
func (s *services) route(w http.ResponseWriter, r *http.Request, via string) {
	name, isKey := strings.CutPrefix(r.URL.Path, "/v1/keys/")
	switch {
	case !(isKey && name != "" && !strings.Contains(name, "/")) && r.URL.Path != "/healthz":
		http.NotFound(w, r)
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "only GET is served here", http.StatusMethodNotAllowed)
	case isKey:
		s.serveKey(w, r, name, via)
	default:
		s.health(w)
	}
}

type callerKey struct{}

// peer is who the kernel says is at the other end of a connection, or why it cannot say. What does not change while the
// connection lasts is written down once.
type peer struct {
	who    *caller.Caller
	claims policy.Claims
	audit  *audit.Caller
	err    error
}

func newPeer(who *caller.Caller, via string) *peer {
	unit := who.Unit()
	return &peer{
		who: who, audit: &audit.Caller{UID: who.UID, Unit: unit, PID: int32(who.PID)},
		claims: policy.Claims{UID: who.UID, Via: via, MatchUnit: who.MatchUnit, Unit: unit, NoUnit: who.NoUnit},
	}
}

// identify asks the kernel about a new connection's other end, once, when it is accepted.
func (s *services) identify(ctx context.Context, c net.Conn) context.Context {
	var p *peer
	var who *caller.Caller
	var err error
	switch c := c.(type) {
	case *net.UnixConn:
		if who, err = s.callers.FromUnix(c); err == nil {
			p = newPeer(who, policy.ViaUnix)
		}
	case *net.TCPConn:
		if who, err = s.callers.FromTCP(c); err == nil {
			p = newPeer(who, policy.ViaTCP)
		}
	default:
		err = fmt.Errorf("a connection of type %T", c)
	}
	if err == nil && !s.admit(c, who) {
		who.Close()
		err = refusal(inject.CodeBusy, "this user has %d connections open already", s.b.cfg.Limits.ConnectionsPerCaller)
	}
	if err != nil {
		p = &peer{err: err}
		s.linger(c)
	}
	return context.WithValue(ctx, callerKey{}, p)
}

// admit counts a connection, unless its caller has too many.
func (s *services) admit(c net.Conn, who *caller.Caller) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	uid := who.UID
	if s.byUID[uid] >= s.b.cfg.Limits.ConnectionsPerCaller || len(s.conns) >= s.b.cfg.Limits.Connections {
		return false
	}
	s.conns[c] = who
	s.byUID[uid]++
	return true
}

// linger keeps a connection that gets nothing open until its first request is answered with the reason. When there are many
// such it is closed instead: whoever opens them faster than they run into their deadline must not use up the descriptors.
func (s *services) linger(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.refusing) >= maxRefusing {
		c.Close()
		return
	}
	s.refusing[c] = struct{}{}
}

func (s *services) closed(c net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.refusing, c)
	who, ok := s.conns[c]
	if !ok {
		return
	}
	who.Close()
	delete(s.conns, c)
	uid := who.UID
	if s.byUID[uid]--; s.byUID[uid] == 0 {
		delete(s.byUID, uid)
	}
}

func (s *services) health(w http.ResponseWriter) {
	if _, err := s.b.realm.current(); err != nil {
		http.Error(w, string(inject.CodeLocked), http.StatusServiceUnavailable)
		return
	}
	w.Write([]byte("ok\n"))
}

// serviceKey is an answer in JSON, for clients that ask for it.
type serviceKey struct {
	Service string        `json:"service"`
	Epoch   uint32        `json:"epoch"`
	Key     inject.Octets `json:"key"`
}

// Header values of every answer with a key. net/http only reads them.
var (
	noStore = []string{"no-store"}
	octets  = []string{"application/octet-stream"}
)

// serveKey answers GET /v1/keys/{name}.
func (s *services) serveKey(w http.ResponseWriter, r *http.Request, name, via string) {
	key, epoch, err := s.release(r, name, via)
	if err != nil {
		s.refuse(w, inject.AsRefusal(err))
		return
	}
	defer key.Wipe()
	raw, err := key.Octets()
	if err != nil {
		s.refuse(w, inject.AsRefusal(err))
		return
	}
	s.keys.Add(1)
	s.released.Inc()
	h := w.Header()
	h["Cache-Control"] = noStore
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		answerJSON(w, http.StatusOK, serviceKey{Service: name, Epoch: epoch, Key: raw})
		return
	}
	h["Content-Type"] = octets
	w.Write(raw) // the client may be gone
}

func (s *services) refuse(w http.ResponseWriter, r inject.Refusal) {
	s.mu.Lock()
	s.answers[r.Code]++
	s.mu.Unlock()
	w.Header().Set("Connection", "close")
	answerRefusal(w, r)
}

// release decides, records and derives: no record, no key.
func (s *services) release(r *http.Request, name, via string) (key derive.ServiceKey, epoch uint32, err error) {
	p, ok := r.Context().Value(callerKey{}).(*peer)
	if !ok || p.err != nil {
		return key, 0, s.unidentified(p)
	}
	d, err := s.decide(r, p, name, via)
	if err != nil {
		return key, 0, s.refused(p, name, d.Rule, inject.AsRefusal(err))
	}
	holder, err := s.b.realm.current()
	if err != nil {
		return key, 0, s.refused(p, name, d.Rule, inject.AsRefusal(err))
	}
	e := s.epoch(name)
	if epoch, err = e.pick(wantedEpoch(r)); err != nil {
		return key, 0, s.refused(p, name, d.Rule, inject.AsRefusal(err))
	}
	if err := p.who.Still(r.Context()); err != nil { // the port may be another's by now
		return key, 0, s.refused(p, name, d.Rule, inject.Refusal{Code: inject.CodeUnknownPeer, Reason: "the caller is gone", Cause: err})
	}
	if err := s.record(p, name, epoch, d.Rule); err != nil {
		return key, 0, err
	}
	key, err = holder.ServiceKey(r.Context(), e.Generation, name, epoch, d.Length)
	return key, epoch, err
}

// decide holds a request to the rules of the door and then to policy.
func (s *services) decide(r *http.Request, p *peer, name, via string) (policy.Decision, error) {
	if err := checkHeaders(r, via); err != nil {
		return policy.Decision{}, err
	}
	if err := checkEpoch(r); err != nil {
		return policy.Decision{}, err
	}
	d := s.b.policy().Service(name, p.claims)
	if !d.Allow {
		return d, decisionRefusal(d)
	}
	return d, nil
}

// checkHeaders refuses what a browser or proxy would send on somebody else's behalf.
func checkHeaders(r *http.Request, via string) error {
	if r.Header.Get("Keybroker") != "1" {
		return inject.Refusal{Code: inject.CodeMalformed, Reason: "the header Keybroker: 1 is missing", Next: "add it: it shows that no browser was tricked into asking"}
	}
	if via == policy.ViaTCP && !localHost(r.Host) {
		return refusal(inject.CodeMalformed, "the Host header is neither 127.0.0.1, [::1] nor localhost with the port")
	}
	for h := range r.Header {
		if slices.Contains(foreign, h) || strings.HasPrefix(h, "Sec-Fetch-") || strings.HasPrefix(h, "X-Forwarded-") {
			return refusal(inject.CodeMalformed, "the header %s: requests of browsers and proxies are refused", h)
		}
	}
	return nil
}

// localHost says whether a Host header names loopback, with a port.
func localHost(host string) bool {
	name, port, err := net.SplitHostPort(host)
	if err != nil || port == "" {
		return false
	}
	a, err := netip.ParseAddr(name)
	return name == "localhost" || err == nil && (a == netip.AddrFrom4([4]byte{127, 0, 0, 1}) || a == netip.IPv6Loopback())
}

func checkEpoch(r *http.Request) error {
	q := r.URL.RawQuery
	if q == "" {
		return nil
	}
	text, ok := strings.CutPrefix(q, "epoch=")
	if n, err := strconv.ParseUint(text, 10, 32); !ok || err != nil || n == 0 {
		return refusal(inject.CodeMalformed, "the query is not epoch=N with N from 1")
	}
	return nil
}

// wantedEpoch reads what checkEpoch has checked; 0 is the current one.
func wantedEpoch(r *http.Request) uint32 {
	text, ok := strings.CutPrefix(r.URL.RawQuery, "epoch=")
	if !ok {
		return 0
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}

// epoch returns a service's epochs; one that never had a second has no record.
func (s *services) epoch(name string) epochRecord {
	if e, ok := s.epochs[name]; ok {
		return e
	}
	return firstEpoch()
}

// record writes the audit record of a release before the key leaves.
func (s *services) record(p *peer, name string, epoch uint32, rule string) error {
	if s.diskIsLow() && !s.lowDisk(p.who.UID).Allow() {
		return refusal(inject.CodeBusy, "the disk is full, and this user asks too often for the reserve that is left")
	}
	r := s.auditRecord(p, name)
	r.Event, r.Decision, r.Rule = audit.EventRelease, audit.Granted, rule
	r.Names, r.Epochs = []string{name}, []uint32{epoch}
	durability := audit.Written
	if s.b.syncAlways {
		durability = audit.Durable
	}
	if _, err := s.b.audit.Append(r, durability); err != nil {
		return inject.Refusal{Code: inject.CodeAudit, Reason: "no audit record can be written, so no key is released", Cause: err}
	}
	return nil
}

// diskIsLow says whether the audit log lives on its reserve. It looks once in a while: looking takes the log's lock.
func (s *services) diskIsLow() bool {
	now, last := time.Since(s.b.since), time.Duration(s.looked.Load())
	if now-last >= lookAtDisk && s.looked.CompareAndSwap(int64(last), int64(now)) {
		s.low.Store(s.b.audit.Stats().Low)
	}
	return s.low.Load()
}

// lowDisk limits each user while the audit log lives on its reserve, so that none uses it up for all. The users are those that
// policy lets have a key.
func (s *services) lowDisk(uid uint32) *rate.Limiter {
	l, _ := s.reserve.LoadOrStore(uid, rate.NewLimiter(rate.Every(time.Minute), 10))
	return l.(*rate.Limiter)
}

func (s *services) auditRecord(p *peer, name string) audit.Record {
	return audit.Record{Tier: "service", Subject: name, Policy: s.policyDigest(), Caller: p.audit}
}

// policyDigest returns the digest of the policy in force.
func (s *services) policyDigest() string {
	now := s.b.policy()
	d := s.digest.Load()
	if d == nil || d.of != now {
		d = &policyDigest{now, now.Digest()}
		s.digest.Store(d)
	}
	return d.hex
}

func (s *services) refused(p *peer, name, rule string, r inject.Refusal) inject.Refusal {
	record := s.auditRecord(p, name)
	record.Event, record.Decision, record.Code, record.Reason, record.Rule = audit.EventRefusal, audit.Refused, string(r.Code), r.Reason, rule
	s.b.refused("service", "uid "+strconv.FormatUint(uint64(p.who.UID), 10), record, r.Cause)
	return r
}

// unidentified refuses a caller whom the kernel does not name: it is told the code and no more.
func (s *services) unidentified(p *peer) inject.Refusal {
	r, reason := inject.Refusal{Code: inject.CodeUnknownPeer}, "no caller"
	if p != nil {
		r.Cause, reason = p.err, p.err.Error()
		errors.As(p.err, &r)
	}
	s.b.refused("service", "unknown", audit.Record{Event: audit.EventRefusal, Decision: audit.Refused, Code: string(r.Code), Reason: reason, Tier: "service"}, nil)
	return r
}

// counters are the answers since the start, by refusal code and for those with a key.
func (s *services) counters() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string]int{}
	for code, n := range s.answers {
		all[string(code)] = n
	}
	if n := s.keys.Load(); n > 0 {
		all["released"] = int(n)
	}
	return all
}
