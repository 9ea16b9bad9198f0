package policy

import (
	"bytes"
	"encoding/hex"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"keybroker/attest"
)

// documentedSNP is the example in docs/attestation.md.
func documentedSNP(t testing.TB) string {
	t.Helper()
	page, err := os.ReadFile("../../docs/attestation.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), "```toml\n")
	text, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("the page has no example")
	}
	return text
}

func TestDocumentedSNPPolicy(t *testing.T) {
	p, err := ParseSNP("snp.toml", []byte(documentedSNP(t)))
	if err != nil {
		t.Fatal(err)
	}
	if w := p.Warnings(time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)); len(w) > 0 {
		t.Errorf("warnings: %q", w)
	}
	m := p.Measurements[0]
	if m.Name != "web 1.2" || len(m.Value) != 48 || !m.Until.Equal(time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC)) || m.Rule != "snp.toml:7 [[measurement]] web 1.2" {
		t.Errorf("%+v", m)
	}
	product := p.Products[0]
	if *product.Reported != (attest.TCB{Bootloader: 10, SNP: 27, Microcode: 27}) || *product.Launch != *product.Reported || product.Line != "Genoa" {
		t.Errorf("%+v", product)
	}
	if !p.Guest.AllowSMT || p.Guest.AllowDebug || !p.Platform.RequireAliasCheck || p.MaxCRLAge != 90*24*time.Hour {
		t.Errorf("%+v", p)
	}
	if got := p.RuleOf("vmpl"); got != "snp.toml:2 vmpl" {
		t.Error(got)
	}
	if got := p.RuleOf("guest_policy.allow_smt"); got != "snp.toml:17 guest_policy.allow_smt" {
		t.Error(got)
	}
	// SHA-256(E("keybroker/v1 host data", subject)). DO NOT CHANGE.
	const golden = "5be9664fd3cebcf00bb7906626e0a5cd90dc86bfedd629840b18c4d828959d1b"
	if got := hex.EncodeToString(p.HostData[0].Value); got != golden {
		t.Errorf("HOST_DATA of the subject is %s", got)
	}
}

const digits48, digits64 = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
	"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// allSNPKeys is an appraisal policy with every key but subject, measurement and crl_max_age.
var allSNPKeys = `
signer = ["VCEK", "VLEK"]
csp = ["CN=example"]
deny_product = ["Milan"]
vmpl = [0, 3]
host_data = ["` + digits64[:64] + `"]
image_id = ["` + digits64[:32] + `"]
family_id = ["` + digits64[:32] + `"]
guest_svn = 7
chip_id = ["` + digits64 + `"]
deny_chip_id = ["` + digits64 + `"]
masked_chip_id = true
crl = "when-given"
min_validity = "24h"
[guest_policy]
abi = "1.55"
allow_debug = true
allow_migration_agent = true
allow_smt = true
allow_cxl = true
require_single_socket = true
require_aes_256_xts = true
require_rapl_disabled = true
require_cipher_hiding = true
require_page_swap_disable = true
[platform]
require_smt_disabled = true
require_tsme = true
require_ecc = true
require_rapl_disabled = true
require_cipher_hiding = true
require_alias_check = true
[[id_key]]
name = "a"
value = "` + digits48 + `"
[[author_key]]
name = "b"
value = "` + digits48 + `"
until = "2027-01-01T12:00:00+01:00"
[[product]]
line = "Turin"
chip_id = ["` + digits64 + `"]
reported = { fmc = 1, bootloader = 2, tee = 3, snp = 4, microcode = 5 }
committed = { fmc = 0, bootloader = 0, tee = 0, snp = 0, microcode = 0 }
launch = { fmc = 255, bootloader = 0, tee = 0, snp = 0, microcode = 0 }
`

// Every key, once.
func TestSNPPolicyKeys(t *testing.T) {
	p, err := ParseSNP("snp.toml", []byte(allSNPKeys))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{p.Guest, p.Platform} {
		for i, fields := 0, reflect.ValueOf(v); i < fields.NumField(); i++ {
			if fields.Field(i).IsZero() {
				t.Errorf("%s of %T is not set", fields.Type().Field(i).Name, v)
			}
		}
	}
	if p.Guest.ABIMajor != 1 || p.Guest.ABIMinor != 55 {
		t.Errorf("%+v", p.Guest)
	}
	if p.MinGuestSVN != 7 || !p.AllowMaskedChip || p.MinValidity != 24*time.Hour || p.VMPLs[1] != 3 || p.CSPs[0] != "CN=example" || p.DenyProducts[0] != "Milan" {
		t.Errorf("%+v", p)
	}
	for name, l := range map[string]attest.ReferenceValues{
		"host_data": p.HostData, "image_id": p.ImageIDs, "family_id": p.FamilyIDs, "chip_id": p.Chips, "deny_chip_id": p.DenyChips,
		"id_key": p.IDKeys, "author_key": p.AuthorKeys, "product chip_id": p.Products[0].Chips,
	} {
		if len(l) != 1 || !bytes.HasPrefix(l[0].Value, []byte{0, 0x11, 0x22}) || l[0].Rule == "" {
			t.Errorf("%s: %+v", name, l)
		}
	}
	if tcb := *p.Products[0].Reported; tcb != (attest.TCB{FMC: 1, Bootloader: 2, TEE: 3, SNP: 4, Microcode: 5}) || p.Products[0].Launch.FMC != 255 {
		t.Errorf("%+v", p.Products[0])
	}
	if got := p.AuthorKeys[0].Until; !got.Equal(time.Date(2027, 1, 1, 11, 0, 0, 0, time.UTC)) {
		t.Error(got)
	}
}

// What is wrong is said with its line, and no value is repeated.
func TestWrongSNPPolicies(t *testing.T) {
	good := documentedSNP(t)
	for name, c := range map[string]struct{ old, new, want string }{
		"unknown key":         {"vmpl    = [0]", "vmpl = [0]\nvmpls = [1]", "snp.toml:3: unknown key"},
		"unknown key below":   {"allow_smt = true", "allow_smtt = true", "unknown key"},
		"empty signer":        {`["VCEK"]`, `[]`, "snp.toml:1: signer: expected the kinds of keys"},
		"other signer":        {`["VCEK"]`, `["vcek"]`, "snp.toml:1: signer: expected of VCEK, VLEK"},
		"VLEK without csp":    {`["VCEK"]`, `["VLEK"]`, "csp: expected the providers"},
		"empty vmpl":          {"[0]", "[]", "snp.toml:2: vmpl: expected VMPLs"},
		"vmpl 4":              {"[0]", "[4]", "snp.toml:2: vmpl: expected VMPLs from 0 to 3, got 4"},
		"no subject":          {`subject = "11111111-2222-3333-4444-555555555555"`, "", "host_data: expected what tells guests"},
		"other subject":       {`"11111111-2222-3333-4444-555555555555"`, `"WEB1"`, "snp.toml:3: subject: expected a UUID"},
		"both":                {`vmpl    = [0]`, "vmpl = [0]\nhost_data = [\"" + digits64[:64] + `"]`, "expected subject or host_data, got both"},
		"empty host_data":     {`subject = "11111111-2222-3333-4444-555555555555"`, "host_data = []", "snp.toml:3: host_data: expected values"},
		"no crl":              {`crl     = "required"`, "", "crl: expected required or when-given, got none"},
		"other crl":           {`"required"`, `"never"`, "snp.toml:4: crl: expected one of required, when-given"},
		"no crl_max_age":      {`crl_max_age = "2160h"`, "", "crl_max_age: expected the greatest age"},
		"no measurement":      {"[[measurement]]", "[[id_keys]]", "measurement: expected measurements, or digests"},
		"short value":         {"00112233", "", "snp.toml:9: value in [[measurement]]: expected 96 hexadecimal digits, got 88 characters"},
		"no hexadecimal":      {"00112233", "0011223g", "expected 96 hexadecimal digits"},
		"no name":             {`name  = "web 1.2"`, "", "snp.toml:7: name in [[measurement]]: expected a name"},
		"no value":            {"value =", "values =", "expected 96 hexadecimal digits, got none"},
		"other until":         {`"2027-01-31"`, `"31.1.2027"`, "snp.toml:10: until in [[measurement]]: expected a date"},
		"bare until":          {`"2027-01-31"`, `2027-01-31`, "snp.toml:10: until"},
		"other line":          {`"Genoa"`, `"Rome"`, "snp.toml:13: line in [[product]]: expected one of"},
		"no line":             {`line = "Genoa"`, "", "expected a product line"},
		"no tcb":              {"tcb  =", "reported =", "product: expected the least reported, committed and launch TCB of Genoa"},
		"both tcb":            {"tcb  =", "launch = { bootloader = 10, tee = 0, snp = 27, microcode = 27 }\ntcb =", "got both"},
		"a part missing":      {", microcode = 27", "", "snp.toml:14: microcode in [product.tcb]: expected the least microcode of Genoa"},
		"a part too many":     {"tee = 0,", "tee = 0, fmc = 1,", "unknown key"},
		"a part of 256":       {"snp = 27", "snp = 256", "expected a whole number from 0 to 255"},
		"no fmc of Turin":     {`"Genoa"`, `"Turin"`, "expected the least fmc of Turin"},
		"other abi":           {"allow_smt = true", `abi = "1"`, "expected a version such as"},
		"abi with rest":       {"allow_smt = true", `abi = "1.5x"`, "expected a version such as"},
		"abi too great":       {"allow_smt = true", `abi = "1.256"`, "expected a version such as"},
		"flag as string":      {"allow_smt = true", `allow_smt = "yes"`, "snp.toml:17: allow_smt in [guest_policy]: expected true or false"},
		"empty chip_id":       {"vmpl    = [0]", "vmpl = [0]\nchip_id = []", "snp.toml:3: chip_id: expected values, or no such list"},
		"empty deny_product":  {"vmpl    = [0]", "vmpl = [0]\ndeny_product = []", "deny_product: expected product lines, or no such list"},
		"empty id_key":        {"vmpl    = [0]", "vmpl = [0]\nid_key = []", "id_key: expected values"},
		"empty product chips": {`line = "Genoa"`, "line = \"Genoa\"\nchip_id = []", "chip_id in [[product]]: expected chips"},
		"line twice":          {"[guest_policy]", "[[product]]\nline = \"Genoa\"\n[guest_policy]", "expected each line once"},
		"no TOML":             {"[0]", "[0", "expected TOML"},
	} {
		text := strings.Replace(good, c.old, c.new, 1)
		if text == good {
			t.Errorf("%s: %q is not in the example", name, c.old)
			continue
		}
		p, err := ParseSNP("snp.toml", []byte(text))
		if err == nil || p != nil || !strings.Contains(strings.ReplaceAll(err.Error(), `"`, ""), c.want) {
			t.Errorf("%s: expected %q, got %v", name, c.want, err)
		}
	}
	if _, err := ParseSNP("snp.toml", nil); err == nil {
		t.Error("an empty file is a policy")
	}
	const secret = "0123456789abcdef0123456789abcdefSECRET"
	for _, old := range []string{`"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"`, `"11111111-2222-3333-4444-555555555555"`} {
		if _, err := ParseSNP("snp.toml", []byte(strings.Replace(good, old, `"`+secret+`"`, 1))); err == nil || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%v", err)
		}
	}
}

// What parses is a policy that can accept something, and says so the same way twice.
func FuzzSNPPolicy(f *testing.F) {
	f.Add([]byte(documentedSNP(f)))
	f.Add([]byte("signer = [\"VLEK\"]\n[[product]]\nline = \"Turin\"\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := ParseSNP("snp.toml", text)
		if (p == nil) != (err != nil) {
			t.Fatalf("%v, %v", p, err)
		}
		if p != nil && len(p.Problems()) > 0 {
			t.Errorf("it refuses everything: %v", p.Problems())
		}
	})
}
