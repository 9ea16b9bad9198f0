//go:build linux

package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"keybroker/inject"
)

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
