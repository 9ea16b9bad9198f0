package inject

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/hpke"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"keybroker/derive"
	"keybroker/internal/octet"
	"keybroker/internal/plain"
)

// ReceiverKey is the HPKE key pair that a receiver makes once in a boot.
type ReceiverKey struct{ secret hpke.PrivateKey }

// NewReceiverKey makes a key pair. It blocks until the kernel's random number generator is ready (getrandom(2)).
func NewReceiverKey() (*ReceiverKey, error) {
	sk, err := kem().GenerateKey()
	if err != nil {
		return nil, fmt.Errorf("making the receiver's key pair: %w", err)
	}
	return &ReceiverKey{sk}, nil
}

// ParseReceiverKey reads what Octets returned.
func ParseReceiverKey(octets []byte) (*ReceiverKey, error) {
	sk, err := kem().NewPrivateKey(octets)
	if err != nil {
		return nil, errors.New("reading the receiver's key pair: not a key of this version")
	}
	return &ReceiverKey{sk}, nil
}

// Octets returns the secret half, for a file that only root reads.
func (k *ReceiverKey) Octets() ([]byte, error) { return k.secret.Bytes() }

// Format shows nothing of the key, with any verb.
func (*ReceiverKey) Format(f fmt.State, _ rune) { io.WriteString(f, "[receiver key]") }

// Pin is an issuer's public key that a receiver trusts, written "ed25519:" and base64url.
type Pin [ed25519.PublicKeySize]byte

const pinPrefix = "ed25519:"

// ParsePin reads a pin as `keybroker identity` prints it.
func ParsePin(s string) (Pin, error) {
	text, ok := strings.CutPrefix(s, pinPrefix)
	b, err := octet.ParseBase64(text)
	if !ok || err != nil || len(b) != ed25519.PublicKeySize {
		return Pin{}, fmt.Errorf("pin %q: expected %q and 43 characters of base64url, as `keybroker identity` prints it", plain.Short(s, maxShown), pinPrefix)
	}
	return Pin(b), nil
}

// PinOf returns the pin of a public key.
func PinOf(public ed25519.PublicKey) Pin { return Pin(public) }

// String returns the form that ParsePin reads.
func (p Pin) String() string { return pinPrefix + octet.Base64(p[:]).String() }

// Receiver is who asks: the guest agent. Its fields are not changed while it is in use.
type Receiver struct {
	Tier    string       // required
	Subject string       // required in tier snp; "" in tier vm: the issuer's look-up is taken
	Pins    []Pin        // 1 to 4 issuers; without one it refuses
	Key     *ReceiverKey // required
	// Attest makes the evidence for one release: in tier snp a report whose REPORT_DATA is t, at most MaxEvidence octets.
	// Required there, and nil in tier vm. It is asked anew for each release, and ctx is that release's.
	Attest func(ctx context.Context, t Transcript) ([]byte, error)
}

// What a receiver refuses to believe.
var (
	ErrNotPinned = errors.New("the issuer is none of the pinned ones")
	ErrSubject   = errors.New("the issuer takes this machine for another")
	ErrSignature = errors.New("the answer is not signed by the pinned issuer in this session")
	ErrBundle    = errors.New("the answer does not hold what was asked for")
)

// ErrEvidence: the receiver has no evidence to show. Nothing was asked for.
var ErrEvidence = errors.New("no evidence")

// Session is a receiver's side of one connection. It is not for concurrent use.
type Session struct {
	receiver *Receiver
	conn     net.Conn
	in       *bufio.Reader
}

// Session begins on conn, on which the issuer serves. The caller closes conn.
func (r *Receiver) Session(conn net.Conn) (*Session, error) {
	if len(r.Pins) == 0 || len(r.Pins) > 4 {
		return nil, fmt.Errorf("%d pins, expected 1 to 4: without the issuer's public key nothing is fetched", len(r.Pins))
	}
	if r.Key == nil || r.Tier == "" {
		return nil, errors.New("a receiver needs a tier and a key pair")
	}
	if r.Tier == TierSNP && (r.Attest == nil || r.Subject == "") {
		return nil, errors.New("a receiver in tier snp needs its subject and something that attests it")
	}
	if r.Tier == TierVM && r.Attest != nil {
		return nil, errors.New("a receiver in tier vm has no evidence")
	}
	return &Session{receiver: r, conn: conn, in: bufio.NewReader(conn)}, nil
}

// kind is of which kind its evidence is.
func (r *Receiver) kind() string {
	if r.Attest == nil {
		return KindNone
	}
	return KindSNP
}

// evidence is what r shows for session t.
func (r *Receiver) evidence(ctx context.Context, t Transcript) ([]byte, error) {
	if r.Attest == nil {
		return nil, nil
	}
	evidence, err := r.Attest(ctx, t)
	if err == nil && len(evidence) > MaxEvidence {
		err = fmt.Errorf("%d octets, expected at most %d", len(evidence), MaxEvidence)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	return evidence, nil
}

// Challenge asks the issuer who it is and who it takes this machine for. It returns ErrNotPinned or ErrSubject, saying what
// was expected, when the answer is not the receiver's own; then the receiver goes on waiting.
func (s *Session) Challenge(ctx context.Context) (*Challenge, error) {
	body, err := s.post(ctx, "/v1/challenge", marshal(challengeRequest{Tier: s.receiver.Tier, Subject: s.receiver.Subject}))
	if err != nil {
		return nil, err
	}
	var c Challenge
	if err := parse(body, &c); err != nil {
		return nil, fmt.Errorf("reading the challenge: %w", err)
	}
	if len(c.Issuer) != ed25519.PublicKeySize || len(c.Nonce) != nonceSize || len(c.Offered) > MaxWant {
		return nil, errors.New("reading the challenge: fields of the wrong length")
	}
	if !slices.Contains(s.receiver.Pins, Pin(c.Issuer)) {
		return nil, fmt.Errorf("%w: expected %v, got %v", ErrNotPinned, s.receiver.Pins, Pin(c.Issuer))
	}
	if derive.CheckSubject(c.Subject) != nil || (s.receiver.Subject != "" && c.Subject != s.receiver.Subject) {
		return nil, fmt.Errorf("%w: expected %q, got %q", ErrSubject, s.receiver.Subject, plain.Short(c.Subject, maxShown))
	}
	return &c, nil
}

// Release asks for keys within the challenge c, and believes the answer only if it is signed by the issuer that c named, opens
// with the receiver's key, and holds exactly what was wanted. A refusal comes back as a Refusal: a hint, never an order.
func (s *Session) Release(ctx context.Context, c *Challenge, want []Want) (*Delivery, error) {
	want = slices.Clone(want)
	SortWant(want)
	if err := checkWant(want); err != nil {
		return nil, err
	}
	r := s.receiver
	pk := r.Key.secret.PublicKey().Bytes()
	t := (&transcriptFields{issuer: ed25519.PublicKey(c.Issuer), tier: r.Tier, kind: r.kind(), subject: c.Subject, nonce: c.Nonce, pk: pk, want: want}).transcript()
	evidence, err := r.evidence(ctx, t)
	if err != nil {
		return nil, err
	}
	body, err := s.post(ctx, "/v1/release", marshal(releaseRequest{Issuer: c.Issuer, Tier: r.Tier, Kind: r.kind(), Subject: c.Subject, Nonce: c.Nonce, PK: pk, Want: want, Evidence: evidence}))
	if err != nil {
		return nil, err
	}
	var a releaseAnswer
	if err := parse(body, &a); err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if len(a.Enc) != encSize || len(a.Sig) != signatureSize || !ed25519.Verify(ed25519.PublicKey(c.Issuer), signed(t, a.Enc, a.CT), a.Sig) {
		return nil, ErrSignature
	}
	return s.delivery(c.Subject, t, want, &a)
}

func (s *Session) delivery(subject string, t Transcript, want []Want, a *releaseAnswer) (*Delivery, error) {
	plain, ackKey, err := open(s.receiver.Key.secret, t, a.Enc, a.CT)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	var b bundle
	if err := parse(plain, &b); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	d := &Delivery{Subject: subject, session: s, transcript: t, ackKey: ackKey, Keys: make([]DeliveredKey, len(b.Keys))}
	for n, k := range b.Keys {
		d.Keys[n] = DeliveredKey{Name: k.Name, Epoch: k.Epoch, Create: k.Create, LUKS: k.LUKS, octets: func() []byte { return k.Key }}
	}
	if err := b.check(subject, s.receiver.Tier, want); err != nil {
		d.Wipe()
		return nil, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	return d, nil
}

// check holds an opened bundle to the request: its own subject and tier, and the wanted names and epochs, one each.
func (b *bundle) check(subject, tier string, want []Want) error {
	if b.Subject != subject || b.Tier != tier {
		return errors.New("it is for another subject or tier")
	}
	if len(b.Keys) != len(want) {
		return fmt.Errorf("%d keys, asked for %d", len(b.Keys), len(want))
	}
	for n, k := range b.Keys {
		if k.Name != want[n].Name || k.Epoch == 0 || (want[n].Epoch != 0 && k.Epoch != want[n].Epoch) {
			return fmt.Errorf("key %d is not the one that was asked for", n+1)
		}
		if len(k.Key) != 32 && len(k.Key) != 64 {
			return fmt.Errorf("key %q of %d octets, expected 32 or 64", want[n].Name, len(k.Key))
		}
	}
	return nil
}

// DeliveredKey is a key as it arrived. It cannot be printed.
type DeliveredKey struct {
	Name   string
	Epoch  uint32
	Create bool      // a blank volume may be formatted with it
	LUKS   *LUKSPins // values that the volume's header must have; nil: the receiver's allow list alone decides
	octets func() []byte
}

// Octets returns the key itself, 32 or 64 octets, until Wipe clears them.
func (k *DeliveredKey) Octets() []byte { return k.octets() }

// Format shows the name and nothing of the key, with any verb.
func (k DeliveredKey) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "[key %s epoch %d]", k.Name, k.Epoch)
}

// Delivery is a believed answer.
type Delivery struct {
	Subject string
	Keys    []DeliveredKey // in the order of the names, as wanted

	session    *Session
	transcript Transcript
	ackKey     []byte
}

// Ack tells the issuer what became of the keys. The keys may be wiped before.
func (d *Delivery) Ack(ctx context.Context, outcomes []Outcome) error {
	body := marshal(outcomes)
	_, err := d.session.post(ctx, "/v1/ack", marshal(ackRequest{Body: body, MAC: ackMAC(d.ackKey, d.transcript, body)}))
	return err
}

// Wipe clears the keys' octets.
func (d *Delivery) Wipe() {
	for _, k := range d.Keys {
		clear(k.octets())
	}
}

// Wait waits for a hint that asking again may help, for a minute at most, and reports whether one came.
func (s *Session) Wait(ctx context.Context) (hinted bool, err error) {
	body, err := s.do(ctx, http.MethodGet, "/v1/events", nil)
	if err != nil || len(body) == 0 {
		return false, err
	}
	var h Hint
	if err := parse(body, &h); err != nil {
		return false, fmt.Errorf("reading a hint: %w", err)
	}
	return h.Event == HintAskAgain, nil
}

func (s *Session) post(ctx context.Context, path string, body []byte) ([]byte, error) {
	return s.do(ctx, http.MethodPost, path, body)
}

// do is one request on the connection. The caller's ctx bounds it.
func (s *Session) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { s.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	request, err := http.NewRequest(method, "http://keybroker"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if err := request.Write(s.conn); err != nil {
		return nil, errors.Join(ctx.Err(), fmt.Errorf("asking the issuer: %w", err))
	}
	response, err := http.ReadResponse(s.in, request)
	if err != nil {
		return nil, errors.Join(ctx.Err(), fmt.Errorf("reading the issuer's answer: %w", err))
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(response.Body, MaxBody+1))
	if err != nil {
		return nil, errors.Join(ctx.Err(), fmt.Errorf("reading the issuer's answer: %w", err))
	}
	return answer, answerError(response.StatusCode, answer)
}

// answerError makes a refusal of an answer that is none. It is shown, so it is bounded and made printable.
func answerError(status int, body []byte) error {
	if len(body) > MaxBody {
		return fmt.Errorf("the issuer's answer is over %d octets", MaxBody)
	}
	if status == http.StatusOK || status == http.StatusNoContent {
		return nil
	}
	var r Refusal
	if err := parse(body, &r); err != nil || r.Code == "" {
		return fmt.Errorf("the issuer answered with status %d and no reason", status)
	}
	shown := func(s string) string { return plain.Short(s, maxShown) }
	return Refusal{Code: Code(shown(string(r.Code))), Reason: shown(r.Reason), Rule: shown(r.Rule), Next: shown(r.Next)}
}
