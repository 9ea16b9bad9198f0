//go:build linux

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

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
