package inject

import (
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"keybroker/derive"
	"keybroker/internal/tuple"
)

const web1 = "11111111-2222-3333-4444-555555555555"

// issuer is a broker's side for tests: the real key schedule, and an open door.
type issuer struct {
	*Issuer
	schedule *derive.Schedule
	door     Door
	refused  []Code
	acked    []Outcome
	claims   []Claim
}

func newIssuer(t *testing.T, master byte) *issuer {
	t.Helper()
	octets := make([]byte, 32)
	for n := range octets {
		octets[n] = master + byte(n)
	}
	m, err := derive.NewMaster(octets)
	if err != nil {
		t.Fatal(err)
	}
	s, err := derive.NewSchedule(m)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{schedule: s}
	i.Issuer = &Issuer{
		Identity: s.Identity(),
		Sign: func(_ context.Context, label string, fields ...[]byte) ([]byte, error) {
			return s.Sign(label, fields...)
		},
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	i.door = Door{
		Tier:    TierVM,
		Offer:   func(context.Context, string) (string, []string, error) { return web1, []string{"disk"}, nil },
		Decide:  i.decide,
		Acked:   func(_ context.Context, _ *Claim, o []Outcome) error { i.acked = o; return nil },
		Refused: func(_ context.Context, _ *Claim, r Refusal) { i.refused = append(i.refused, r.Code) },
	}
	return i
}

func (i *issuer) decide(_ context.Context, c *Claim) (*Grant, error) {
	i.claims = append(i.claims, *c)
	g := &Grant{}
	for _, w := range c.Want {
		epoch := max(w.Epoch, 1)
		k, err := i.schedule.VMKey(derive.VMKeyID{Tier: c.Tier, Subject: c.Subject, Name: w.Name, Epoch: epoch, Length: 32})
		if err != nil {
			return nil, err
		}
		g.Keys = append(g.Keys, GrantedKey{Name: w.Name, Epoch: epoch, Key: k, Create: true, LUKS: &LUKSPins{Cipher: "aes-xts-plain64"}})
	}
	return g, nil
}

// connect serves the issuer on one end of a pipe and returns the other, which ends with the test.
func (i *issuer) connect(t *testing.T) net.Conn {
	t.Helper()
	theirs, ours := net.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Serve(ctx, theirs, i.door) }()
	t.Cleanup(func() {
		ours.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return ours
}

func newReceiver(t *testing.T, pins ...ed25519.PublicKey) *Receiver {
	t.Helper()
	k, err := NewReceiverKey()
	if err != nil {
		t.Fatal(err)
	}
	r := &Receiver{Tier: TierVM, Key: k}
	for _, p := range pins {
		r.Pins = append(r.Pins, PinOf(p))
	}
	return r
}

func (r *Receiver) on(t *testing.T, conn net.Conn) *Session {
	t.Helper()
	s, err := r.Session(conn)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestReleaseAndAck(t *testing.T) {
	i := newIssuer(t, 1)
	r := newReceiver(t, i.Identity)
	s := r.on(t, i.connect(t))
	ctx := testContext(t)
	c, err := s.Challenge(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if c.Subject != web1 || len(c.Offered) != 1 {
		t.Fatalf("challenge: subject %q, offered %q", c.Subject, c.Offered)
	}
	d, err := s.Release(ctx, c, []Want{{Name: "disk"}, {Name: "app", Epoch: 3}})
	if err != nil {
		t.Fatal(err)
	}
	for n, want := range []struct {
		name  string
		epoch uint32
	}{{"app", 3}, {"disk", 1}} {
		k, err := i.schedule.VMKey(derive.VMKeyID{Tier: TierVM, Subject: web1, Name: want.name, Epoch: want.epoch, Length: 32})
		if err != nil {
			t.Fatal(err)
		}
		octets, _ := k.Octets()
		if got := d.Keys[n]; got.Name != want.name || got.Epoch != want.epoch || string(got.Octets()) != string(octets) || !got.Create {
			t.Errorf("key %d: %v, expected %s epoch %d as the schedule derives it", n, got, want.name, want.epoch)
		}
	}
	d.Wipe()
	if string(d.Keys[0].Octets()) != string(make([]byte, 32)) {
		t.Error("Wipe left the key")
	}
	outcomes := []Outcome{{Name: "disk", Epoch: 1, Sink: "luks /dev/vdb\x1b[2J", OK: true, Opened: true}}
	if err := d.Ack(ctx, outcomes); err != nil {
		t.Fatal(err)
	}
	if len(i.acked) != 1 || !i.acked[0].Opened || strings.ContainsRune(i.acked[0].Sink, 0x1b) {
		t.Errorf("acknowledged %+v, expected one outcome without control characters", i.acked)
	}
	if err := d.Ack(ctx, outcomes); err == nil {
		t.Error("an acknowledgement was taken twice")
	}
}

// A second release on the same connection needs a new challenge: a nonce serves once, whatever became of it.
func TestNonceServesOnce(t *testing.T) {
	i := newIssuer(t, 1)
	s := newReceiver(t, i.Identity).on(t, i.connect(t))
	ctx := testContext(t)
	c, err := s.Challenge(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Release(ctx, c, []Want{{Name: "disk"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Release(ctx, c, []Want{{Name: "disk"}}); !errors.Is(err, Refusal{Code: CodeBadNonce}) {
		t.Errorf("a used nonce: %v, expected %s", err, CodeBadNonce)
	}
	// a nonce of another connection
	other := newReceiver(t, i.Identity).on(t, i.connect(t))
	c, err = other.Challenge(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Release(ctx, c, []Want{{Name: "disk"}}); !errors.Is(err, Refusal{Code: CodeBadNonce}) {
		t.Errorf("another connection's nonce: %v, expected %s", err, CodeBadNonce)
	}
	if want := []Code{CodeBadNonce, CodeBadNonce}; len(i.refused) != 2 || i.refused[0] != want[0] || i.refused[1] != want[1] {
		t.Errorf("recorded refusals %v, expected %v", i.refused, want)
	}
}

func TestReceiverBelievesOnlyItsPin(t *testing.T) {
	real, impostor := newIssuer(t, 1), newIssuer(t, 2)
	ctx := testContext(t)

	if _, err := newReceiver(t, real.Identity).on(t, impostor.connect(t)).Challenge(ctx); !errors.Is(err, ErrNotPinned) {
		t.Errorf("another issuer: %v, expected ErrNotPinned", err)
	}
	// it claims the pinned identity and signs with its own
	impostor.Identity = real.Identity
	s := newReceiver(t, real.Identity).on(t, impostor.connect(t))
	c, err := s.Challenge(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Release(ctx, c, []Want{{Name: "disk"}}); !errors.Is(err, ErrSignature) {
		t.Errorf("an impostor's answer: %v, expected ErrSignature", err)
	}
	if _, err := (&Receiver{Tier: TierVM, Key: newReceiver(t).Key}).Session(nil); err == nil {
		t.Error("a receiver without a pin began a session")
	}
	r := newReceiver(t, real.Identity)
	r.Subject = "99999999-2222-3333-4444-555555555555"
	if _, err := r.on(t, real.connect(t)).Challenge(ctx); !errors.Is(err, ErrSubject) {
		t.Errorf("taken for another machine: %v, expected ErrSubject", err)
	}
}

// replayer answers every request with what another session got.
func replayer(t *testing.T, challenge Challenge, answer []byte) net.Conn {
	theirs, ours := net.Pipe()
	go func() {
		defer theirs.Close()
		buffer := make([]byte, MaxBody)
		for _, body := range [][]byte{marshal(challenge), answer} {
			if _, err := readRequest(theirs, buffer); err != nil {
				return
			}
			io.WriteString(theirs, "HTTP/1.1 200 OK\r\nContent-Length: "+itoa(len(body))+"\r\n\r\n"+string(body))
		}
	}()
	t.Cleanup(func() { ours.Close() })
	return ours
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

func readRequest(c net.Conn, buffer []byte) (string, error) {
	got := ""
	for {
		n, err := c.Read(buffer)
		if err != nil {
			return "", err
		}
		got += string(buffer[:n])
		head, body, ok := strings.Cut(got, "\r\n\r\n")
		if ok && strings.Contains(head+"\r\n", "Content-Length: "+itoa(len(body))+"\r\n") {
			return got, nil
		}
	}
}

// An answer that was recorded in one session opens in no other, not even for the same receiver.
func TestRecordedAnswerIsWorthless(t *testing.T) {
	i := newIssuer(t, 1)
	r := newReceiver(t, i.Identity)
	ctx := testContext(t)
	t1 := Transcript{1}
	enc, ct, _, err := seal(r.Key.secret.PublicKey().Bytes(), t1, marshal(bundle{Subject: web1, Tier: TierVM}))
	if err != nil {
		t.Fatal(err)
	}
	sig, _ := i.schedule.Sign(derive.LabelRelease, t1[:], enc, ct)
	recorded := marshal(releaseAnswer{Enc: enc, CT: ct, Sig: sig})
	s := r.on(t, replayer(t, Challenge{Issuer: Octets(i.Identity), Nonce: make([]byte, 32), Subject: web1, Offered: []string{}}, recorded))
	c, err := s.Challenge(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Release(ctx, c, []Want{{Name: "disk"}}); !errors.Is(err, ErrSignature) {
		t.Errorf("a recorded answer: %v, expected ErrSignature", err)
	}
}

// What is signed in this very session must still be what was asked for.
func TestBundleMustMatch(t *testing.T) {
	key := make([]byte, 32)
	good := bundle{Subject: web1, Tier: TierVM, Keys: []bundleKey{{Name: "disk", Epoch: 1, Key: key}}}
	want := []Want{{Name: "disk"}}
	if err := good.check(web1, TierVM, want); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*bundle){
		"other subject": func(b *bundle) { b.Subject = strings.Replace(web1, "1", "2", 1) },
		"other tier":    func(b *bundle) { b.Tier = TierSNP },
		"no key":        func(b *bundle) { b.Keys = nil },
		"other name":    func(b *bundle) { b.Keys = []bundleKey{{Name: "app", Epoch: 1, Key: key}} },
		"epoch 0":       func(b *bundle) { b.Keys = []bundleKey{{Name: "disk", Key: key}} },
		"short key":     func(b *bundle) { b.Keys = []bundleKey{{Name: "disk", Epoch: 1, Key: key[:31]}} },
		"one too many":  func(b *bundle) { b.Keys = append(b.Keys, bundleKey{Name: "app", Epoch: 1, Key: key}) },
	} {
		b := good
		change(&b)
		if err := b.check(web1, TierVM, want); err == nil {
			t.Errorf("%s: believed", name)
		}
	}
	if err := good.check(web1, TierVM, []Want{{Name: "disk", Epoch: 2}}); err == nil {
		t.Error("epoch 1 believed where epoch 2 was asked for")
	}
}

// DO NOT CHANGE: receivers in the field compute the same digest.
func TestTranscriptGolden(t *testing.T) {
	s := transcriptFields{
		issuer: make([]byte, 32), tier: TierVM, kind: KindNone, subject: web1,
		nonce: []byte(strings.Repeat("\x01", 32)), pk: []byte(strings.Repeat("\x02", receiverSize)),
		want: []Want{{Name: "app", Epoch: 2}, {Name: "disk"}},
	}
	got := s.transcript()
	const want = "36143281ae942eb761c7104692f87711f0fc13b76dadd1675c507095c3f3967bcf7f4fd33b8ad42ad039fe90c8eb2acfe16045040771238980f7eaba7e81687c"
	if hex.EncodeToString(got[:]) != want {
		t.Errorf("T = %x, want %s", got, want)
	}
	base := got
	for name, change := range map[string]func(*transcriptFields){
		"issuer":  func(s *transcriptFields) { s.issuer = append([]byte{1}, s.issuer[1:]...) },
		"tier":    func(s *transcriptFields) { s.tier = TierSNP },
		"kind":    func(s *transcriptFields) { s.kind = "snp-report" },
		"subject": func(s *transcriptFields) { s.subject = "x" },
		"nonce":   func(s *transcriptFields) { s.nonce = s.nonce[1:] },
		"pk":      func(s *transcriptFields) { s.pk = s.pk[1:] },
		"want":    func(s *transcriptFields) { s.want = s.want[1:] },
		"epoch":   func(s *transcriptFields) { s.want = []Want{{Name: "app", Epoch: 2}, {Name: "disk", Epoch: 1}} },
	} {
		other := s
		change(&other)
		if other.transcript() == base {
			t.Errorf("a change of %s does not change T", name)
		}
	}
}

func TestSealOpensOnlyInItsSession(t *testing.T) {
	k, err := NewReceiverKey()
	if err != nil {
		t.Fatal(err)
	}
	t1, t2 := Transcript{1}, Transcript{2}
	enc, ct, ackKey, err := seal(k.secret.PublicKey().Bytes(), t1, []byte("bundle"))
	if err != nil {
		t.Fatal(err)
	}
	if len(enc) != encSize {
		t.Errorf("enc of %d octets, expected %d", len(enc), encSize)
	}
	plain, ackKey2, err := open(k.secret, t1, enc, ct)
	if err != nil || string(plain) != "bundle" || string(ackKey) != string(ackKey2) {
		t.Errorf("open: %q, %v", plain, err)
	}
	if _, _, err := open(k.secret, t2, enc, ct); err == nil {
		t.Error("opened in another session")
	}
	other, _ := NewReceiverKey()
	if _, _, err := open(other.secret, t1, enc, ct); err == nil {
		t.Error("opened with another receiver's key")
	}
	octets, _ := k.Octets()
	back, err := ParseReceiverKey(octets)
	if err != nil || string(back.secret.PublicKey().Bytes()) != string(k.secret.PublicKey().Bytes()) {
		t.Errorf("a stored receiver key: %v", err)
	}
	if !ed25519.Verify(newIssuer(t, 1).Identity, tuple.Encode([]byte(derive.LabelRelease), t1[:], enc, ct), mustSign(t, newIssuer(t, 1), t1, enc, ct)) {
		t.Error("the schedule's signature does not verify over signed()")
	}
}

func mustSign(t *testing.T, i *issuer, tr Transcript, enc, ct []byte) []byte {
	sig, err := i.schedule.Sign(derive.LabelRelease, tr[:], enc, ct)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}
