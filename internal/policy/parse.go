package policy

import (
	"fmt"
	"slices"
	"strings"

	"keybroker/derive"
	"keybroker/internal/plain"
	"keybroker/internal/tomlfile"
)

// defaultLength is the length of a key whose entry does not say, in octets.
const defaultLength = 32

// A builder makes a policy while files are read.
type builder struct {
	p        *Policy
	roots    []*tomlfile.Table       // of all files
	subjects map[string]*VM          // who has the keys of a subject
	groups   map[string]*snpTable    // [[snp]] by name
	tables   map[*VM]*tomlfile.Table // where entries stand
}

func newBuilder() *builder {
	return &builder{
		p:        &Policy{exact: map[string][]*Service{}, globs: map[string][]*Service{}, byUUID: map[string]*VM{}, uids: map[uint32]bool{}},
		subjects: map[string]*VM{}, groups: map[string]*snpTable{}, tables: map[*VM]*tomlfile.Table{},
	}
}

func ruleName(file string, t *tomlfile.Table, kind, name string) string {
	return strings.TrimRight(fmt.Sprintf("%s:%d [[%s]] %s", file, t.Line(), kind, name), " ")
}

// service adds a [[service]] entry.
func (b *builder) service(file string, t *tomlfile.Table) {
	s := &Service{Via: []string{ViaUnix, ViaTCP}, Length: defaultLength, order: len(b.p.services)}
	var prefix string
	var glob bool
	if t.String("name", &s.Name) {
		prefix, glob = checkServiceName(t, s.Name)
	} else if !t.Has("name") {
		t.Errorf("name", "expected the name of a service, or its beginning and a *, got none")
	}
	t.Uint32s("uid", &s.UIDs)
	t.Strings("unit", &s.Units)
	t.Strings("via", &s.Via)
	s.Length = readLength(t)
	checkUnits(t, s)
	for _, v := range s.Via {
		if v != ViaUnix && v != ViaTCP {
			t.Errorf("via", "expected %q and %q, or one of them, got %.40q", ViaUnix, ViaTCP, v)
		}
	}
	s.Rule = ruleName(file, t, "service", s.Name)
	b.p.services = append(b.p.services, s)
	for _, uid := range s.UIDs {
		b.p.uids[uid] = b.p.uids[uid] || !s.useless()
	}
	if glob {
		b.p.globs[prefix] = append(b.p.globs[prefix], s)
	} else {
		b.p.exact[s.Name] = append(b.p.exact[s.Name], s)
	}
}

// checkServiceName returns what stands before the * of a name that has one.
func checkServiceName(t *tomlfile.Table, name string) (prefix string, glob bool) {
	prefix, glob = strings.CutSuffix(name, "*")
	probe := name
	if glob {
		probe = prefix + "0" // some name that the entry matches
	}
	if glob && prefix == "" {
		t.Errorf("name", "expected at least one character before the *: an entry for all services cannot be told from a mistake")
	} else if err := derive.CheckKeyName(probe); err != nil {
		t.Errorf("name", "expected the name of a service such as \"db\", or its beginning and a * such as \"db-*\", got %.64q: %v", name, err)
	}
	return prefix, glob
}

// checkUnits holds that a unit is a whole cgroup path and stands with a uid: a user's own manager can make a unit of any
// name, and can make none of the system's paths.
func checkUnits(t *tomlfile.Table, s *Service) {
	if t.Has("unit") && !t.Has("uid") {
		t.Errorf("unit", "expected uid beside unit: a unit is known by its cgroup's path together with the uid of its processes")
	}
	for _, u := range s.Units {
		switch {
		case !strings.Contains(u, "/") && u != "":
			t.Errorf("unit", "expected a whole cgroup path, got %.100q; did you mean %.120q (`systemctl show -P ControlGroup %.100s` prints it)",
				u, "/system.slice/"+u, plain.Line(u))
		case !isCgroupPath(u):
			t.Errorf("unit", "expected a whole cgroup path such as \"/system.slice/db.service\", got %.100q", u)
		}
	}
}

// isCgroupPath reports whether s is an absolute path in its shortest form, and not that of the root cgroup.
func isCgroupPath(s string) bool {
	if len(s) < 2 || len(s) > 1024 || s[0] != '/' || plain.Line(s) != s {
		return false
	}
	for part := range strings.SplitSeq(s[1:], "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return true
}

func readLength(t *tomlfile.Table) int {
	n := defaultLength
	t.Int("length", &n, 32, 64)
	if n != 32 && n != 64 {
		t.Errorf("length", "expected 32 or 64 octets, got %d", n)
	}
	return n
}

// vm adds a [[vm]] entry.
func (b *builder) vm(file string, t *tomlfile.Table) {
	v := &VM{AfterGap: GapAllow}
	if t.String("uuid", &v.UUID) {
		checkUUID(t, "uuid", v.UUID)
	} else if !t.Has("uuid") {
		t.Errorf("uuid", "expected the domain's UUID, as `virsh domuuid` prints it, got none")
	}
	if t.String("name", &v.Name) {
		checkText(t, "name", v.Name, "the domain's name")
	}
	if t.Strings("hosts", &v.Hosts) {
		for _, h := range v.Hosts {
			checkText(t, "hosts", h, "names of hosts")
		}
	}
	if t.String("subject", &v.Subject) && v.Subject != "" {
		checkUUID(t, "subject", v.Subject)
	}
	v.Subject = nameOr(v.Subject, v.UUID)
	t.Bool("deny", &v.Deny)
	t.Choice("after_gap", &v.AfterGap, GapAllow, GapRefuse)
	readTier(t, v)
	checkAppraisal(t, v)
	readKeys(t, v)
	v.Rule = ruleName(file, t, "vm", nameOr(v.Name, v.UUID))
	b.addVM(t, v)
}

func nameOr(name, other string) string {
	if name != "" {
		return name
	}
	return other
}

// addVM holds that no two entries speak of the same VM or share keys. An entry that denies takes no subject: the earlier
// UUID of a domain that was defined anew may stay in the policy so.
func (b *builder) addVM(t *tomlfile.Table, v *VM) {
	if v.UUID == "" {
		return
	}
	if other := b.p.byUUID[v.UUID]; other != nil {
		t.Errorf("uuid", "expected each UUID once, got it again; the other is %s", other.Rule)
		return
	}
	if other := b.subjects[v.Subject]; other != nil && !v.Deny {
		t.Errorf("subject", "expected each VM to have keys of its own, got the subject of %s; both would read each other's disks", other.Rule)
	}
	if !v.Deny {
		b.subjects[v.Subject] = v
	}
	b.tables[v] = t
	b.p.vms = append(b.p.vms, v)
	b.p.byUUID[v.UUID] = v
}

func checkUUID(t *tomlfile.Table, key, uuid string) {
	if derive.CheckSubject(uuid) == nil && strings.Trim(uuid, "0-") != "" {
		return
	}
	if lower := strings.ToLower(uuid); lower != uuid && derive.CheckSubject(lower) == nil {
		t.Errorf(key, "expected a UUID in lower case, got %q; write %q", uuid, lower)
		return
	}
	t.Errorf(key, "expected a UUID such as \"11111111-2222-3333-4444-555555555555\", got %.60q", uuid)
}

// checkText accepts what may be shown on a terminal.
func checkText(t *tomlfile.Table, key, s, what string) {
	if s == "" || len(s) > 255 || plain.Line(s) != s || strings.Contains(s, "/") {
		t.Errorf(key, "expected %s, 1 to 255 printable characters without /, got %.60q", what, s)
	}
}

// readTier takes the tiers of VMs, as far as this build knows what to do with them.
func readTier(t *tomlfile.Table, v *VM) {
	if !t.String("tier", &v.Tier) {
		if !t.Has("tier") {
			t.Errorf("tier", "expected tier = %q or %q, got none; an entry names its tier", derive.TierVM, derive.TierSNP)
		}
		return
	}
	switch v.Tier {
	case derive.TierVM, derive.TierSNP:
	case "container", "user":
		t.Errorf("tier", "this build does not serve tier %q yet; expected tier = %q or %q", v.Tier, derive.TierVM, derive.TierSNP)
	default:
		t.Errorf("tier", "expected tier = %q or %q, got %.40q", derive.TierVM, derive.TierSNP, v.Tier)
	}
}

// readKeys takes keys = ["disk"] and the [[vm.key]] tables, which say more about a key.
func readKeys(t *tomlfile.Table, v *VM) {
	var names []string
	t.Strings("keys", &names)
	for _, n := range names {
		addKey(t, "keys", v, Key{Name: n, Length: defaultLength})
	}
	for _, kt := range t.Tables("key") {
		var k Key
		if !kt.String("name", &k.Name) && !kt.Has("name") {
			kt.Errorf("name", "expected the name of a key, got none")
		}
		k.Length = readLength(kt)
		if lt := kt.Table("luks"); lt != nil {
			k.LUKS = readLUKS(lt)
		}
		if k.Name != "" || kt.Is("name", "") {
			addKey(kt, "name", v, k)
		}
	}
	if len(v.Keys) > maxKeys {
		t.Errorf("keys", "expected at most %d keys for a VM, got %d", maxKeys, len(v.Keys))
	}
}

// maxKeys is how many keys a VM may have: as many as one request can want.
const maxKeys = 64

func addKey(t *tomlfile.Table, at string, v *VM, k Key) {
	if err := derive.CheckKeyName(k.Name); err != nil {
		t.Errorf(at, "expected names of keys such as \"disk\", got %.64q: %v", k.Name, err)
		return
	}
	if slices.Contains(v.KeyNames(), k.Name) {
		t.Errorf(at, "expected each key once, got %q again", k.Name)
		return
	}
	v.Keys = append(v.Keys, k)
}

// What the agent's sink for volumes accepts. Any other pin would refuse every volume.
const (
	luksCipher  = "aes-xts-plain64"
	luksKeySize = 512 // bits
)

// readLUKS takes the header values that a key's volume must have. An empty table would pin nothing.
func readLUKS(t *tomlfile.Table) *LUKS {
	l := &LUKS{}
	if t.String("cipher", &l.Cipher) && l.Cipher != luksCipher {
		t.Errorf("cipher", "expected %q, the only cipher that agents accept, got %.60q", luksCipher, l.Cipher)
	}
	if t.Int("key_size", &l.KeySize, 0, 1<<20) && l.KeySize != luksKeySize {
		t.Errorf("key_size", "expected %d bits, the only size of a volume's key that agents accept, got %d", luksKeySize, l.KeySize)
	}
	if t.Int("sector_size", &l.SectorSize, 0, 1<<20) && l.SectorSize != 512 && l.SectorSize != 4096 {
		t.Errorf("sector_size", "expected 512 or 4096 octets, which agents accept, got %d", l.SectorSize)
	}
	if !t.Has("cipher") && !t.Has("key_size") && !t.Has("sector_size") {
		t.Errorf("", "expected cipher, key_size or sector_size to pin, got none of them")
	}
	return l
}
