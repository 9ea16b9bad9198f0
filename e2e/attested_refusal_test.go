package e2e

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/mdlayher/vsock"

	"keybroker/attest"
	"keybroker/attest/snp/snptest"
	"keybroker/e2e/domain"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/daemon"
	"keybroker/internal/tuple"
)

// lie is a request that is refused: the machine is not what the policy wants, or the relay alters what it carries. Each has a subject
// of its own, which the policy would give a disk.
type lie struct {
	name   string
	change func(*testing.T, *snptest.Guest)
	alter  func(t *testing.T, body string) string // of a release request; "": hang up; nil: the relay that ships
	claim  string                                 // that fails
	bare   bool                                   // the guest is told the code alone: the report does not even prove that it is one of this session
	says   string                                 // what the audit says of it
}

// lies leaves out what no relay can do to one's own request; package inject has tests of the rest.
func lies() []lie {
	return []lie{
		{name: "measurement", change: func(_ *testing.T, g *snptest.Guest) { g.Measurement[0] ^= 1 }, claim: "measurement", says: "measurement: expected one of "},
		{name: "debug", change: func(_ *testing.T, g *snptest.Guest) { g.Policy |= 1 << 19 }, claim: "guest-policy.debug", says: "guest-policy.debug: expected off, got on"},
		{name: "old-tcb", change: func(t *testing.T, g *snptest.Guest) {
			g.TCB.SNP--
			if err := g.Certify(); err != nil {
				t.Fatal(err)
			}
		}, claim: "reported-tcb.snp, committed-tcb.snp, launch-tcb.snp", says: "reported-tcb.snp: expected at least 27, got 26"},
		{name: "vmpl", change: func(_ *testing.T, g *snptest.Guest) { g.VMPL = 1 }, claim: "vmpl", says: "vmpl: expected one of 0, got 1"},
		{name: "another-vm", change: func(_ *testing.T, g *snptest.Guest) { copy(g.HostData[:], attest.HostData(liarUUID)) }, claim: "host-data", says: "host-data: expected one of "},
		{name: "product", change: func(_ *testing.T, g *snptest.Guest) { g.CPU = [3]byte{0x19, 0x60, 1} }, claim: "product", bare: true, says: "product: expected Milan, Genoa, Turin, got unknown, family 19h model 60h"},
		{name: "altered-names", alter: func(_ *testing.T, body string) string { return strings.ReplaceAll(body, `"disk"`, `"other"`) }, claim: "report-data", bare: true, says: "report-data: expected "},
		{name: "spliced", alter: func(t *testing.T, body string) string {
			key, err := hpke.MLKEM768X25519().GenerateKey()
			if err != nil {
				t.Error(err)
				return ""
			}
			pk := base64.RawURLEncoding.EncodeToString(key.PublicKey().Bytes())
			return regexp.MustCompile(`"pk":"[^"]*"`).ReplaceAllString(body, `"pk":"`+pk+`"`)
		}, claim: "report-data", bare: true, says: "report-data: expected "},
		{name: "replayed", alter: replays(), claim: "report-data", bare: true, says: "report-data: expected "},
	}
}

// replays keeps the first request's report to itself, and puts it in the place of that of each later one.
func replays() func(*testing.T, string) string {
	var mu sync.Mutex
	evidence, recorded := regexp.MustCompile(`"evidence":"[^"]*"`), ""
	return func(_ *testing.T, body string) string {
		mu.Lock()
		defer mu.Unlock()
		if recorded == "" {
			recorded = evidence.FindString(body)
			return ""
		}
		return evidence.ReplaceAllString(body, recorded)
	}
}

const liarUUID = "aaaaaaaa-2222-4222-8222-000000000000"

func (l lie) uuid() string {
	h := sha256.Sum256([]byte(l.name))
	return fmt.Sprintf("aaaaaaaa-2222-4222-8222-%x", h[:6])
}

// files are what the guest needs to tell a lie: the machine, and an agent's configuration with the subject.
func (l lie) files(t *testing.T, pin string, honest *snptest.Guest) map[string][]byte {
	t.Helper()
	g := *honest
	copy(g.HostData[:], attest.HostData(l.uuid()))
	if l.change != nil {
		l.change(t, &g)
	}
	return map[string][]byte{"etc/lab/" + l.name + ".json": encoded(t, &g), "etc/lab/" + l.name + ".toml": []byte(snpAgent(pin, l.uuid()))}
}

// agentAs ends the guest's agent and starts another in its place, with a configuration of the initramfs and a state of its own.
func (g *attested) agentAs(name string) (from int64) {
	g.t.Helper()
	g.run("killall keybroker-agent 2>/dev/null; while pidof keybroker-agent >/dev/null; do usleep 10000; done")
	from = g.ConsoleEnd()
	g.run("cp /etc/lab/" + name + ".json /etc/tsm.json 2>/dev/null; (keybroker-agent -config /etc/lab/" + name + ".toml -state-dir /run/lab-" + name +
		" >/dev/ttyS0 2>&1 </dev/null &)")
	return from
}

// TestAttestedRefusals: a guest gets nothing for a report that is not what the policy wants of its VM. Its console says which claim
// fails if the report is a genuine one of this session; status and audit say it of all, and the audit what was expected.
func TestAttestedRefusals(t *testing.T) {
	ctx := operated(t)
	authority := attesting(ctx, t)
	stranger, strangerKey, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	entries, all := "", lies()
	for _, l := range all {
		entries += snpEntry(l.name, l.uuid())
	}
	g := attestedGuest(ctx, t, authority, "liar", liarUUID, entries, func(machine *snptest.Guest) map[string][]byte {
		files := map[string][]byte{
			"etc/lab/honest.json": encoded(t, machine), "etc/lab/stranger.toml": []byte(snpAgent(inject.PinOf(stranger).String(), "")),
		}
		for _, l := range all {
			maps.Copy(files, l.files(t, pin(ctx, t), machine))
		}
		return files
	})
	g.start()
	g.opened()
	on := func(t *testing.T) *attested { return &attested{&guest{g.Spec, t, ctx}, g.machine} }

	for _, l := range all {
		if l.alter == nil {
			t.Run(l.name, func(t *testing.T) { on(t).refusedFor(l) })
		}
	}
	t.Run("a second receiver of this boot", func(t *testing.T) {
		g := on(t)
		g.run("cp /etc/lab/honest.json /etc/tsm.json")
		from := g.agentAgain("/run/keybroker-agent")
		g.expect(from, "refused: receiver-taken")
		g.until("refusing the second receiver", func(v daemon.VMStatus) bool { return v.State == daemon.VMReleased && v.Code == "receiver-taken" })
		if got := records(ctx, t, g.UUID, "--code receiver-taken"); len(got) != 1 || got[0].Evidence == "" || got[0].Reason != "another receiver of this boot has the keys" {
			t.Errorf("the audit has %+v", got)
		}
	})
	t.Run("a broker that the pin does not match", func(t *testing.T) {
		g := on(t)
		line, _ := g.expect(g.agentAs("stranger"), "none of the pinned ones")
		if !strings.Contains(line, inject.PinOf(stranger).String()) || !strings.Contains(line, pin(ctx, t)) {
			t.Errorf("the console says %q, expected which pin it has and which broker came", line)
		}
	})
	sh(ctx, t, "systemctl stop keybroker-relay.service")
	for _, l := range all {
		if l.alter != nil {
			t.Run(l.name, func(t *testing.T) {
				inPlaceOfRelay(t, func(guest net.Conn) { alteringReleases(t, guest, l.alter) })
				on(t).refusedFor(l)
			})
		}
	}
	t.Run("an answer of tier vm", func(t *testing.T) { on(t).offeredTierVM(stranger, strangerKey) })
	t.Run("a plain VM with the UUID", func(t *testing.T) { on(t).asPlainVM() })
	if got := len(records(ctx, t, g.UUID, "--event release")); got != 1 {
		t.Errorf("the audit has %d releases, expected the first", got)
	}
	for _, l := range all {
		if got := records(ctx, t, l.uuid(), "--event release"); len(got) != 0 {
			t.Errorf("%s: the audit has releases: %+v", l.name, got)
		}
	}
}

func (g *attested) refusedFor(l lie) {
	g.t.Helper()
	line, _ := g.expect(g.agentAs(l.name), "key disk: refused: bad-evidence")
	line, _, _ = strings.Cut(line, " (")
	_, told, _ := strings.Cut(line, "refused: bad-evidence")
	if want := ": the evidence is refused: " + l.claim; told != want && !l.bare || told != "" && l.bare {
		g.t.Errorf("the console says %q, expected %q, or nothing more: %v", told, want, l.bare)
	}
	g.t.Log(line)
	liar := &guest{domain.Spec{Name: l.name, UUID: l.uuid()}, g.t, g.ctx}
	v := liar.until("refused", func(v daemon.VMStatus) bool { return v.State == daemon.VMRefused })
	if v.Code != "bad-evidence" || !strings.Contains(v.Why, l.claim) || v.Tier != inject.TierSNP {
		g.t.Errorf("vm show has %+v", v)
	}
	if out := sh(g.ctx, g.t, "keybroker explain "+l.name); !strings.Contains(out, "it was last refused with bad-evidence: the evidence is refused: "+l.claim) {
		g.t.Errorf("explain says %s", out)
	}
	all := records(g.ctx, g.t, l.uuid(), "--code bad-evidence")
	if len(all) == 0 {
		g.t.Fatal("the audit has no record of the refusal")
	}
	r := all[0]
	if !strings.Contains(r.Reason, l.says) || r.Decision != audit.Refused || r.Tier != inject.TierSNP || r.Kind != attest.KindSNP || len(r.Evidence) != 64 {
		g.t.Errorf("the audit has %+v, expected %q in it", r, l.says)
	}
}

// inPlaceOfRelay listens where guests dial, until the test ends.
func inPlaceOfRelay(t *testing.T, serve func(guest net.Conn)) {
	t.Helper()
	l, err := vsock.ListenContextID(vsock.Host, inject.Port, nil)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(serving.Wait)
	t.Cleanup(func() { l.Close() })
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { // a guest whose agent has ended may still wait for an answer
				stop := context.AfterFunc(t.Context(), func() { conn.Close() })
				defer stop()
				defer conn.Close()
				serve(conn)
			})
		}
	})
}

// altering is a relay that can read, and alters the requests; where nothing is left of one it hangs up.
func altering(guest, broker net.Conn, alter func(path, body string) string) {
	defer broker.Close()
	requests, answers := bufio.NewReader(guest), bufio.NewReader(broker)
	for {
		request, err := http.ReadRequest(requests)
		if err != nil {
			return
		}
		body, err := io.ReadAll(request.Body)
		if err != nil {
			return
		}
		altered := alter(request.URL.Path, string(body))
		if altered == "" && len(body) > 0 {
			return
		}
		request.Body, request.ContentLength = io.NopCloser(strings.NewReader(altered)), int64(len(altered))
		if request.Write(broker) != nil {
			return
		}
		answer, err := http.ReadResponse(answers, request)
		if err != nil || answer.Write(guest) != nil {
			return
		}
	}
}

// alteringReleases is such a relay to the broker, which alters the requests for keys alone.
func alteringReleases(t *testing.T, guest net.Conn, alter func(*testing.T, string) string) {
	broker, err := net.Dial("tcp", relayListen)
	if err != nil {
		t.Error(err)
		return
	}
	stop := context.AfterFunc(t.Context(), func() { broker.Close() })
	defer stop()
	altering(guest, broker, func(path, body string) string {
		if path != "/v1/release" {
			return body
		}
		return alter(t, body)
	})
}

// offeredTierVM has the host answer in place of the relay, with a pinned identity and in tier vm, as a broker could that serves both:
// first to what the guest asks, and then to what an altering relay makes of it, so that the answer is sealed to this guest and signed.
func (g *attested) offeredTierVM(identity ed25519.PublicKey, key ed25519.PrivateKey) {
	g.t.Helper()
	answered := make(chan *inject.Claim, 16)
	issuer := &inject.Issuer{
		Identity: identity, Log: slog.New(slog.DiscardHandler),
		Sign: func(_ context.Context, label string, fields ...[]byte) ([]byte, error) {
			return ed25519.Sign(key, tuple.Encode(append([][]byte{[]byte(label)}, fields...)...)), nil
		},
	}
	door := inject.Door{
		Offer: func(context.Context, string) (string, []string, error) { return g.UUID, nil, nil },
		Decide: func(_ context.Context, c *inject.Claim) (*inject.Grant, error) {
			if c.Tier == inject.TierVM {
				answered <- c
			}
			return &inject.Grant{}, nil
		},
		Acked:   func(context.Context, *inject.Claim, []inject.Outcome) error { return nil },
		Refused: func(context.Context, *inject.Claim, inject.Refusal) {},
	}
	tierVM, evidence := strings.NewReplacer(`"tier":"snp"`, `"tier":"vm"`, `"kind":"snp-report"`, `"kind":"none"`), regexp.MustCompile(`"evidence":"[^"]*"`)
	unaltered := func(_, body string) string { return body }
	for _, c := range []struct {
		tier  string
		alter func(path, body string) string
		says  string
	}{
		{inject.TierSNP, unaltered, "the answer does not hold what was asked for"}, // so the signatures are good
		{inject.TierVM, unaltered, `refused: wrong-tier: this connection is of tier "vm"`},
		{inject.TierVM, func(_, body string) string { return evidence.ReplaceAllString(tierVM.Replace(body), `"evidence":""`) }, "the answer is not signed by the pinned issuer in this session"},
	} {
		g.t.Run("", func(t *testing.T) {
			g := &attested{&guest{g.Spec, t, g.ctx}, g.machine}
			ctx := t.Context()
			door := door
			door.Tier = c.tier
			inPlaceOfRelay(t, func(guest net.Conn) {
				ours, theirs := net.Pipe()
				stop := context.AfterFunc(ctx, func() { ours.Close() })
				defer stop()
				go issuer.Serve(ctx, theirs, door)
				altering(guest, ours, c.alter)
			})
			g.expect(g.agentAs("stranger"), c.says)
		})
	}
	select {
	case c := <-answered:
		if c.Tier != inject.TierVM || c.Subject != g.UUID || len(c.Evidence) != 0 {
			g.t.Errorf("the request was %+v", c)
		}
	default:
		g.t.Error("nothing was answered in tier vm")
	}
}

// asPlainVM starts the domain as one of tier vm that asks for the same disk: libvirt is told not to.
func (g *attested) asPlainVM() {
	g.t.Helper()
	g.virsh("destroy")
	plain := g.Spec
	plain.Keys, plain.Files, plain.Agent = []string{"disk"}, nil, domain.AgentConfig(pin(g.ctx, g.t), "disk")
	if err := plain.Define(step(g.ctx, g.t)); err != nil {
		g.t.Fatal(err)
	}
	out, err := domain.Virsh(step(g.ctx, g.t), "start", g.Name)
	if err == nil || !strings.Contains(out, "wrong-tier") {
		g.t.Errorf("starting it: %v, %s; expected the policy's refusal", err, out)
	}
	if got := records(g.ctx, g.t, g.UUID, "--code wrong-tier"); len(got) != 1 || got[0].Tier != inject.TierVM {
		g.t.Errorf("the audit has %+v", got)
	}
}
