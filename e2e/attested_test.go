package e2e

import (
	"context"
	"encoding/pem"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
	"keybroker/e2e/domain"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/daemon"
)

const (
	relayListen = "127.0.0.1:7210"
	deadBroker  = "127.0.0.1:1"
	testRoots   = "/etc/keybroker/test-roots.pem"
)

// attesting has the broker take guests of tier snp, of a test's authority, from a relay on this very host, until the test ends.
func attesting(ctx context.Context, t *testing.T) *snptest.Authority {
	t.Helper()
	authority, err := snptest.New(snp.Genoa)
	if err != nil {
		t.Fatal(err)
	}
	after := context.WithoutCancel(ctx)
	t.Cleanup(func() { sh(after, t, "systemctl daemon-reload; systemctl restart keybroker.service") })
	settings(t, "allow_local_snp = true\n[relay]\nlisten = [\""+relayListen+"\"]\n")
	placed(t, testRoots, rootsPEM(authority))
	placed(t, "/etc/keybroker/relay.env", []byte("BROKERS="+deadBroker+" "+relayListen+"\n"))
	placed(t, "/run/systemd/system/keybroker.service.d/lab.conf",
		[]byte("[Service]\nExecStart=\nExecStart=/usr/bin/keybroker serve --insecure-test-roots Genoa="+testRoots+"\n"))
	sh(ctx, t, "systemctl daemon-reload; systemctl restart keybroker.service")
	brokerOpen(ctx, t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("relay:\n%s", sh(after, t, "journalctl -b --no-pager -o short-monotonic -n 20 -u keybroker-relay.service"))
		}
		sh(after, t, "systemctl stop keybroker-relay.service")
	})
	sh(ctx, t, "systemctl start keybroker-relay.service")
	return authority
}

// placed writes a file that everybody may read, until the test ends.
func placed(t *testing.T, path string, content []byte) {
	t.Helper()
	t.Cleanup(func() { os.Remove(path) })
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, content, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func rootsPEM(a *snptest.Authority) (all []byte) {
	root := a.Root()
	all = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.ARK.Raw})
	for _, c := range root.Intermediates {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return all
}

// snpTable is the policy that accepts the guest's reports of any VM that names it.
func snpTable(g *snptest.Guest) string {
	tcb := fmt.Sprintf("{ bootloader = %d, tee = %d, snp = %d, microcode = %d }", g.TCB.Bootloader, g.TCB.TEE, g.TCB.SNP, g.TCB.Microcode)
	return fmt.Sprintf("[[snp]]\nname = \"lab\"\nsigner = [\"VCEK\"]\nvmpl = [%d]\ncrl = \"when-given\"\n[[snp.measurement]]\nname = \"lab\"\nvalue = \"%x\"\n"+
		"[[snp.product]]\nline = \"Genoa\"\ntcb = %s\n[snp.guest_policy]\nallow_smt = true\n", g.VMPL, g.Measurement, tcb)
}

func snpEntry(name, uuid string) string {
	return fmt.Sprintf("[[vm]]\nuuid = %q\nname = %q\ntier = \"snp\"\nsnp = \"lab\"\nkeys = [\"disk\"]\n", uuid, name)
}

// snpAgent is the configuration of an agent in tier snp; without a subject it takes the firmware's UUID.
func snpAgent(pin, subject string) string {
	text := strings.Replace(domain.AgentConfig(pin, "disk"), `tier = "vm"`, `tier = "snp"`, 1)
	if subject != "" {
		text = fmt.Sprintf("subject = %q\n", subject) + text
	}
	return text
}

// attested is an SNP-like guest of the lab. To keybroker its domain is nothing: it has no metadata of ours.
type attested struct {
	*guest
	machine *snptest.Guest
}

// attestedGuest defines such a guest, which the policy accepts, with blank disks further entries
// of the policy, and more files in its initramfs.
func attestedGuest(ctx context.Context, t *testing.T, authority *snptest.Authority, name, uuid, entries string, more func(*snptest.Guest) map[string][]byte) *attested {
	t.Helper()
	machine, err := authority.NewGuest(uuid)
	if err != nil {
		t.Fatal(err)
	}
	firmware, err := os.ReadFile("/share/bin/tsm")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"bin/tsm": firmware, "etc/tsm.json": encoded(t, machine)}
	if more != nil {
		maps.Copy(files, more(machine))
	}
	admit(ctx, t, name, snpEntry(name, uuid)+entries+snpTable(machine))
	return &attested{define(ctx, t, domain.Spec{Name: name, UUID: uuid, Agent: snpAgent(pin(ctx, t), ""), Files: files}), machine}
}

func encoded(t *testing.T, g *snptest.Guest) []byte {
	t.Helper()
	b, err := g.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// opened waits until status has the guest with its disk open.
func (g *attested) opened() daemon.VMStatus {
	g.t.Helper()
	return g.until("released with its disk open", func(v daemon.VMStatus) bool {
		return v.State == daemon.VMReleased && strings.Contains(fmt.Sprint(v.Sinks), "open")
	})
}

// launch is the REPORT_ID that the guest's firmware says it has.
func (g *attested) launch(from int64) string {
	g.t.Helper()
	line, _ := g.expect(from, "tsm: launch ")
	_, id, _ := strings.Cut(line, "tsm: launch ")
	return id
}

// records are the audit's about a subject.
func records(ctx context.Context, t *testing.T, subject, filter string) (all []audit.Record) {
	t.Helper()
	for line := range strings.Lines(sh(ctx, t, "keybroker audit query --json "+filter+" --subject "+subject)) {
		var r audit.Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		all = append(all, r)
	}
	return all
}

// TestAttestedVM: a guest that proves by its processor's report whose it is opens its disk, through a relay.
func TestAttestedVM(t *testing.T) {
	ctx := operated(t)
	authority := attesting(ctx, t)
	if out := sh(ctx, t, "journalctl -b --no-pager -u keybroker.service"); !strings.Contains(out, "INSECURE: reports of this line may be signed by a test's chain") {
		t.Error("the journal does not warn of the test's root")
	}
	g := attestedGuest(ctx, t, authority, "attested", "aaaaaaaa-1111-4111-8111-000000000001", "", nil)
	from := g.ConsoleEnd()
	g.start()
	g.expect(from, "/dev/vdb was blank and has been formatted")
	first := g.released(g.launch(from), 1)
	g.plant("attested-was-here")
	g.connectsSoon(from)

	from = g.ConsoleEnd()
	g.reboots(func() { g.run("(reboot -f) >/dev/null 2>&1 &") })
	g.connectsSoon(from)
	second := g.released(g.launch(from), 2)
	g.marked("attested-was-here")
	if second.Receiver == first.Receiver || second.Evidence == first.Evidence {
		t.Errorf("a reboot has the receiver or the report of the boot before it: %+v", second)
	}
	if out := sh(ctx, t, "keybroker explain attested"); !strings.Contains(out, "allowed by policy.d/attested.toml:1 [[vm]] attested, for a report that passes under [[snp]] lab") {
		t.Errorf("explain says %s", out)
	}
	sh(ctx, t, "keybroker audit verify --identity "+pin(ctx, t))
	g.outlivesRestart()
	log := sh(ctx, t, "journalctl -b --no-pager -u keybroker-relay.service")
	relayed := regexp.MustCompile(`relaying.* broker=`+relayListen+` connected_after=(\S+)`).FindAllStringSubmatch(log, -1)
	if len(relayed) < 2 {
		t.Errorf("the relay's log has %d sessions: %s", len(relayed), log)
	}
	for _, r := range relayed {
		t.Logf("the relay, with a dead broker before the one that lives, connected after %s", r[1])
	}
}

// outlivesRestart restarts the broker: a guest that has its disk keeps it, and one that opens it again may come without certificates,
// since the broker has kept those that came before.
func (g *attested) outlivesRestart() {
	g.t.Helper()
	sh(g.ctx, g.t, "systemctl restart keybroker.service")
	brokerOpen(g.ctx, g.t)
	if v := g.shown(); v.Tier != inject.TierSNP || v.Releases != 1 || v.LastRelease.IsZero() {
		g.t.Errorf("after the broker's restart vm show has %+v", v)
	}
	g.expect(g.agentAgain("/none"), "disk: is there already, epoch 1, ")
	g.marked("attested-was-here")
	if all := records(g.ctx, g.t, g.UUID, "--event release"); len(all) != 2 {
		g.t.Errorf("the audit has %d releases, expected those of two boots", len(all))
	}
	g.run("killall keybroker-agent; cryptsetup close data; touch /etc/tsm.bare")
	from := g.agentAgain("/none")
	g.expect(from, "with 0 octets of certificates")
	g.expect(from, "ready:")
	g.marked("attested-was-here")
}

// connectsSoon holds that the agent did not have to dial for long: the host may still have the connections of the boot before.
func (g *attested) connectsSoon(from int64) {
	g.t.Helper()
	line, _ := g.expect(from, "times after the start: ")
	g.t.Log(line)
	seconds := 0.0
	_, after, _ := strings.Cut(line, ": connected ")
	if _, err := fmt.Sscanf(after, "%f", &seconds); err != nil || seconds > 20 {
		g.t.Errorf("connected after %v s (%v)", seconds, err)
	}
}

// released holds what status and audit say of a guest that has its disk open for the nth time, and returns the release's record.
func (g *attested) released(launch string, n int) audit.Record {
	g.t.Helper()
	g.until("released in this boot", func(daemon.VMStatus) bool { return len(records(g.ctx, g.t, g.UUID, "--event ack")) == n })
	if v := g.opened(); v.Tier != inject.TierSNP || v.Name != g.Name || fmt.Sprint(v.Keys) != "[disk]" {
		g.t.Errorf("vm show has %+v", v)
	}
	if out := sh(g.ctx, g.t, "keybroker status"); !regexp.MustCompile(`(?m)^\s*` + g.Name + `\s.*snp.*released`).MatchString(out) {
		g.t.Errorf("status does not have it as released in tier snp: %s", out)
	}
	all := records(g.ctx, g.t, g.UUID, "--event release")
	if len(all) != n {
		g.t.Fatalf("the audit has %d releases, expected %d", len(all), n)
	}
	r := all[n-1]
	if r.Tier != inject.TierSNP || r.Kind != attest.KindSNP || r.Instance != "report "+launch || len(r.Evidence) != 64 || r.Decision != audit.Granted {
		g.t.Errorf("the release's record is %+v; its REPORT_ID is %s", r, launch)
	}
	return r
}
