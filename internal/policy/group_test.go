package policy

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keybroker/attest"
	"keybroker/derive"
)

// sampleSNP is two VMs that share an appraisal policy.
var sampleSNP = `[[vm]]
uuid = "` + web1 + `"
name = "web1"
tier = "snp"
snp  = "web"
keys = ["disk"]

[[vm]]
uuid    = "` + web2 + `"
tier    = "snp"
snp     = "web"
subject = "` + web3 + `"
keys    = ["disk"]

[[snp]]
name = "web"
signer = ["VCEK"]
vmpl = [0]
crl = "required"
crl_max_age = "2160h"
[[snp.measurement]]
name = "web 1.2"
value = "` + digits48 + `"
until = "2027-01-31"
[[snp.measurement]]
name = "web 1.3"
value = "a` + digits48[1:] + `"
[[snp.product]]
line = "Genoa"
tcb = { bootloader = 10, tee = 0, snp = 27, microcode = 27 }
[snp.guest_policy]
allow_smt = true
`

// vmSNP returns a [[vm]] entry of tier snp.
func vmSNP(uuid, lines string) string {
	return "[[vm]]\nuuid = '" + uuid + "'\nname = 'n" + uuid[:1] + "'\ntier = 'snp'\nkeys = ['disk']\n" + lines + "\n"
}

// table returns a [[snp]] table that accepts no weakness, with these keys and tables more.
func table(name, keys, tables string) string {
	return "[[snp]]\nname = '" + name + "'\nsigner = ['VCEK']\nvmpl = [0]\ncrl = 'required'\ncrl_max_age = '24h'\n" + keys + `
[[snp.product]]
line = "Turin"
tcb = { fmc = 1, bootloader = 1, tee = 1, snp = 1, microcode = 1 }
` + tables + "\n"
}

func measurement(name, digit string) string {
	return "[[snp.measurement]]\nname = '" + name + "'\nvalue = '" + strings.Repeat(digit, 96) + "'\n"
}

func decide(t *testing.T, p *Policy, uuid string) *VM {
	t.Helper()
	v, d := p.VM(VMClaims{UUID: uuid, Tier: derive.TierSNP, Host: "any"})
	if !d.Allow || v.SNP == nil || len(v.SNP.Problems()) > 0 {
		t.Fatalf("%+v", d)
	}
	return v
}

// The decision has the policy that the VM's reports are appraised with: the group's, with the VM's own HOST_DATA.
func TestAppraisalPolicyOfVM(t *testing.T) {
	p := parse(t, sampleSNP)
	for uuid, rule := range map[string]string{web1: "policy.toml:1 [[vm]] web1", web2: "policy.toml:8 [[vm]] " + web2} {
		v := decide(t, p, uuid)
		if len(v.SNP.HostData) != 1 || !bytes.Equal(v.SNP.HostData[0].Value, attest.HostData(uuid)) || v.SNP.HostData[0].Rule != rule {
			t.Errorf("HOST_DATA of %s: %+v", uuid, v.SNP.HostData)
		}
		if got := v.SNP.RuleOf("vmpl"); got != "policy.toml:18 vmpl" {
			t.Error(got)
		}
		if got := v.SNP.RuleOf("csp"); got != "policy.toml:15 [[snp]] web csp" {
			t.Error(got)
		}
		if got := v.SNP.Measurements[1].Rule; got != "policy.toml:25 [[snp.measurement]] web 1.3" {
			t.Error(got)
		}
		if got := v.SNP.Products[0].Rule; got != "policy.toml:28 [[snp.product]] Genoa" {
			t.Error(got)
		}
		if _, d := p.VM(VMClaims{UUID: uuid, Name: "web1", Tier: derive.TierVM}); d.Allow || d.Code != CodeTier {
			t.Errorf("in tier vm: %+v", d)
		}
	}
	for _, c := range []VMClaims{{UUID: web3, Tier: derive.TierSNP}, {UUID: web1}} {
		if v, d := p.VM(c); v != nil || d.Allow {
			t.Errorf("%+v: %+v", c, d)
		}
	}
	denied := parse(t, strings.Replace(sampleSNP, "name = \"web1\"", "deny = true", 1))
	if v, d := denied.VM(VMClaims{UUID: web1, Tier: derive.TierSNP}); v != nil || d.Code != CodeDenies {
		t.Errorf("denied: %+v", d)
	}
}

// A next measurement stands beside the present one, until that one's end.
func TestStagedMeasurement(t *testing.T) {
	v := decide(t, parse(t, sampleSNP), web1)
	old, next := v.SNP.Measurements[0].Value, v.SNP.Measurements[1].Value
	end := time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		at        time.Time
		old, next bool
	}{{end.Add(-1), true, true}, {end, false, true}, {end.AddDate(9, 0, 0), false, true}} {
		_, isOld := v.SNP.Measurements.Find(old, c.at)
		_, isNext := v.SNP.Measurements.Find(next, c.at)
		if isOld != c.old || isNext != c.next {
			t.Errorf("at %s: %v, %v", c.at, isOld, isNext)
		}
	}
}

// Tables and VMs find each other across files, in any order.
func TestAppraisalPolicyInDropIn(t *testing.T) {
	vm, group := File{"policy.d/10.toml", []byte(vmSNP(web1, "snp = 'web'"))}, File{"policy.d/20.toml", []byte(table("web", "", measurement("a", "1")))}
	for _, files := range [][]File{{vm, group}, {group, vm}} {
		p, err := Parse(files...)
		if err != nil {
			t.Fatal(err)
		}
		if v := decide(t, p, web1); v.SNP.RuleOf("vmpl") != "policy.d/20.toml:4 vmpl" || v.SNP.HostData[0].Rule != "policy.d/10.toml:1 [[vm]] n1" {
			t.Errorf("%s, %s", v.SNP.RuleOf("vmpl"), v.SNP.HostData[0].Rule)
		}
	}
	_, err := Parse(vm)
	if err == nil || !strings.HasPrefix(err.Error(), `policy.d/10.toml:6: "snp" in [[vm]]: expected the name of a [[snp]] table, got "web", which none has`) {
		t.Errorf("no table: %v", err)
	}
	_, err = Parse(group, File{"policy.d/30.toml", group.Text})
	if err == nil || !strings.Contains(err.Error(), `policy.d/30.toml:2: "name" in [[snp]]: expected each name once, got it again; the other is policy.d/20.toml:1 [[snp]] web`) {
		t.Errorf("twice: %v", err)
	}
	_, err = Parse(vm, File{"policy.d/40.toml", []byte("[[snp")}, File{"policy.d/50.toml", []byte("a = 1")})
	if err == nil || strings.Contains(err.Error(), "which none has") || !strings.Contains(err.Error(), "40.toml:1") || !strings.Contains(err.Error(), "50.toml:1: unknown key") {
		t.Errorf("a file that is no TOML: %v", err)
	}
}

// What is wrong is said with its line; each list that is empty refuses; and a policy without measurement and key digest is none.
func TestWrongAppraisalPolicies(t *testing.T) {
	for name, c := range map[string]struct{ old, new, want string }{
		"no snp":               {"snp  = \"web\"\n", "", `policy.toml:1: snp in [[vm]]: expected snp = NAME`},
		"empty snp":            {`snp  = "web"`, `snp = ""`, `policy.toml:5: snp in [[vm]]: expected the name of a [[snp]] table, got an empty one`},
		"other snp":            {`snp  = "web"`, `snp = "db"`, `policy.toml:5: snp in [[vm]]: expected the name of a [[snp]] table, got db, which none has`},
		"hosts":                {`snp  = "web"`, "snp = \"web\"\nhosts = [\"h\"]", `policy.toml:6: hosts in [[vm]]: expected no hosts in tier snp`},
		"after_gap":            {`snp  = "web"`, "snp = \"web\"\nafter_gap = \"allow\"", `policy.toml:6: after_gap in [[vm]]: expected no after_gap in tier snp`},
		"snp in tier vm":       {`tier = "snp"`, `tier = "vm"`, `policy.toml:5: snp in [[vm]]: expected no snp in tier vm`},
		"no name":              {"name = \"web\"\n", "", `policy.toml:15: name in [[snp]]: expected a name`},
		"empty name":           {"name = \"web\"\n", "name = \"\"\n", `policy.toml:16: name in [[snp]]: expected a name`},
		"unknown key":          {"vmpl = [0]", "vmpls = [0]", `policy.toml:18: unknown key vmpls in [[snp]]; did you mean vmpl`},
		"unknown key below":    {"allow_smt = true", "allow_smt = true\nallow_dbug = true", `policy.toml:33: unknown key allow_dbug in [snp.guest_policy]`},
		"unknown in a value":   {`until =`, `since =`, `policy.toml:24: unknown key since in [[snp.measurement]]`},
		"letter case":          {"vmpl = [0]", "VMPL = [0]", `policy.toml:18: unknown key VMPL in [[snp]]; did you mean vmpl`},
		"subject":              {"vmpl = [0]", "vmpl = [0]\nsubject = \"" + web1 + `"`, `policy.toml:19: subject in [[snp]]: expected no subject: the HOST_DATA of each VM`},
		"no table of tables":   {"[[snp]]\n", "[snp]\n", `policy.toml:15: snp: expected tables [[snp]], got a table`},
		"a name twice":         {"web 1.3", "web 1.2", `policy.toml:26: name in [[snp.measurement]]: expected each name once`},
		"short value":          {`"a0112`, `"12`, `policy.toml:27: value in [[snp.measurement]]: expected 96 hexadecimal digits, got 93 characters`},
		"any HOST_DATA":        {"vmpl = [0]", "vmpl = [0]\nany_host_data = true", `policy.toml:15: host_data in [[snp]]: expected what tells guests with the same image apart`},
		"any HOST_DATA and it": {"vmpl = [0]", "vmpl = [0]\nany_host_data = true\nhost_data = [\"" + digits64[:64] + `"]`, `policy.toml:19: any_host_data in [[snp]]: expected any_host_data or host_data, got both`},

		"no signer":    {"signer = [\"VCEK\"]\n", "", `policy.toml:15: signer in [[snp]]: expected the kinds of keys that may sign, VCEK or VLEK, got none`},
		"no vmpl":      {"vmpl = [0]\n", "", `policy.toml:15: vmpl in [[snp]]: expected VMPLs, 0 to 3, got none`},
		"no crl":       {"crl = \"required\"\n", "", `policy.toml:15: crl in [[snp]]: expected required or when-given, got none`},
		"no CRL's age": {"crl_max_age = \"2160h\"\n", "", `expected the greatest age of a revocation list, got none`},
		"no csp":       {`["VCEK"]`, `["VLEK"]`, `csp in [[snp]]: expected the providers whose VLEK is accepted, got none`},

		"empty signer":       {`["VCEK"]`, `[]`, `policy.toml:17: signer in [[snp]]: expected`},
		"empty csp":          {`["VCEK"]`, "[\"VLEK\"]\ncsp = []", `policy.toml:18: csp in [[snp]]: expected`},
		"empty vmpl":         {"[0]", "[]", `policy.toml:18: vmpl in [[snp]]: expected`},
		"empty deny_product": {"vmpl = [0]", "vmpl = [0]\ndeny_product = []", `policy.toml:19: deny_product in [[snp]]: expected`},
		"empty id_key":       {"vmpl = [0]", "vmpl = [0]\nid_key = []", `policy.toml:19: id_key in [[snp]]: expected values`},
		"empty author_key":   {"vmpl = [0]", "vmpl = [0]\nauthor_key = []", `policy.toml:19: author_key in [[snp]]: expected values`},
		"empty host_data":    {"vmpl = [0]", "vmpl = [0]\nhost_data = []", `policy.toml:19: host_data in [[snp]]: expected values`},
		"empty image_id":     {"vmpl = [0]", "vmpl = [0]\nimage_id = []", `policy.toml:19: image_id in [[snp]]: expected values`},
		"empty family_id":    {"vmpl = [0]", "vmpl = [0]\nfamily_id = []", `policy.toml:19: family_id in [[snp]]: expected values`},
		"empty chip_id":      {"vmpl = [0]", "vmpl = [0]\nchip_id = []", `policy.toml:19: chip_id in [[snp]]: expected values`},
		"empty deny_chip_id": {"vmpl = [0]", "vmpl = [0]\ndeny_chip_id = []", `policy.toml:19: deny_chip_id in [[snp]]: expected values`},
		"empty line's chips": {`line = "Genoa"`, "line = \"Genoa\"\nchip_id = []", `policy.toml:30: chip_id in [[snp.product]]: expected chips`},
	} {
		text := strings.Replace(sampleSNP, c.old, c.new, 1)
		p, err := Parse(File{"policy.toml", []byte(text)})
		if text == sampleSNP || err == nil || p != nil || !strings.Contains(strings.ReplaceAll(err.Error(), `"`, ""), c.want) {
			t.Errorf("%s:\nwant %s\n got %v", name, c.want, err)
		}
	}
	for keys, want := range map[string]string{
		"":                 `policy.toml:7: "measurement" in [[snp]]: expected measurements, or digests of ID keys or author keys, got none of them`,
		"measurement = []": `policy.toml:13: "measurement" in [[snp]]: expected values, or no such list, got none`,
	} {
		_, err := Parse(File{"policy.toml", []byte(vmSNP(web1, "snp = 'a'") + table("a", keys, ""))})
		if err == nil || err.Error() != want {
			t.Errorf("%q:\nwant %s\n got %v", keys, want, err)
		}
	}
	p, err := Parse(File{"policy.toml", []byte(vmSNP(web1, "snp = 'a'") + "[[snp]]\nname = 'a'\nsigner = ['VCEK']\nvmpl = [0]\ncrl = 'when-given'\nproduct = []\n" + measurement("a", "1"))})
	if p != nil || err == nil || !strings.Contains(err.Error(), `policy.toml:12: "product" in [[snp]]: expected product lines with their least TCB, got none`) {
		t.Errorf("empty product: %v", err)
	}
	if _, err := Parse(File{"policy.toml", []byte("[[vm]]\nuuid = '" + web1 + "'\ntier = 'vm'\nshared = true\n")}); err == nil || !strings.Contains(err.Error(), `expected no shared in tier "vm"`) {
		t.Errorf("shared in tier vm: %v", err)
	}
}

// Two entries that one report could satisfy are refused, unless both say that they share.
func TestEntriesThatOneReportSatisfies(t *testing.T) {
	data := "host_data = ['" + digits64[:64] + "']"
	own := fmt.Sprintf("host_data = ['%x']", attest.HostData(web1))
	for name, c := range map[string]struct {
		one, two, tables string
		want             string // in the error; empty: it is none
	}{
		"own HOST_DATA": {"snp = 'a'", "snp = 'a'", table("a", "", measurement("a", "1")), ""},
		"one HOST_DATA": {"snp = 'a'", "snp = 'a'", table("a", data, measurement("a", "1")),
			`policy.toml:12: "snp" in [[vm]]: expected reports that fit this entry or policy.toml:1 [[vm]] n1, got entries that one report could satisfy both, ` +
				`so that either guest had the other's keys: host_data 0011223344556677... is in both, measurement 1111111111111111... is in both, id_key is in neither`},
		"both shared":             {"snp = 'a'\nshared = true", "snp = 'a'\nshared = true", table("a", data, measurement("a", "1")), ""},
		"the first shared":        {"snp = 'a'\nshared = true", "snp = 'a'", table("a", data, measurement("a", "1")), "shared = true in both (one of them says so)"},
		"the second shared":       {"snp = 'a'", "snp = 'a'\nshared = true", table("a", data, measurement("a", "1")), "shared = true in both (one of them says so)"},
		"not shared is no shared": {"snp = 'a'\nshared = true", "snp = 'a'\nshared = false", table("a", data, measurement("a", "1")), "shared = true in both (one of them says so)"},
		"other measurements":      {"snp = 'a'", "snp = 'b'", table("a", data, measurement("a", "1")) + table("b", data, measurement("b", "2")), ""},
		"a measurement in common": {"snp = 'a'", "snp = 'b'", table("a", data, measurement("a", "1")+measurement("c", "3")) + table("b", data, measurement("b", "2")+measurement("c", "3")),
			"measurement 3333333333333333... is in both"},
		"another's own HOST_DATA":    {"snp = 'a'", "snp = 'b'", table("a", "", measurement("a", "1")) + table("b", own, measurement("b", "1")), "is in both"},
		"another's own, the 2nd way": {"snp = 'b'", "snp = 'a'", table("a", "", measurement("a", "1")) + table("b", fmt.Sprintf("host_data = ['%x']", attest.HostData(web2)), measurement("b", "1")), "is in both"},
		"any HOST_DATA": {"snp = 'a'", "snp = 'b'", table("a", "", measurement("a", "1")) +
			table("b", "any_host_data = true\nimage_id = ['"+digits64[:32]+"']", measurement("b", "1")), "host_data is in one alone"},
		"any HOST_DATA first": {"snp = 'b'", "snp = 'a'", table("a", "", measurement("a", "1")) +
			table("b", "any_host_data = true\nimage_id = ['"+digits64[:32]+"']", measurement("b", "1")), "host_data is in one alone"},
		"image ids": {"snp = 'a'", "snp = 'b'", table("a", "any_host_data = true\nimage_id = ['"+digits64[:32]+"']", measurement("a", "1")) +
			table("b", "any_host_data = true\nimage_id = ['a"+digits64[1:32]+"']", measurement("b", "1")), ""},
		"one image id": {"snp = 'a'", "snp = 'a'", table("a", "any_host_data = true\nimage_id = ['"+digits64[:32]+"']", measurement("a", "1")), "image_id 0011223344556677... is in both"},
		"one denied":   {"snp = 'a'\ndeny = true", "snp = 'a'", table("a", data, measurement("a", "1")), ""},
		"VMPLs":        {"snp = 'a'", "snp = 'b'", table("a", data, measurement("a", "1")) + strings.Replace(table("b", data, measurement("b", "1")), "[0]", "[1]", 1), "could satisfy both"},
	} {
		p, err := Parse(File{"policy.toml", []byte(vmSNP(web1, c.one) + vmSNP(web2, c.two) + c.tables)})
		if (err == nil) != (c.want == "") || (p == nil) != (err != nil) || err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s:\nwant %s\n got %v", name, c.want, err)
		}
	}
}

// Many VMs of one group are told apart as fast as they are read.
func TestManyVMsOfOneGroup(t *testing.T) {
	var b strings.Builder
	for i := range 3000 {
		b.WriteString(vmSNP(fmt.Sprintf("%08d-2222-3333-4444-555555555555", i+1), "snp = 'a'"))
	}
	began := time.Now()
	p := parse(t, b.String()+table("a", "", measurement("a", "1")))
	if took := time.Since(began); len(p.VMs()) != 3000 || took > 20*time.Second {
		t.Errorf("%d VMs in %s", len(p.VMs()), took)
	}
}

// everyKey is a table with every key, as those of a file of its own in TestSNPPolicyKeys.
var everyKey = func() string {
	lines := strings.Replace(allSNPKeys, "\n[", "\n[snp.", -1)
	lines = strings.Replace(lines, "[snp.[", "[[snp.", -1)
	return vmSNP(web1, "snp = 'all'") + "[[snp]]\nname = 'all'" + lines + "[[snp.measurement]]\nname = 'm'\nvalue = '" + digits48 + "'\nuntil = '2027-01-31'\n"
}()

// What is logged when a policy changes, and what policy check shows, has every key of a table.
func TestDiffSeesEveryKey(t *testing.T) {
	old := parse(t, everyKey)
	if got := Diff(old, parse(t, "# moved\n\n"+everyKey)); got != nil {
		t.Errorf("only lines moved: %q", got)
	}
	edits := map[string][]string{ // of a line's value, the first that parses counts
		"true": {"false"}, "[": {`["VLEK"]`, `["VCEK"]`, `["CN=other"]`, `["Genoa"]`, "[1]", `["a` + digits64[1:64] + `"]`, `["a` + digits64[1:32] + `"]`, `["a` + digits64[1:] + `"]`},
		"{": {"{ fmc = 9, bootloader = 9, tee = 9, snp = 9, microcode = 9 }"}, "": {"8", `"25h"`, `"1.56"`, `"required"` + "\ncrl_max_age = \"24h\"", `"a` + digits48[1:] + `"`, `"2027-02-01"`, `"Genoa"`, `"other"`},
	}
	lines := strings.Split(everyKey, "\n")
	tried := 0
	for i, line := range lines {
		key, value, found := strings.Cut(line, " = ")
		if !found || i < 8 { // the VM, and the table's name
			continue
		}
		changed := false
		for kind, values := range edits {
			if !strings.HasPrefix(value, kind) || kind == "" && strings.ContainsAny(value[:1], "[{t") {
				continue
			}
			for _, v := range values {
				edited := slices.Clone(lines)
				edited[i] = key + " = " + v
				p, err := Parse(File{"policy.toml", []byte(strings.Join(edited, "\n"))})
				if err != nil || v == value {
					continue
				}
				changed = true
				if len(Diff(old, p)) == 0 {
					t.Errorf("%s -> %s: no difference", line, v)
				}
				break
			}
		}
		if changed {
			tried++
		} else if key != "line" { // whose TCB would lack a part, or have one more
			t.Errorf("%s: nothing to change it to", line)
		}
	}
	if tried < 35 {
		t.Errorf("%d keys", tried)
	}
	for add, want := range map[string]string{
		"any_host_data = true": `changed [[snp]] web: host_data: each VM's own -> anything`,
		"min_validity = '24h'": `changed [[snp]] web: min_validity: (default) -> another 24h0m0s`,
	} {
		got := Diff(parse(t, strings.Replace(sampleSNP, "vmpl", "image_id = ['"+digits64[:32]+"']\nvmpl", 1)),
			parse(t, strings.Replace(strings.Replace(sampleSNP, "vmpl", "image_id = ['"+digits64[:32]+"']\n"+add+"\nvmpl", 1), "\n[[vm]]\nuuid    =", "\n[[vm]]\ndeny = true\nuuid    =", 1)))
		if !slices.Contains(got, want) {
			t.Errorf("%s: %q", add, got)
		}
	}
}

func TestAppraisals(t *testing.T) {
	p := parse(t, sampleSNP+table("none", "deny_product = ['Milan']", measurement("a", "1")))
	got := p.Appraisals(time.Date(2027, 2, 1, 0, 0, 0, 0, time.UTC))
	want := Appraisal{
		Rule: "policy.toml:15 [[snp]] web", VMs: []string{"web1", web2},
		Rows: [][2]string{
			{"signer", "VCEK"}, {"product Genoa", "at least bootloader 10, tee 0, snp 27, microcode 27"}, {"vmpl", "0"},
			{`measurement "web 1.2"`, digits48 + " until 2027-01-31T00:00:00Z, so no longer"}, {`measurement "web 1.3"`, "a" + digits48[1:]},
			{"host_data", "each VM's own"}, {"host_data of web1", fmt.Sprintf("%x", attest.HostData(web1))}, {"host_data of " + web2, fmt.Sprintf("%x", attest.HostData(web2))},
			{"crl", "required, at most 2160h0m0s old"}, {"guest_policy", "allow_smt"}, {"platform", "nothing required"},
		},
	}
	if d := cmp.Diff(want, got[0]); d != "" {
		t.Errorf("differs (-want +got):\n%s", d)
	}
	if len(got) != 2 || got[1].VMs != nil {
		t.Errorf("%+v", got)
	}
	if got := p.Grants()[0]; got.Who != "tier snp "+web1+" by [[snp]] web" {
		t.Errorf("%+v", got)
	}
	var warnings []string
	for _, w := range Check(p, time.Date(2027, 2, 1, 0, 0, 0, 0, time.UTC)) {
		warnings = append(warnings, w.String())
	}
	for i, want := range []string{
		"policy.toml:21 [[snp.measurement]] web 1.2: is no longer accepted, since 2027-01-31T00:00:00Z; remove it",
		`policy.toml:33 [[snp]] none: no VM names it; give a [[vm]] of tier "snp" the line snp = "none", or remove it`,
	} {
		if len(warnings) != 2 || warnings[i] != want {
			t.Errorf("%q", warnings)
		}
	}
	shared := parse(t, vmSNP(web1, "snp = 'a'\nshared = true")+table("a", "", measurement("a", "1")))
	if got := Check(shared, time.Now()); len(got) != 1 || !strings.Contains(got[0].String(), "is shared: the guest of any other shared entry") {
		t.Errorf("%v", got)
	}
}

// The example in docs/policy.md is one.
func TestDocumentedAppraisalPolicy(t *testing.T) {
	page, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), "### [[snp]]")
	_, rest, _ = strings.Cut(rest, "```toml\n")
	text, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("the page has no example")
	}
	p := parse(t, text)
	if w := Check(p, time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)); len(w) > 0 || len(p.Appraisals(time.Now())) != 1 {
		t.Errorf("%v", w)
	}
	for _, v := range p.VMs() {
		decide(t, p, v.UUID)
	}
	if len(p.VMs()) != 2 {
		t.Errorf("%d VMs", len(p.VMs()))
	}
}

// checkAppraisals holds what any policy must that was read: appraisal policies that can accept something, and of two entries
// that do not share, ones that no report satisfies both.
func checkAppraisals(t *testing.T, p *Policy) {
	if got := len(p.Appraisals(time.Now())); got != len(p.snps) {
		t.Errorf("%d appraisal policies of %d", got, len(p.snps))
	}
	for i, v := range p.vms {
		if v.SNP == nil {
			continue
		}
		if len(v.SNP.Problems()) > 0 {
			t.Fatalf("%s refuses everything: %v", v.Rule, v.SNP.Problems())
		}
		for _, w := range p.vms[:i] {
			if w.SNP == nil || v.Deny || w.Deny || v.Shared && w.Shared {
				continue
			}
			if apart, why := attest.Apart(v.SNP, w.SNP); !apart {
				t.Fatalf("%s and %s: %q", v.Rule, w.Rule, why)
			}
		}
	}
}
