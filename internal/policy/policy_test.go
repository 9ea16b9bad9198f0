package policy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keybroker/derive"
	"keybroker/internal/tomlfile"
)

const (
	web1 = "11111111-2222-3333-4444-555555555555"
	web2 = "21111111-2222-3333-4444-555555555555"
	web3 = "31111111-2222-3333-4444-555555555555"
)

const sample = `[[service]]
name = "my-database"
uid  = [1001]
unit = ["/system.slice/my-database.service"]

[[service]]
name = "db-*"
uid = [1001, 1002]
length = 64

[[service]]
name = "nothing"

[[vm]]
uuid = "` + web1 + `"
name = "web1"
tier = "vm"
keys = ["disk", "app"]

[[vm]]
uuid = "` + web2 + `"
tier = "vm"
subject = "` + web3 + `"
after_gap = "refuse"
hosts = ["hv1"]
[[vm.key]]
name = "disk"
length = 64
luks = { cipher = "aes-xts-plain64", key_size = 512, sector_size = 4096 }
`

func parse(t *testing.T, text string) *Policy {
	t.Helper()
	p, err := Parse(File{Name: "policy.toml", Text: []byte(text)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// in returns a MatchUnit for a caller in this unit.
func in(unit string) func(string) bool { return func(path string) bool { return path == unit } }

func TestService(t *testing.T) {
	p := parse(t, sample+`
[[service]]
name = "two"
uid = [1]
[[service]]
name = "two"
uid = [1, 2]
via = ["unix"]
[[service]]
name = "empty-uid"
uid = []
[[service]]
name = "empty-unit"
uid = [5]
unit = []
[[service]]
name = "empty-via"
uid = [5]
via = []
`)
	const unit = "/system.slice/my-database.service"
	for _, c := range []struct {
		name   string
		claims Claims
		code   string // empty: allowed
		rule   string
		length int
	}{
		{"my-database", Claims{UID: 1001, Via: "tcp", MatchUnit: in(unit)}, "", "policy.toml:1 [[service]] my-database", 32},
		{"my-database", Claims{UID: 1002, Via: "tcp", MatchUnit: in(unit)}, CodeUID, "policy.toml:1 [[service]] my-database", 0},
		{"my-database", Claims{UID: 1001, Via: "tcp", MatchUnit: in("/x.service")}, CodeUnit, "policy.toml:1 [[service]] my-database", 0},
		{"my-database", Claims{UID: 1001, Via: "tcp"}, CodeUnit, "policy.toml:1 [[service]] my-database", 0},
		{"db-1", Claims{UID: 1002, Via: "unix"}, "", "policy.toml:6 [[service]] db-*", 64},
		{"db-", Claims{UID: 1002, Via: "unix"}, CodeBadName, "", 0},
		{"db", Claims{UID: 1002, Via: "unix"}, CodeNoPolicy, "", 0},
		{"xdb-1", Claims{UID: 1002, Via: "unix"}, CodeNoPolicy, "", 0},
		{"db-1", Claims{UID: 0, Via: "unix"}, CodeUID, "policy.toml:6 [[service]] db-*", 0},
		{"db-1", Claims{UID: 1002}, CodeDoor, "policy.toml:6 [[service]] db-*", 0},
		{"nothing", Claims{UID: 0, Via: "unix"}, CodeDenies, "policy.toml:11 [[service]] nothing", 0},
		{"empty-uid", Claims{UID: 0, Via: "unix"}, CodeDenies, "policy.toml:38 [[service]] empty-uid", 0},
		{"empty-unit", Claims{UID: 5, Via: "unix", MatchUnit: in("")}, CodeDenies, "policy.toml:41 [[service]] empty-unit", 0},
		{"empty-via", Claims{UID: 5, Via: "unix"}, CodeDenies, "policy.toml:45 [[service]] empty-via", 0},
		{"two", Claims{UID: 1, Via: "unix"}, "", "policy.toml:31 [[service]] two", 32},
		{"two", Claims{UID: 2, Via: "unix"}, "", "policy.toml:34 [[service]] two", 32},
		{"two", Claims{UID: 2, Via: "tcp"}, CodeUID, "policy.toml:31 [[service]] two", 0},
		{"Two", Claims{UID: 2, Via: "unix"}, CodeBadName, "", 0},
		{"", Claims{UID: 2, Via: "unix"}, CodeBadName, "", 0},
		{"db-*", Claims{UID: 1002, Via: "unix"}, CodeBadName, "", 0},
	} {
		d := p.Service(c.name, c.claims)
		if d.Allow != (c.code == "") || d.Code != c.code || d.Rule != c.rule || d.Length != c.length {
			t.Errorf("%s by %+v: %+v, want %+v", c.name, c.claims, d, c)
		}
		if (d.Reason == "") != d.Allow {
			t.Errorf("%s by %+v: reason %q", c.name, c.claims, d.Reason)
		}
		if d.Allow && !p.NamesUID(c.claims.UID) {
			t.Errorf("uid %d is allowed and not named", c.claims.UID)
		}
	}
	for _, uid := range []uint32{0, 5, 1000} { // 5 stands in entries that allow nobody
		if p.NamesUID(uid) {
			t.Errorf("uid %d is named", uid)
		}
	}
}

// An exact entry and a glob that both allow: the first in the file names the rule, whatever kind it is.
func TestFirstMatchNamesTheRule(t *testing.T) {
	const exact, glob = "[[service]]\nname='db-1'\nuid=[7]\n", "[[service]]\nname='db-*'\nuid=[7]\n"
	const shorter = "[[service]]\nname='d*'\nuid=[7]\n"
	for text, want := range map[string]string{exact + glob: "db-1", glob + exact: "db-*", shorter + glob + exact: "d*"} {
		d := parse(t, text).Service("db-1", Claims{UID: 7, Via: "unix"})
		if !d.Allow || d.Rule != "policy.toml:1 [[service]] "+want {
			t.Errorf("%q: %+v", text, d)
		}
	}
}

func TestZeroPolicyRefusesEverything(t *testing.T) {
	empty, err := Parse()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []*Policy{{}, empty} {
		if d := p.Service("db", Claims{Via: "unix"}); d.Allow || d.Code != CodeNoPolicy {
			t.Errorf("service: %+v", d)
		}
		if v, d := p.VM(VMClaims{UUID: web1, Tier: "vm"}); v != nil || d.Allow || d.Code != CodeNoPolicy {
			t.Errorf("vm: %+v, %+v", v, d)
		}
	}
	if (Decision{}).Allow {
		t.Error("the zero decision allows")
	}
}

func TestVM(t *testing.T) {
	p := parse(t, sample+"[[vm]]\nuuid='"+web3+"'\ntier='vm'\nkeys=['disk']\ndeny=true\n"+
		"[[vm]]\nuuid='41111111-2222-3333-4444-555555555555'\ntier='vm'\nkeys=[]\n"+
		"[[vm]]\nuuid='51111111-2222-3333-4444-555555555555'\ntier='vm'\nkeys=['disk']\nhosts=[]\n")
	for _, c := range []struct {
		claims VMClaims
		code   string
	}{
		{VMClaims{UUID: web1, Name: "web1", Tier: "vm", Host: "any"}, ""},
		{VMClaims{UUID: web1, Name: "web9", Tier: "vm", Host: "any"}, CodeVMName},
		{VMClaims{UUID: web1, Name: "", Tier: "vm", Host: "any"}, CodeVMName},
		{VMClaims{UUID: web1, Name: "web1", Tier: "snp", Host: "any"}, CodeTier},
		{VMClaims{UUID: web1, Name: "web1", Tier: "", Host: "any"}, CodeTier},
		{VMClaims{UUID: strings.ToUpper(web1[:35]) + "a", Name: "web1", Tier: "vm"}, CodeNoPolicy},
		{VMClaims{UUID: web2, Name: "whatever", Tier: "vm", Host: "hv1"}, ""},
		{VMClaims{UUID: web2, Name: "whatever", Tier: "vm", Host: "hv2"}, CodeHost},
		{VMClaims{UUID: web3, Tier: "vm"}, CodeDenies},
		{VMClaims{UUID: "41111111-2222-3333-4444-555555555555", Tier: "vm"}, CodeDenies},
		{VMClaims{UUID: "51111111-2222-3333-4444-555555555555", Tier: "vm"}, CodeHost},
		{VMClaims{}, CodeNoPolicy},
	} {
		v, d := p.VM(c.claims)
		if d.Allow != (c.code == "") || d.Code != c.code || (v != nil) != d.Allow {
			t.Errorf("%+v: %+v, %+v, want code %q", c.claims, v, d, c.code)
		}
	}
}

func TestVMFields(t *testing.T) {
	p := parse(t, sample)
	want := []*VM{{
		Rule: "policy.toml:14 [[vm]] web1", UUID: web1, Name: "web1", Tier: "vm", Subject: web1, AfterGap: "allow",
		Keys: []Key{{Name: "disk", Length: 32}, {Name: "app", Length: 32}},
	}, {
		Rule: "policy.toml:20 [[vm]] " + web2, UUID: web2, Tier: "vm", Subject: web3, AfterGap: "refuse", Hosts: []string{"hv1"},
		Keys: []Key{{Name: "disk", Length: 64, LUKS: &LUKS{Cipher: "aes-xts-plain64", KeySize: 512, SectorSize: 4096}}},
	}}
	if d := cmp.Diff(want, p.VMs()); d != "" {
		t.Errorf("entries differ (-want +got):\n%s", d)
	}
	v := p.VMs()[0]
	if k, d := v.Key("app"); !d.Allow || k.Length != 32 || d.Rule != v.Rule {
		t.Errorf("key app: %+v, %+v", k, d)
	}
	if _, d := v.Key("swap"); d.Allow || d.Code != CodeKey || !strings.Contains(d.Expected, `"disk", "app"`) || strings.Contains(d.Reason, "disk") {
		t.Errorf("key swap: %+v", d)
	}
	if got := p.Find("web1"); len(got) != 1 || got[0] != v {
		t.Errorf("by name: %v", got)
	}
	if got := p.Find(strings.ToUpper(web2)); len(got) != 1 || got[0].UUID != web2 {
		t.Errorf("by UUID: %v", got)
	}
	if got := p.Find(""); len(got) != 0 {
		t.Errorf("by no name: %v", got)
	}
}

// The peer learns its own claim and where to ask; what the policy expects is for the log.
func TestReasonTellsOwnClaimOnly(t *testing.T) {
	d := parse(t, sample).Service("my-database", Claims{UID: 4711, Via: "unix", Unit: "/user.slice/x"})
	if !strings.Contains(d.Reason, "this uid, which is 4711") || !strings.Contains(d.Reason, "keybroker explain my-database") {
		t.Errorf("reason: %s", d.Reason)
	}
	if strings.Contains(d.Reason, "1001") || strings.Contains(d.Reason, "system.slice") || !strings.Contains(d.Expected, "1001") {
		t.Errorf("reason %q, expected %q", d.Reason, d.Expected)
	}
	d = parse(t, sample).Service("my-database", Claims{UID: 1001, Via: "unix", NoUnit: "needs Linux 6.5"})
	if !strings.Contains(d.Reason, "this unit, which is unknown: needs Linux 6.5") {
		t.Errorf("reason: %s", d.Reason)
	}
}

func TestExplain(t *testing.T) {
	p := parse(t, sample+"[[service]]\nname='my-*'\nuid=[9]\nvia=['unix']\n")
	var got []string
	for _, trial := range p.ExplainService("my-database", Claims{UID: 9, Via: "tcp", Unit: "/a"}) {
		got = append(got, trial.String())
	}
	want := []string{
		`policy.toml:1 [[service]] my-database: refuses; uid: expected one of 1001, got 9; unit: expected one of "/system.slice/my-database.service", got "/a"`,
		`policy.toml:30 [[service]] my-*: refuses; via: expected one of "unix", got "tcp"`,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("services differ (-want +got):\n%s", d)
	}
	trials := p.ExplainVM(VMClaims{UUID: web2, Tier: "vm", Host: "hv2"})
	if len(trials) != 1 || trials[0].String() != "policy.toml:20 [[vm]] "+web2+`: refuses; hosts: expected one of "hv1", got "hv2"` {
		t.Errorf("vm: %v", trials)
	}
	if trials := p.ExplainVM(VMClaims{UUID: web1, Name: "web1", Tier: "vm"}); trials[0].String() != "policy.toml:14 [[vm]] web1: allows" {
		t.Errorf("vm that is allowed: %v", trials)
	}
	if trials := p.ExplainVM(VMClaims{UUID: web3}); trials != nil {
		t.Errorf("no entry: %v", trials)
	}
}

func TestMistakes(t *testing.T) {
	vm := func(lines string) string { return "[[vm]]\nuuid='" + web1 + "'\ntier='vm'\n" + lines }
	for _, c := range []struct{ text, want string }{
		{"[[service]]\nuid=[1]", `policy.toml:1: "name" in [[service]]: expected the name of a service`},
		{"[[service]]\nname='*'", `policy.toml:2: "name" in [[service]]: expected at least one character before the *`},
		{"[[service]]\nname='a*b'", `expected the name of a service such as "db"`},
		{"[[service]]\nname='-*'", `expected the name of a service such as "db"`},
		{"[[service]]\nname='A'", `expected the name of a service such as "db"`},
		{"[[service]]\nname=''", `expected the name of a service such as "db"`},
		{"[[service]]\nname=5", `expected a string, got a whole number`},
		{"[[service]]\nname='a'\nunit=['/x.service']", `policy.toml:3: "unit" in [[service]]: expected uid beside unit`},
		{"[[service]]\nname='a'\nuid=[1]\nunit=['x.service']", `policy.toml:4: "unit" in [[service]]: expected a whole cgroup path, got "x.service"; did you mean "/system.slice/x.service"`},
		{"[[service]]\nname='a'\nuid=[1]\nunit=['/']", `expected a whole cgroup path such as`},
		{"[[service]]\nname='a'\nuid=[1]\nunit=['/a/../b']", `expected a whole cgroup path such as`},
		{"[[service]]\nname='a'\nuid=[1]\nunit=['/a/']", `expected a whole cgroup path such as`},
		{"[[service]]\nname='a'\nuid=[1]\nunit=['']", `expected a whole cgroup path such as`},
		{"[[service]]\nname='a'\nuid=[-1]", `expected a list of whole numbers from 0 to 4294967294`},
		{"[[service]]\nname='a'\nuid=1", `policy.toml:3: "uid" in [[service]]: expected a list of whole numbers from 0 to 4294967294 in [ ], got a whole number`},
		{"[[service]]\nname='a'\nuid=[1]\nlength=48", `expected 32 or 64 octets, got 48`},
		{"[[service]]\nname='a'\nuid=[1]\nlength=16", `expected a whole number from 32 to 64`},
		{"[[service]]\nname='a'\nvia=['vsock']", `expected "unix" and "tcp", or one of them, got "vsock"`},
		{"[[service]]\nname='a'\nuids=[1]", `policy.toml:3: unknown key "uids" in [[service]]; did you mean "uid"`},
		{"[service]\nname='a'", `policy.toml:1: "service": expected tables [[service]], got a table`},
		{"[[servce]]\nname='a'", `policy.toml:1: unknown key "servce"; did you mean "service"`},
		{"[[vm]]\ntier='vm'", `policy.toml:1: "uuid" in [[vm]]: expected the domain's UUID`},
		{"[[vm]]\nuuid='" + web1 + "'", `policy.toml:1: "tier" in [[vm]]: expected tier = "vm" or "snp", got none`},
		{"[[vm]]\nuuid='" + web1 + "'\ntier='user'", `policy.toml:3: "tier" in [[vm]]: this build does not serve tier "user" yet`},
		{"[[vm]]\nuuid='" + web1 + "'\ntier='host'", `expected tier = "vm" or "snp", got "host"`},
		{"[[vm]]\ntier='vm'\nuuid='A1111111-2222-3333-4444-555555555555'", `write "a1111111-2222-3333-4444-555555555555"`},
		{"[[vm]]\ntier='vm'\nuuid='11111111222233334444555555555555'", `expected a UUID such as`},
		{"[[vm]]\ntier='vm'\nuuid='00000000-0000-0000-0000-000000000000'", `expected a UUID such as`},
		{vm("name=''"), `expected the domain's name, 1 to 255 printable characters`},
		{vm("name=\"a\\u001b[31m\""), `expected the domain's name, 1 to 255 printable characters`},
		{vm("subject='web1'"), `policy.toml:4: "subject" in [[vm]]: expected a UUID`},
		{vm("after_gap='maybe'"), `expected one of "allow", "refuse"`},
		{vm("deny='true'"), `expected true or false`},
		{vm("keys=['disk','disk']"), `expected each key once, got "disk" again`},
		{vm("keys=['disk:64']"), `expected names of keys such as "disk"`},
		{vm("keys=['disk']\n[[vm.key]]\nname='disk'"), `policy.toml:6: "name" in [[vm.key]]: expected each key once, got "disk" again`},
		{vm("[[vm.key]]\nlength=64"), `policy.toml:4: "name" in [[vm.key]]: expected the name of a key, got none`},
		{vm("[[vm.key]]\nname='d'\nluks={}"), `[vm.key.luks]: expected cipher, key_size or sector_size to pin, got none of them`},
		{vm("[[vm.key]]\nname='d'\nluks={cipher='cipher_null-ecb'}"), `expected "aes-xts-plain64", the only cipher that agents accept`},
		{vm("[[vm.key]]\nname='d'\n[vm.key.luks]\ncipher='serpent-xts-plain64'"), `policy.toml:7: "cipher" in [vm.key.luks]: expected "aes-xts-plain64"`},
		{vm("[[vm.key]]\nname='d'\n[vm.key.luks]\ncipher=''"), `policy.toml:7: "cipher" in [vm.key.luks]: expected "aes-xts-plain64"`},
		{vm("[[vm.key]]\nname='d'\n[vm.key.luks]\nkey_size=256"), `policy.toml:7: "key_size" in [vm.key.luks]: expected 512 bits`},
		{vm("[[vm.key]]\nname='d'\n[vm.key.luks]\nkey_size=0"), `policy.toml:7: "key_size" in [vm.key.luks]: expected 512 bits`},
		{vm("[[vm.key]]\nname='d'\n[vm.key.luks]\nsector_size=513"), `policy.toml:7: "sector_size" in [vm.key.luks]: expected 512 or 4096`},
		{vm("[[vm.key]]\nname='d'\n[vm.key.luks]\nsector_size=2048"), `policy.toml:7: "sector_size" in [vm.key.luks]: expected 512 or 4096`},
		{vm("") + vm(""), `policy.toml:5: "uuid" in [[vm]]: expected each UUID once, got it again; the other is policy.toml:1 [[vm]] ` + web1},
		{vm("") + "[[vm]]\nuuid='" + web2 + "'\ntier='vm'\nsubject='" + web1 + "'", `both would read each other's disks`},
		{"[[vm]]\nuuid='" + web2 + "'\ntier='vm'\nsubject='" + web1 + "'\n" + vm(""), `policy.toml:5: "subject" in [[vm]]: expected each VM to have keys of its own`},
		{"[[vm]]\nuuid='" + web2 + "'\ntier='vm'\nsubject='" + web3 + "'\n[[vm]]\nuuid='" + web1 + "'\ntier='vm'\nsubject='" + web3 + "'\n",
			`policy.toml:8: "subject" in [[vm]]: expected each VM to have keys of its own`},
	} {
		p, err := Parse(File{Name: "policy.toml", Text: []byte(c.text)})
		if err == nil || !strings.Contains(err.Error(), c.want) || p != nil {
			t.Errorf("reading %q:\n got %v\nwant %s", c.text, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("reading %q: one mistake, several errors:\n%v", c.text, err)
		}
	}
}

// A domain that was defined anew keeps its disk while the entry of its earlier UUID stays, denied.
func TestSubjectOfDeniedEntry(t *testing.T) {
	parse(t, "[[vm]]\nuuid='"+web1+"'\ntier='vm'\nkeys=['disk']\ndeny=true\n[[vm]]\nuuid='"+web2+"'\ntier='vm'\nkeys=['disk']\nsubject='"+web1+"'\n")
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	src := Source{File: filepath.Join(dir, "policy.toml"), Dir: filepath.Join(dir, "policy.d")}
	if p, err := Load(src); err != nil || len(p.Services())+len(p.VMs()) != 0 {
		t.Errorf("no files: %v, %v", p, err)
	}
	if _, err := Load(Source{File: src.File, Required: true}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("--policy names a missing file: %v", err)
	}
	write(t, src.File, "[[service]]\nname='a'\nuid=[1]\n")
	write(t, filepath.Join(src.Dir, "20.toml"), "[[service]]\nname='c'\nuid=[1]\n")
	write(t, filepath.Join(src.Dir, "10.toml"), "\n[[service]]\nname='b'\nuid=[1]\n")
	p, err := Load(src)
	if err != nil {
		t.Fatal(err)
	}
	var rules []string
	for _, s := range p.Services() {
		rules = append(rules, s.Rule)
	}
	want := []string{"policy.toml:1 [[service]] a", "policy.d/10.toml:2 [[service]] b", "policy.d/20.toml:1 [[service]] c"}
	if d := cmp.Diff(want, rules); d != "" {
		t.Errorf("rules differ (-want +got):\n%s", d)
	}
	write(t, filepath.Join(src.Dir, "30.toml"), "\n\nwrong")
	if _, err := Load(src); err == nil || !strings.Contains(err.Error(), "policy.d/30.toml:3: expected TOML") {
		t.Errorf("a wrong drop-in: %v", err)
	}
	write(t, filepath.Join(src.Dir, "30.toml"), "")
	if err := os.Chmod(filepath.Join(src.Dir, "30.toml"), 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(src); !errors.Is(err, tomlfile.ErrUnsafe) {
		t.Errorf("a drop-in that everybody writes: %v", err)
	}
}

func TestDigest(t *testing.T) {
	one := File{"policy.toml", []byte("[[service]]\nname='a'\n")}
	two := File{"policy.d/a.toml", []byte("# b")}
	seen := map[string]string{}
	for what, files := range map[string][]File{
		"none": nil, "one": {one}, "both": {one, two}, "other name": {{"policy.d/b.toml", one.Text}, two},
		"a comment more": {{one.Name, append(slices.Clone(one.Text), '#')}, two}, "an empty file more": {one, two, {"z", nil}},
	} {
		p, err := Parse(files...)
		if err != nil {
			t.Fatal(err)
		}
		if other, same := seen[p.Digest()]; same {
			t.Errorf("%q has the digest of %q", what, other)
		}
		seen[p.Digest()] = what
		again, err := Parse(files...)
		if err != nil || again.Digest() != p.Digest() || len(p.Digest()) != 64 {
			t.Errorf("%q: digest %s, then %s, %v", what, p.Digest(), again.Digest(), err)
		}
	}
}

// DO NOT CHANGE: audit records hold this digest of the empty policy.
func TestDigestGolden(t *testing.T) {
	p, err := Parse()
	if err != nil {
		t.Fatal(err)
	}
	const want = "77be9b50084a774b10b7b6a972f073af6496e58238d7197b4093d577d2f67f80"
	if p.Digest() != want {
		t.Errorf("digest %s, want %s", p.Digest(), want)
	}
}

func TestDiff(t *testing.T) {
	old := parse(t, sample)
	if got := Diff(old, parse(t, "# moved\n\n"+sample)); got != nil {
		t.Errorf("only lines moved: %q", got)
	}
	text := strings.Replace(sample, "uid  = [1001]", "uid = [1001, 1003]", 1)
	text = strings.Replace(text, "length = 64\n\n", "\n", 1)
	text = strings.Replace(text, `keys = ["disk", "app"]`, "keys = [\"disk\"]\ndeny = true", 1)
	text = strings.Replace(text, "[[service]]\nname = \"nothing\"", "[[service]]\nname = \"new\"\nuid = [3]", 1)
	text = strings.Replace(text, "[[vm]]\nuuid = \""+web2, "[[vm]]\nuuid = \""+strings.Replace(web2, "2", "7", 1), 1)
	got := Diff(old, parse(t, text))
	want := []string{
		`changed [[service]] my-database: uid: [1001] -> [1001, 1003]`,
		`changed [[service]] db-*: length: 64 -> (default)`,
		`added [[service]] new: { name = "new", uid = [3] }`,
		`changed [[vm]] web1 ` + web1 + `: keys: ["disk", "app"] -> ["disk"], deny: (default) -> true`,
		`added [[vm]] 71111111-2222-3333-4444-555555555555: { uuid = "71111111-2222-3333-4444-555555555555", tier = "vm", hosts = ["hv1"], subject = "` + web3 +
			`", key = [{ name = "disk", length = 64, luks = { cipher = "aes-xts-plain64", key_size = 512, sector_size = 4096 } }], after_gap = "refuse" }`,
		`removed [[service]] nothing`,
		`removed [[vm]] ` + web2,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("differences differ (-want +got):\n%s", d)
	}
	if got := Diff(nil, old); len(got) != 5 || !strings.HasPrefix(got[0], "added") {
		t.Errorf("from nothing: %q", got)
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"", "the policy has no entries"},
		{"[[service]]\nname='a-service'", "allows nobody"},
		{"[[service]]\nname='a-service'\nuid=[0]", "allows uid 0"},
		{"[[service]]\nname='a-service'\nuid=[65534]", "allows uid 65534"},
		{"[[service]]\nname='a*'\nuid=[1]", "which is broad"},
		{"[[service]]\nname='abc'\nuid=[1]\nunit=['/user.slice/user-1.slice/user@1.service/app.slice/a.service']", "belongs to a user's own manager"},
		{"[[service]]\nname='abc'\nuid=[1]\nunit=['/system.slice']", "is not that of a service or scope"},
		{"[[service]]\nname='abc'\nuid=[1]\n[[service]]\nname='ab*'\nlength=64\nuid=[2]\n", "policy.toml:1 [[service]] abc: gives a key of 32 octets where policy.toml:4 [[service]] ab* gives one of 64"},
		{"[[service]]\nname='abc'\nuid=[1]\n[[service]]\nname='abc'\nlength=64\nuid=[2]\n", "policy.toml:4 [[service]] abc: gives a key of 64 octets where policy.toml:1 [[service]] abc gives one of 32"},
		{"[[service]]\nname='abc*'\nuid=[1]\n[[service]]\nname='abcd*'\nlength=64\nuid=[2]\n", "policy.toml:4 [[service]] abcd*: gives a key of 64 octets"},
		{"[[vm]]\nuuid='" + web1 + "'\nname='a'\ntier='vm'", "has no keys"},
		{"[[vm]]\nuuid='" + web1 + "'\ntier='vm'\nkeys=['d']", "has no name"},
		{"[[vm]]\nuuid='" + web1 + "'\nname='a'\ntier='vm'\nkeys=['d']\nhosts=[]", "has an empty list of hosts"},
		{"[[vm]]\nuuid='" + web1 + "'\nname='a'\ntier='vm'\nkeys=['d']\n[[vm]]\nuuid='" + web2 + "'\nname='a'\ntier='vm'\nkeys=['d']", "policy.toml:6 [[vm]] a: has the same name as policy.toml:1 [[vm]] a"},
	} {
		var got []string
		for _, w := range Check(parse(t, c.text), time.Now()) {
			got = append(got, w.String())
		}
		if !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, c.want) }) {
			t.Errorf("%q:\n got %q\nwant %s", c.text, got, c.want)
		}
	}
	fine := "[[service]]\nname='abc'\nuid=[1]\nunit=['/system.slice/a.service']\n[[vm]]\nuuid='" + web1 + "'\nname='a'\ntier='vm'\nkeys=['d']\n" +
		"[[vm]]\nuuid='" + web2 + "'\ntier='vm'\ndeny=true" // whatever its name is
	if got := Check(parse(t, fine), time.Now()); got != nil {
		t.Errorf("nothing is wrong, got %v", got)
	}
}

func TestGrants(t *testing.T) {
	got := parse(t, sample+"[[vm]]\nuuid='"+web3+"'\ntier='vm'\nkeys=['d']\ndeny=true").Grants()
	want := []Grant{
		{"service", "my-database", "uid 1001 in /system.slice/my-database.service via unix, tcp", "my-database (32)", "policy.toml:1 [[service]] my-database"},
		{"service", "db-*", "uid 1001, 1002 via unix, tcp", "db-* (64)", "policy.toml:6 [[service]] db-*"},
		{"vm", "web1", "tier vm " + web1, "disk (32), app (32)", "policy.toml:14 [[vm]] web1"},
		{"vm", web2, "tier vm " + web2 + " on hv1", "disk (64)", "policy.toml:20 [[vm]] " + web2},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("grants differ (-want +got):\n%s", d)
	}
}

// A unit that comes to be while the caller is refused is a refusal, not a crash.
func TestUnitThatChanges(t *testing.T) {
	asked := 0
	d := parse(t, sample).Service("my-database", Claims{UID: 1001, Via: "unix", MatchUnit: func(string) bool { asked++; return asked > 1 }})
	if d.Allow || d.Code != CodeUnit {
		t.Errorf("got %+v", d)
	}
}

// render returns the policy as one TOML file without comments, which Parse reads as the same entries.
func render(p *Policy) string {
	var b strings.Builder
	for _, s := range p.services {
		renderEntry(&b, "service", s.settings())
	}
	for _, v := range p.vms {
		renderEntry(&b, "vm", v.settings())
	}
	return b.String()
}

func renderEntry(b *strings.Builder, kind string, lines []setting) {
	fmt.Fprintf(b, "[[%s]]\n", kind)
	for _, l := range lines {
		fmt.Fprintf(b, "%s = %s\n", l.key, l.value)
	}
}

// An error means no policy; a policy has valid entries, its rendering is the same policy, and reading it again too.
func FuzzParse(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte(sampleSNP))
	f.Add([]byte(strings.Replace(sampleSNP, "crl = ", "any_host_data = true\nimage_id = ['"+digits64[:32]+"']\ncrl = ", 1)))
	f.Add([]byte("[[service]]\nname='a*'\nuid=[]\nunit=[]\nvia=['tcp']\n[[vm]]\nuuid='" + web1 + "'\nname=\"\\u00e9 x\"\ntier='vm'\ndeny=true\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(File{"policy.toml", data})
		if (err == nil) != (p != nil) {
			t.Fatalf("policy %v beside error %v", p, err)
		}
		if err != nil {
			return
		}
		for _, v := range p.VMs() {
			if v.Tier != derive.TierVM && v.Tier != derive.TierSNP || (v.SNP != nil) != (v.Tier == derive.TierSNP) || len(v.UUID) != 36 || len(v.Subject) != 36 || len(v.Keys) > maxKeys || p.byUUID[v.UUID] != v {
				t.Fatalf("not valid: %+v", v)
			}
		}
		again, err := Parse(File{"policy.toml", data})
		if err != nil || again.Digest() != p.Digest() || Diff(p, again) != nil {
			t.Fatalf("read again: %v", err)
		}
		Check(p, time.Now())
		p.Grants()
		checkAppraisals(t, p)
		if len(p.snps) > 0 {
			return // what tables accept is not rendered
		}
		rendered, err := Parse(File{"policy.toml", []byte(render(p))})
		if err != nil {
			t.Fatalf("reading the rendering: %v\n%s", err, render(p))
		}
		if d := Diff(p, rendered); d != nil || render(rendered) != render(p) {
			t.Fatalf("the rendering differs: %q\n%s", d, render(p))
		}
	})
}

func large(tb testing.TB) *Policy {
	var b strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&b, "[[service]]\nname='service-%d'\nuid=[%d]\n[[service]]\nname='team-%d-*'\nuid=[%d]\nunit=['/system.slice/t%d.service']\n", i, i, i, i, i)
	}
	p, err := Parse(File{"policy.toml", []byte(b.String())})
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

func BenchmarkServiceOf10000(b *testing.B) {
	p := large(b)
	unit := in("/system.slice/t4000.service")
	for name, c := range map[string]Claims{"service-4000": {UID: 4000, Via: "unix"}, "team-4000-db": {UID: 4000, Via: "tcp", MatchUnit: unit}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !p.Service(name, c).Allow {
					b.Fatal("refused")
				}
			}
		})
	}
	b.Run("refused", func(b *testing.B) {
		for b.Loop() {
			if p.Service("team-4000-db", Claims{UID: 1, Via: "tcp"}).Allow {
				b.Fatal("allowed")
			}
		}
	})
}

func BenchmarkParse10000(b *testing.B) {
	for b.Loop() {
		large(b)
	}
}
