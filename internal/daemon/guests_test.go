package daemon

import (
	"context"
	"log/slog"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/time/rate"

	"keybroker/derive"
	"keybroker/hypervisor"
	"keybroker/internal/audit"
	"keybroker/internal/config"
	"keybroker/internal/policy"
	"keybroker/internal/store"
)

const (
	testVM       = "11111111-2222-3333-4444-555555555555"
	testVMPolicy = "[[vm]]\nuuid = \"" + testVM + "\"\ntier = \"vm\"\nkeys = [\"disk\"]\n"
)

// newTestBroker is a broker with store, audit, policy and an open realm, that serves nobody.
func newTestBroker(t *testing.T, policyText string, settings func(*config.Config)) *Broker {
	t.Helper()
	dir := t.TempDir()
	paths, err := config.PathsUnder(dir)
	if err != nil {
		t.Fatal(err)
	}
	b := &Broker{cfg: config.Default(), paths: paths, log: slog.New(slog.DiscardHandler), running: t.Context()}
	if settings != nil {
		settings(b.cfg)
	}
	p, err := policy.Parse(policy.File{Name: "policy.toml", Text: []byte(policyText)})
	if err != nil {
		t.Fatal(err)
	}
	b.rules.Store(&loadedPolicy{Policy: p})
	if b.store, err = store.Open(filepath.Join(dir, "state.db")); err != nil {
		t.Fatal(err)
	}
	b.realm, _ = newTestRealm(t)
	if err := b.openAudit("00112233445566778899aabbccddeeff"); err != nil {
		t.Fatal(err)
	}
	b.guests, b.metrics = newGuests(b), newMetrics(func() float64 { return 1 })
	t.Cleanup(b.close)
	open := func(ctx context.Context) (*derive.Holder, string) {
		h, err := b.realm.start(ctx, filledPage(t))
		if err != nil {
			t.Error(err)
		}
		return h, "by a test"
	}
	if b.realm.attempt(t.Context(), open) == nil {
		t.Fatal("the realm is not open")
	}
	return b
}

// newTestGuest is a domain that a process of its own runs, with the ticket of a boot that was seen. Nobody dials it.
func newTestGuest(t *testing.T, b *Broker) (x *guest, kill func()) {
	t.Helper()
	cmd := exec.Command("tail", "-f", "/dev/null")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := hypervisor.OpenProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	kill = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	t.Cleanup(func() { kill(); p.Close() })
	b.ticket(testVM, "prepare", (*hypervisor.Ticket).Prepare)
	b.ticket(testVM, "start", func(k *hypervisor.Ticket) bool {
		return k.Started(p.Boot(testVM), hypervisor.OriginCold, hypervisor.GapRefuse)
	})
	return &guest{
		b: b, domain: hypervisor.Domain{UUID: testVM, Name: "web1", CID: 7, Metadata: true, Running: true}, process: p,
		ctx: t.Context(), asks: rate.NewLimiter(rate.Every(askEvery), askBurst), hint: make(chan struct{}, 1),
	}, kill
}

// recorded lists what the audit has, oldest first.
func recorded(t *testing.T, b *Broker, f audit.Filter) (all []audit.Record) {
	t.Helper()
	err := audit.Query(b.paths.AuditDir, f, func(r *audit.Record, _ []byte) error {
		all = append(all, *r)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
