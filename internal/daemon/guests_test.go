package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"keybroker/attest/snp"
	"keybroker/derive"
	"keybroker/hypervisor"
	"keybroker/hypervisor/libvirt"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/caller"
	"keybroker/internal/config"
	"keybroker/internal/policy"
	"keybroker/internal/store"
)

const (
	testVM       = "11111111-2222-3333-4444-555555555555"
	otherVM      = "11111111-2222-3333-4444-000000000000"
	testVMPolicy = "[[vm]]\nuuid = \"" + testVM + "\"\ntier = \"vm\"\nkeys = [\"disk\"]\n"
)

// setPolicy puts a policy in force.
func setPolicy(t *testing.T, b *Broker, text string) {
	t.Helper()
	p, err := policy.Parse(policy.File{Name: "policy.toml", Text: []byte(text)})
	if err != nil {
		t.Fatal(err)
	}
	b.rules.Store(&loadedPolicy{Policy: p, at: time.Now()})
}

// newStoreBroker is a broker with a store alone.
func newStoreBroker(t *testing.T) *Broker {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	b := &Broker{log: slog.New(slog.DiscardHandler), store: s, paths: config.Paths{Endorsements: t.TempDir()}}
	setPolicy(t, b, "")
	b.guests = newGuests(b)
	if b.attesting, err = newAttesting(b, snp.AMDRoots()); err != nil {
		t.Fatal(err)
	}
	return b
}

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
	setPolicy(t, b, policyText)
	if b.store, err = store.Open(filepath.Join(dir, "state.db")); err != nil {
		t.Fatal(err)
	}
	b.realm, _ = newTestRealm(t)
	if err := b.openAudit("00112233445566778899aabbccddeeff"); err != nil {
		t.Fatal(err)
	}
	if b.libvirt, err = libvirt.New(libvirt.Config{}); err != nil {
		t.Fatal(err)
	}
	b.defined = b.libvirt.Defined
	b.guests, b.metrics = newGuests(b), newMetrics(func() float64 { return 1 })
	if b.attesting, err = newAttesting(b, snp.AMDRoots()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.close)
	open := func(ctx context.Context) (*derive.Holder, string) {
		h, err := b.realm.start(ctx, filledPage(t, derive.RandomMaster()))
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

// diskClaim asks for testVM's disk.
func diskClaim() *inject.Claim {
	return &inject.Claim{Tier: inject.TierVM, Kind: inject.KindNone, Subject: testVM, Receiver: [32]byte{1}, Want: []inject.Want{{Name: "disk"}}}
}

// Each thing that a release needs is looked at, and what is not as it should be is refused with its code, and recorded.
func TestDecide(t *testing.T) {
	b := newTestBroker(t, testVMPolicy, nil)
	type setting struct {
		x     *guest
		kill  func()
		claim *inject.Claim
		live  func(calls int) (hypervisor.Domain, error) // libvirt's word, from call 1 on
	}
	const running = 7                              // its CID
	meanwhile := func(s *setting, change func()) { // between the record and the key
		s.live = func(calls int) (hypervisor.Domain, error) {
			if calls == 2 {
				change()
			}
			return hypervisor.Domain{UUID: testVM, CID: running}, nil
		}
	}
	for _, c := range []struct {
		name   string
		change func(*setting)
		want   inject.Code
	}{
		{"all is well", func(*setting) {}, ""},
		{"it asks too often", func(s *setting) { s.x.asks = rate.NewLimiter(0, 0) }, inject.CodeBusy},
		{"another's name", func(s *setting) { s.claim.Subject = otherVM }, inject.CodePeerMismatch},
		{"its process has ended", func(s *setting) { s.kill() }, inject.CodePeerMismatch},
		{"its process ends while it is recorded", func(s *setting) { meanwhile(s, s.kill) }, inject.CodePeerMismatch},
		{"libvirt does not run it", func(s *setting) {
			s.live = func(int) (hypervisor.Domain, error) { return hypervisor.Domain{}, libvirt.ErrNotRunning }
		}, inject.CodePeerMismatch},
		{"its address is another's too", func(s *setting) {
			s.live = func(int) (hypervisor.Domain, error) { return hypervisor.Domain{}, libvirt.ErrAddressTaken }
		}, inject.CodePeerMismatch},
		{"its address changes while it is recorded", func(s *setting) {
			s.live = func(calls int) (hypervisor.Domain, error) {
				return hypervisor.Domain{UUID: testVM, CID: running + uint32(calls) - 1}, nil
			}
		}, inject.CodePeerMismatch},
		{"libvirt hangs", func(s *setting) {
			s.live = func(int) (hypervisor.Domain, error) { return hypervisor.Domain{}, libvirt.ErrNotAnswering }
		}, inject.CodeHypervisor},
		{"evidence", func(s *setting) { s.claim.Evidence = []byte{1} }, inject.CodeWrongKind},
		{"another tier", func(s *setting) { s.claim.Tier = inject.TierSNP }, inject.CodeWrongTier},
		{"a key of others", func(s *setting) { s.claim.Want[0].Name = "swap" }, inject.CodeKeyNotAllowed},
		{"an epoch to come", func(s *setting) { s.claim.Want[0].Epoch = 2 }, inject.CodeUnknownEpoch},
		{"no ticket", func(s *setting) { b.ticket(testVM, "test", (*hypervisor.Ticket).Revoke) }, inject.CodeNoTicket},
		{"a ticket of another boot", func(s *setting) { newTestGuest(t, b) }, inject.CodeNoTicket},
		{"another receiver has acknowledged", func(s *setting) {
			b.ticket(testVM, "test", func(k *hypervisor.Ticket) bool {
				k.Take(hypervisor.Receiver{2})
				k.Ack(hypervisor.Receiver{2})
				return true
			})
		}, inject.CodeReceiverTaken},
		{"its ticket is revoked while it is recorded", func(s *setting) {
			meanwhile(s, func() { b.ticket(testVM, "test", (*hypervisor.Ticket).Revoke) })
		}, inject.CodeNoTicket},
		{"it boots again while it is recorded", func(s *setting) {
			meanwhile(s, func() { b.ticket(testVM, "test", (*hypervisor.Ticket).Reset) })
		}, inject.CodeNoTicket},
		{"the policy drops it while it is recorded", func(s *setting) { meanwhile(s, func() { setPolicy(t, b, "") }) }, inject.CodeNoPolicy},
		{"the policy drops its key while it is recorded", func(s *setting) {
			meanwhile(s, func() { setPolicy(t, b, strings.ReplaceAll(testVMPolicy, "disk", "swap")) })
		}, inject.CodeKeyNotAllowed},
		{"the policy gives another subject's key while it is recorded", func(s *setting) {
			meanwhile(s, func() { setPolicy(t, b, testVMPolicy+"subject = \""+otherVM+"\"\n") })
		}, inject.CodeKeyNotAllowed},
		{"the policy changes nothing while it is recorded", func(s *setting) { meanwhile(s, func() { setPolicy(t, b, testVMPolicy) }) }, ""},
		{"denied", func(s *setting) { b.denyVM(byHand("")) }, inject.CodeDenied},
		{"denied while it is recorded", func(s *setting) { b.allowVM(byHand("")); meanwhile(s, func() { b.denyVM(byHand("")) }) }, inject.CodeDenied},
		{"the realm is locked", func(s *setting) { b.allowVM(byHand("")); b.realm.lock("a test") }, inject.CodeLocked},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &setting{
				claim: diskClaim(),
				live:  func(int) (hypervisor.Domain, error) { return hypervisor.Domain{UUID: testVM, CID: running}, nil },
			}
			s.x, s.kill = newTestGuest(t, b)
			rules := b.rules.Load()
			defer b.rules.Store(rules)
			c.change(s)
			calls := 0
			b.live = func(context.Context, string) (hypervisor.Domain, error) { calls++; return s.live(calls) }
			b.refusals.Close()
			b.refusals = audit.NewCoalescer(audit.CoalescerConfig{Append: b.audit.Append}) // which has no refusal of before to fold with
			g, err := s.x.decide(t.Context(), s.claim)
			if c.want == "" {
				release := recorded(t, b, audit.Filter{Event: audit.EventRelease, Limit: 1})
				if err != nil || len(g.Keys) != 1 || len(release) != 1 || b.audit.Stats().Synced < release[0].Seq {
					t.Errorf("%v, %+v, recorded %+v", err, g, release)
				}
				return
			}
			if !errors.Is(err, inject.Refusal{Code: c.want}) || g != nil {
				t.Errorf("%v, %+v; expected %s", err, g, c.want)
			}
			refusals := recorded(t, b, audit.Filter{Event: audit.EventRefusal, Subject: testVM, Limit: 1})
			if len(refusals) != 1 || refusals[0].Code != string(c.want) || refusals[0].Instance != s.x.boot().String() {
				t.Errorf("recorded as %+v", refusals)
			}
		})
	}
}

// An acknowledgement is about the keys that were released, also when the policy has given the VM another subject since.
func TestAckAfterAnotherSubject(t *testing.T) {
	b := newTestBroker(t, testVMPolicy, nil)
	b.live = func(context.Context, string) (hypervisor.Domain, error) {
		return hypervisor.Domain{UUID: testVM, CID: 7}, nil
	}
	x, _ := newTestGuest(t, b)
	claim := diskClaim()
	if _, err := x.decide(t.Context(), claim); err != nil {
		t.Fatal(err)
	}
	setPolicy(t, b, testVMPolicy+"subject = \""+otherVM+"\"\n")
	outcomes := []inject.Outcome{{Name: "disk", Epoch: 1, OK: true, Opened: true}}
	if err := x.acked(t.Context(), &inject.Claim{Receiver: claim.Receiver, Want: claim.Want}, outcomes); err == nil {
		t.Error("an acknowledgement of no release is taken")
	}
	if err := x.acked(t.Context(), claim, outcomes); err != nil {
		t.Fatal(err)
	}
	for subject, want := range map[string]uint32{testVM: 1, otherVM: 0} {
		err := b.store.View(func(tx store.Tx) error {
			e, err := getEpoch(tx, vmEpochKey(subject, "disk"))
			if e.Opened != want {
				t.Errorf("subject %s: opened up to epoch %d, expected %d", subject, e.Opened, want)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// No record, no key.
func TestDecideWithoutAudit(t *testing.T) {
	b := newTestBroker(t, testVMPolicy, nil)
	b.live = func(context.Context, string) (hypervisor.Domain, error) {
		return hypervisor.Domain{UUID: testVM, CID: 7}, nil
	}
	x, _ := newTestGuest(t, b)
	if err := b.audit.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	claim := diskClaim()
	if g, err := x.decide(t.Context(), claim); !errors.Is(err, inject.Refusal{Code: inject.CodeAudit}) || g != nil {
		t.Errorf("%v, %+v", err, g)
	}
}

// A hook event that libvirt has given up on changes nothing.
func TestLateHookEvent(t *testing.T) {
	b := newTestBroker(t, testVMPolicy, nil)
	for _, c := range []struct {
		age  time.Duration
		want hypervisor.Origin
	}{{2 * hypervisor.HookLife, hypervisor.OriginUnknown}, {0, hypervisor.OriginRestore}} {
		at := (hypervisor.BootTime() - c.age).Nanoseconds()
		if r := b.hookEvent(hypervisor.HookEvent{Operation: hypervisor.OpRestore, UUID: testVM, Name: "web1", At: at}); r != nil {
			t.Errorf("%v old: %v", c.age, r)
		}
		if r, err := b.vm(testVM); err != nil || r.Ticket.Pending != c.want {
			t.Errorf("%v old: %v, announced %q, expected %q", c.age, err, r.Ticket.Pending, c.want)
		}
	}
}

// With sync = "always" a service's record is on disk before the key leaves.
func TestSyncAlways(t *testing.T) {
	for _, always := range []bool{false, true} {
		b := newTestBroker(t, "", func(c *config.Config) {
			c.Audit.Sync = 10 * time.Second
			if always {
				c.Audit.Sync = 0
			}
		})
		var err error
		if b.services, err = newServices(b); err != nil {
			t.Fatal(err)
		}
		p := &peer{who: &caller.Caller{UID: 7}, audit: &audit.Caller{UID: 7}}
		if err := b.services.record(p, "db", grant{rule: "a rule", epoch: 1}); err != nil {
			t.Fatal(err)
		}
		if s := b.audit.Stats(); (s.Synced == s.Head.Seq) != always {
			t.Errorf("always %v: %d of %d records are on disk", always, s.Synced, s.Head.Seq)
		}
	}
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
