package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"keybroker/attest"
)

// samples are reports of real processors; see the README there.
const samples = "../../../shared/vectors/snp"

func readSample(t *testing.T, name string) []byte {
	t.Helper()
	octets, err := os.ReadFile(filepath.Join(samples, name))
	if err != nil {
		t.Fatalf("the samples must be there: %v", err)
	}
	return octets
}

// writeFile puts octets in a file of their own.
func writeFile(t *testing.T, name string, octets []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, octets, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// policyFor is a production policy that accepts a report's measurement and HOST_DATA.
func policyFor(t *testing.T, report []byte, line, more string) string {
	t.Helper()
	return writeFile(t, "snp.toml", fmt.Appendf(nil, `
%s
vmpl = [%d]
crl = "when-given"
host_data = ["%x"]
[[measurement]]
name = "image"
value = "%x"
[[product]]
line = "%s"
tcb = { bootloader = 2, tee = 0, snp = 5, microcode = 27 }
[guest_policy]
allow_smt = true
`, more, binary.LittleEndian.Uint32(report[0x30:]), report[0xc0:0xe0], report[0x90:0xc0], line))
}

const vcekOnly, vlekOnly = `signer = ["VCEK"]`, "signer = [\"VLEK\"]\nmasked_chip_id = true\ncsp = [\"CN=cc-us-east-2.amazonaws.com\"]"

// Each sample is judged as the README beside it says: without a policy, and under a production policy.
func TestExplainEvidence(t *testing.T) {
	for _, c := range []struct {
		name, cert, line, signer, at string
		more                         []string
		genuine, accepted            int    // exit statuses without and with a policy
		claim                        string // that fails under the policy
	}{
		{"milan-v2-a", "vcek", "Milan", vcekOnly, "2026-11-22", nil, 0, 0, ""},
		{"milan-v2-b", "vcek", "Milan", vcekOnly, "2026-11-22", nil, 0, 0, ""},
		{"milan-v3-vlek", "vlek", "Milan", vlekOnly, "2025-12-10", []string{"milan.ask-ark-asvk.pem"}, 0, 0, ""},
		{"milan-v3-vlek", "vlek", "Milan", vlekOnly, "2025-12-11", []string{"milan.ask-ark-asvk.pem"}, 6, 6, "certificate-validity"},
		{"milan-v3-vlek", "vlek", "Milan", vlekOnly, "", []string{"milan.ask-ark-asvk.pem"}, 6, 6, "certificate-validity"},
		{"milan-v3-vlek", "vlek", "Milan", vlekOnly, "2025-12-10", nil, 5, 5, "issuer"},
		{"zen4c-v5", "vcek", "Genoa", vcekOnly, "2026-11-22", nil, 0, 0, ""},
		{"zen4c-v5", "vcek", "Milan", vcekOnly, "2026-11-22", nil, 0, 9, "product"},
		{"milan-v2-debug", "vcek", "Milan", vcekOnly, "2026-11-22T12:00:00Z", nil, 0, 9, "guest-policy.debug"},
	} {
		t.Run(c.name+" "+c.at, func(t *testing.T) {
			report := readSample(t, c.name+".report.bin")
			args := []string{"explain", "--evidence", filepath.Join(samples, c.name+".report.bin"), "--certs", filepath.Join(samples, c.name+"."+c.cert+".der")}
			if c.at != "" {
				args = append(args, "--at", c.at)
			}
			for _, more := range c.more {
				args = append(args, "--certs", filepath.Join(samples, more))
			}
			status, out, stderr := call(t, args...)
			if status != c.genuine || c.genuine == 0 && !strings.HasSuffix(out, "verdict: genuine; not checked: binding (--report-data), policy (--policy or --vm)\n") {
				t.Errorf("without a policy: status %d\n%s%s", status, out, stderr)
			}
			args = append(args, "--policy", policyFor(t, report, c.line, c.signer), "--report-data", hex.EncodeToString(report[0x50:0x90]))
			status, out, stderr = call(t, args...)
			if status != c.accepted || c.accepted == 0 && !strings.HasSuffix(out, "\nverdict: accepted\n") {
				t.Errorf("with a policy: status %d\n%s%s", status, out, stderr)
			}
			if c.claim != "" && !regexp.MustCompile(`(?m)^refused, [a-z]+: `+regexp.QuoteMeta(c.claim)+`: expected .+, got .+ \(.+\)$`).MatchString(out) {
				t.Errorf("%s is not named:\n%s", c.claim, out)
			}
			jsonStatus, out, _ := call(t, append(args, "--json")...)
			checkJSON(t, out, status, c.claim)
			if jsonStatus != status {
				t.Errorf("--json: status %d, not %d", jsonStatus, status)
			}
		})
	}
}

// checkJSON holds the JSON against the exit status.
func checkJSON(t *testing.T, out string, status int, claim string) {
	t.Helper()
	var e struct {
		Verdict    string            `json:"verdict"`
		Pass       bool              `json:"pass"`
		ExitStatus int               `json:"exit_status"`
		At         string            `json:"at"`
		Parts      map[string]string `json:"parts"`
		Claims     []attest.Claim    `json:"claims"`
	}
	if err := json.Unmarshal([]byte(out), &e, json.RejectUnknownMembers(true)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	verdict := "refused"
	if status == 0 {
		verdict = "accepted"
	}
	if e.Verdict != verdict || e.Pass != (status == 0) || e.ExitStatus != status || len(e.Parts) != 7 || e.At == "" {
		t.Errorf("%+v", e)
	}
	fails := slices.ContainsFunc(e.Claims, func(c attest.Claim) bool { return c.Name == claim && c.Result == attest.Fails })
	if len(e.Claims) < 20 || fails != (claim != "") {
		t.Errorf("%d claims, %q fails: %v", len(e.Claims), claim, fails)
	}
}

// vcekTable is a table as a hypervisor hands it to a guest, with one certificate.
func vcekTable(t *testing.T) []byte {
	der := readSample(t, "zen4c-v5.vcek.der")
	head := make([]byte, 48)
	copy(head, "\x63\xda\x75\x8d\xe6\x64\x45\x64\xad\xc5\xf4\xb9\x3b\xe8\xac\xcd") // VCEK
	binary.LittleEndian.PutUint32(head[16:], uint32(len(head)))
	binary.LittleEndian.PutUint32(head[20:], uint32(len(der)))
	return append(head, der...)
}

// Each class of failure has its own exit status, and the first of several decides.
func TestExplainEvidenceStatuses(t *testing.T) {
	report, cert := readSample(t, "zen4c-v5.report.bin"), filepath.Join(samples, "zen4c-v5.vcek.der")
	good := filepath.Join(samples, "zen4c-v5.report.bin")
	changed := func(at int) string {
		octets := bytes.Clone(report)
		octets[at] ^= 0x10
		return writeFile(t, "report.bin", octets)
	}
	table := make([]byte, 48)
	copy(table, "\x63\xda\x75\x8d")
	binary.LittleEndian.PutUint32(table[20:], 1<<31)
	required := policyFor(t, report, "Genoa", vcekOnly)
	text, err := os.ReadFile(required)
	if err != nil {
		t.Fatal(err)
	}
	required = writeFile(t, "snp.toml", bytes.Replace(text, []byte(`"when-given"`), []byte("\"required\"\ncrl_max_age = \"720h\""), 1))
	at := []string{"--at", "2026-11-22"}
	for name, c := range map[string]struct {
		status int
		args   []string
	}{
		"no such file":            {1, []string{"--evidence", "nowhere"}},
		"no such certificates":    {1, []string{"--evidence", good, "--certs", "nowhere"}},
		"certificate as report":   {1, []string{"--evidence", cert}},
		"bad policy":              {1, []string{"--evidence", good, "--policy", writeFile(t, "bad.toml", []byte("a = 1\n"))}},
		"too long":                {1, []string{"--evidence", writeFile(t, "long", make([]byte, maxInput+1))}},
		"bad date":                {2, []string{"--evidence", good, "--at", "yesterday"}},
		"bad REPORT_DATA":         {2, []string{"--evidence", good, "--report-data", "00"}},
		"a name as well":          {2, []string{"web1", "--evidence", good}},
		"uid as well":             {2, []string{"--evidence", good, "--uid", "3"}},
		"policy but no report":    {2, []string{"--certs", cert, "--policy", required}},
		"a date but nothing else": {2, []string{"--at", "2026-11-22"}},
		"truncated":               {3, []string{"--evidence", writeFile(t, "short", report[:1183])}},
		"version":                 {3, []string{"--evidence", changed(0), "--certs", cert}},
		"table in the evidence":   {3, []string{"--evidence", writeFile(t, "extended", slices.Concat(report, table)), "--certs", cert}},
		"table in --certs":        {3, []string{"--evidence", good, "--certs", writeFile(t, "aux", table)}},
		"signature":               {4, []string{"--evidence", changed(0x90), "--certs", cert}},
		"other chip":              {4, []string{"--evidence", filepath.Join(samples, "milan-v2-a.report.bin"), "--certs", filepath.Join(samples, "milan-v2-b.vcek.der")}},
		"no certificate":          {5, []string{"--evidence", good}},
		"empty auxblob":           {5, []string{"--evidence", good, "--certs", writeFile(t, "auxblob", nil)}},
		"auxblob":                 {0, []string{"--evidence", good, "--certs", writeFile(t, "auxblob", vcekTable(t))}},
		"extended report":         {0, []string{"--evidence", writeFile(t, "extended", slices.Concat(report, vcekTable(t)))}},
		"expired":                 {6, []string{"--evidence", good, "--certs", cert, "--at", "2040-01-01"}},
		"no CRL":                  {7, []string{"--evidence", good, "--certs", cert, "--policy", required}},
		"other REPORT_DATA":       {8, []string{"--evidence", good, "--certs", cert, "--report-data", strings.Repeat("00", 64)}},
		"other measurement":       {9, []string{"--evidence", good, "--certs", cert, "--policy", policyFor(t, make([]byte, 1184), "Genoa", vcekOnly)}},
		"certificate alone":       {0, []string{"--certs", cert}},
		"Turin's certificate":     {0, []string{"--certs", filepath.Join(samples, "turin.vcek.der"), "--certs", filepath.Join(samples, "turin.chain.pem")}},
		"expired certificate":     {6, []string{"--certs", cert, "--at", "2040-01-01"}},
		"no certificate for keys": {5, []string{"--certs", filepath.Join(samples, "turin.chain.pem")}},
	} {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"explain"}, c.args...)
			if !slices.Contains(args, "--at") && c.status != 2 {
				args = append(args, at...)
			}
			status, out, stderr := call(t, args...)
			if status != c.status {
				t.Errorf("status %d, expected %d\n%s%s", status, c.status, out, stderr)
			}
			if refused := strings.Contains(out, "verdict: refused"); refused != (status > 3 || status == 3 && stderr == "") {
				t.Errorf("status %d\n%s%s", status, out, stderr)
			}
			if hint := strings.Contains(stderr, "blSPL=10&teeSPL=0&snpSPL=27&ucodeSPL=27 has it"); hint != (name == "no certificate" || name == "empty auxblob") {
				t.Errorf("hint %v: %s", hint, stderr)
			}
			if name == "Turin's certificate" && !strings.Contains(out, "fmc 0, bootloader 0, tee 0, snp 0, microcode 9") {
				t.Errorf("the TCB is not there:\n%s", out)
			}
		})
	}
}

// hostPolicy is a policy.toml whose VM web1 accepts a report's measurement until 2026-12-01, and another one. Its HOST_DATA is given:
// no sample was launched with one of ours.
func hostPolicy(t *testing.T, report []byte) string {
	t.Helper()
	return writeFile(t, "policy.toml", fmt.Appendf(nil, `
[[vm]]
uuid = "11111111-2222-3333-4444-555555555555"
name = "web1"
tier = "snp"
snp  = "web"
keys = ["disk"]

[[vm]]
uuid = "21111111-2222-3333-4444-555555555555"
name = "web2"
tier = "snp"
snp  = "own"
keys = ["disk"]

[[vm]]
uuid = "31111111-2222-3333-4444-555555555555"
name = "plain"
tier = "vm"
keys = ["disk"]

[[snp]]
name = "web"
signer = ["VCEK"]
vmpl = [0, 1]
crl = "when-given"
host_data = ["%[1]x"]
[[snp.measurement]]
name = "now"
value = "%[2]x"
until = "2026-12-01"
[[snp.measurement]]
name = "next"
value = "%[3]x"
[[snp.product]]
line = "Genoa"
tcb = { bootloader = 2, tee = 0, snp = 5, microcode = 27 }
[snp.guest_policy]
allow_smt = true

[[snp]]
name = "own"
signer = ["VCEK"]
vmpl = [0, 1]
crl = "when-given"
[[snp.measurement]]
name = "now"
value = "%[2]x"
[[snp.product]]
line = "Genoa"
tcb = { bootloader = 2, tee = 0, snp = 5, microcode = 27 }
[snp.guest_policy]
allow_smt = true

[[vm]]
uuid = "41111111-2222-3333-4444-555555555555"
name = "twin"
tier = "snp"
snp  = "own"

[[vm]]
uuid = "51111111-2222-3333-4444-555555555555"
name = "twin"
tier = "snp"
snp  = "own"
deny = true
`, report[0xc0:0xe0], report[0x90:0xc0], make([]byte, 48)))
}

// A report is judged by a VM's own entry, at a date: the measurement that ends is accepted before, and the staged one says nothing
// for it afterwards.
func TestExplainEvidenceOfVM(t *testing.T) {
	report := readSample(t, "zen4c-v5.report.bin")
	file := hostPolicy(t, report)
	args := []string{"explain", "--evidence", filepath.Join(samples, "zen4c-v5.report.bin"), "--certs", filepath.Join(samples, "zen4c-v5.vcek.der"), "--policy", file}
	for name, c := range map[string]struct {
		status   int
		args     []string
		out, err string
	}{
		"accepted":    {0, []string{"--vm", "web1", "--at", "2026-11-22"}, "policy.toml:28 [[snp.measurement]] now", "policy.toml:26 crl: without a revocation list"},
		"by UUID":     {0, []string{"--vm", "11111111-2222-3333-4444-555555555555", "--at", "2026-11-30"}, "verdict: accepted", "policy.toml:26 crl"},
		"retired":     {9, []string{"--vm", "web1", "--at", "2026-12-01"}, "which was accepted until 2026-12-01T00:00:00Z (policy.toml:28 [[snp.measurement]] now)", "is no longer accepted"},
		"another VM":  {9, []string{"--vm", "web2", "--at", "2026-11-22"}, "refused, policy: host-data: expected one of \"web2\" ", "policy.toml:45 crl"},
		"its rule":    {9, []string{"--vm", "web2", "--at", "2026-11-22"}, " (policy.toml:9 [[vm]] web2)", ""},
		"tier vm":     {1, []string{"--vm", "plain"}, "", `no report gets keys by policy.toml:16 [[vm]] plain: expected tier: "vm"`},
		"no such VM":  {1, []string{"--vm", "nobody"}, "", `no [[vm]] entry in the policy has the name or UUID "nobody"`},
		"no keys":     {1, []string{"--vm", "41111111-2222-3333-4444-555555555555"}, "", "no report gets keys by policy.toml:55 [[vm]] twin: expected keys: an entry with keys"},
		"denied":      {1, []string{"--vm", "51111111-2222-3333-4444-555555555555"}, "", "no report gets keys by policy.toml:61 [[vm]] twin: expected deny: an entry without deny"},
		"two names":   {1, []string{"--vm", "twin"}, "", "policy.toml:55 [[vm]] twin and policy.toml:61 [[vm]] twin have the same name\nkeybroker: hint: name the VM by its UUID"},
		"not by name": {1, nil, "", "name one of its VMs with --vm"},
		"with uid":    {2, []string{"--vm", "web1", "--uid", "3"}, "", "none of the others can be"},
	} {
		status, out, stderr := call(t, append(slices.Clone(args), c.args...)...)
		if status != c.status || !strings.Contains(out, c.out) || !strings.Contains(stderr, c.err) {
			t.Errorf("%s: status %d\n%s%s", name, status, out, stderr)
		}
	}
	if status, _, stderr := call(t, "explain", "--vm", "web1", "--policy", file); status != 2 || !strings.Contains(stderr, "--evidence is missing") {
		t.Errorf("no evidence: status %d, %s", status, stderr)
	}
}

// policy check says what reports must say, and warns of what is weak.
func TestPolicyCheckOfSNP(t *testing.T) {
	file := hostPolicy(t, readSample(t, "zen4c-v5.report.bin"))
	status, out, stderr := call(t, "policy", "check", "--policy", file)
	for _, want := range []string{
		`vm    web1   tier snp 11111111-2222-3333-4444-555555555555 by [[snp]] web`, "\npolicy.toml:22 [[snp]] web: reports for web1\n", `  measurement "next"  000000`,
		`until 2026-12-01T00:00:00Z`, `at least bootloader 2, tee 0, snp 5, microcode 27`, "\npolicy.toml:41 [[snp]] own: reports for web2, twin, twin\n", "  host_data of web2  ", "\ndigest ",
	} {
		if status != 0 || !strings.Contains(out, want) {
			t.Errorf("status %d, no %q\n%s%s", status, want, out, stderr)
		}
	}
	if !strings.Contains(stderr, "keybroker: warning: policy.toml:26 crl: without a revocation list nothing is known to be revoked\n") {
		t.Errorf("%s", stderr)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	nothing := writeFile(t, "policy.toml", regexp.MustCompile(`(?s)\[\[snp\.measurement\]\].*?\n\[\[snp.product`).ReplaceAll(text, []byte("[[snp.product")))
	status, out, stderr = call(t, "policy", "check", "--policy", nothing)
	if status != 1 || out != "" || !strings.Contains(stderr, `policy.toml:22: "measurement" in [[snp]]: expected measurements, or digests of ID keys or author keys`) {
		t.Errorf("no measurement: status %d\n%s%s", status, out, stderr)
	}
}

// Help and documentation have every exit status.
func TestExplainStatusesAreDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(moduleRoot, "docs/attestation.md"))
	if err != nil {
		t.Fatal(err)
	}
	statuses := slices.Collect(maps.Values(evidenceStatus))
	slices.Sort(statuses)
	if !slices.Equal(statuses, []exitStatus{3, 4, 5, 6, 7, 8, 9}) || len(evidenceStatus) != len(attest.Parts()) {
		t.Errorf("%v", evidenceStatus)
	}
	for part, status := range evidenceStatus {
		if !regexp.MustCompile(fmt.Sprintf("(?m)^\\| `%s` \\| .* \\| %d \\|$", part, status)).Match(page) {
			t.Errorf("the page has not %s with status %d", part, status)
		}
		if !strings.Contains(evidenceHelp, fmt.Sprintf("  %d  %s", status, part)) {
			t.Errorf("the help has not %s with status %d", part, status)
		}
	}
}
