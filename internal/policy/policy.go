// Package policy is the operator's word on who may have which key: policy.toml and its drop-ins.
//
// Everything is refused unless an entry allows it, every condition of that entry must hold, and an empty list allows
// nothing. A policy does not change once it is loaded; all its methods may be called at the same time.
package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"keybroker/attest"
	"keybroker/derive"
)

// The doors through which a service's caller may come.
const (
	ViaUnix = "unix" // the Unix socket
	ViaTCP  = "tcp"  // 127.0.0.1 and ::1
)

// Codes of refusals. They are stable: scripts and alarms match them.
const (
	CodeNoPolicy = "no-policy"       // no entry for this service or VM
	CodeDenies   = "policy-denies"   // the entry allows nobody
	CodeUID      = "wrong-uid"       // the caller's uid is not in the entry
	CodeUnit     = "wrong-unit"      // the caller's unit is not in the entry, or unknown
	CodeDoor     = "wrong-door"      // not through this transport
	CodeBadName  = "bad-name"        // not the name of a key
	CodeTier     = "wrong-tier"      // the entry names another tier
	CodeVMName   = "wrong-vm-name"   // the domain has another name than the entry
	CodeHost     = "wrong-host"      // the entry does not name this host
	CodeKey      = "key-not-allowed" // the entry does not have this key
)

// A Policy is what was loaded. The zero value refuses everything.
type Policy struct {
	digest   string // hexadecimal
	services []*Service
	exact    map[string][]*Service // by name
	globs    map[string][]*Service // by what stands before the *
	vms      []*VM
	snps     []*snpTable
	byUUID   map[string]*VM
	uids     map[uint32]bool // that some entry of a service allows
}

// A Service is one [[service]] entry. Its slices are not to be changed.
type Service struct {
	Rule   string   // "policy.toml:12 [[service]] my-database": names the entry everywhere
	Name   string   // a service's name, or its beginning and a *
	UIDs   []uint32 // empty: the entry allows nobody
	Units  []string // whole cgroup paths, nil: no condition; empty but not nil: the entry allows nobody
	Via    []string // doors, ViaUnix and ViaTCP; empty: the entry allows nobody
	Length int      // octets of the key, 32 or 64

	order int
}

// A VM is one [[vm]] entry. Its slices are not to be changed.
type VM struct {
	Rule     string   // "policy.toml:20 [[vm]] web1": names the entry everywhere
	UUID     string   // lower case, 36 octets
	Name     string   // the domain's name, which must be this; empty: any. In tier snp only what people call it
	Tier     string   // derive.TierVM or derive.TierSNP
	Subject  string   // whose keys they are: the entry's subject, or its UUID
	Hosts    []string // names of hosts; nil: any host; empty but not nil: none
	Keys     []Key    // empty: the entry allows no key
	Deny     bool     // refuse it whatever else the entry says
	AfterGap string   // GapAllow or GapRefuse

	SNP     *attest.Policy // what its reports are appraised with, HOST_DATA included; nil if and only if the tier is another than derive.TierSNP
	SNPName string         // of the [[snp]] table that this comes from
	Shared  bool           // a report that satisfies this entry may satisfy others that say so too
}

// What happens to a VM that was running while nobody watched for its events.
const (
	GapAllow  = "allow"  // it gets at most one presumed ticket
	GapRefuse = "refuse" // it waits for its next boot, or for an administrator
)

// A Key is one key that a VM may have.
type Key struct {
	Name   string
	Length int   // octets, 32 or 64
	LUKS   *LUKS // values of the volume's header to insist on; nil: the agent's own list alone decides
}

// LUKS is what the header of a volume must say. A zero field is not pinned.
type LUKS struct {
	Cipher     string // "aes-xts-plain64"
	KeySize    int    // of the volume key, bits
	SectorSize int    // octets
}

// Claims is what the kernel says of a service's caller.
type Claims struct {
	UID       uint32
	Via       string                 // ViaUnix or ViaTCP
	MatchUnit func(path string) bool // whether it is in the cgroup at this path; nil: unknown, so no unit rule is met
	Unit      string                 // its unit, for messages; empty: unknown
	NoUnit    string                 // why its unit is unknown, for messages
}

// VMClaims is what the hypervisor says of a VM.
type VMClaims struct {
	UUID string // lower case, 36 octets
	Name string // the domain's name now
	Tier string // the tier of the channel that it asks on
	Host string // this host's name
}

// A Decision is the policy's answer, with its grounds. The zero value is a refusal.
type Decision struct {
	Allow    bool
	Rule     string // the entry that decides; empty: there is none
	Code     string // of a refusal; empty if allowed
	Reason   string // of a refusal, for the peer: what it sent and what to do next
	Expected string // of a refusal, for the log alone: what the policy expects
	Length   int    // octets of a service's key if allowed
}

// Service decides whether a caller may have the key of a service. Any entry that allows allows; the first of these names
// the rule and the key's length. It takes less than a microsecond if it allows.
func (p *Policy) Service(name string, c Claims) Decision {
	var allowed *Service
	for s := range p.matching(name) {
		if (allowed == nil || s.order < allowed.order) && s.allows(c) {
			allowed = s
		}
	}
	if allowed != nil {
		return Decision{Allow: true, Rule: allowed.Rule, Length: allowed.Length}
	}
	return p.refuseService(name, c)
}

// NamesUID reports whether any [[service]] entry has this uid and a chance to allow it. Whom it does not name gets no key,
// whatever it asks for.
func (p *Policy) NamesUID(uid uint32) bool { return p.uids[uid] }

// matching yields the entries whose names match, in no order.
func (p *Policy) matching(name string) func(yield func(*Service) bool) {
	return func(yield func(*Service) bool) {
		if derive.CheckKeyName(name) != nil {
			return
		}
		for _, s := range p.exact[name] {
			if !yield(s) {
				return
			}
		}
		for n := 1; len(p.globs) > 0 && n <= len(name); n++ {
			for _, s := range p.globs[name[:n]] {
				if !yield(s) {
					return
				}
			}
		}
	}
}

func (p *Policy) matchingInOrder(name string) []*Service {
	return slices.SortedFunc(p.matching(name), func(a, b *Service) int { return cmp.Compare(a.order, b.order) })
}

// useless reports whether the entry has no condition that anybody could meet.
func (s *Service) useless() bool {
	return len(s.UIDs) == 0 || len(s.Via) == 0 || s.Units != nil && len(s.Units) == 0
}

func (s *Service) allows(c Claims) bool {
	return !s.useless() && slices.Contains(s.UIDs, c.UID) && slices.Contains(s.Via, c.Via) && s.unitHolds(c)
}

func (s *Service) unitHolds(c Claims) bool {
	return s.Units == nil || c.MatchUnit != nil && slices.ContainsFunc(s.Units, c.MatchUnit)
}

// VM decides whether a VM may have keys at all. The entry is nil if not. In tier snp it is so far the guest's own word who it
// is: nothing is decided before a report for this session passes under the entry's SNP.
func (p *Policy) VM(c VMClaims) (*VM, Decision) {
	v := p.byUUID[c.UUID]
	if v == nil {
		return nil, Decision{
			Code:     CodeNoPolicy,
			Reason:   fmt.Sprintf("add [[vm]] uuid = %.40q to policy.toml", c.UUID),
			Expected: "a [[vm]] entry with this uuid",
		}
	}
	for _, cond := range v.conditions(c) {
		if !cond.Holds {
			return nil, cond.refusal(v.Rule, askExplain+c.UUID+"`")
		}
	}
	return v, Decision{Allow: true, Rule: v.Rule}
}

// Key decides whether a VM's entry has a key of this name.
func (v *VM) Key(name string) (Key, Decision) {
	for _, k := range v.Keys {
		if k.Name == name {
			return k, Decision{Allow: true, Rule: v.Rule}
		}
	}
	return Key{}, Decision{
		Rule:     v.Rule,
		Code:     CodeKey,
		Reason:   fmt.Sprintf("key %.64q is not among the keys of this VM's entry; add it there, or ask for another", name),
		Expected: "one of the keys " + quoteStrings(v.KeyNames()),
	}
}

// KeyNames returns the names of the keys that the VM may have, in the order of the entry.
func (v *VM) KeyNames() []string {
	names := []string{}
	for _, k := range v.Keys {
		names = append(names, k.Name)
	}
	return names
}

// Find returns the entries of VMs with this UUID or this name, in the order of the files.
func (p *Policy) Find(nameOrUUID string) []*VM {
	var out []*VM
	for _, v := range p.vms {
		if v.UUID == strings.ToLower(nameOrUUID) || v.Name == nameOrUUID && v.Name != "" {
			out = append(out, v)
		}
	}
	return out
}

// Services returns all [[service]] entries in the order of the files.
func (p *Policy) Services() []*Service { return slices.Clone(p.services) }

// VMs returns all [[vm]] entries in the order of the files.
func (p *Policy) VMs() []*VM { return slices.Clone(p.vms) }

// Digest returns SHA-256 over the files' names and contents, in hexadecimal: it stands for the policy in audit records.
func (p *Policy) Digest() string { return p.digest }
