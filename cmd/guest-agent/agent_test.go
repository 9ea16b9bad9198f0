//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
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

// guest is an agent on a Unix socket in place of vsock.
type guest struct {
	t      *testing.T
	dir    string // on a tmpfs
	socket string
	config *config
	once   bool
	mu     sync.Mutex
	out    bytes.Buffer
	spoke  chan struct{} // there is something new in out
	result chan error
	stop   context.CancelFunc
	notes  []string
}

func newGuest(t *testing.T, pin inject.Pin, keys ...keyConfig) *guest {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "keybroker-agent-test-")
	if err != nil {
		t.Skipf("needs a tmpfs on /dev/shm: mount -t tmpfs tmpfs /dev/shm: %v", err)
	}
	g := &guest{t: t, dir: dir, spoke: make(chan struct{}, 1), socket: filepath.Join(dir, "vsock")}
	g.config = &config{Tier: "vm", Pins: []inject.Pin{pin}, Deadline: 20 * time.Second, Keys: keys}
	if err := g.config.setKeys(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.halt()
		os.RemoveAll(dir)
	})
	return g
}

func (g *guest) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case g.spoke <- struct{}{}:
	default:
	}
	return g.out.Write(p)
}

func (g *guest) said() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.out.String()
}

// start runs an agent as serve does.
func (g *guest) start() *agent {
	g.t.Helper()
	s, err := openState(filepath.Join(g.dir, "state"), "boot-1")
	if err != nil {
		g.t.Fatal(err)
	}
	key, _, err := s.receiverKey()
	if err != nil {
		g.t.Fatal(err)
	}
	a := newAgent(g.config, s, newConsole(g), key)
	a.once = g.once
	a.notify = func(say string) { g.notes = append(g.notes, say) }
	os.Remove(g.socket)
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		g.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(g.t.Context())
	g.stop, g.result = stop, make(chan error, 1)
	go a.accept(ctx, l, func(net.Addr) bool { return true })
	go func() {
		err := a.resume()
		if err == nil {
			err = a.run(ctx)
		}
		stop()
		s.close()
		g.result <- err
	}()
	return a
}

// ended waits for the agent's end.
func (g *guest) ended() error {
	g.t.Helper()
	select {
	case err := <-g.result:
		g.result = nil
		return err
	case <-time.After(30 * time.Second):
		g.t.Fatalf("the agent does not end; it said:\n%s", g.said())
		return nil
	}
}

func (g *guest) halt() {
	if g.result != nil {
		g.stop()
		g.ended()
	}
}

func fileKey(name, path string) keyConfig {
	return keyConfig{Name: name, Sink: sinkFile, Path: path}
}

func (g *guest) holds(path string, want []byte) {
	g.t.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		g.t.Errorf("%s: %v, right octets: %v; the agent said:\n%s", path, err, bytes.Equal(got, want), g.said())
	}
}

func keyPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "keybroker-agent-test-")
	if err != nil {
		t.Skipf("needs a tmpfs on /dev/shm: mount -t tmpfs tmpfs /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "key")
}

func TestOnceDeliversAndEnds(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.once = true
	g.start()
	b.pushed(g)
	if err := g.ended(); err != nil {
		t.Fatal(err)
	}
	g.holds(path, b.octets("app", 1))
	steps := regexp.MustCompile(`times after the start: connected \d+\.\d{3} s, challenge [\d.]+ s, release [\d.]+ s, in its sink [\d.]+ s, acknowledged [\d.]+ s\n`)
	if !steps.MatchString(g.said()) {
		t.Errorf("the console has no times of the steps:\n%s", g.said())
	}
	if o := b.outcomes(); len(o) != 1 || o[0] != (inject.Outcome{Name: "app", Epoch: 1, Sink: "file " + path, OK: true}) {
		t.Errorf("acknowledged %+v", o)
	}
	if len(g.notes) == 0 || !strings.HasPrefix(g.notes[len(g.notes)-1], "READY=1") {
		t.Errorf("told the service manager %q", g.notes)
	}
	if strings.Contains(g.said(), string(b.octets("app", 1))) {
		t.Error("the key is on the console")
	}
}

func TestStaysAndTakesTheNextEpoch(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.start()
	b.pushed(g)
	g.holds(path, b.octets("app", 1))
	b.mu.Lock()
	b.epoch = 2
	b.mu.Unlock()
	b.hinted(g)
	g.holds(path, b.octets("app", 2))
	b.mu.Lock()
	b.epoch = 1
	b.mu.Unlock()
	b.hinted(g)
	g.holds(path, b.octets("app", 2)) // an earlier epoch is not taken
	g.stop()
	if err := g.ended(); err != nil {
		t.Errorf("stopped with its key in place: %v", err)
	}
}

func TestRestartContinues(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.start()
	b.pushed(g)
	receiver, err := os.ReadFile(filepath.Join(g.dir, "state", receiverFile))
	if err != nil {
		t.Fatal(err)
	}
	g.halt()
	g.once = true
	g.start() // nothing is missing: it asks for nothing and ends
	if err := g.ended(); err != nil {
		t.Fatal(err)
	}
	if n := b.releases(); n != 1 {
		t.Errorf("%d releases, expected 1", n)
	}
	again, err := os.ReadFile(filepath.Join(g.dir, "state", receiverFile))
	if err != nil || !bytes.Equal(receiver, again) {
		t.Errorf("the receiver's key changed: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	g.start() // what is gone is asked for again
	b.pushed(g)
	if err := g.ended(); err != nil {
		t.Fatal(err)
	}
	g.holds(path, b.octets("app", 1))
}

func TestRefusedThenHinted(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.once = true
	b.allow("app", inject.CodeNoPolicy)
	g.start()
	done := b.push(g)
	waitFor(t, g, "refused: no-policy")
	b.allow("app", "")
	b.hints <- struct{}{}
	if err := g.ended(); err != nil {
		t.Fatal(err)
	}
	<-done
	g.holds(path, b.octets("app", 1))
	if n := b.releases(); n != 2 {
		t.Errorf("%d requests, expected 2", n)
	}
}

// waitFor waits until the agent has said something.
func waitFor(t *testing.T, g *guest, text string) {
	t.Helper()
	end := time.After(20 * time.Second)
	for !strings.Contains(g.said(), text) {
		select {
		case <-g.spoke:
		case <-end:
			t.Fatalf("the agent did not say %q but:\n%s", text, g.said())
		}
	}
}

func TestANewConnectionGetsItsTurn(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.once = true
	b.allow("app", inject.CodeNoTicket)
	g.start()
	first := b.push(g) // refused, and waits for a hint
	waitFor(t, g, "refused: no-ticket")
	b.allow("app", "")
	b.pushed(g)
	if err := g.ended(); err != nil {
		t.Fatal(err)
	}
	<-first
	g.holds(path, b.octets("app", 1))
}

func TestNothingIsAskedForTwice(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	b.allow("app", inject.CodeNoTicket)
	g.start()
	first := b.push(g)
	waitFor(t, g, "refused: no-ticket")
	b.allow("app", "")
	b.pushed(g)
	select { // the connection that waited for a hint is of no use any more
	case <-first:
	case <-time.After(20 * time.Second):
		t.Error("the refused connection is still open")
	}
	if n := b.releases(); n != 2 {
		t.Errorf("%d requests, expected 2", n)
	}
}

func TestImpostorIsNotBelieved(t *testing.T) {
	b, impostor, path := newBroker(t, 1), newBroker(t, 2), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.once = true
	g.start()
	impostor.pushed(g)
	waitFor(t, g, "the issuer is none of the pinned ones")
	if impostor.releases() != 0 {
		t.Error("the impostor was asked for keys")
	}
	b.pushed(g)
	if err := g.ended(); err != nil {
		t.Fatal(err)
	}
	g.holds(path, b.octets("app", 1))
}

func TestWrongSubjectIsNotBelieved(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.config.Subject = "99999999-2222-3333-4444-555555555555"
	g.start()
	b.pushed(g)
	waitFor(t, g, "takes this machine for another")
	if b.releases() != 0 {
		t.Error("keys were asked for")
	}
}

func TestOptionalKeyKeepsNoOtherAway(t *testing.T) {
	b, must, may := newBroker(t, 1), keyPath(t), keyPath(t)
	optional := fileKey("nice", may)
	optional.Optional = true
	g := newGuest(t, b.pin(), fileKey("app", must), optional)
	g.once = true
	b.allow("nice", inject.CodeKeyNotAllowed)
	g.start()
	b.pushed(g)
	if err := g.ended(); err != nil {
		t.Fatal(err)
	}
	g.holds(must, b.octets("app", 1))
	if _, err := os.Stat(may); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the refused key: %v", err)
	}
	waitFor(t, g, "nice: refused: key-not-allowed")
}

func TestDeadline(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.config.Deadline = 300 * time.Millisecond
	b.allow("app", inject.CodeNoPolicy)
	g.start()
	b.push(g)
	err := g.ended()
	if !errors.Is(err, errDeadline) || !strings.Contains(err.Error(), "key app") || !strings.Contains(err.Error(), "no-policy") {
		t.Errorf("got %v", err)
	}
}

func TestDeadlineWithAStuckPeer(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.config.Deadline = 300 * time.Millisecond
	g.start()
	conn, err := net.Dial("unix", g.socket) // never answers
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := g.ended(); !errors.Is(err, errDeadline) {
		t.Errorf("got %v", err)
	}
}

func TestASinkThatCannotBeMendedEndsIt(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	if err := os.WriteFile(path, []byte("somebody's"), 0o600); err != nil {
		t.Fatal(err)
	}
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.start()
	b.pushed(g)
	if err := g.ended(); err == nil || !strings.Contains(err.Error(), "taken by somebody else") {
		t.Errorf("got %v", err)
	}
	if o := b.outcomes(); len(o) != 1 || o[0].OK || o[0].Opened {
		t.Errorf("acknowledged %+v", o)
	}
}

func TestLengthOfTheKey(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	k := fileKey("app", path)
	k.Length = 64
	g := newGuest(t, b.pin(), k)
	g.start()
	b.pushed(g)
	if err := g.ended(); !errors.Is(err, errLength) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key was written: %v", err)
	}
}

func TestWaitsForTheDevice(t *testing.T) {
	b := newBroker(t, 1)
	g := newGuest(t, b.pin(), keyConfig{Name: "disk", Sink: sinkLUKS, Device: "/dev/keybroker-absent", Mapper: "kbtest"})
	g.config.Deadline = 300 * time.Millisecond
	g.start()
	b.push(g)
	if err := g.ended(); !errors.Is(err, errDeadline) || !strings.Contains(err.Error(), "/dev/keybroker-absent is not there") {
		t.Errorf("got %v", err)
	}
	if b.releases() != 0 {
		t.Error("a key was asked for that had nowhere to go")
	}
}

func TestStateOfAnotherBoot(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.start()
	b.pushed(g)
	g.halt()
	s, err := openState(filepath.Join(g.dir, "state"), "boot-2")
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if _, err := os.Stat(filepath.Join(g.dir, "state", receiverFile)); !errors.Is(err, os.ErrNotExist) || len(s.Keys) != 0 {
		t.Errorf("the earlier boot's state is kept: %v, %d keys", err, len(s.Keys))
	}
	if _, made, err := s.receiverKey(); err != nil || !made {
		t.Errorf("receiver key: made %v, %v", made, err)
	}
	if err := s.forget(); err != nil {
		t.Error(err)
	}
}

func TestStateRefusals(t *testing.T) {
	b := newBroker(t, 1)
	g := newGuest(t, b.pin(), fileKey("app", keyPath(t)))
	dir := filepath.Join(g.dir, "state")
	s, err := openState(dir, "boot-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openState(dir, "boot-1"); err == nil || !strings.Contains(err.Error(), "another keybroker-agent") {
		t.Errorf("two at once: %v", err)
	}
	s.close()
	for _, text := range []string{"", "{", `{"version":1,"boot":"boot-1","keys":{},"x":1}`, `{"version":9,"boot":"boot-1","keys":{}}`} {
		if err := os.WriteFile(filepath.Join(dir, stateFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openState(dir, "boot-1"); err == nil || !strings.Contains(err.Error(), "to begin anew") {
			t.Errorf("state %q: %v", text, err)
		}
	}
	if _, err := openState("/sys/kernel", "boot-1"); err == nil || !strings.Contains(err.Error(), "not in memory") {
		t.Errorf("not on a tmpfs: %v", err)
	}
}
