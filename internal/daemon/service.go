package daemon

import (
	"context"
	"errors"
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
	answerTime = 10 * time.Second // for the keyholder to derive, and for an answer to be taken: a caller that does not read is not waited for
	lookAtDisk = 100 * time.Millisecond
)

// services serve tier 1: keys of the host's own services.
type services struct {
	b        *Broker
	conns    *conns
	low      atomic.Bool            // the audit log lives on its reserve
	looked   atomic.Int64           // when that was seen, since the broker's start
	reserve  sync.Map               // uid -> *rate.Limiter
	epochs   map[string]epochRecord // those of the store, which nothing changes while the broker runs
	released prometheus.Counter
	patience time.Duration // answerTime, but in tests
	keys     atomic.Int64  // answers with a key

	mu      sync.Mutex
	answers map[inject.Code]int // refusals
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
		b: b, conns: newConns(callers, &b.cfg.Limits, func(uid uint32) bool { return b.policy().NamesUID(uid) }),
		epochs: epochs, released: b.metrics.releases.WithLabelValues("service"), patience: answerTime, answers: map[inject.Code]int{},
	}, nil
}

// collectLess lets the heap grow to five times what lives in it before it is collected, unless the environment has GOGC. Go's own
// setting, twice what lives, suits a program whose heap is large: in a broker a few megabytes live, so a busy one, which uses up
// some kilobytes with each request, would collect hundreds of times a second, and spend a tenth of its time so. What it costs is
// memory: ten to twenty megabytes at most.
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

// door makes one of the two doors of tier 1.
func (s *services) door(via string) *door {
	l := s.b.cfg.Limits
	return &door{
		route: func(w http.ResponseWriter, r *http.Request) { s.route(w, r, via) },
		conns: s.conns, log: s.b.log,
		headTime: l.HeaderTimeout, idleTime: l.IdleTimeout, writeTime: s.patience,
	}
}

// route does what a ServeMux would for two routes, and leaves out what takes one time: it matches, and neither redirects nor
// takes HEAD for a GET, which would release a key to nobody. Only who gets what it asked for keeps its connection.
func (s *services) route(w http.ResponseWriter, r *http.Request, via string) {
	p := peerOf(r.Context())
	name, isKey := strings.CutPrefix(r.URL.Path, "/v1/keys/")
	switch {
	case !(isKey && name != "" && !strings.Contains(name, "/")) && r.URL.Path != "/healthz":
		w.Header().Set("Connection", "close")
		http.NotFound(w, r)
	case r.Method != http.MethodGet:
		w.Header().Set("Connection", "close")
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "only GET is served here", http.StatusMethodNotAllowed)
	case isKey:
		s.serveKey(w, r, p, name, via)
	default:
		s.health(w, p)
	}
}

func (s *services) health(w http.ResponseWriter, p *peer) {
	if p.err != nil { // it is not counted among the connections of its user
		w.Header().Set("Connection", "close")
	}
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
func (s *services) serveKey(w http.ResponseWriter, r *http.Request, p *peer, name, via string) {
	key, epoch, err := s.release(r, p, name, via)
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
func (s *services) release(r *http.Request, p *peer, name, via string) (key derive.ServiceKey, epoch uint32, err error) {
	if p.known() != nil {
		return key, 0, s.unidentified(p)
	}
	g, err := s.decide(r, p, name, via)
	if err != nil {
		return key, 0, s.refused(p, name, g.rule, inject.AsRefusal(err))
	}
	if err := s.record(p, name, g); err != nil {
		return key, 0, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.patience) // a keyholder that hangs holds nobody for ever
	defer cancel()
	key, err = g.holder.ServiceKey(ctx, g.generation, name, g.epoch, g.length)
	return key, g.epoch, err
}

// grant is a key that a caller may have.
type grant struct {
	rule       string // that decided; also of a refusal
	holder     *derive.Holder
	generation uint32
	epoch      uint32
	length     int
}

// decide holds a request to the rules of the door and to policy, and asks last whether its caller is still there.
func (s *services) decide(r *http.Request, p *peer, name, via string) (g grant, err error) {
	want, err := checkRequest(r, via)
	if err != nil {
		return g, err
	}
	d := s.b.policy().Service(name, p.claims)
	if g.rule, g.length = d.Rule, d.Length; !d.Allow {
		return g, decisionRefusal(d)
	}
	if g.holder, err = s.b.realm.current(); err != nil {
		return g, err
	}
	e := s.epoch(name)
	g.generation = e.Generation
	if g.epoch, err = e.pick(want); err != nil {
		return g, err
	}
	if err := p.who.Still(r.Context()); err != nil { // the port may be another's by now
		return g, inject.Refusal{Code: inject.CodeUnknownPeer, Reason: "the caller is gone", Cause: err}
	}
	return g, nil
}

// checkRequest holds a request to the rules of the door, and returns the epoch that it wants; 0 is the current one.
func checkRequest(r *http.Request, via string) (epoch uint32, err error) {
	if err := checkHeaders(r, via); err != nil {
		return 0, err
	}
	if r.ContentLength != 0 {
		return 0, refusal(inject.CodeMalformed, "a request for a key has no body")
	}
	return wantedEpoch(r.URL.RawQuery)
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

func wantedEpoch(query string) (uint32, error) {
	if query == "" {
		return 0, nil
	}
	text, ok := strings.CutPrefix(query, "epoch=")
	n, err := strconv.ParseUint(text, 10, 32)
	if !ok || err != nil || n == 0 {
		return 0, refusal(inject.CodeMalformed, "the query is not epoch=N with N from 1")
	}
	return uint32(n), nil
}

// epoch returns a service's epochs; one that never had a second has no record.
func (s *services) epoch(name string) epochRecord {
	if e, ok := s.epochs[name]; ok {
		return e
	}
	return firstEpoch()
}

// record writes the audit record of a release before the key leaves.
func (s *services) record(p *peer, name string, g grant) error {
	if s.diskIsLow() && !s.lowDisk(p.who.UID).Allow() {
		return refusal(inject.CodeBusy, "the disk is full, and this user asks too often for the reserve that is left")
	}
	r := s.auditRecord(p, name)
	r.Event, r.Decision, r.Rule = audit.EventRelease, audit.Granted, g.rule
	r.Names, r.Epochs = []string{name}, []uint32{g.epoch}
	durability := audit.Written
	if s.b.syncAlways {
		durability = audit.Durable
	}
	if _, err := s.b.audit.Append(r, durability); err != nil {
		return unrecordedRelease(err)
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
	return audit.Record{Tier: "service", Subject: name, Policy: s.b.policy().Digest(), Caller: p.audit}
}

func (s *services) refused(p *peer, name, rule string, r inject.Refusal) inject.Refusal {
	record := s.auditRecord(p, name)
	record.Event, record.Decision, record.Code, record.Reason, record.Rule = audit.EventRefusal, audit.Refused, string(r.Code), r.Reason, rule
	s.b.refused("service", "uid "+strconv.FormatUint(uint64(p.who.UID), 10), record, r.Cause)
	return r
}

// unidentified refuses a caller whom the kernel does not name: it is told the code and no more.
func (s *services) unidentified(p *peer) inject.Refusal {
	r := inject.Refusal{Code: inject.CodeUnknownPeer, Cause: p.err}
	errors.As(p.err, &r)
	record := audit.Record{Event: audit.EventRefusal, Decision: audit.Refused, Code: string(r.Code), Reason: p.err.Error(), Tier: "service"}
	s.b.refused("service", "unknown", record, nil)
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
