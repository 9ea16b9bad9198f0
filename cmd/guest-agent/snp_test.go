//go:build linux

package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
	"keybroker/attest/snp/snptest/tsmfs"
	"keybroker/inject"
)

const testGuest = "KEYBROKER_AGENT_TEST_GUEST"

// inGuest runs the rest of a test in a process with mounts of its own, in which the kernel's folder for reports can be made. It
// returns false in the process that has only to wait for that one.
func inGuest(t *testing.T) bool {
	t.Helper()
	if os.Getenv(testGuest) == t.Name() {
		if err := unix.Mount("tmpfs", "/sys/kernel", "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and /dev/fuse (modprobe fuse), or run it in the lab")
	}
	c := exec.Command(os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
	c.Env = append(os.Environ(), testGuest+"="+t.Name())
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// boot gives the machine a platform. It lasts as long as the test's process.
func boot(t *testing.T, p tsmfs.Platform) {
	t.Helper()
	dir := filepath.Join(configfs, "tsm/report")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	unmount, err := tsmfs.Mount(dir, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Errorf("unmounting: %v", err)
		}
	})
}

// firmware is a platform of a test guest.
func firmware(g *snptest.Guest) tsmfs.Platform {
	return tsmfs.Platform{Provider: snpProvider, Report: func(data []byte, _ int) (out, aux []byte, err error) {
		out, err = g.Report([snp.ReportDataSize]byte(data))
		return out, g.Table(), err
	}}
}

func newSNPGuest(t *testing.T) (*snptest.Authority, *snptest.Guest) {
	t.Helper()
	authority, err := snptest.New(snp.Genoa)
	if err != nil {
		t.Fatal(err)
	}
	g, err := authority.NewGuest(testSubject)
	if err != nil {
		t.Fatal(err)
	}
	return authority, g
}

// host is the other end of what the agent dials.
type host struct {
	broker *broker
	door   inject.Door
	dir    string

	mu     sync.Mutex
	served sync.WaitGroup
}

// newHost makes a broker that appraises reports.
func newHost(t *testing.T, b *broker, authority *snptest.Authority, policy *attest.Policy) *host {
	t.Helper()
	verifier, err := snp.New(snp.Config{Roots: []snp.Root{authority.Root()}})
	if err != nil {
		t.Fatal(err)
	}
	h := &host{broker: b, door: b.door(), dir: t.TempDir()}
	h.door.Tier = inject.TierSNP
	h.door.Offer = func(_ context.Context, subject string) (string, []string, error) { return subject, nil, nil }
	h.door.Decide = func(ctx context.Context, c *inject.Claim) (*inject.Grant, error) {
		h.mu.Lock() // tests change the policy
		defer h.mu.Unlock()
		verdict := verifier.Appraise(snp.Request{
			Evidence: attest.Evidence{Kind: c.Kind, Octets: c.Evidence}, ReportData: c.Transcript[:], Policy: policy, At: time.Now(),
		})
		var failed []string
		for _, f := range verdict.Failures() {
			failed = append(failed, f.Name)
		}
		if !verdict.Pass() {
			return nil, inject.Refusal{Code: inject.CodeBadEvidence, Reason: strings.Join(failed, ", ")}
		}
		return b.decide(ctx, c)
	}
	return h
}

// listen serves whoever dials, until the test ends.
func (h *host) listen(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(h.dir, "host"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		h.served.Wait()
	})
	h.served.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			h.served.Go(func() { h.broker.issuer.Serve(t.Context(), conn, h.door) })
		}
	})
}

func (h *host) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", filepath.Join(h.dir, "host"))
}

// startSNP runs an agent in tier snp that dials h.
func (g *guest) startSNP(h *host) {
	g.t.Helper()
	g.config.Tier, g.config.Subject = inject.TierSNP, testSubject
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
	ctx, stop := context.WithCancel(g.t.Context())
	g.stop, g.result = stop, make(chan error, 1)
	called := make(chan struct{})
	go func() {
		defer close(called)
		a.call(ctx, h.dial)
	}()
	go func() {
		err := a.run(ctx)
		stop()
		<-called
		s.close()
		g.result <- err
	}()
}

// The agent that ships, the kernel's interface and a real verifier: a release, through the library that reads /sys.
func TestSNPRelease(t *testing.T) {
	if !inGuest(t) {
		return
	}
	authority, machine := newSNPGuest(t)
	boot(t, firmware(machine))
	b, path := newBroker(t, 1), keyPath(t)
	h := newHost(t, b, authority, machine.Accepting())
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.once = true
	g.startSNP(h)
	waitFor(t, g, "nobody answers, since 0.0 s: ")
	h.listen(t)
	if err := g.ended(); err != nil {
		t.Fatalf("%v; it said:\n%s", err, g.said())
	}
	g.holds(path, b.octets("app", 1))
	for _, want := range []string{
		`asking the platform for a report\n`, `the platform \(sev_guest\) made a report in \d+ ms, with \d{4} octets of certificates\n`,
		`times after the start: connected [\d.]+ s, challenge [\d.]+ s, report [\d.]+ s, release [\d.]+ s, in its sink [\d.]+ s, acknowledged [\d.]+ s\n`,
	} {
		if !regexp.MustCompile(want).MatchString(g.said()) {
			t.Errorf("no %q in:\n%s", want, g.said())
		}
	}
	if left, err := os.ReadDir(filepath.Join(configfs, "tsm/report")); err != nil || len(left) != 0 {
		t.Errorf("requests left with the platform: %v, %v", left, err)
	}
	if o := b.outcomes(); len(o) != 1 || !o[0].OK {
		t.Errorf("acknowledged %+v", o)
	}
}

// Another image is refused, and the agent says so and waits for the broker's hint; then it asks with a fresh report.
func TestSNPRefusedThenHinted(t *testing.T) {
	if !inGuest(t) {
		return
	}
	authority, machine := newSNPGuest(t)
	boot(t, firmware(machine))
	policy := machine.Accepting()
	good := policy.Measurements[0].Value
	policy.Measurements[0].Value = make([]byte, 48)
	b, path := newBroker(t, 1), keyPath(t)
	h := newHost(t, b, authority, policy)
	h.listen(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.once = true
	g.startSNP(h)
	waitFor(t, g, "key app: refused: bad-evidence: measurement (asking again)")
	h.mu.Lock()
	policy.Measurements[0].Value = good
	h.mu.Unlock()
	b.hints <- struct{}{}
	if err := g.ended(); err != nil {
		t.Fatalf("%v; it said:\n%s", err, g.said())
	}
	g.holds(path, b.octets("app", 1))
}

// An agent in tier snp has no use for a broker that serves tier vm, pinned though it is.
func TestSNPAgentTakesNoAnswerOfTierVM(t *testing.T) {
	b, path := newBroker(t, 1), keyPath(t)
	h := &host{broker: b, door: b.door(), dir: t.TempDir()}
	h.listen(t)
	g := newGuest(t, b.pin(), fileKey("app", path))
	g.startSNP(h)
	waitFor(t, g, `refused: wrong-tier: this connection is of tier "vm"`)
	g.stop()
	if err := g.ended(); !errors.Is(err, errStopped) || b.releases() != 0 {
		t.Errorf("%v, %d releases", err, b.releases())
	}
}

// A refusal is said at once, also when it comes right after another trouble: it may be the last word for a minute.
func TestSNPRefusalRightAfterAnotherTrouble(t *testing.T) {
	b := newBroker(t, 1)
	h := &host{broker: b, door: b.door(), dir: t.TempDir()}
	h.door.Tier = inject.TierVM
	l, err := net.Listen("unix", filepath.Join(h.dir, "host"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.served.Wait)
	t.Cleanup(func() { l.Close() })
	h.served.Go(func() {
		for first := true; ; first = false {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if first {
				conn.Read(make([]byte, 1))
				conn.Close()
				continue
			}
			b.issuer.Serve(t.Context(), conn, h.door)
		}
	})
	g := newGuest(t, b.pin(), fileKey("app", keyPath(t)))
	g.startSNP(h)
	waitFor(t, g, "reading the issuer's answer")
	waitFor(t, g, "refused: wrong-tier")
	g.stop()
	if err := g.ended(); !errors.Is(err, errStopped) {
		t.Error(err)
	}
}

// A relay that reaches no broker hangs up. The agent dials on, with pauses, until its deadline.
func TestSNPDialsOnUntilTheDeadline(t *testing.T) {
	b := newBroker(t, 1)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "host"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	calls := make(chan int, 1)
	go func() {
		n := 0
		for {
			conn, err := l.Accept()
			if err != nil {
				calls <- n
				return
			}
			n++
			conn.Close()
		}
	}()
	g := newGuest(t, b.pin(), fileKey("app", keyPath(t)))
	g.config.Deadline = time.Second
	g.startSNP(&host{dir: filepath.Dir(l.Addr().String())})
	if err := g.ended(); !errors.Is(err, errDeadline) {
		t.Errorf("%v, expected the deadline's end", err)
	}
	l.Close()
	if n := <-calls; n < 2 || n > 8 {
		t.Errorf("dialled %d times in a second, expected some 5: pauses of 50 ms and twice that each", n)
	}
	g2 := newGuest(t, b.pin(), fileKey("app", keyPath(t)))
	g2.config.Deadline = 300 * time.Millisecond
	g2.startSNP(&host{dir: t.TempDir()})
	if err := g2.ended(); !errors.Is(err, errDeadline) || !strings.Contains(err.Error(), "host") {
		t.Errorf("nobody there: %v, expected the deadline's end and why", err)
	}
}

// ask asks a platform once.
func ask(t *testing.T, p *platform, data byte) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return p.attest(ctx, inject.Transcript{data})
}

// What may be in the way of a report is named, with what to do.
func TestReportsThatCannotBeHad(t *testing.T) {
	if !inGuest(t) {
		return
	}
	p := newPlatform(newConsole(os.Stderr))
	wants := func(what string) {
		t.Helper()
		if _, err := ask(t, p, 1); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, expected something with %q", err, what)
		}
	}
	wants("mount -t configfs configfs /sys/kernel/config")
	_, machine := newSNPGuest(t)
	with := func(name string, change func(*tsmfs.Platform), want string) {
		t.Run(name, func(t *testing.T) {
			f := firmware(machine)
			change(&f)
			boot(t, f)
			wants(want)
		})
	}
	with("no driver", func(f *tsmfs.Platform) { f.Provider = "" }, "modprobe sev-guest")
	with("another platform", func(f *tsmfs.Platform) { f.Provider = "tdx_guest" }, `"tdx_guest", expected "sev_guest"`)
	with("refusal", func(f *tsmfs.Platform) {
		f.Report = func([]byte, int) (out, aux []byte, err error) { return nil, nil, syscall.EIO }
	}, "input/output error")
	with("too short", func(f *tsmfs.Platform) {
		f.Report = func([]byte, int) (out, aux []byte, err error) { return make([]byte, 64), nil, nil }
	}, "64 octets, expected 1184")
	with("too long", func(f *tsmfs.Platform) {
		f.Report = func([]byte, int) (out, aux []byte, err error) { return make([]byte, maxState+1), nil, nil }
	}, "more than")
	with("another's", func(f *tsmfs.Platform) {
		f.Report = func([]byte, int) (out, aux []byte, err error) {
			out, err = machine.Report([64]byte{2})
			return out, nil, err
		}
	}, "not this session's")
}

// Certificates come along where the host gives some, and are left out where they are more than a request holds.
func TestCertificatesBehindTheReport(t *testing.T) {
	if !inGuest(t) {
		return
	}
	_, machine := newSNPGuest(t)
	for name, c := range map[string]struct{ given, sent int }{
		"none": {0, 0}, "a page": {4096, 4096}, "the kernel's most": {16384, 16384}, "all that fits": {inject.MaxEvidence - reportSize, inject.MaxEvidence - reportSize}, "too many": {inject.MaxEvidence, 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := firmware(machine)
			f.Report = func(data []byte, _ int) (out, aux []byte, err error) {
				out, err = machine.Report([64]byte(data))
				return out, make([]byte, c.given), err
			}
			boot(t, f)
			evidence, err := ask(t, newPlatform(newConsole(os.Stderr)), 7)
			if err != nil || len(evidence) != reportSize+c.sent || evidence[reportDataAt] != 7 {
				t.Errorf("%v, %d octets, expected %d", err, len(evidence), reportSize+c.sent)
			}
		})
	}
}

// Another program writes into the request while the report is made: it is asked for anew, and not for ever.
func TestDisturbedReport(t *testing.T) {
	if !inGuest(t) {
		return
	}
	_, machine := newSNPGuest(t)
	var disturb, asked atomic.Int32
	disturb.Store(1)
	f := firmware(machine)
	f.Report = func(data []byte, _ int) (out, aux []byte, err error) {
		entries, err := filepath.Glob(configfs + "/tsm/report/entry*/privlevel")
		if asked.Add(1) <= disturb.Load() && err == nil {
			err = os.WriteFile(entries[0], []byte("0"), 0o200)
		}
		if err != nil {
			return nil, nil, err
		}
		out, err = machine.Report([64]byte(data))
		return out, nil, err
	}
	boot(t, f)
	var out strings.Builder
	p := newPlatform(newConsole(&out))
	if evidence, err := ask(t, p, 1); err != nil || len(evidence) != reportSize || !strings.Contains(out.String(), "asking again") {
		t.Errorf("disturbed once: %d octets, %v; it said:\n%s", len(evidence), err, out.String())
	}
	disturb.Store(1 << 20)
	before := asked.Load()
	if _, err := ask(t, p, 1); err == nil || !strings.Contains(err.Error(), "generation") {
		t.Errorf("disturbed always: %v", err)
	}
	if n := asked.Load() - before; n > 2*reportTries {
		t.Errorf("asked %d times", n)
	}
}

// A platform that does not answer holds nobody up for longer than the session, and is not asked a second time meanwhile.
func TestPlatformThatHangs(t *testing.T) {
	if !inGuest(t) {
		return
	}
	_, machine := newSNPGuest(t)
	f := firmware(machine)
	honest, answer := f.Report, make(chan struct{})
	f.Report = func(data []byte, level int) (out, aux []byte, err error) {
		<-answer
		return honest(data, level)
	}
	boot(t, f)
	p := newPlatform(newConsole(os.Stderr))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.attest(ctx, inject.Transcript{1}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, expected the deadline's end", err)
	}
	if _, err := ask(t, p, 2); err == nil || !strings.Contains(err.Error(), "earlier request") {
		t.Errorf("while it hangs: %v", err)
	}
	close(answer)
	p.busy <- struct{}{} // until the earlier request is over
	<-p.busy
	if _, err := ask(t, p, 3); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestKernelsThatAreTooOld(t *testing.T) {
	for release, want := range map[string]bool{
		"6.1.0-13-amd64": true, "5.19.0": true, "6.6.9": true, "6.7.0": false, "6.12.4+deb12": false, "7.0-rc1": false, "10.1": false, "": false, "next": false,
	} {
		if tooOld(release) != want {
			t.Errorf("%q: %v", release, !want)
		}
	}
}
