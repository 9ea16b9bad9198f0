package inject

import (
	"context"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"

	"keybroker/derive"
	"keybroker/internal/plain"
)

const (
	nonceLife    = 60 * time.Second // monotonic
	readTimeout  = 10 * time.Second // of one request
	writeTimeout = 10 * time.Second // of one answer
	// decideTimeout is how long a decision may take: libvirt, while it starts other machines, takes its time.
	decideTimeout = 30 * time.Second
	idleTimeout   = 90 * time.Second // between requests: a receiver may be formatting a volume before it acknowledges
	hintTimeout   = 60 * time.Second // how long GET /v1/events waits
	// lateTime is what a receiver has to finish its request when ctx ends, and again to take its answer.
	lateTime = time.Second
)

// Claim is what a receiver asks for, read and checked for form; nothing in it is believed yet.
type Claim struct {
	Tier, Kind, Subject string
	Transcript          Transcript
	Receiver            [sha256.Size]byte // SHA-256 of its public key
	Want                []Want
	Evidence            []byte
}

// Grant is what the issuer gives, in the order of the claim's Want.
type Grant struct {
	Keys []GrantedKey
}

// GrantedKey is one key of a grant. Create says that the receiver may format a volume; LUKS pins its header's values.
type GrantedKey struct {
	Name   string
	Epoch  uint32
	Key    derive.VMKey
	Create bool
	LUKS   *LUKSPins
}

// Door is one connection's peer as its listener knows it, and who decides about it.
type Door struct {
	// Tier is the listener's; a request for another is refused.
	Tier string
	// Offer answers a challenge request: in tier vm the subject and the names that the domain's metadata offers.
	Offer func(ctx context.Context, subject string) (string, []string, error)
	// Decide checks peer, policy, evidence and instance, and writes the audit record: it returns a grant only if all of
	// it held and the record is on disk. A Refusal that it returns is already recorded.
	Decide func(ctx context.Context, c *Claim) (*Grant, error)
	// Acked takes an authenticated acknowledgement.
	Acked func(ctx context.Context, c *Claim, outcomes []Outcome) error
	// Refused records what the protocol itself refuses, before or after Decide; claim holds what was read of it.
	Refused func(ctx context.Context, c *Claim, r Refusal)
	// Hints wakes a receiver that waits on /v1/events; nil never does.
	Hints <-chan struct{}
}

// Issuer serves the release protocol. It is safe for concurrent use; each connection is one call of Serve.
type Issuer struct {
	// Identity is the realm's public key; Sign signs tuple.Encode(label, fields...) with its secret half. Both required.
	Identity ed25519.PublicKey
	Sign     func(ctx context.Context, label string, fields ...[]byte) ([]byte, error)
	// Log takes connection troubles. Required.
	Log *slog.Logger
}

// Serve answers one receiver on conn until it is done or ctx ends, and closes conn. Everything from the peer is bounded in
// size and time. A request that has come when ctx ends is answered; one that is still on its way has a second to arrive.
func (i *Issuer) Serve(ctx context.Context, conn net.Conn, door Door) error {
	s := &issuerSession{issuer: i, door: door, ending: ctx.Done(), deciding: make(chan struct{}, 1)}
	closed := make(chan struct{})
	var asked atomic.Bool // something, ever
	server := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaders,
		ErrorLog:          slog.NewLogLogger(i.Log.Handler(), slog.LevelDebug),
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateActive:
				asked.Store(true)
			case http.StateClosed:
				close(closed)
			}
		},
	}
	listener := &oneConn{conn: conn, closed: closed, ended: make(chan struct{})}
	shut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(shut)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
		defer cancel()
		go s.giveUp(grace, cancel)
		if !asked.Load() || server.Shutdown(grace) != nil {
			server.Close()
		}
	})
	defer func() {
		if !stop() {
			<-shut
		}
	}()
	if err := server.Serve(listener); !errors.Is(err, errServed) && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	if untaken := listener.take(); untaken != nil { // ctx ended first
		return untaken.Close()
	}
	<-closed
	return nil
}

// giveUp ends the grace of a session that its receiver alone keeps open, by a request that it does not finish or an answer that it
// does not take: a stranger must not hold up the broker's end. What is being decided is waited for.
func (s *issuerSession) giveUp(grace context.Context, end func()) {
	pause(grace, lateTime)
	select {
	case s.deciding <- struct{}{}:
		<-s.deciding
	case <-grace.Done():
	}
	pause(grace, lateTime)
	end()
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// oneConn is a listener with one connection, which ends when that one does, or when the server is told to.
type oneConn struct {
	conn   net.Conn
	taken  sync.Once
	closed <-chan struct{} // the connection is

	closing sync.Once
	ended   chan struct{}
}

var errServed = errors.New("the one connection is closed")

// take returns the connection once, and then nil.
func (l *oneConn) take() (conn net.Conn) {
	l.taken.Do(func() { conn = l.conn })
	return conn
}

func (l *oneConn) Accept() (net.Conn, error) {
	if conn := l.take(); conn != nil {
		return conn, nil
	}
	select {
	case <-l.closed:
	case <-l.ended:
	}
	return nil, errServed
}

// Close lets Accept return: net/http's Shutdown waits for that before it does anything else.
func (l *oneConn) Close() error {
	l.closing.Do(func() { close(l.ended) })
	return nil
}

func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// issuerSession is the state of one connection: the one outstanding nonce, and the release that waits for its
// acknowledgement. HTTP/1.1 serves a connection's requests one after the other, so it needs no lock.
type issuerSession struct {
	issuer   *Issuer
	door     Door
	ending   <-chan struct{} // no request waits beyond this
	deciding chan struct{}   // full while a request that has come is looked at

	nonce   []byte // nil: none outstanding
	nonceAt time.Time

	acked  *Claim // the last release, until it is acknowledged
	ackKey []byte
}

func (s *issuerSession) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/challenge", s.answer(s.challenge))
	mux.HandleFunc("POST /v1/release", s.answer(s.release))
	mux.HandleFunc("POST /v1/ack", s.answer(s.ack))
	mux.HandleFunc("GET /v1/events", s.events)
	return mux
}

// answer reads a bounded body, and writes what f makes of it: JSON, nothing (204), or a refusal.
func (s *issuerSession) answer(f func(ctx context.Context, body []byte) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
		holdOpen(w, decideTimeout)
		var v any
		if err != nil {
			err = s.unreadable(r.Context(), err)
		} else {
			v, err = s.guarded(r.Context(), body, f)
		}
		if err != nil {
			writeRefusal(w, AsRefusal(err))
			return
		}
		if v == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		writeJSON(w, http.StatusOK, v)
	}
}

func (s *issuerSession) unreadable(ctx context.Context, err error) error {
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return s.refuse(ctx, nil, Refusal{Code: CodeTooLarge, Reason: fmt.Sprintf("a request of more than %d octets", MaxBody)})
	}
	return s.refuse(ctx, nil, Refusal{Code: CodeMalformed, Reason: "the request's body could not be read", Cause: err})
}

// guarded turns a panic into a refusal: whatever a guest sends, the broker lives on.
func (s *issuerSession) guarded(ctx context.Context, body []byte, f func(context.Context, []byte) (any, error)) (v any, err error) {
	s.deciding <- struct{}{}
	defer func() { <-s.deciding }()
	defer func() {
		if p := recover(); p != nil {
			v, err = nil, s.refuse(ctx, nil, Refusal{Code: CodeInternal, Cause: fmt.Errorf("panic: %v", p)})
		}
	}()
	return f(ctx, body)
}

// refuse records a refusal that is the protocol's own, not Decide's.
func (s *issuerSession) refuse(ctx context.Context, c *Claim, r Refusal) error {
	if c == nil {
		c = &Claim{Tier: s.door.Tier}
	}
	s.door.Refused(ctx, c, r)
	return r
}

func (s *issuerSession) challenge(ctx context.Context, body []byte) (any, error) {
	var request challengeRequest
	if err := parse(body, &request); err != nil {
		return nil, s.refuse(ctx, nil, malformed("challenge", err))
	}
	if request.Tier != s.door.Tier {
		return nil, s.refuse(ctx, nil, s.wrongTier())
	}
	if request.Subject != "" && derive.CheckSubject(request.Subject) != nil {
		return nil, s.refuse(ctx, nil, Refusal{Code: CodeMalformed, Reason: "challenge: a subject that is not a UUID in lower case"})
	}
	subject, offered, err := s.door.Offer(ctx, request.Subject)
	if err != nil {
		return nil, s.refuse(ctx, &Claim{Tier: request.Tier, Subject: request.Subject}, AsRefusal(err))
	}
	s.nonce, s.nonceAt = make([]byte, nonceSize), time.Now()
	rand.Read(s.nonce)
	if offered == nil {
		offered = []string{}
	}
	return Challenge{Issuer: Octets(s.issuer.Identity), Nonce: s.nonce, Subject: subject, Offered: offered}, nil
}

func (s *issuerSession) wrongTier() Refusal {
	return Refusal{Code: CodeWrongTier, Reason: fmt.Sprintf("this connection is of tier %q", s.door.Tier)}
}

func (s *issuerSession) release(ctx context.Context, body []byte) (any, error) {
	nonce, age := s.takeNonce() // used up from here on, whatever follows
	var request releaseRequest
	if err := parse(body, &request); err != nil {
		return nil, s.refuse(ctx, nil, malformed("release", err))
	}
	c, err := s.claim(&request, nonce, age)
	if err != nil {
		return nil, s.refuse(ctx, c, AsRefusal(err))
	}
	grant, err := s.door.Decide(ctx, c)
	if err != nil {
		return nil, AsRefusal(err)
	}
	answer, err := s.sealed(ctx, c, grant, request.PK)
	if err != nil {
		return nil, s.refuse(ctx, c, AsRefusal(err))
	}
	return answer, nil
}

func (s *issuerSession) takeNonce() ([]byte, time.Duration) {
	nonce := s.nonce
	s.nonce = nil
	return nonce, time.Since(s.nonceAt)
}

// claim holds a request to the protocol's form and computes T from the issuer's own identity and nonce.
func (s *issuerSession) claim(r *releaseRequest, nonce []byte, age time.Duration) (*Claim, error) {
	c := &Claim{Tier: s.door.Tier}
	switch {
	case subtle.ConstantTimeCompare(r.Issuer, s.issuer.Identity) != 1:
		return c, Refusal{Code: CodeWrongIssuer, Reason: "the request names another issuer", Next: "take `keybroker identity` as the pin"}
	case nonce == nil || subtle.ConstantTimeCompare(r.Nonce, nonce) != 1:
		return c, Refusal{Code: CodeBadNonce, Reason: "not this connection's outstanding nonce"}
	case age > nonceLife:
		return c, Refusal{Code: CodeExpiredNonce, Reason: fmt.Sprintf("the nonce is older than %v", nonceLife)}
	case r.Tier != s.door.Tier:
		return c, s.wrongTier()
	case derive.CheckSubject(r.Subject) != nil:
		return c, Refusal{Code: CodeMalformed, Reason: "release: a subject that is not a UUID in lower case"}
	case !plainKind.MatchString(r.Kind):
		return c, Refusal{Code: CodeMalformed, Reason: "release: a kind of evidence that is no name"}
	case len(r.PK) != receiverSize:
		return c, Refusal{Code: CodeMalformed, Reason: fmt.Sprintf("release: a public key of %d octets, expected %d", len(r.PK), receiverSize)}
	}
	if err := checkWant(r.Want); err != nil {
		return c, malformed("release", err)
	}
	full := transcriptFields{issuer: s.issuer.Identity, tier: r.Tier, kind: r.Kind, subject: r.Subject, nonce: nonce, pk: r.PK, want: r.Want}
	return &Claim{
		Tier: r.Tier, Kind: r.Kind, Subject: r.Subject, Transcript: full.transcript(),
		Receiver: sha256.Sum256(r.PK), Want: r.Want, Evidence: r.Evidence,
	}, nil
}

// sealed makes the answer: the bundle, sealed to the receiver and signed within the session.
func (s *issuerSession) sealed(ctx context.Context, c *Claim, g *Grant, pk []byte) (*releaseAnswer, error) {
	plain, err := bundleOf(c, g)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	enc, ct, ackKey, err := seal(pk, c.Transcript, plain)
	if err != nil {
		return nil, malformed("release", err)
	}
	sig, err := s.issuer.Sign(ctx, derive.LabelRelease, c.Transcript[:], enc, ct)
	if err != nil {
		return nil, fmt.Errorf("signing the answer: %w", err)
	}
	s.acked, s.ackKey = c, ackKey
	return &releaseAnswer{Enc: enc, CT: ct, Sig: sig}, nil
}

// bundleOf encodes the grant and wipes its keys.
func bundleOf(c *Claim, g *Grant) ([]byte, error) {
	b := bundle{Subject: c.Subject, Tier: c.Tier, Keys: make([]bundleKey, len(g.Keys))}
	for n, k := range g.Keys {
		defer k.Key.Wipe()
		octets, err := k.Key.Octets()
		if err != nil {
			return nil, fmt.Errorf("key %q: %w", k.Name, err)
		}
		b.Keys[n] = bundleKey{Name: k.Name, Epoch: k.Epoch, Key: octets, Create: k.Create, LUKS: k.LUKS}
	}
	return marshal(b), nil
}

func (s *issuerSession) ack(ctx context.Context, body []byte) (any, error) {
	var request ackRequest
	if err := parse(body, &request); err != nil {
		return nil, s.refuse(ctx, nil, malformed("ack", err))
	}
	c := s.acked
	if c == nil || !hmac.Equal(request.MAC, ackMAC(s.ackKey, c.Transcript, request.Body)) {
		return nil, s.refuse(ctx, c, Refusal{Code: CodeMalformed, Reason: "ack: not of this connection's last release"})
	}
	var outcomes []Outcome
	if err := parse(request.Body, &outcomes); err != nil || len(outcomes) > MaxWant {
		return nil, s.refuse(ctx, c, Refusal{Code: CodeMalformed, Reason: "ack: a body that is not a list of outcomes", Cause: err})
	}
	for n := range outcomes {
		outcomes[n].Sink = plain.Short(outcomes[n].Sink, maxShown)
	}
	if err := s.door.Acked(ctx, c, outcomes); err != nil {
		return nil, AsRefusal(err)
	}
	s.acked, s.ackKey = nil, nil
	return nil, nil
}

// events holds the request until there is a reason to ask again (200), or for a minute (204).
func (s *issuerSession) events(w http.ResponseWriter, r *http.Request) {
	holdOpen(w, hintTimeout)
	wait := time.NewTimer(hintTimeout)
	defer wait.Stop()
	select {
	case <-s.door.Hints:
		writeJSON(w, http.StatusOK, Hint{Event: HintAskAgain})
	case <-wait.C:
		w.WriteHeader(http.StatusNoContent)
	case <-s.ending:
		w.WriteHeader(http.StatusNoContent)
	case <-r.Context().Done():
	}
}

// holdOpen gives an answer its time, for reading too: net/http would take the request's own deadline for the client's end.
func holdOpen(w http.ResponseWriter, d time.Duration) {
	c, until := http.NewResponseController(w), time.Now().Add(d+writeTimeout)
	c.SetReadDeadline(until)
	c.SetWriteDeadline(until)
}

// HintAskAgain says that something changed at the issuer: ask again for what is missing.
const HintAskAgain = "ask-again"

// Hint is an answer of /v1/events: unsigned, and never obeyed beyond asking again.
type Hint struct {
	Event string `json:"event"`
}

func writeRefusal(w http.ResponseWriter, r Refusal) { writeJSON(w, r.Code.HTTPStatus(), r) }

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("inject: encoding %T: %v", v, err))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(b) // the peer may be gone; it will ask again
}
