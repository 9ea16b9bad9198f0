package policy

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/derive"
	"keybroker/internal/tomlfile"
)

// ParseSNP reads an appraisal policy for SNP reports that is a file of its own, and has the keys of a [[snp]] table. It is for judging
// reports by hand: nobody gets keys by it. Name is used in messages and rules. A policy that would refuse everything is an error.
func ParseSNP(name string, data []byte) (*attest.Policy, error) {
	t, err := tomlfile.Parse(name, data)
	if err != nil {
		return nil, fmt.Errorf("reading policy: %w", err)
	}
	r := newSNPReader(name, t, name)
	r.read()
	if err := t.Err(); err != nil {
		return nil, fmt.Errorf("reading policy: %w", err)
	}
	return r.p, nil
}

// Sizes of what reports hold, octets.
const (
	measurementSize = 48
	hostDataSize    = 32
	idSize          = 16
	chipIDSize      = 64
)

// An snpReader reads the table of one appraisal policy: a [[snp]] table, or a file of its own.
type snpReader struct {
	file    string
	t       *tomlfile.Table
	group   bool // it is a [[snp]] table: each VM that names it has a HOST_DATA of its own
	p       *attest.Policy
	anyData bool // unless the table has any_host_data
}

func newSNPReader(file string, t *tomlfile.Table, rule string) *snpReader {
	return &snpReader{file: file, t: t, p: &attest.Policy{Rule: rule, File: file, Lines: map[string]int{}}}
}

// kind returns how rules name a table within: "measurement", or "snp.measurement".
func (r *snpReader) kind(key string) string {
	if r.group {
		return "snp." + key
	}
	return key
}

// read reads it all. What is wrong is collected by the table.
func (r *snpReader) read() {
	t, p := r.t, r.p
	r.words("signer", &p.Signers, attest.VCEK, attest.VLEK)
	t.Strings("csp", &p.CSPs)
	r.words("deny_product", &p.DenyProducts, snp.Milan, snp.Genoa, snp.Turin)
	r.vmpl()
	for _, l := range []struct {
		key  string
		size int
		dst  *attest.ReferenceValues
	}{{"measurement", measurementSize, &p.Measurements}, {"id_key", measurementSize, &p.IDKeys}, {"author_key", measurementSize, &p.AuthorKeys}} {
		*l.dst = r.named(l.key, l.size)
	}
	r.hostData()
	p.ImageIDs, p.FamilyIDs = r.plain(t, "image_id", idSize), r.plain(t, "family_id", idSize)
	p.Chips, p.DenyChips = r.plain(t, "chip_id", chipIDSize), r.plain(t, "deny_chip_id", chipIDSize)
	t.Bool("masked_chip_id", &p.AllowMaskedChip)
	r.guestSVN()
	t.Choice("crl", &p.CRL, attest.CRLRequired, attest.CRLWhenGiven)
	const year = 366 * 24 * time.Hour
	t.Duration("crl_max_age", &p.MaxCRLAge, time.Minute, 10*year)
	t.Duration("min_validity", &p.MinValidity, 0, 10*year)
	r.guestPolicy()
	r.platform()
	r.products()
	r.lines(t, "", "signer", "csp", "product", "deny_product", "vmpl", "measurement", "id_key", "author_key", "subject", "host_data", "image_id",
		"family_id", "guest_svn", "chip_id", "deny_chip_id", "masked_chip_id", "crl", "crl_max_age", "min_validity")
	r.problems()
}

// lines notes where keys stand, for the rules that verdicts name.
func (r *snpReader) lines(t *tomlfile.Table, prefix string, keys ...string) {
	for _, k := range keys {
		if t.Has(k) {
			r.p.Lines[prefix+k] = t.KeyLine(k)
		}
	}
}

// problems reports why the policy would refuse everything, where that was not said before.
func (r *snpReader) problems() {
	p := *r.p
	if r.group && p.HostData == nil && !r.anyData {
		p.HostData = attest.ReferenceValues{{}} // each VM has its own
	}
	for _, problem := range p.Problems() {
		key := problem.Key
		if key == "host_data" && r.t.Has("subject") || key == "crl" && r.t.Has("crl") || key == "chip_id" && !r.t.Has("chip_id") {
			continue // this was found wrong where it stands
		}
		r.t.Errorf(key, "expected %s, got %s", problem.Expected, problem.Got)
	}
}

// words asks for a list of some of these words.
func (r *snpReader) words(key string, dst *[]string, known ...string) {
	r.t.Strings(key, dst)
	for _, w := range *dst {
		if !slices.Contains(known, w) {
			r.t.Errorf(key, "expected of %s one or more, got another word", strings.Join(known, ", "))
		}
	}
}

func (r *snpReader) vmpl() {
	r.t.Uint32s("vmpl", &r.p.VMPLs)
	for _, v := range r.p.VMPLs {
		if v > 3 {
			r.t.Errorf("vmpl", "expected VMPLs from 0 to 3, got %d", v)
		}
	}
}

func (r *snpReader) guestSVN() {
	var n int
	if r.t.Int("guest_svn", &n, 0, 1<<31-1) {
		r.p.MinGuestSVN = uint32(n)
	}
}

// octets decodes hexadecimal of a fixed size.
func (r *snpReader) octets(t *tomlfile.Table, key, text string, size int) []byte {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != size {
		t.Errorf(key, "expected %d hexadecimal digits, got %d characters", 2*size, len(text))
		return nil
	}
	return b
}

// plain asks for a list of values in hexadecimal. Nil if the key is not there.
func (r *snpReader) plain(t *tomlfile.Table, key string, size int) attest.ReferenceValues {
	var texts []string
	if !t.Strings(key, &texts) {
		return nil
	}
	out := attest.ReferenceValues{}
	for _, text := range texts {
		v := r.octets(t, key, text, size)
		out = append(out, attest.ReferenceValue{Value: v, Rule: fmt.Sprintf("%s:%d %s", r.file, t.KeyLine(key), key)})
	}
	return out
}

// named asks for tables with name, value and until. Nil if there are none; an empty list, [], is one that accepts nothing.
func (r *snpReader) named(key string, size int) attest.ReferenceValues {
	if !r.t.Has(key) {
		r.t.Tables(key) // so that the key is known
		return nil
	}
	out := attest.ReferenceValues{}
	for _, t := range r.t.Tables(key) {
		var text string
		v := attest.ReferenceValue{}
		if t.String("name", &v.Name) {
			checkText(t, "name", v.Name, "a name")
		} else if !t.Has("name") {
			t.Errorf("name", "expected a name for this value, got none")
		}
		if t.String("value", &text) {
			v.Value = r.octets(t, "value", text, size)
		} else if !t.Has("value") {
			t.Errorf("value", "expected %d hexadecimal digits, got none", 2*size)
		}
		if slices.ContainsFunc(out, func(w attest.ReferenceValue) bool { return w.Name == v.Name && v.Name != "" }) {
			t.Errorf("name", "expected each name once, got it again")
		}
		v.Until = readDate(t, "until")
		v.Rule = ruleName(r.file, t, r.kind(key), v.Name)
		out = append(out, v)
	}
	return out
}

// ParseDate reads a day, which is its first moment in UTC, or a moment as RFC 3339 has it.
func ParseDate(s string) (time.Time, error) {
	if t, err := time.Parse(time.DateOnly, s); err == nil {
		return t, nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("expected a date such as 2027-01-31 or 2027-01-31T12:00:00Z, got %.40q", s)
	}
	return t, nil
}

func readDate(t *tomlfile.Table, key string) time.Time {
	var text string
	if !t.String(key, &text) {
		return time.Time{}
	}
	at, err := ParseDate(text)
	if err != nil {
		t.Errorf(key, "expected a date such as \"2027-01-31\" or \"2027-01-31T12:00:00Z\", got %d characters", len(text))
	}
	return at
}

// hostData takes HOST_DATA, or the subject whose HOST_DATA it is. In a [[snp]] table subjects are the VMs', and any_host_data says
// that it does not matter.
func (r *snpReader) hostData() {
	r.p.HostData = r.plain(r.t, "host_data", hostDataSize)
	if r.group {
		r.t.Bool("any_host_data", &r.anyData)
		if r.anyData && r.p.HostData != nil {
			r.t.Errorf("any_host_data", "expected any_host_data or host_data, got both")
		}
	}
	var subject string
	if r.group && !r.t.Has("subject") || !r.t.String("subject", &subject) {
		return
	}
	switch {
	case r.group:
		r.t.Errorf("subject", "expected no subject: the HOST_DATA of each VM that names this table is its own")
	case r.p.HostData != nil:
		r.t.Errorf("subject", "expected subject or host_data, got both")
	case derive.CheckSubject(subject) != nil:
		r.t.Errorf("subject", "expected a UUID in lower case, such as \"11111111-2222-3333-4444-555555555555\", got %d characters", len(subject))
	}
	rule := fmt.Sprintf("%s:%d subject", r.file, r.t.KeyLine("subject"))
	r.p.HostData = attest.ReferenceValues{{Name: "subject " + subject, Value: attest.HostData(subject), Rule: rule}}
}

// A flag is a key that is true or false.
type flag struct {
	key string
	is  *bool
}

// flags asks for keys that are true or false.
func (r *snpReader) flags(t *tomlfile.Table, prefix string, flags []flag) {
	for _, f := range flags {
		t.Bool(f.key, f.is)
		r.lines(t, prefix, f.key)
	}
}

func guestFlags(g *attest.GuestPolicy) []flag {
	return []flag{
		{"allow_debug", &g.AllowDebug}, {"allow_migration_agent", &g.AllowMigrationAgent}, {"allow_smt", &g.AllowSMT}, {"allow_cxl", &g.AllowCXL},
		{"require_single_socket", &g.RequireSingleSocket}, {"require_aes_256_xts", &g.RequireAES256XTS},
		{"require_rapl_disabled", &g.RequireRAPLDisabled}, {"require_cipher_hiding", &g.RequireCipherHiding},
		{"require_page_swap_disable", &g.RequirePageSwapDisable},
	}
}

func platformFlags(p *attest.PlatformPolicy) []flag {
	return []flag{
		{"require_smt_disabled", &p.RequireSMTDisabled}, {"require_tsme", &p.RequireTSME}, {"require_ecc", &p.RequireECC},
		{"require_rapl_disabled", &p.RequireRAPLDisabled}, {"require_cipher_hiding", &p.RequireCipherHiding}, {"require_alias_check", &p.RequireAliasCheck},
	}
}

func (r *snpReader) guestPolicy() {
	t := r.t.Table("guest_policy")
	if t == nil {
		return
	}
	g := &r.p.Guest
	var abi string
	if t.String("abi", &abi) {
		if _, err := fmt.Sscanf(abi, "%d.%d", &g.ABIMajor, &g.ABIMinor); err != nil || fmt.Sprintf("%d.%d", g.ABIMajor, g.ABIMinor) != abi {
			t.Errorf("abi", "expected a version such as \"1.55\", got %d characters", len(abi))
		}
	}
	r.lines(t, "guest_policy.", "abi")
	r.flags(t, "guest_policy.", guestFlags(g))
}

func (r *snpReader) platform() {
	if t := r.t.Table("platform"); t != nil {
		r.flags(t, "platform.", platformFlags(&r.p.Platform))
	}
}

// products takes the [[product]] tables.
func (r *snpReader) products() {
	for _, t := range r.t.Tables("product") {
		product := attest.Product{}
		if !t.Choice("line", &product.Line, snp.Milan, snp.Genoa, snp.Turin) && !t.Has("line") {
			t.Errorf("line", "expected a product line, Milan, Genoa or Turin, got none")
		}
		if slices.ContainsFunc(r.p.Products, func(p attest.Product) bool { return p.Line == product.Line && p.Line != "" }) {
			t.Errorf("line", "expected each line once, got it again")
		}
		product.Rule = ruleName(r.file, t, r.kind("product"), product.Line)
		if product.Chips = r.plain(t, "chip_id", chipIDSize); product.Chips != nil && len(product.Chips) == 0 {
			t.Errorf("chip_id", "expected chips, or no such list, got none")
		}
		r.leastTCBs(t, &product)
		r.p.Products = append(r.p.Products, product)
	}
}

// leastTCBs takes tcb, which stands for all three, or each of them by its own name.
func (r *snpReader) leastTCBs(t *tomlfile.Table, product *attest.Product) {
	all := readTCB(t, "tcb", product.Line)
	for key, dst := range map[string]**attest.TCB{"reported": &product.Reported, "committed": &product.Committed, "launch": &product.Launch} {
		*dst = readTCB(t, key, product.Line)
		if *dst != nil && all != nil {
			t.Errorf(key, "expected tcb, which stands for reported, committed and launch, or these, got both")
		}
		if *dst == nil {
			*dst = all
		}
	}
}

// readTCB takes a table with every part of the line's TCB. Nil if it is not there.
func readTCB(parent *tomlfile.Table, key, line string) *attest.TCB {
	t := parent.Table(key)
	if t == nil {
		return nil
	}
	parts := snp.TCBParts(line)
	if parts == nil { // that the line is wrong has been said
		parts = snp.TCBParts(snp.Turin) // which has every part that there is
	}
	var values []uint8
	for _, name := range parts {
		var n int
		if !t.Int(name, &n, 0, 255) && line != "" && !t.Has(name) {
			t.Errorf(name, "expected the least %s of %s, got none", name, line)
		}
		values = append(values, uint8(n))
	}
	tcb, _ := snp.TCBOf(line, values) // it fails for a wrong line alone
	return &tcb
}
