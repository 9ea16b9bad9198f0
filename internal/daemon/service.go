package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

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

// services serve tier 1: keys of the host's own services.
type services struct {
	b       *Broker
	callers *caller.Resolver

	mu     sync.Mutex
	conns  map[net.Conn]*caller.Caller // whose each open connection is
	byUID  map[uint32]int              // how many each caller has
	counts map[string]int              // answers by code
}

func newServices(b *Broker) (*services, error) {
	callers, err := caller.New(caller.Config{})
	if err != nil {
		return nil, err
	}
	return &services{b: b, callers: callers, conns: map[net.Conn]*caller.Caller{}, byUID: map[uint32]int{}, counts: map[string]int{}}, nil
}

// server makes the HTTP server of one door.
func (s *services) server(via string) *http.Server {
	l := s.b.cfg.Limits
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/keys/{service}", func(w http.ResponseWriter, r *http.Request) { s.serveKey(w, r, via) })
	mux.HandleFunc("GET /healthz", s.health)
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: l.HeaderTimeout, IdleTimeout: l.IdleTimeout, MaxHeaderBytes: 8 << 10,
		ConnContext: s.identify, ConnState: s.closed, ErrorLog: slog.NewLogLogger(s.b.log.Handler(), slog.LevelDebug),
	}
}

type callerKey struct{}

// peer is who the kernel says is at the other end of a connection, or why it cannot say.
type peer struct {
	who *caller.Caller
	err error
}

// identify asks the kernel about a new connection's other end, once, when it is accepted.
func (s *services) identify(ctx context.Context, c net.Conn) context.Context {
	var p peer
	switch c := c.(type) {
	case *net.UnixConn:
		p.who, p.err = s.callers.FromUnix(c)
	case *net.TCPConn:
		p.who, p.err = s.callers.FromTCP(c)
	default:
		p.err = fmt.Errorf("a connection of type %T", c)
	}
	if p.err == nil && !s.admit(c, p.who) {
		p.who.Close()
		p.err = refusal(inject.CodeBusy, "this user has %d connections open already", s.b.cfg.Limits.ConnectionsPerCaller)
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

func (s *services) closed(c net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
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

func (s *services) health(w http.ResponseWriter, _ *http.Request) {
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

// serveKey answers GET /v1/keys/{service}.
func (s *services) serveKey(w http.ResponseWriter, r *http.Request, via string) {
	key, epoch, err := s.release(r, via)
	if err != nil {
		refused := inject.AsRefusal(err)
		s.countAnswer(string(refused.Code))
		w.Header().Set("Connection", "close")
		answerRefusal(w, refused)
		return
	}
	defer key.Wipe()
	s.countAnswer("released")
	s.b.metrics.released("service")
	octets, err := key.Octets()
	if err != nil {
		answerRefusal(w, inject.AsRefusal(err))
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		answerJSON(w, http.StatusOK, serviceKey{Service: r.PathValue("service"), Epoch: epoch, Key: octets})
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Write(octets) // the client may be gone
}

// release decides, records and derives: no record, no key.
func (s *services) release(r *http.Request, via string) (key derive.ServiceKey, epoch uint32, err error) {
	p, ok := r.Context().Value(callerKey{}).(peer)
	if !ok || p.err != nil {
		return key, 0, s.unidentified(p.err)
	}
	name := r.PathValue("service")
	d, err := s.decide(r, p.who, name, via)
	if err != nil {
		return key, 0, s.refused(p.who, name, d.Rule, inject.AsRefusal(err))
	}
	holder, err := s.b.realm.current()
	if err != nil {
		return key, 0, s.refused(p.who, name, d.Rule, inject.AsRefusal(err))
	}
	e, err := s.epoch(name)
	if err == nil {
		epoch, err = e.pick(wantedEpoch(r))
	}
	if err != nil {
		return key, 0, s.refused(p.who, name, d.Rule, inject.AsRefusal(err))
	}
	if err := p.who.Still(r.Context()); err != nil { // the port may be another's by now
		return key, 0, s.refused(p.who, name, d.Rule, inject.Refusal{Code: inject.CodeUnknownPeer, Reason: "the caller is gone", Cause: err})
	}
	if err := s.record(p.who, name, epoch, d.Rule); err != nil {
		return key, 0, err
	}
	key, err = holder.ServiceKey(r.Context(), e.Generation, name, epoch, d.Length)
	return key, epoch, err
}

// decide holds a request to the rules of the door and then to policy.
func (s *services) decide(r *http.Request, who *caller.Caller, name, via string) (policy.Decision, error) {
	if err := checkHeaders(r, via); err != nil {
		return policy.Decision{}, err
	}
	if err := checkEpoch(r); err != nil {
		return policy.Decision{}, err
	}
	d := s.b.policy().Service(name, policy.Claims{UID: who.UID, Via: via, MatchUnit: who.MatchUnit, Unit: who.Unit(), NoUnit: who.NoUnit})
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
	n, err := strconv.ParseUint(strings.TrimPrefix(r.URL.RawQuery, "epoch="), 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}

// epoch reads a service's epochs; one that never had a second has no record.
func (s *services) epoch(name string) (e epochRecord, err error) {
	err = s.b.store.View(func(tx store.Tx) error {
		e, err = getEpoch(tx, serviceEpochKey(name))
		return err
	})
	return e, err
}

// record writes the audit record of a release before the key leaves.
func (s *services) record(who *caller.Caller, name string, epoch uint32, rule string) error {
	r := s.auditRecord(who, name)
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

func (s *services) auditRecord(who *caller.Caller, name string) audit.Record {
	return audit.Record{
		Tier: "service", Subject: name, Policy: s.b.policy().Digest(),
		Caller: &audit.Caller{UID: who.UID, Unit: who.Unit(), PID: int32(who.PID)},
	}
}

func (s *services) refused(who *caller.Caller, name, rule string, r inject.Refusal) inject.Refusal {
	record := s.auditRecord(who, name)
	record.Event, record.Decision, record.Code, record.Reason, record.Rule = audit.EventRefusal, audit.Refused, string(r.Code), r.Reason, rule
	s.b.refused("service", "uid "+strconv.FormatUint(uint64(who.UID), 10), record)
	return r
}

// unidentified refuses a caller whom the kernel does not name: it is told the code and no more.
func (s *services) unidentified(err error) inject.Refusal {
	r := inject.Refusal{Code: inject.CodeUnknownPeer, Cause: err}
	if known := (inject.Refusal{}); errors.As(err, &known) {
		r = known
	}
	reason := "no caller"
	if err != nil {
		reason = err.Error()
	}
	s.b.refused("service", "unknown", audit.Record{Event: audit.EventRefusal, Decision: audit.Refused, Code: string(r.Code), Reason: reason, Tier: "service"})
	return r
}

func (s *services) countAnswer(code string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[code]++
}

func (s *services) counters() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.counts)
}
