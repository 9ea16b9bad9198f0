package attest

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The keys that may sign an SNP report (SNP ABI, section 7.3, SIGNING_KEY).
const (
	VCEK = "VCEK" // the chip's own, of one TCB
	VLEK = "VLEK" // one that a cloud provider got from AMD and loaded
)

// What a policy wants of certificate revocation lists.
const (
	CRLRequired  = "required"   // a list that is not too old must say that nothing is revoked
	CRLWhenGiven = "when-given" // what lists there are must not revoke anything
)

// A TCB is the security version of each part of a processor's firmware (SNP ABI, section 2.2).
type TCB struct {
	FMC        uint8 // Turin and newer alone
	Bootloader uint8
	TEE        uint8
	SNP        uint8
	Microcode  uint8
}

// A ReferenceValue is one value that a policy accepts.
type ReferenceValue struct {
	Name  string    // for people; may be empty
	Value []byte    // compared whole; an empty one is never equal
	Until time.Time // from this moment on it is not accepted; zero: no end
	Rule  string    // "snp.toml:4 [[measurement]] web 1.2": names it everywhere
}

// ReferenceValues are the values that a policy accepts in one place. Nil means that the policy says nothing there; a list that
// is empty but not nil accepts nothing.
type ReferenceValues []ReferenceValue

// accepted reports whether the value is still accepted at this time.
func (v *ReferenceValue) accepted(at time.Time) bool { return v.Until.IsZero() || at.Before(v.Until) }

// Find returns the first value that equals got and is accepted at this time; failing that, one that equals got and is no
// longer accepted; nil if none equals.
func (l ReferenceValues) Find(got []byte, at time.Time) (v *ReferenceValue, accepted bool) {
	for i := range l {
		if len(got) == 0 || !bytes.Equal(l[i].Value, got) {
			continue
		}
		if l[i].accepted(at) {
			return &l[i], true
		}
		v = &l[i]
	}
	return v, false
}

// A Product is a line of processors that a policy accepts, with the least TCB of each kind. A nil TCB makes the policy
// incomplete.
type Product struct {
	Line      string          // "Milan", "Genoa", "Turin"
	Reported  *TCB            // of REPORTED_TCB, for which the certificate was made
	Committed *TCB            // of COMMITTED_TCB, below which the host cannot go back
	Launch    *TCB            // of LAUNCH_TCB, when the guest was launched
	Chips     ReferenceValues // only these chips of the line
	Rule      string
}

// GuestPolicy says which policies a guest may have been launched under (SNP ABI, section 4.3). Allow is about what weakens
// the guest, Require about what strengthens it: the zero value allows nothing and requires nothing.
type GuestPolicy struct {
	ABIMajor, ABIMinor     uint8 // the least that the guest's policy must ask of the firmware
	AllowDebug             bool  // the host may read and write the guest's memory
	AllowMigrationAgent    bool  // a migration agent may hand the guest's memory on
	AllowSMT               bool  // two threads may share a core
	AllowCXL               bool
	RequireSingleSocket    bool
	RequireAES256XTS       bool
	RequireRAPLDisabled    bool
	RequireCipherHiding    bool // of DRAM
	RequirePageSwapDisable bool
}

// PlatformPolicy says what PLATFORM_INFO must report of the host (SNP ABI, section 7.3). The zero value requires nothing.
type PlatformPolicy struct {
	RequireSMTDisabled  bool
	RequireTSME         bool
	RequireECC          bool
	RequireRAPLDisabled bool
	RequireCipherHiding bool
	RequireAliasCheck   bool // no two addresses name one cell of memory: against BadRAM
}

// A Policy is the appraisal policy for SNP reports of one subject or several. Everything that it does not allow is refused, a
// nil list in a place that must not be left out as well as an empty list anywhere. It does not change once it is in use.
type Policy struct {
	Rule  string         // "policy.toml:20 [[snp]] web": names the policy everywhere
	File  string         // the file's name, for the rules of keys in Lines; empty: Rule alone names them
	Lines map[string]int // the lines of keys in that file; may be nil

	Signers      []string  // VCEK, VLEK; must be there
	CSPs         []string  // providers whose VLEK is accepted, as CSP_ID in its certificate; must be there if VLEK is
	Products     []Product // must be there
	DenyProducts []string  // lines that are refused whatever Products says
	VMPLs        []uint32  // 0 to 3; must be there

	// Who it is. Measurements, IDKeys or AuthorKeys must be there; each that is there must hold.
	Measurements ReferenceValues // 48 octets
	IDKeys       ReferenceValues // 48 octets, the digest of the key that signed the ID block
	AuthorKeys   ReferenceValues // 48 octets, the digest of the key that signed the ID key
	// Which guest it is, of those with one image. HostData, ImageIDs or IDKeys must be there.
	HostData    ReferenceValues // 32 octets
	ImageIDs    ReferenceValues // 16 octets
	FamilyIDs   ReferenceValues // 16 octets
	MinGuestSVN uint32

	Guest    GuestPolicy
	Platform PlatformPolicy

	Chips           ReferenceValues // 64 octets: only these chips
	DenyChips       ReferenceValues // 64 octets: not these
	AllowMaskedChip bool            // a report may hide which chip made it

	CRL         string        // CRLRequired or CRLWhenGiven; must be there
	MaxCRLAge   time.Duration // since a list was issued; must be there if CRLRequired
	MinValidity time.Duration // for how long certificates must still be valid; zero: for a moment
}

// A Problem is a reason why a policy refuses everything.
type Problem struct {
	Key      string // as a policy's file calls it
	Expected string
	Got      string
}

// RuleOf returns how messages name a key of the policy: "snp.toml:12 vmpl".
func (p *Policy) RuleOf(key string) string {
	if line := p.Lines[key]; p.File != "" && line > 0 {
		return fmt.Sprintf("%s:%d %s", p.File, line, key)
	}
	return strings.TrimSpace(cmp.Or(p.Rule, p.File) + " " + key)
}

// Problems returns all reasons why the policy refuses everything: what must be there and is not, and lists that are empty.
func (p *Policy) Problems() []Problem {
	var out []Problem
	add := func(wrong bool, key, expected, got string) {
		if wrong {
			out = append(out, Problem{key, expected, got})
		}
	}
	for _, l := range p.lists() {
		add(l.length == 0 && (l.given || l.must), l.key, l.what, "none")
	}
	add(p.Measurements == nil && p.IDKeys == nil && p.AuthorKeys == nil,
		"measurement", "measurements, or digests of ID keys or author keys", "none of them")
	add(p.HostData == nil && p.ImageIDs == nil && p.IDKeys == nil,
		"host_data", "what tells guests with the same image apart: a subject, HOST_DATA, IMAGE_ID or ID keys", "none of them")
	add(p.CRL != CRLRequired && p.CRL != CRLWhenGiven, "crl", "required or when-given", orNone(p.CRL))
	add(p.CRL == CRLRequired && p.MaxCRLAge <= 0, "crl_max_age", "the greatest age of a revocation list", "none")
	for _, product := range p.Products {
		add(product.Reported == nil || product.Committed == nil || product.Launch == nil,
			"product", "the least reported, committed and launch TCB of "+orNone(product.Line), "not all of them")
	}
	return out
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// A listField is one list of a policy, for what all of them have in common.
type listField struct {
	key    string
	what   string
	length int
	given  bool // it is not nil
	must   bool // it must be there
}

func (p *Policy) lists() []listField {
	out := []listField{
		{"signer", "the kinds of keys that may sign, VCEK or VLEK", len(p.Signers), p.Signers != nil, true},
		{"csp", "the providers whose VLEK is accepted", len(p.CSPs), p.CSPs != nil, slices.Contains(p.Signers, VLEK)},
		{"product", "product lines with their least TCB", len(p.Products), p.Products != nil, true},
		{"deny_product", "product lines, or no such list", len(p.DenyProducts), p.DenyProducts != nil, false},
		{"vmpl", "VMPLs, 0 to 3", len(p.VMPLs), p.VMPLs != nil, true},
		valuesField("measurement", p.Measurements), valuesField("id_key", p.IDKeys), valuesField("author_key", p.AuthorKeys),
		valuesField("host_data", p.HostData), valuesField("image_id", p.ImageIDs), valuesField("family_id", p.FamilyIDs),
		valuesField("chip_id", p.Chips), valuesField("deny_chip_id", p.DenyChips),
	}
	for _, product := range p.Products {
		out = append(out, valuesField("chip_id", product.Chips))
	}
	return out
}

func valuesField(key string, l ReferenceValues) listField {
	return listField{key, "values, or no such list", len(l), l != nil, false}
}
