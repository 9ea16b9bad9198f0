package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"keybroker/derive"
)

// A Warning is about an entry that is legal and probably not what its writer wants.
type Warning struct {
	Rule string // the entry; empty: the policy as a whole
	Text string // what is weak or useless about it, and what to do
}

// String returns "rule: text".
func (w Warning) String() string {
	if w.Rule == "" {
		return w.Text
	}
	return w.Rule + ": " + w.Text
}

// minPrefix is how many characters before a * are not called broad.
const minPrefix = 3

// nobody is the uid that the kernel shows for users that cannot be named here, and that strangers share.
const nobody = 65534

// Check returns what is weak or useless in a policy at this time: of services, of VMs, and of appraisal policies, each in the order
// of the files.
func Check(p *Policy, at time.Time) []Warning {
	if len(p.services)+len(p.vms) == 0 {
		return []Warning{{Text: "the policy has no entries: everything is refused; add [[service]] or [[vm]] entries to policy.toml"}}
	}
	var out []Warning
	for _, s := range p.services {
		for _, text := range append(s.warnings(), p.overlaps(s)...) {
			out = append(out, Warning{s.Rule, text})
		}
	}
	named := map[string]*VM{}
	for _, v := range p.vms {
		for _, text := range v.warnings(named[v.Name]) {
			out = append(out, Warning{v.Rule, text})
		}
		if v.Name != "" && named[v.Name] == nil {
			named[v.Name] = v
		}
	}
	for _, g := range p.snps {
		for _, text := range g.warnings() {
			out = append(out, Warning{g.Rule, text})
		}
		for _, text := range g.policy.Warnings(at) {
			out = append(out, Warning{Text: text}) // which names the rule of a single key
		}
	}
	return out
}

func (s *Service) warnings() (out []string) {
	if s.useless() {
		out = append(out, "allows nobody, for it has no uid or an empty list; it stops no other entry from allowing; give it a uid or remove it")
	}
	if slices.Contains(s.UIDs, 0) {
		out = append(out, "allows uid 0: root is served on the Unix socket alone, and can read every key of this host anyway; run the service as a user of its own")
	}
	if slices.Contains(s.UIDs, nobody) {
		out = append(out, fmt.Sprintf("allows uid %d, nobody, which unrelated programs share; run the service as a user of its own", nobody))
	}
	if prefix, glob := strings.CutSuffix(s.Name, "*"); glob && len(prefix) < minPrefix {
		out = append(out, fmt.Sprintf("matches every service that begins with %q, which is broad; write more of the name before the *", prefix))
	}
	for _, u := range s.Units {
		out = append(out, unitWarnings(u)...)
	}
	return out
}

func unitWarnings(u string) (out []string) {
	if strings.Contains(u, "/user@") {
		out = append(out, fmt.Sprintf("unit %q belongs to a user's own manager: that user can start anything in it; the uid is all that this entry checks", u))
	}
	if !strings.HasSuffix(u, ".service") && !strings.HasSuffix(u, ".scope") && !strings.Contains(u, ".service/") {
		out = append(out, fmt.Sprintf("unit %q is not that of a service or scope, and what is in cgroups below it does not match", u))
	}
	return out
}

// overlaps reports entries for the same names that give keys of another length: which one a caller gets depends on who
// it is then. Of two entries with one name, the later is reported.
func (p *Policy) overlaps(s *Service) (out []string) {
	probe := s.Name
	if prefix, glob := strings.CutSuffix(s.Name, "*"); glob {
		probe = prefix + "0"
	}
	for other := range p.matching(probe) {
		if other.Length == s.Length || other.useless() || s.useless() || other.Name == s.Name && other.order > s.order {
			continue
		}
		out = append(out, fmt.Sprintf("gives a key of %d octets where %s gives one of %d; use one length for a service",
			s.Length, other.Rule, other.Length))
	}
	slices.Sort(out)
	return out
}

func (v *VM) warnings(sameName *VM) (out []string) {
	if len(v.Keys) == 0 && !v.Deny {
		out = append(out, "has no keys, so the VM is refused; add keys = [\"disk\"], or deny = true to say so")
	}
	if v.Hosts != nil && len(v.Hosts) == 0 {
		out = append(out, "has an empty list of hosts, so the VM is refused everywhere; remove hosts to allow every host")
	}
	if v.Shared {
		out = append(out, "is shared: the guest of any other shared entry that its report satisfies gets these keys too")
	}
	if v.Name == "" && !v.Deny && v.Tier == derive.TierVM {
		out = append(out, "has no name: whoever may define a domain of another name with this UUID gets its keys; add name")
	}
	if sameName != nil {
		out = append(out, fmt.Sprintf("has the same name as %s; commands by name cannot tell them apart", sameName.Rule))
	}
	return out
}

// A Grant is a row of what the policy allows.
type Grant struct {
	Kind string // "service" or "vm"
	Name string // of the service, or of the VM (its UUID if it has none)
	Who  string // whom it is given to
	Keys string // which keys, of how many octets
	Rule string // the entry
}

// Grants returns what the policy allows, in the order of the files. Entries that allow nothing are not among it.
func (p *Policy) Grants() []Grant {
	var out []Grant
	for _, s := range p.services {
		if !s.useless() {
			out = append(out, Grant{"service", s.Name, s.who(), fmt.Sprintf("%s (%d)", s.Name, s.Length), s.Rule})
		}
	}
	for _, v := range p.vms {
		if !v.Deny && len(v.Keys) > 0 && (v.Hosts == nil || len(v.Hosts) > 0) {
			out = append(out, Grant{"vm", nameOr(v.Name, v.UUID), v.who(), v.keyList(), v.Rule})
		}
	}
	return out
}

func (s *Service) who() string {
	who := "uid " + joinInts(s.UIDs)
	if s.Units != nil {
		who += " in " + strings.Join(s.Units, ", ")
	}
	return who + " via " + strings.Join(s.Via, ", ")
}

func (v *VM) who() string {
	who := "tier " + v.Tier + " " + v.UUID
	if v.SNPName != "" {
		who += " by [[snp]] " + v.SNPName
	}
	if v.Hosts != nil {
		who += " on " + strings.Join(v.Hosts, ", ")
	}
	return who
}

func (v *VM) keyList() string {
	var out []string
	for _, k := range v.Keys {
		out = append(out, fmt.Sprintf("%s (%d)", k.Name, k.Length))
	}
	return strings.Join(out, ", ")
}
