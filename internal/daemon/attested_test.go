package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keybroker/attest/snp"
	"keybroker/attest/snp/endorsements"
	"keybroker/attest/snp/snptest"
	"keybroker/derive"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/store"
)

// authority signs the reports of these tests.
var authority = sync.OnceValues(func() (*snptest.Authority, error) { return snptest.New(snp.Genoa) })

// attestation is a broker that serves tier snp, and one guest of its policy.
type attestation struct {
	*Broker
	guest *snptest.Guest
	bare  bool // the host hands the guest no certificates
}

func newAttestation(t *testing.T) *attestation {
	t.Helper()
	ca, err := authority()
	if err != nil {
		t.Fatal(err)
	}
	guest, err := ca.NewGuest(testVM)
	if err != nil {
		t.Fatal(err)
	}
	a := &attestation{guest: guest}
	a.Broker, _, _ = startBroker(t, func(b *Broker) {
		if err := endorsements.Make(b.paths.Endorsements); err != nil {
			t.Fatal(err)
		}
		if b.attesting, err = newAttesting(b, []snp.Root{ca.Root()}); err != nil {
			t.Fatal(err)
		}
		setPolicy(t, b, a.policyText(testVM, "disk"))
	})
	return a
}

// policyText lets the guest as it is now have keys of this VM.
func (a *attestation) policyText(uuid string, keys ...string) string {
	return fmt.Sprintf(`[[vm]]
uuid = %q
tier = "snp"
snp = "test"
keys = ["%s"]
[[snp]]
name = "test"
signer = ["VCEK"]
vmpl = [0]
crl = "when-given"
[[snp.measurement]]
name = "one"
value = "%x"
[[snp.product]]
line = "Genoa"
tcb = { bootloader = %d, tee = %d, snp = %d, microcode = %d }
[snp.guest_policy]
allow_smt = true
`, uuid, strings.Join(keys, `", "`), a.guest.Measurement, a.guest.TCB.Bootloader, a.guest.TCB.TEE, a.guest.TCB.SNP, a.guest.TCB.Microcode)
}

// receiver is the agent in the guest, with a key of its own.
func (a *attestation) receiver(t *testing.T) *inject.Receiver {
	t.Helper()
	key, err := inject.NewReceiverKey()
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := a.issuer()
	if err != nil {
		t.Fatal(err)
	}
	return &inject.Receiver{
		Tier: inject.TierSNP, Subject: testVM, Pins: []inject.Pin{inject.PinOf(issuer.Identity)}, Key: key,
		Attest: func(_ context.Context, data inject.Transcript) ([]byte, error) {
			report, err := a.guest.Report(data)
			if !a.bare {
				report = append(report, a.guest.Table()...)
			}
			return report, err
		},
	}
}

// connect is a connection that a relay brought.
func (a *attestation) connect(t *testing.T) net.Conn {
	t.Helper()
	ours, theirs := ends(t)
	served := make(chan struct{})
	go func() {
		defer close(served)
		a.attesting.session(a.running, theirs)
	}()
	t.Cleanup(func() { ours.Close(); <-served })
	return ours
}

// ask asks for keys in a session of its own.
func (a *attestation) ask(t *testing.T, r *inject.Receiver, names ...string) (*inject.Delivery, error) {
	t.Helper()
	s, err := r.Session(a.connect(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	c, err := s.Challenge(ctx)
	if err != nil {
		return nil, err
	}
	var want []inject.Want
	for _, n := range names {
		want = append(want, inject.Want{Name: n})
	}
	return s.Release(ctx, c, want)
}

// shownVM is what status says of the guest.
func (a *attestation) shownVM(t *testing.T) VMStatus {
	t.Helper()
	v, err := a.oneVM(testVM)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// A guest whose evidence holds has its key, again after a reboot, with a record for each, and status shows it.
func TestAttestedRelease(t *testing.T) {
	a := newAttestation(t)
	r := a.receiver(t)
	d, err := a.ask(t, r, "disk")
	if err != nil {
		t.Fatal(err)
	}
	first := bytes.Clone(d.Keys[0].Octets())
	if !d.Keys[0].Create {
		t.Error("a volume that was never opened may not be formatted")
	}
	if err := d.Ack(t.Context(), []inject.Outcome{{Name: "disk", Epoch: 1, Sink: "luks /dev/vdb", OK: true, Opened: true}}); err != nil {
		t.Error(err)
	}
	if v := a.shownVM(t); v.State != VMReleased || v.Tier != inject.TierSNP || fmt.Sprint(v.Sinks) != "[luks /dev/vdb open]" || v.Releases != 1 {
		t.Errorf("status shows %+v", v)
	}
	a.guest.ReportID[0]++ // another boot
	d, err = a.ask(t, a.receiver(t), "disk")
	if err != nil {
		t.Fatal(err)
	}
	if same := bytes.Equal(first, d.Keys[0].Octets()); !same || d.Keys[0].Create {
		t.Errorf("after a reboot the same key: %v, may format: %v", same, d.Keys[0].Create)
	}
	h, err := a.realm.current()
	if err != nil {
		t.Fatal(err)
	}
	vm, err := h.VMKey(t.Context(), 1, derive.VMKeyID{Tier: derive.TierVM, Subject: testVM, Name: "disk", Epoch: 1, Length: 32})
	if err != nil {
		t.Fatal(err)
	}
	if other, err := vm.Octets(); err != nil || bytes.Equal(other, first) {
		t.Error("tier snp has the key of tier vm")
	}
	releases := recorded(t, a.Broker, audit.Filter{Event: audit.EventRelease})
	if len(releases) != 2 {
		t.Fatalf("%d records of releases", len(releases))
	}
	if r := releases[1]; r.Tier != "snp" || r.Kind != "snp-report" || r.Instance != fmt.Sprintf("report %x", a.guest.ReportID) || r.Evidence == "" || r.Subject != testVM {
		t.Errorf("the second release is recorded as %+v", r)
	}
}

// Each claim that does not hold refuses, under one code, and the audit says what was expected and what came.
func TestAttestedRefusals(t *testing.T) {
	a := newAttestation(t)
	for _, c := range []struct {
		name    string
		change  func(*snptest.Guest)
		claim   string
		genuine bool // the processor has made the report, for this session
	}{
		{"another measurement", func(g *snptest.Guest) { g.Measurement[0]++ }, "measurement", true},
		{"debug", func(g *snptest.Guest) { g.Policy |= 1 << 19 }, "guest-policy.debug", true},
		{"another VMPL", func(g *snptest.Guest) { g.VMPL = 1 }, "vmpl", true},
		{"another VM's HOST_DATA", func(g *snptest.Guest) { g.HostData[0]++ }, "host-data", true},
		{"another chip", func(g *snptest.Guest) { g.ChipID[0]++ }, "certificate-chip-id", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			kept := *a.guest
			c.change(a.guest)
			_, err := a.ask(t, a.receiver(t), "disk")
			*a.guest = kept
			var r inject.Refusal
			if !errors.As(err, &r) || r.Code != inject.CodeBadEvidence || strings.Contains(r.Reason, c.claim) != c.genuine || r.Reason != "" != c.genuine {
				t.Fatalf("%v, expected %s naming %s: %v", err, inject.CodeBadEvidence, c.claim, c.genuine)
			}
			if v := a.shownVM(t); v.State != VMRefused || v.Code != string(inject.CodeBadEvidence) {
				t.Errorf("status shows %+v", v)
			}
			all := recorded(t, a.Broker, audit.Filter{Event: audit.EventRefusal})
			if last := all[len(all)-1]; !strings.Contains(last.Reason, c.claim+": expected ") || last.Subject != testVM {
				t.Errorf("the audit says %+v, not what was expected of %s", last, c.claim)
			}
		})
	}
	if n := len(recorded(t, a.Broker, audit.Filter{Event: audit.EventRelease})); n != 0 {
		t.Errorf("%d releases", n)
	}
}

// What the transport says counts for nothing, and what the guest may not have it does not get.
func TestAttestedPolicy(t *testing.T) {
	a := newAttestation(t)
	ask := func(names ...string) error {
		_, err := a.ask(t, a.receiver(t), names...)
		a.guest.ReportID[0]++
		return err
	}
	refused := func(what string, err error, code inject.Code) {
		t.Helper()
		if !errors.Is(err, inject.Refusal{Code: code}) {
			t.Errorf("%s: %v, expected %s", what, err, code)
		}
	}
	refused("a key that the entry has not", ask("app"), inject.CodeKeyNotAllowed)
	setPolicy(t, a.Broker, testVMPolicy)
	refused("an entry of tier vm", ask("disk"), inject.CodeWrongTier)
	setPolicy(t, a.Broker, a.policyText(otherVM, "disk"))
	refused("no entry", ask("disk"), inject.CodeNoPolicy)
	if all := a.attesting.list(); len(all) != 0 {
		t.Errorf("status shows VMs that policy does not have: %v", all)
	}
	setPolicy(t, a.Broker, a.policyText(testVM, "disk"))
	if _, err := a.changeVM(testVM, func(_ store.Tx, r *vmRecord) (bool, error) {
		r.Denied = true
		return true, nil
	}); err != nil {
		t.Fatal(err)
	}
	refused("denied", ask("disk"), inject.CodeDenied)
}

// The first receiver of a boot stays the only one, over a restart of the broker too: it is in the store.
func TestAttestedReceiver(t *testing.T) {
	a := newAttestation(t)
	first := a.receiver(t)
	for range 2 { // a lost answer is asked for again
		if _, err := a.ask(t, first, "disk"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.ask(t, a.receiver(t), "disk"); !errors.Is(err, inject.Refusal{Code: inject.CodeReceiverTaken}) {
		t.Errorf("a second receiver: %v", err)
	}
	if v := a.shownVM(t); v.State != VMReleased || v.Code != string(inject.CodeReceiverTaken) {
		t.Errorf("status shows %+v: the VM has its keys, and somebody else was refused", v)
	}
	a.guest.ReportID[0]++
	if _, err := a.ask(t, a.receiver(t), "disk"); err != nil {
		t.Errorf("the next boot: %v", err)
	}
}

// A subject's boots are remembered up to a number, the newest of them.
func TestReportsAreBounded(t *testing.T) {
	var r reportsRecord
	for n := range 2 * reportsKept {
		if fresh, err := r.bind(fmt.Sprint(n), "a", time.Now()); !fresh || err != nil {
			t.Fatal(fresh, err)
		}
	}
	if len(r.Boots) != reportsKept {
		t.Errorf("%d boots are remembered", len(r.Boots))
	}
	if _, err := r.bind(fmt.Sprint(2*reportsKept-1), "b", time.Now()); !errors.Is(err, inject.Refusal{Code: inject.CodeReceiverTaken}) {
		t.Errorf("a second receiver of the newest boot: %v", err)
	}
}

// Certificates that came along once are there for a boot to which the host hands none.
func TestEndorsementsAreKept(t *testing.T) {
	a := newAttestation(t)
	a.bare = true
	if _, err := a.ask(t, a.receiver(t), "disk"); !errors.Is(err, inject.Refusal{Code: inject.CodeBadEvidence}) {
		t.Fatalf("a report without certificates, of which none are stored: %v", err)
	}
	a.bare = false
	a.guest.ReportID[0]++
	if _, err := a.ask(t, a.receiver(t), "disk"); err != nil {
		t.Fatal(err)
	}
	for entries, _ := a.attesting.stored.List(); len(entries) < 3; entries, _ = a.attesting.stored.List() { // VCEK, ASK, ARK
		runtime.Gosched()
	}
	a.bare = true
	a.guest.ReportID[0]++
	if _, err := a.ask(t, a.receiver(t), "disk"); err != nil {
		t.Errorf("a report without certificates, which are stored: %v", err)
	}
}

// A session asks a few times at once, and then seldom; addresses have a number of sessions.
func TestAttestedLimits(t *testing.T) {
	a := newAttestation(t)
	s, err := a.receiver(t).Session(a.connect(t))
	if err != nil {
		t.Fatal(err)
	}
	a.guest.Measurement[0]++ // refused, so that nothing is bound
	for n := 0; ; n++ {
		c, err := s.Challenge(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err = s.Release(t.Context(), c, []inject.Want{{Name: "disk"}}); errors.Is(err, inject.Refusal{Code: inject.CodeBusy}) {
			break
		}
		if n > 2*attestedBurst {
			t.Fatalf("%d requests of one session, and none is too many: %v", n, err)
		}
	}
	for range maxAttestedEach {
		a.attesting.admit(&attestedSession{peer: "10.0.0.1"})
	}
	if a.attesting.admit(&attestedSession{peer: "10.0.0.1"}) == nil || a.attesting.admit(&attestedSession{peer: "10.0.0.2"}) != nil {
		t.Error("an address has as many sessions as it likes, or takes those of others")
	}
}

// A host that runs VMs itself does not take a policy that promises to protect them from it.
func TestLocalSNPIsRefused(t *testing.T) {
	a := newAttestation(t)
	if err := os.WriteFile(a.paths.PolicyFile, []byte(a.policyText(testVM, "disk")), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.readPolicy(); err != nil {
		t.Errorf("on a host without libvirt: %v", err)
	}
	a.cfg.Libvirt = []string{"/run/libvirt/libvirt-sock-ro"}
	if _, err := a.readPolicy(); err == nil || !strings.Contains(err.Error(), "keybroker relay") {
		t.Errorf("on a host with libvirt: %v", err)
	}
	a.cfg.AllowLocalSNP = true
	if _, err := a.readPolicy(); err != nil {
		t.Errorf("allowed: %v", err)
	}
}

// What an administrator sees and does is about tier snp: no libvirt, no tickets.
func TestAttestedAdministration(t *testing.T) {
	a := newAttestation(t)
	if v := a.shownVM(t); v.Tier != inject.TierSNP || v.State != VMQuiet {
		t.Errorf("before it asked status shows %+v", v)
	}
	explained := func() string { return strings.Join(a.explainVM(t.Context(), testVM).Lines, "\n") }
	if text := explained(); !strings.Contains(text, "allowed by policy.toml:1") || !strings.Contains(text, "[[snp]] test") {
		t.Errorf("explain says %s", text)
	}
	if err := a.allowVM(byHand("")); !errors.Is(err, inject.Refusal{Code: inject.CodeNoTicket}) {
		t.Errorf("allowing who is not denied: %v", err)
	}
	if err := a.denyVM(byHand("")); err != nil {
		t.Fatal(err)
	}
	if text := explained(); !strings.Contains(text, "refused, denied") {
		t.Errorf("explain says %s", text)
	}
	if all := recorded(t, a.Broker, audit.Filter{Event: audit.EventTicket}); len(all) != 1 || all[0].Tier != inject.TierSNP {
		t.Errorf("the denial is recorded as %+v", all)
	}
	if err := a.allowVM(byHand("")); err != nil {
		t.Error(err)
	}
	a.guest.Measurement[0]++
	if _, err := a.ask(t, a.receiver(t), "disk"); err == nil {
		t.Fatal("released")
	}
	if text := explained(); !strings.Contains(text, "last refused with bad-evidence") {
		t.Errorf("explain says %s", text)
	}
}

// A refusal is never recorded under the instance of an earlier release.
func TestAttestedInstance(t *testing.T) {
	a := newAttestation(t)
	s, err := a.receiver(t).Session(a.connect(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, good := range []bool{true, false} {
		if !good {
			a.guest.Measurement[0]++
		}
		c, err := s.Challenge(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err = s.Release(t.Context(), c, []inject.Want{{Name: "disk"}}); (err == nil) != good {
			t.Fatal(err)
		}
	}
	if all := recorded(t, a.Broker, audit.Filter{Event: audit.EventRefusal}); len(all) != 1 || all[0].Instance != "" {
		t.Errorf("recorded: %+v", all)
	}
}

// from is a connection that says where it comes from.
type from struct {
	net.Conn
	address string
}

func (f from) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(f.address), Port: 40000} }

// Who has as many sessions as he may have does not fill the journal with those that he gets not.
func TestSessionsTooManyAreSaidOnce(t *testing.T) {
	a := newAttestation(t)
	var log bytes.Buffer
	a.log = slog.New(slog.NewTextHandler(&log, nil))
	for range maxAttestedEach {
		a.attesting.admit(&attestedSession{peer: "10.0.0.1"})
	}
	for range 10 {
		_, theirs := net.Pipe()
		a.attesting.session(t.Context(), from{theirs, "10.0.0.1"})
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("10 connections too many are %d lines: %s", n, log.String())
	}
}

// Certificates of a guest that policy refuses are not kept, however genuine its report is: there are many such machines.
func TestRefusedEndorsementsAreNotKept(t *testing.T) {
	a := newAttestation(t)
	a.guest.Measurement[0]++
	if _, err := a.ask(t, a.receiver(t), "disk"); !errors.Is(err, inject.Refusal{Code: inject.CodeBadEvidence}) {
		t.Fatal(err)
	}
	a.guest.Measurement[0]--
	a.guest.ChipID[0]++ // keeping was begun before this was decided
	_, _ = a.ask(t, a.receiver(t), "disk")
	a.attesting.storing.Lock()
	defer a.attesting.storing.Unlock()
	if entries, err := a.attesting.stored.List(); err != nil || len(entries) != 0 {
		t.Errorf("%d endorsements are stored: %v", len(entries), err)
	}
}

// Made-up reports that fail in ever other claims are one refusal of one peer, and take no record from anybody else.
func TestMadeUpEvidenceIsFolded(t *testing.T) {
	a := newAttestation(t)
	r := a.receiver(t)
	attest := r.Attest
	const measurement, hostData, vmpl = 0x90, 0xc0, 0x30
	for _, spoilt := range [][]int{{measurement}, {hostData}, {vmpl}, {measurement, vmpl}, {hostData, vmpl}} {
		r.Attest = func(ctx context.Context, data inject.Transcript) ([]byte, error) {
			report, err := attest(ctx, data)
			for _, at := range spoilt {
				report[at] ^= 1
			}
			return report, err
		}
		if _, err := a.ask(t, r, "disk"); !errors.Is(err, inject.Refusal{Code: inject.CodeBadEvidence}) {
			t.Fatal(err)
		}
	}
	if all := recorded(t, a.Broker, audit.Filter{Event: audit.EventRefusal}); len(all) != 1 {
		t.Errorf("%d records, expected one", len(all))
	}
	for n := range 2000 { // from everywhere
		a.refused(inject.TierSNP, fmt.Sprint(n), audit.Record{Event: audit.EventRefusal, Decision: audit.Refused, Code: string(inject.CodeNoPolicy)}, nil)
	}
	a.refused("service", "uid 7", audit.Record{Event: audit.EventRefusal, Decision: audit.Refused, Code: "wrong-uid", Tier: "service"}, nil)
	if all := recorded(t, a.Broker, audit.Filter{Event: audit.EventRefusal, Code: "wrong-uid"}); len(all) != 1 {
		t.Errorf("strangers of tier snp have taken the record of a service's refusal: %v", all)
	}
}

// Strangers who take every place and do nothing do not keep a guest out, and do not take the place of one that has proved itself.
func TestIdleStrangersGiveWay(t *testing.T) {
	a := newAttestation(t)
	first, err := a.receiver(t).Session(a.connect(t))
	if err != nil {
		t.Fatal(err)
	}
	c, err := first.Challenge(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.Release(t.Context(), c, []inject.Want{{Name: "disk"}}); err != nil {
		t.Fatal(err)
	}
	a.guest.ReportID[0]++
	var strangers []*closeNoted
	for n := range 2 * maxAttested {
		conn := &closeNoted{}
		if a.attesting.admit(&attestedSession{conn: conn, peer: fmt.Sprint(n % 4)}) == nil {
			strangers = append(strangers, conn)
		}
	}
	if _, err := a.ask(t, a.receiver(t), "disk"); err != nil {
		t.Errorf("a guest while strangers hold all places: %v", err)
	}
	if _, err := first.Challenge(t.Context()); err != nil {
		t.Errorf("the session of a guest that has its keys: %v", err)
	}
	if !strangers[0].closed.Load() || strangers[len(strangers)-1].closed.Load() {
		t.Error("it is not the oldest stranger that gives way")
	}
	a.attesting.mu.Lock()
	defer a.attesting.mu.Unlock()
	if a.attesting.all > maxAttested {
		t.Errorf("%d sessions", a.attesting.all)
	}
}

// closeNoted is a connection that notes its end.
type closeNoted struct {
	net.Conn
	closed atomic.Bool
}

func (c *closeNoted) Close() error { c.closed.Store(true); return nil }
