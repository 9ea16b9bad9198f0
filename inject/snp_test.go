package inject

import (
	"context"
	"crypto/sha256"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
)

// attested is an issuer that releases to SNP guests whose evidence holds, and a guest with its firmware.
type attested struct {
	*issuer
	guest    *snptest.Guest
	verdicts []*attest.Verdict
}

func newAttested(t *testing.T) *attested {
	t.Helper()
	authority, err := snptest.New(snp.Genoa)
	if err != nil {
		t.Fatal(err)
	}
	guest, err := authority.NewGuest(web1)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := snp.New(snp.Config{Roots: []snp.Root{authority.Root()}})
	if err != nil {
		t.Fatal(err)
	}
	a := &attested{issuer: newIssuer(t, 1), guest: guest}
	policy := guest.Accepting()
	a.door.Tier = TierSNP
	a.door.Offer = func(_ context.Context, subject string) (string, []string, error) { return subject, nil, nil }
	a.door.Decide = func(ctx context.Context, c *Claim) (*Grant, error) {
		if c.Kind != KindSNP {
			return nil, Refusal{Code: CodeWrongKind}
		}
		verdict := verifier.Appraise(snp.Request{
			Evidence: attest.Evidence{Kind: c.Kind, Octets: c.Evidence}, ReportData: c.Transcript[:], Policy: policy, At: time.Now(),
		})
		a.verdicts = append(a.verdicts, verdict)
		if !verdict.Pass() {
			return nil, Refusal{Code: CodeBadEvidence}
		}
		return a.decide(ctx, c)
	}
	return a
}

// evidence is what an honest agent sends.
func (a *attested) evidence(t *testing.T, data Transcript) []byte {
	t.Helper()
	report, err := a.guest.Report(data)
	if err != nil {
		t.Fatal(err)
	}
	return append(report, a.guest.Table()...)
}

// receiver is an honest agent's, whose evidence goes through change.
func (a *attested) receiver(t *testing.T, change func(Transcript, []byte) []byte) *Receiver {
	r := newReceiver(t, a.Identity)
	r.Tier, r.Subject = TierSNP, web1
	r.Attest = func(_ context.Context, data Transcript) ([]byte, error) {
		return change(data, a.evidence(t, data)), nil
	}
	return r
}

func honest(_ Transcript, evidence []byte) []byte { return evidence }

// release asks for one key in a session of its own.
func (a *attested) release(t *testing.T, r *Receiver) (*Delivery, error) {
	t.Helper()
	s, ctx := r.on(t, a.connect(t)), testContext(t)
	c, err := s.Challenge(ctx)
	if err != nil {
		return nil, err
	}
	return s.Release(ctx, c, []Want{{Name: "disk"}})
}

// failing are the claims that did not hold in the last verdict.
func (a *attested) failing() (names []string) {
	for _, c := range a.verdicts[len(a.verdicts)-1].Failures() {
		names = append(names, c.Name)
	}
	return names
}

func TestAttestedRelease(t *testing.T) {
	a := newAttested(t)
	r := a.receiver(t, honest)
	d, err := a.release(t, r)
	if err != nil {
		t.Fatalf("%v: failing %q", err, a.failing())
	}
	c := a.claims[0]
	if d.Subject != web1 || c.Tier != TierSNP || c.Kind != KindSNP || c.Receiver != sha256.Sum256(r.Key.secret.PublicKey().Bytes()) {
		t.Errorf("delivered for %q after claim %+v", d.Subject, c)
	}
	if err := d.Ack(testContext(t), []Outcome{{Name: "disk", Epoch: 1, OK: true}}); err != nil || len(a.acked) != 1 {
		t.Errorf("acknowledging: %v", err)
	}
	if _, err := a.release(t, r); err != nil { // the same receiver again, with a fresh report
		t.Error(err)
	}
}

// A genuine report serves in the session that it was made for, and for the receiver's key of that session, and nowhere else.
func TestEvidenceOfAnotherSession(t *testing.T) {
	a := newAttested(t)
	recorded, other := []byte(nil), Transcript{}
	first := a.receiver(t, func(data Transcript, e []byte) []byte {
		recorded, other = e, data
		return e
	})
	if _, err := a.release(t, first); err != nil {
		t.Fatal(err)
	}
	thief := a.receiver(t, func(Transcript, []byte) []byte { return recorded })
	for name, r := range map[string]*Receiver{
		"replayed, same receiver":    {Tier: TierSNP, Subject: web1, Pins: first.Pins, Key: first.Key, Attest: thief.Attest},
		"spliced onto another key":   thief,
		"REPORT_DATA of other nonce": a.receiver(t, func(Transcript, []byte) []byte { return a.evidence(t, other) }),
		"REPORT_DATA changed": a.receiver(t, func(data Transcript, _ []byte) []byte {
			changed := slices.Clone(recorded)
			copy(changed[0x50:], data[:])
			return changed
		}),
	} {
		if _, err := a.release(t, r); !errors.Is(err, Refusal{Code: CodeBadEvidence}) {
			t.Errorf("%s: %v, expected %s", name, err, CodeBadEvidence)
		}
		want := "report-data"
		if name == "REPORT_DATA changed" {
			want = "signature"
		}
		if f := a.failing(); len(f) != 1 || f[0] != want {
			t.Errorf("%s: failing %q, expected %s alone", name, f, want)
		}
	}
	if len(a.claims) != 1 {
		t.Errorf("%d releases, expected 1", len(a.claims))
	}
}

// A relay that puts its own public key into a request gets nothing: the report is of the guest's.
func TestRelayCannotPutItsOwnKey(t *testing.T) {
	a := newAttested(t)
	mine, err := NewReceiverKey()
	if err != nil {
		t.Fatal(err)
	}
	r := a.receiver(t, honest)
	theirs := r.Key.secret.PublicKey().Bytes()
	from, to := Octets(theirs).String(), Octets(mine.secret.PublicKey().Bytes()).String()
	conn := &rewriter{Conn: a.connect(t), from: from, to: to}
	s, ctx := r.on(t, conn), testContext(t)
	c, err := s.Challenge(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Release(ctx, c, []Want{{Name: "disk"}}); !errors.Is(err, Refusal{Code: CodeBadEvidence}) || !conn.done {
		t.Errorf("another key in the request: %v, put there: %v", err, conn.done)
	}
}

// rewriter changes what passes, of the same length.
type rewriter struct {
	net.Conn
	from, to string
	done     bool
	held     []byte
}

func (w *rewriter) Write(p []byte) (int, error) {
	w.held = append(w.held, p...)
	text := string(w.held)
	if head, body, ok := strings.Cut(text, "\r\n\r\n"); !ok || !strings.Contains(head+"\r\n", "Content-Length: "+itoa(len(body))+"\r\n") {
		return len(p), nil // not all of it yet
	}
	w.held = nil
	w.done = w.done || strings.Contains(text, w.from)
	if _, err := w.Conn.Write([]byte(strings.ReplaceAll(text, w.from, w.to))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// A receiver in tier snp has no use for an answer that was made for another tier, signed by its own pin though it is.
func TestSNPReceiverTakesNoOtherTier(t *testing.T) {
	a := newAttested(t)
	a.door.Tier = TierVM
	r := a.receiver(t, honest)
	if _, err := a.release(t, r); !errors.Is(err, Refusal{Code: CodeWrongTier}) {
		t.Errorf("a door of tier vm: %v, expected %s", err, CodeWrongTier)
	}
	for name, c := range map[string]struct {
		transcript transcriptFields
		bundle     string
		want       error
	}{
		"the whole answer of tier vm": {transcriptFields{tier: TierVM, kind: KindNone}, TierVM, ErrSignature},
		"the kind of tier vm":         {transcriptFields{tier: TierSNP, kind: KindNone}, TierSNP, ErrSignature},
		"the bundle of tier vm":       {transcriptFields{tier: TierSNP, kind: KindSNP}, TierVM, ErrBundle},
	} {
		challenge := Challenge{Issuer: Octets(a.Identity), Nonce: make([]byte, nonceSize), Subject: web1, Offered: []string{}}
		pk, want := r.Key.secret.PublicKey().Bytes(), []Want{{Name: "disk"}}
		f := c.transcript
		f.issuer, f.subject, f.nonce, f.pk, f.want = a.Identity, web1, challenge.Nonce, pk, want
		enc, ct, _, err := seal(pk, f.transcript(), marshal(bundle{Subject: web1, Tier: c.bundle, Keys: []bundleKey{{Name: "disk", Epoch: 1, Key: make([]byte, 32)}}}))
		if err != nil {
			t.Fatal(err)
		}
		answer := marshal(releaseAnswer{Enc: enc, CT: ct, Sig: mustSign(t, a.issuer, f.transcript(), enc, ct)})
		s, ctx := r.on(t, replayer(t, challenge, answer)), testContext(t)
		got, err := s.Challenge(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Release(ctx, got, want); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, expected %v", name, err, c.want)
		}
	}
}

// Without evidence, or with more than a request holds, nothing is asked for.
func TestNoEvidenceNoRequest(t *testing.T) {
	a := newAttested(t)
	broken := errors.New("no firmware answers")
	for name, attest := range map[string]func(context.Context, Transcript) ([]byte, error){
		"none":     func(context.Context, Transcript) ([]byte, error) { return nil, broken },
		"too much": func(context.Context, Transcript) ([]byte, error) { return make([]byte, MaxEvidence+1), nil },
	} {
		r := a.receiver(t, honest)
		r.Attest = attest
		if _, err := a.release(t, r); !errors.Is(err, ErrEvidence) || name == "none" && !errors.Is(err, broken) {
			t.Errorf("%s: %v, expected ErrEvidence", name, err)
		}
	}
	if len(a.verdicts)+len(a.refused) != 0 {
		t.Error("something was asked for")
	}
	key := newReceiver(t).Key
	for name, r := range map[string]*Receiver{
		"snp without evidence":  {Tier: TierSNP, Subject: web1, Pins: []Pin{{}}, Key: key},
		"snp without a subject": {Tier: TierSNP, Pins: []Pin{{}}, Key: key, Attest: a.receiver(t, honest).Attest},
		"vm with evidence":      {Tier: TierVM, Pins: []Pin{{}}, Key: key, Attest: a.receiver(t, honest).Attest},
	} {
		if _, err := r.Session(nil); err == nil {
			t.Errorf("%s: began a session", name)
		}
	}
}

// The most evidence and the most keys fit into one request.
func TestLargestRequestFits(t *testing.T) {
	a := newAttested(t)
	r := a.receiver(t, func(_ Transcript, e []byte) []byte { return append(e, make([]byte, MaxEvidence-len(e))...) })
	s, ctx := r.on(t, a.connect(t)), testContext(t)
	c, err := s.Challenge(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var want []Want
	for n := range MaxWant {
		want = append(want, Want{Name: strings.Repeat("n", 61) + string([]byte{'a' + byte(n/26), 'a' + byte(n%26)}), Epoch: 4294967295})
	}
	if _, err := s.Release(ctx, c, want); errors.Is(err, Refusal{Code: CodeTooLarge}) || len(a.verdicts) != 1 {
		t.Errorf("%v, %d verdicts", err, len(a.verdicts))
	}
}
