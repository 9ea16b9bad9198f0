package daemon

import (
	"cmp"
	"container/list"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/endorsements"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/policy"
	"keybroker/internal/store"
)

const (
	// bucketReports: subject -> reportsRecord
	bucketReports = "reports"
	// reportsKept is how many boots of a subject are remembered.
	reportsKept = 64

	// Sessions that relays bring, in all and from one address.
	maxAttested     = 4096
	maxAttestedEach = 1024
	// One session may ask so often, after so many at once. A verdict costs a millisecond.
	attestedEvery = time.Second
	attestedBurst = 5
	// keepTime is how long it may take to store certificates.
	keepTime = 10 * time.Second
)

// attesting serves tier snp: guests that prove with each request whose they are, whatever brings their connection.
type attesting struct {
	b        *Broker
	verifier *snp.Verifier
	stored   *endorsements.Store
	working  chan struct{} // as many as appraise at once: a flood of bad evidence leaves a processor for others
	storing  sync.Mutex
	full     rate.Sometimes // says that there are too many sessions
	spoiled  rate.Sometimes // says what in the store is of no use

	mu    sync.Mutex
	open  map[string]int // sessions by address
	all   int
	new   list.List           // *attestedSession that have shown no genuine evidence, the oldest first
	shown map[string]VMStatus // by subject, of those that policy has an entry for
}

func newAttesting(b *Broker, roots []snp.Root) (*attesting, error) {
	v, err := snp.New(snp.Config{Roots: roots})
	if err != nil {
		return nil, err
	}
	e, err := endorsements.New(endorsements.Config{Dir: b.paths.Endorsements, Verifier: v})
	if err != nil {
		return nil, err
	}
	return &attesting{
		b: b, verifier: v, stored: e, working: make(chan struct{}, max(1, runtime.NumCPU()-1)), open: map[string]int{}, shown: map[string]VMStatus{},
		full: rate.Sometimes{Interval: time.Minute}, spoiled: rate.Sometimes{Interval: time.Minute},
	}, nil
}

// serve takes relays' sessions until ctx ends, and returns when they have.
func (a *attesting) serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var sessions sync.WaitGroup
	defer sessions.Wait()
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			sessions.Go(func() { a.session(ctx, c) })
		case ctx.Err() != nil:
			return nil
		case isShortage(err):
			a.b.log.Warn("accepting a relay's connection", "err", err)
			time.Sleep(acceptPause)
		default:
			return err
		}
	}
}

func (a *attesting) session(ctx context.Context, c net.Conn) {
	defer c.Close()
	address := hostOf(c.RemoteAddr())
	s := &attestedSession{a: a, conn: c, peer: address, asks: rate.NewLimiter(rate.Every(attestedEvery), attestedBurst)}
	if err := a.admit(s); err != nil {
		a.full.Do(func() {
			a.b.log.Warn("refused a relay's connection; of others in the next minute nothing is said", "peer", address, "err", err)
		})
		return
	}
	defer a.leave(s)
	issuer, err := a.b.issuer()
	if err != nil {
		return // while the realm is not open nobody is served; the guest asks again
	}
	a.b.metrics.sessions.Inc()
	defer a.b.metrics.sessions.Dec()
	if err := issuer.Serve(ctx, c, s.door()); err != nil {
		a.b.log.Warn("serving a guest", "peer", address, "err", err)
	}
}

func hostOf(a net.Addr) string {
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	return host
}

// admit counts a session, or says which limit it exceeds. When all places are taken, one that has proved nothing gives way: else
// strangers kept guests out by doing nothing.
func (a *attesting) admit(s *attestedSession) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.open[s.peer] >= maxAttestedEach:
		return fmt.Errorf("this address has %d sessions already", a.open[s.peer])
	case a.all >= maxAttested && !a.giveWay():
		return fmt.Errorf("there are %d sessions already", a.all)
	}
	a.open[s.peer]++
	a.all++
	s.counted, s.place = true, a.new.PushBack(s)
	return nil
}

// giveWay ends a session that has proved nothing, the oldest of the address that has most.
func (a *attesting) giveWay() bool {
	var one *attestedSession
	for e := a.new.Front(); e != nil; e = e.Next() {
		if s := e.Value.(*attestedSession); one == nil || a.open[s.peer] > a.open[one.peer] {
			one = s
		}
	}
	if one == nil {
		return false
	}
	a.forget(one)
	one.conn.Close()
	return true
}

func (a *attesting) leave(s *attestedSession) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forget(s)
}

// forget takes a session out of the count, once. It is called with mu held.
func (a *attesting) forget(s *attestedSession) {
	if !s.counted {
		return
	}
	s.counted = false
	a.settle(s)
	a.all--
	if a.open[s.peer]--; a.open[s.peer] == 0 {
		delete(a.open, s.peer)
	}
}

// settle lets a session keep its place. It is called with mu held.
func (a *attesting) settle(s *attestedSession) {
	if s.place != nil {
		a.new.Remove(s.place)
		s.place = nil
	}
}

// proved notes that a session has shown genuine evidence.
func (a *attesting) proved(s *attestedSession) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.settle(s)
}

// attestedSession is one guest's connection.
type attestedSession struct {
	a        *attesting
	conn     net.Conn
	counted  bool          // with a.mu held
	place    *list.Element // in a.new, with a.mu held; nil: it is not there
	peer     string        // what brought the connection; it says nothing about the guest
	asks     *rate.Limiter
	handed   handedOut
	instance string // the REPORT_ID that the last release was for, hexadecimal
}

func (s *attestedSession) door() inject.Door {
	return inject.Door{
		Tier: inject.TierSNP,
		Offer: func(_ context.Context, subject string) (string, []string, error) {
			return subject, nil, s.named(subject)
		},
		Decide:  s.decide,
		Acked:   s.acked,
		Refused: func(_ context.Context, c *inject.Claim, r inject.Refusal) { s.refuse(c, &attestedDecision{}, r) },
	}
}

// named holds that the guest says who it is. It is not told what policy has for it before it has proved that.
func (s *attestedSession) named(subject string) error {
	if subject == "" {
		return refusal(inject.CodeMalformed, "challenge: in tier %s the guest names its subject", inject.TierSNP)
	}
	return nil
}

// decide checks, records and grants, in the order of docs/protocol.md; the first failure ends it, and is recorded too.
func (s *attestedSession) decide(ctx context.Context, c *inject.Claim) (*inject.Grant, error) {
	d := &attestedDecision{s: s, c: c}
	g, err := d.run(ctx)
	if d.identified() {
		s.a.proved(s)
	}
	if err == nil {
		return g, nil
	}
	r := s.refuse(c, d, inject.AsRefusal(err))
	if !d.identified() {
		r = inject.Refusal{Code: r.Code}
	}
	return nil, r
}

// attestedDecision is one decision under way.
type attestedDecision struct {
	s        *attestedSession
	c        *inject.Claim
	rule     string
	verdict  *attest.Verdict
	instance string // REPORT_ID of a verdict that passes, hexadecimal
}

func (d *attestedDecision) run(ctx context.Context) (*inject.Grant, error) {
	b, c := d.s.a.b, d.c
	if !d.s.asks.Allow() {
		return nil, refusal(inject.CodeBusy, "this guest asks too often")
	}
	if c.Kind != inject.KindSNP {
		return nil, refusal(inject.CodeWrongKind, "tier %s takes evidence of kind %s, got kind %q", inject.TierSNP, inject.KindSNP, c.Kind)
	}
	p := b.policy()
	entry, err := d.entry(p)
	if err != nil {
		return nil, err
	}
	holder, err := b.realm.current()
	if err != nil {
		return nil, err
	}
	if err := d.appraise(ctx, entry); err != nil {
		return nil, err
	}
	grants, err := d.take(entry)
	if err != nil {
		return nil, err
	}
	if err := d.record(p, entry, grants); err != nil {
		return nil, err
	}
	if err := d.still(p); err != nil {
		return nil, err
	}
	g, err := derived(ctx, holder, inject.TierSNP, entry, grants)
	if err == nil {
		d.released(entry, grants)
	}
	return g, err
}

// identified says whether a processor has vouched for who asks, in this session: to anybody else goes the bare code.
func (d *attestedDecision) identified() bool {
	return d.verdict != nil && d.verdict.All(append(attest.Genuine(), attest.Binding))
}

// entry finds the policy's entry for the subject that the guest claims to be.
func (d *attestedDecision) entry(p *policy.Policy) (*policy.VM, error) {
	b := d.s.a.b
	entry, decision := p.VM(policy.VMClaims{UUID: d.c.Subject, Tier: inject.TierSNP, Host: b.host})
	if d.rule = decision.Rule; !decision.Allow {
		return nil, decisionRefusal(decision)
	}
	return entry, b.notDenied(entry.UUID, cmp.Or(entry.Name, entry.UUID))
}

// appraise verifies the evidence whole. A genuine guest is told which claims fail, and not what was expected.
func (d *attestedDecision) appraise(ctx context.Context, entry *policy.VM) error {
	a := d.s.a
	select {
	case a.working <- struct{}{}:
		defer func() { <-a.working }()
	case <-ctx.Done():
		return refusal(inject.CodeBusy, "too much evidence waits to be appraised")
	}
	evidence := attest.Evidence{Kind: d.c.Kind, Octets: d.c.Evidence}
	d.verdict = a.verifier.Appraise(snp.Request{
		Evidence: evidence, Endorsements: a.endorsed(evidence), ReportData: d.c.Transcript[:], Policy: entry.SNP, At: time.Now(),
	})
	if d.verdict.Pass() {
		go a.keep(context.WithoutCancel(ctx), evidence)
		return nil
	}
	return inject.Refusal{Code: inject.CodeBadEvidence, Reason: "the evidence is refused: " + strings.Join(failed(d.verdict, 8), ", "), Rule: d.rule,
		Next: "`keybroker audit query --code " + string(inject.CodeBadEvidence) + "` on the broker's host says what was expected and what came"}
}

// endorsed returns what is stored for a report. Nothing here waits for a network.
func (a *attesting) endorsed(ev attest.Evidence) attest.Endorsements {
	keys, err := snp.KeysOf(ev.Octets[:min(len(ev.Octets), snp.ReportSize)])
	if err != nil {
		return attest.Endorsements{} // the verdict says why
	}
	found, problems := a.stored.Find(keys...)
	problems = slices.DeleteFunc(problems, func(err error) bool { return errors.Is(err, fs.ErrNotExist) })
	if len(problems) > 0 {
		a.spoiled.Do(func() { a.b.log.Warn("stored endorsements are not used", "err", errors.Join(problems...)) })
	}
	return found
}

// keep stores the certificates that came with evidence that policy takes: the guest's next boot may come without. Those of any other
// machine of AMD's would fill the store, which has an end. It is no part of a release, and one at a time is enough.
func (a *attesting) keep(ctx context.Context, ev attest.Evidence) {
	if !a.storing.TryLock() {
		return
	}
	defer a.storing.Unlock()
	ctx, cancel := context.WithTimeout(ctx, keepTime)
	defer cancel()
	if _, err := a.stored.PutEvidence(ctx, ev); err != nil {
		a.b.log.Warn("storing the certificates that came with a report", "err", err)
	}
}

// failed names the claims that keep a verdict from passing, the first of them.
func failed(v *attest.Verdict, most int) (names []string) {
	for _, c := range v.Claims() {
		if c.Result != attest.Holds {
			names = append(names, c.Name)
		}
	}
	if len(names) > most {
		names = append(names[:most], fmt.Sprintf("and %d more", len(names)-most))
	}
	return names
}

// reportsRecord is which receiver each of a subject's latest boots has, by REPORT_ID.
type reportsRecord struct {
	Boots []reportBoot `json:"boots"`
}

type reportBoot struct {
	ReportID string    `json:"report_id"` // hexadecimal
	Receiver string    `json:"receiver"`  // SHA-256 of its public key, hexadecimal
	Since    time.Time `json:"since"`
}

// bind gives the running guest that made the evidence its first receiver, for good.
func (r *reportsRecord) bind(reportID, receiver string, now time.Time) (changed bool, err error) {
	for _, b := range r.Boots {
		if b.ReportID != reportID {
			continue
		}
		if b.Receiver != receiver {
			return false, inject.Refusal{Code: inject.CodeReceiverTaken, Reason: "another receiver of this boot has the keys", Next: "reboot the VM"}
		}
		return false, nil
	}
	r.Boots = append(r.Boots, reportBoot{reportID, receiver, now})
	r.Boots = r.Boots[max(0, len(r.Boots)-reportsKept):]
	return true, nil
}

// take binds the receiver and settles every key and epoch, in one transaction: all of it or nothing.
func (d *attestedDecision) take(entry *policy.VM) (grants []granted, err error) {
	if len(d.verdict.Instance) == 0 {
		return nil, errors.New("a verdict that passes names no instance")
	}
	d.instance = hex.EncodeToString(d.verdict.Instance)
	receiver, now := hex.EncodeToString(d.c.Receiver[:]), time.Now().UTC()
	_, err = d.s.a.b.changeVM(entry.UUID, func(tx store.Tx, r *vmRecord) (bool, error) {
		var boots reportsRecord
		if _, err := get(tx, bucketReports, entry.UUID, &boots); err != nil {
			return false, err
		}
		fresh, err := boots.bind(d.instance, receiver, now)
		if err != nil {
			return false, err
		}
		if grants, err = grantsOf(tx, entry, d.c.Want); err != nil {
			return false, err
		}
		if r.Name, r.LastRelease = entry.Name, now; fresh {
			r.Releases = 0
		}
		r.Releases++
		return true, put(tx, bucketReports, entry.UUID, &boots)
	})
	return grants, err
}

func (d *attestedDecision) record(p *policy.Policy, entry *policy.VM, grants []granted) error {
	return d.s.a.b.recordRelease(d.s.auditRecord(d.c, d.instance), d.rule, p, entry, grants)
}

// still holds what was granted to what is in force when the record is on disk.
func (d *attestedDecision) still(p *policy.Policy) error {
	now := d.s.a.b.policy()
	if _, err := d.entry(now); err != nil {
		return err
	}
	if now.Digest() != p.Digest() { // its appraisal may have changed too
		return inject.Refusal{Code: inject.CodeBusy, Reason: "the policy has changed meanwhile", Next: "the guest may ask again"}
	}
	return nil
}

func (d *attestedDecision) released(entry *policy.VM, grants []granted) {
	s := d.s
	s.handed, s.instance = handedOut{d.c, entry.Subject, grants}, d.instance
	s.a.show(entry, VMReleased, wantedNames(d.c), nil)
	s.a.b.metrics.released(inject.TierSNP)
	s.a.b.log.Info("released", "vm", entry.UUID, "name", entry.Name, "tier", inject.TierSNP, "keys", wantedNames(d.c), "report_id", s.instance, "peer", s.peer)
}

// auditRecord fills in what every record about a claim of this session says.
func (s *attestedSession) auditRecord(c *inject.Claim, instance string) audit.Record {
	r := claimRecord(c)
	r.Subject, r.Peer, r.Policy = c.Subject, "relay "+s.peer, s.a.b.policy().Digest()
	if instance != "" {
		r.Instance = "report " + instance
	}
	return r
}

// acked takes the receiver's word on what became of its keys.
func (s *attestedSession) acked(_ context.Context, c *inject.Claim, outcomes []inject.Outcome) error {
	if s.handed.claim != c {
		return refusal(inject.CodeMalformed, "not of this session's last release")
	}
	good, sinks := judge(c, outcomes)
	b := s.a.b
	_, err := b.changeVM(c.Subject, func(tx store.Tx, r *vmRecord) (bool, error) {
		r.Sinks = sinks
		return true, s.handed.settle(tx, outcomes)
	})
	if err != nil {
		return err
	}
	b.recordAck(s.auditRecord(c, s.instance), sinks)
	b.log.Info("acknowledged", "vm", c.Subject, "tier", inject.TierSNP, "sinks", sinks, "complete", good)
	return nil
}

// refuse records a refusal and returns what the guest is told. Anybody can claim to be any subject: status shows those alone that
// policy knows, and refusals of all others that one address brings are folded into one record.
func (s *attestedSession) refuse(c *inject.Claim, d *attestedDecision, r inject.Refusal) inject.Refusal {
	peer := s.peer
	if entries := s.a.b.policy().Find(c.Subject); c.Subject != "" && len(entries) == 1 && entries[0].Tier == inject.TierSNP {
		s.a.show(entries[0], VMRefused, wantedNames(c), &r)
		peer += " " + c.Subject
	}
	record := s.auditRecord(c, d.instance)
	record.Event, record.Decision, record.Code, record.Rule, record.Reason = audit.EventRefusal, audit.Refused, string(r.Code), d.rule, r.Reason
	if d.verdict != nil && r.Code == inject.CodeBadEvidence {
		record.Reason = told(d.verdict)
		peer += " " + strings.Join(d.why(), " ") // what fails for another reason has a record of its own
	}
	s.a.b.refused(inject.TierSNP, peer, record, r.Cause)
	return r
}

// why are the failing claims that tell refusals apart. Who makes up a report can let any of its claims fail that he likes, in too
// many combinations for a record of each: of his the first alone counts.
func (d *attestedDecision) why() []string {
	names := failed(d.verdict, 8)
	if !d.identified() {
		return names[:min(len(names), 1)]
	}
	return names
}

// told says of the claims that fail what was expected and what came.
func told(v *attest.Verdict) string {
	var all []string
	for _, c := range v.Failures() {
		all = append(all, fmt.Sprintf("%s: expected %s, got %s", c.Name, c.Expected, c.Got))
	}
	if len(all) == 0 {
		return "unchecked: " + strings.Join(failed(v, 8), ", ")
	}
	return strings.Join(all, "; ")
}

// show remembers what became of a subject's last request. That an intruder was refused does not hide that the VM has its keys.
func (a *attesting) show(entry *policy.VM, state string, keys []string, r *inject.Refusal) {
	a.mu.Lock()
	defer a.mu.Unlock()
	v, known := a.shown[entry.UUID]
	if !known || v.State != VMReleased || state == VMReleased {
		v.State, v.Changed = state, time.Now()
	}
	v.UUID, v.Name, v.Tier, v.Keys, v.Code, v.Why = entry.UUID, entry.Name, inject.TierSNP, keys, "", ""
	if r != nil {
		v.Code, v.Why = string(r.Code), r.Reason
	}
	a.shown[entry.UUID] = v
}

// list is what status shows of tier snp: the subjects that asked since the broker's start and that policy still has.
func (a *attesting) list() (all []VMStatus) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.b.policy()
	for uuid, v := range a.shown {
		if entries := p.Find(uuid); len(entries) != 1 || entries[0].Tier != inject.TierSNP {
			delete(a.shown, uuid)
			continue
		}
		all = append(all, a.withRecord(v))
	}
	return all
}

func (a *attesting) get(uuid string) (v VMStatus, ok bool) {
	all := a.list()
	n := slices.IndexFunc(all, func(v VMStatus) bool { return v.UUID == uuid })
	if n < 0 {
		return v, false
	}
	return all[n], true
}

// withRecord adds what the store knows of a subject.
func (a *attesting) withRecord(v VMStatus) VMStatus {
	v.Sinks = []string{}
	r, err := a.b.vm(v.UUID)
	if err != nil {
		v.Why = "its state cannot be read: " + err.Error()
		return v
	}
	v.Ticket, v.Releases, v.LastRelease, v.Denied = r.Ticket.String(), r.Releases, r.LastRelease, r.Denied
	if v.State == VMReleased {
		v.Sinks = append(v.Sinks, r.Sinks...)
	}
	return v
}
