package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/config"
)

// newTestRealm is a realm whose opener and keyholder are this test's program, and what it writes to the audit.
func newTestRealm(t *testing.T) (r *realm, events func() []audit.Event) {
	r = newRealm(config.Default(), filepath.Join(t.TempDir(), "realm.json"), nil, slog.New(slog.DiscardHandler))
	var mu sync.Mutex
	var all []audit.Event
	r.events = func(e audit.Event, _ string) error {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, e)
		return nil
	}
	r.opened = func() {}
	t.Cleanup(r.close)
	return r, func() []audit.Event {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

// filledPage is a secret page with this master's keys.
func filledPage(t testing.TB, master derive.Master) *os.File {
	t.Helper()
	page, err := derive.NewPage()
	if err != nil {
		t.Fatal(err)
	}
	if err := derive.FillPage(page, []derive.Master{master}); err != nil {
		t.Fatal(err)
	}
	return page
}

// A page that holds another realm than broker.toml pins is not taken.
func TestPinAgainstThePage(t *testing.T) {
	r, events := newTestRealm(t)
	r.cfg.Realm = "00112233445566778899aabbccddeeff"
	h := r.attempt(t.Context(), func(ctx context.Context) (*derive.Holder, string) {
		return r.resume(ctx, filledPage(t, derive.RandomMaster()))
	})
	if _, err := r.current(); h != nil || !errors.Is(err, inject.Refusal{Code: inject.CodeLocked}) || len(events()) != 0 {
		t.Errorf("%v, %v, %v", h, err, events())
	}
	page := filledPage(t, derive.RandomMaster())
	defer page.Close()
	if _, err := r.start(t.Context(), page); err == nil || !strings.Contains(err.Error(), "expected "+r.cfg.Realm) {
		t.Error(err)
	}
}

// Once lock has returned, who asks gets nothing, and neither does who had asked for the keyholder before.
func TestLockEndsTheKeyholder(t *testing.T) {
	r, events := newTestRealm(t)
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- r.run(ctx, filledPage(t, derive.RandomMaster()), func() { close(ready) }) }()
	<-ready
	h, err := r.current()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.lock("a test"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.Done():
	default:
		t.Error("the keyholder's process lives")
	}
	if _, err := h.ServiceKey(t.Context(), 1, "db", 1, 32); !errors.Is(err, derive.ErrHolderGone) {
		t.Errorf("who had the keyholder: %v", err)
	}
	if _, err := r.current(); !errors.Is(err, inject.Refusal{Code: inject.CodeLocked}) {
		t.Errorf("who asks: %v", err)
	}
	if got, want := events(), []audit.Event{audit.EventUnlock, audit.EventLock}; !slices.Equal(got, want) {
		t.Errorf("the audit has %v, want %v", got, want)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("the broker would end: %v", err)
	}
}

// An attempt that is under way when somebody locks the realm comes to nothing, also one that has its keyholder already; the
// next one begins only after an unlock.
func TestLockEndsAnAttempt(t *testing.T) {
	r, events := newTestRealm(t)
	var started []*derive.Holder
	for _, late := range []bool{false, true} {
		r.tryAgain()
		begun, locked, result := make(chan struct{}), make(chan error, 1), make(chan *derive.Holder)
		go func() {
			result <- r.attempt(t.Context(), func(ctx context.Context) (*derive.Holder, string) {
				close(begun)
				if !late {
					<-ctx.Done()
				}
				h, err := r.start(context.WithoutCancel(ctx), filledPage(t, derive.RandomMaster()))
				if err != nil {
					t.Error(err)
				}
				started = append(started, h)
				if late {
					<-ctx.Done()
				}
				return h, "by a test"
			})
		}()
		<-begun
		go func() { locked <- r.lock("a test") }()
		if h := <-result; h != nil {
			t.Errorf("late %v: the realm is open after it was locked", late)
		}
		if err := <-locked; err != nil {
			t.Error(err)
		}
		if _, err := r.current(); !errors.Is(err, inject.Refusal{Code: inject.CodeLocked}) || r.state != realmLocked {
			t.Errorf("late %v: %v, %s", late, err, r.state)
		}
	}
	for _, h := range started {
		if h.Err() == nil {
			t.Error("a keyholder lives that nobody knows")
		}
	}
	if h := r.attempt(t.Context(), func(context.Context) (*derive.Holder, string) { t.Error("tried"); return nil, "" }); h != nil {
		t.Error("opened without an unlock")
	}
	if got, want := events(), []audit.Event{audit.EventLock, audit.EventLock}; !slices.Equal(got, want) {
		t.Errorf("the audit has %v, want %v", got, want)
	}
}

// An unlock that comes while the realm is being locked begins when the lock is done and recorded.
func TestUnlockWaitsForLock(t *testing.T) {
	r, _ := newTestRealm(t)
	recording, release, locked, again := make(chan struct{}), make(chan struct{}), make(chan error, 1), make(chan struct{})
	r.events = func(audit.Event, string) error {
		close(recording)
		<-release
		return nil
	}
	go func() { locked <- r.lock("a test") }()
	<-recording
	go func() {
		r.tryAgain()
		close(again)
	}()
	select {
	case <-again:
		t.Error("the realm may be opened before the lock is recorded")
	case <-time.After(50 * time.Millisecond): // long enough to see it where it does not wait
	}
	close(release)
	<-again
	if err := <-locked; err != nil {
		t.Error(err)
	}
	if r.shut || len(r.openUp) != 1 {
		t.Error("the unlock is lost")
	}
}

// A lock ends the opener that waits for a passphrase. The stand-in says what the opener says, and would wait for ever.
func TestLockEndsTheOpener(t *testing.T) {
	r, _ := newTestRealm(t)
	r.self = filepath.Join(t.TempDir(), "opener")
	const program = "#!/bin/sh\necho '{\"state\":\"waiting\",\"why\":\"a passphrase opens it\"}' >&4\nexec tail -f /dev/null\n"
	if err := os.WriteFile(r.self, []byte(program), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- r.run(ctx, nil, func() { close(ready) }) }()
	<-ready
	if err := r.lock("a test"); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	if r.state != realmLocked || r.why != lockedByHand || r.opening != nil {
		t.Errorf("%s: %s", r.state, r.why)
	}
	r.mu.Unlock()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
