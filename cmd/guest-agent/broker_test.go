//go:build linux

package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"keybroker/derive"
	"keybroker/inject"
)

const testSubject = "11111111-2222-3333-4444-555555555555"

// broker is the issuer's side: the real key schedule and protocol, and a policy that tests set.
type broker struct {
	t      *testing.T
	issuer *inject.Issuer
	keys   *derive.Schedule
	hints  chan struct{}
	idle   chan struct{} // the guest waits for a hint

	mu     sync.Mutex
	epoch  uint32
	refuse map[string]inject.Code // by key name
	wants  [][]inject.Want
	acked  []inject.Outcome
}

func newBroker(t *testing.T, master byte) *broker {
	t.Helper()
	octets := bytes.Repeat([]byte{master}, derive.MasterSize)
	octets[0] = ^master
	m, err := derive.NewMaster(octets)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := derive.NewSchedule(m)
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{t: t, keys: keys, epoch: 1, refuse: map[string]inject.Code{}, hints: make(chan struct{}, 1), idle: make(chan struct{}, 16)}
	b.issuer = &inject.Issuer{
		Identity: keys.Identity(),
		Sign: func(_ context.Context, label string, fields ...[]byte) ([]byte, error) {
			return keys.Sign(label, fields...)
		},
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	return b
}

func (b *broker) pin() inject.Pin { return inject.PinOf(b.keys.Identity()) }

func (b *broker) decide(_ context.Context, c *inject.Claim) (*inject.Grant, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wants = append(b.wants, c.Want)
	g := &inject.Grant{}
	for _, w := range c.Want {
		if code := b.refuse[w.Name]; code != "" {
			return nil, inject.Refusal{Code: code, Reason: "as the test says"}
		}
		epoch := w.Epoch
		if epoch == 0 {
			epoch = b.epoch
		}
		g.Keys = append(g.Keys, inject.GrantedKey{Name: w.Name, Epoch: epoch, Key: b.key(w.Name, epoch), Create: true})
	}
	return g, nil
}

func (b *broker) key(name string, epoch uint32) derive.VMKey {
	k, err := b.keys.VMKey(derive.VMKeyID{Tier: "vm", Subject: testSubject, Name: name, Epoch: epoch, Length: 32})
	if err != nil {
		b.t.Error(err)
	}
	return k
}

func (b *broker) octets(name string, epoch uint32) []byte {
	k := b.key(name, epoch)
	o, err := k.Octets()
	if err != nil {
		b.t.Error(err)
	}
	return o
}

func (b *broker) allow(name string, code inject.Code) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refuse[name] = code
}

func (b *broker) outcomes() []inject.Outcome {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.acked
}

func (b *broker) releases() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.wants)
}

func (b *broker) door() inject.Door {
	return inject.Door{
		Tier:   inject.TierVM,
		Hints:  b.hints,
		Offer:  func(context.Context, string) (string, []string, error) { return testSubject, nil, nil },
		Decide: b.decide,
		Acked: func(_ context.Context, _ *inject.Claim, o []inject.Outcome) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.acked = append(b.acked, o...)
			return nil
		},
		Refused: func(context.Context, *inject.Claim, inject.Refusal) {},
	}
}

// push dials the guest and serves until the guest hangs up.
func (b *broker) push(g *guest) <-chan error {
	conn, err := net.Dial("unix", g.socket)
	if err != nil {
		b.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- b.issuer.Serve(b.t.Context(), &idleSpy{conn, b.idle}, b.door()) }()
	return done
}

// idleSpy tells when the guest begins to wait for a hint.
type idleSpy struct {
	net.Conn
	idle chan struct{}
}

func (s *idleSpy) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if bytes.Contains(p[:n], []byte("GET /v1/events")) || bytes.HasPrefix(p[:n], []byte("ET /v1/events")) { // net/http reads one octet ahead
		s.idle <- struct{}{}
	}
	return n, err
}

// pushed is push, and waits for the guest to be done with it: it hangs up, or waits for a hint.
func (b *broker) pushed(g *guest) {
	b.t.Helper()
	b.settled(g, b.push(g))
}

// hinted lets the guest ask again, and waits for it to be done.
func (b *broker) hinted(g *guest) {
	b.t.Helper()
	b.hints <- struct{}{}
	b.settled(g, nil)
}

func (b *broker) settled(g *guest, hungUp <-chan error) {
	b.t.Helper()
	select {
	case err := <-hungUp:
		if err != nil {
			b.t.Errorf("serving the guest: %v", err)
		}
	case <-b.idle:
	case <-time.After(20 * time.Second):
		b.t.Fatalf("the guest neither hangs up nor waits; it said:\n%s", g.said())
	}
}
