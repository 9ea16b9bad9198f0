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
			if status != c.genuine || c.genuine == 0 && !strings.HasSuffix(out, "verdict: genuine; not checked: binding (--report-data), policy (--policy)\n") {
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
