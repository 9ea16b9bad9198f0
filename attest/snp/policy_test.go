package snp_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
)

// full is a request whose policy has every list, with the sample's own values, and passes.
func full(t testing.TB) resigned {
	r := resign(t, sampleNamed(t, "zen4c-v5"))
	r.report = with(r.report, 0x48, 1)                                 // AUTHOR_KEY_EN
	r.report = with(r.report, 0xe0, bytes.Repeat([]byte{0xaa}, 48)...) // ID_KEY_DIGEST
	r.report = with(r.report, 0x110, bytes.Repeat([]byte{0xbb}, 48)...)
	p, chip := r.policy, r.report[0x1a0:0x1e0]
	p.IDKeys, p.AuthorKeys = one("id", r.report[0xe0:0x110]), one("author", r.report[0x110:0x140])
	p.ImageIDs, p.FamilyIDs = one("image", r.report[0x20:0x30]), one("family", r.report[0x10:0x20])
	p.Chips, p.Products[0].Chips = one("chip", chip), one("chip", chip)
	p.DenyChips, p.DenyProducts = one("other chip", make([]byte, 64)), []string{snp.Milan}
	p.Signers, p.CSPs = []string{attest.VCEK, attest.VLEK}, []string{"CN=test"}
	return r
}

// Each list of a policy, empty in turn, refuses; and so does each that must be there, left out.
func TestEmptyListsRefuse(t *testing.T) {
	wantFailures(t, full(t).appraise(t))
	empty := attest.ReferenceValues{}
	for name, change := range map[string]func(*attest.Policy){
		"signer":       func(p *attest.Policy) { p.Signers = []string{} },
		"csp":          func(p *attest.Policy) { p.CSPs = []string{} },
		"product":      func(p *attest.Policy) { p.Products = []attest.Product{} },
		"deny_product": func(p *attest.Policy) { p.DenyProducts = []string{} },
		"vmpl":         func(p *attest.Policy) { p.VMPLs = []uint32{} },
		"measurement":  func(p *attest.Policy) { p.Measurements = empty },
		"id_key":       func(p *attest.Policy) { p.IDKeys = empty },
		"author_key":   func(p *attest.Policy) { p.AuthorKeys = empty },
		"host_data":    func(p *attest.Policy) { p.HostData = empty },
		"image_id":     func(p *attest.Policy) { p.ImageIDs = empty },
		"family_id":    func(p *attest.Policy) { p.FamilyIDs = empty },
		"chip_id":      func(p *attest.Policy) { p.Chips = empty },
		"chip_id ":     func(p *attest.Policy) { p.Products[0].Chips = empty },
		"deny_chip_id": func(p *attest.Policy) { p.DenyChips = empty },

		"no signer":       func(p *attest.Policy) { p.Signers = nil },
		"no csp":          func(p *attest.Policy) { p.CSPs = nil },
		"no product":      func(p *attest.Policy) { p.Products = nil },
		"no vmpl":         func(p *attest.Policy) { p.VMPLs = nil },
		"no measurement":  func(p *attest.Policy) { p.Measurements, p.IDKeys, p.AuthorKeys = nil, nil, nil },
		"no host_data":    func(p *attest.Policy) { p.HostData, p.ImageIDs, p.IDKeys = nil, nil, nil },
		"no crl":          func(p *attest.Policy) { p.CRL = "" },
		"other crl":       func(p *attest.Policy) { p.CRL = "never" },
		"no crl_max_age":  func(p *attest.Policy) { p.CRL = attest.CRLRequired },
		"no product TCB":  func(p *attest.Policy) { p.Products[0].Reported = nil },
		"no product TCB ": func(p *attest.Policy) { p.Products[0].Committed = nil },
		"no product  TCB": func(p *attest.Policy) { p.Products[0].Launch = nil },
		"empty product":   func(p *attest.Policy) { *p = attest.Policy{} },
	} {
		t.Run(name, func(t *testing.T) {
			r := full(t)
			change(r.policy)
			verdict := r.appraise(t)
			words := strings.Fields(name)
			if len(words) > 1 && words[0] != "chip_id" {
				words = words[1:]
			}
			if verdict.Pass() || !slices.Contains(failing(verdict), "policy."+words[0]) || len(r.policy.Problems()) == 0 {
				t.Errorf("pass %v, failing %q", verdict.Pass(), failing(verdict))
			}
		})
	}
}

// A list of values: one that has ended, an ending one, an empty value, the order.
func TestReferenceValues(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *resigned)
		fails  string
	}{
		"a second value": {func(r *resigned) {
			r.policy.Measurements = append(one("next", make([]byte, 48)), r.policy.Measurements...)
		}, ""},
		"ends tomorrow":  {func(r *resigned) { r.policy.Measurements[0].Until = spring.AddDate(0, 0, 1) }, ""},
		"ends now":       {func(r *resigned) { r.policy.Measurements[0].Until = spring }, "measurement"},
		"ended":          {func(r *resigned) { r.policy.Measurements[0].Until = spring.AddDate(0, 0, -1) }, "measurement"},
		"other":          {func(r *resigned) { r.policy.Measurements[0].Value = make([]byte, 48) }, "measurement"},
		"beginning":      {func(r *resigned) { r.policy.Measurements[0].Value = r.policy.Measurements[0].Value[:47] }, "measurement"},
		"empty value":    {func(r *resigned) { r.policy.Measurements[0].Value = nil }, "measurement"},
		"other ID key":   {func(r *resigned) { r.policy.IDKeys[0].Value = make([]byte, 48) }, "id-key"},
		"no ID key":      {func(r *resigned) { clear(r.report[0xe0:0x110]); r.policy.IDKeys[0].Value = make([]byte, 48) }, "id-key"},
		"no author key":  {func(r *resigned) { r.report[0x48] = 0 }, "author-key"},
		"other HOST":     {func(r *resigned) { r.report[0xc0]++ }, "host-data"},
		"other image id": {func(r *resigned) { r.report[0x20]++ }, "image-id"},
		"other family":   {func(r *resigned) { r.report[0x10]++ }, "family-id"},
		"denied product": {func(r *resigned) { r.policy.DenyProducts = []string{snp.Genoa} }, "deny-product"},
		"denied chip":    {func(r *resigned) { r.policy.DenyChips = r.policy.Chips }, "deny-chip-id"},
		"denied until": {func(r *resigned) {
			r.policy.DenyChips = slices.Clone(r.policy.Chips)
			r.policy.DenyChips[0].Until = spring
		}, "deny-chip-id"},
		"other chip":     {func(r *resigned) { r.policy.Products[0].Chips = one("other", make([]byte, 64)) }, "product.chip-id"},
		"other signer":   {func(r *resigned) { r.policy.Signers = []string{attest.VLEK} }, "signer"},
		"lower SVN":      {func(r *resigned) { r.policy.MinGuestSVN = 1 }, "guest-svn"},
		"short validity": {func(r *resigned) { r.policy.MinValidity = 100 * 365 * 24 * time.Hour }, "min-validity"},
		"long validity":  {func(r *resigned) { r.policy.MinValidity = time.Hour }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := full(t)
			c.change(&r)
			wantFailures(t, r.appraise(t), strings.Fields(c.fails)...)
		})
	}
}

// Every part of each TCB has its own least value.
func TestLeastTCB(t *testing.T) {
	for name, c := range map[string]struct {
		r     func(testing.TB) resigned
		parts string
	}{
		"Genoa": {full, "bootloader tee snp microcode"}, "Turin": {turin, "fmc bootloader tee snp microcode"},
	} {
		if got := strings.Join(snp.TCBParts(name), " "); got != c.parts {
			t.Errorf("%s: %s", name, got)
		}
		for i, kind := range []string{"reported-tcb", "committed-tcb", "launch-tcb"} {
			for part := range strings.FieldsSeq(c.parts) {
				r := c.r(t)
				least := r.template.TCB
				entry := &r.policy.Products[0]
				*[]**attest.TCB{&entry.Reported, &entry.Committed, &entry.Launch}[i] = &least
				wantFailures(t, r.appraise(t))
				*map[string]*uint8{
					"fmc": &least.FMC, "bootloader": &least.Bootloader, "tee": &least.TEE, "snp": &least.SNP, "microcode": &least.Microcode,
				}[part]++
				wantFailures(t, r.appraise(t), kind+"."+part)
			}
		}
	}
	if snp.TCBParts("Rome") != nil {
		t.Error("Rome has a TCB")
	}
}

// Each flag of the guest's policy and of the platform, both ways.
func TestFlags(t *testing.T) {
	for _, c := range []struct {
		name   string
		at     int  // the octet in the report
		bit    int  // in that octet
		weak   bool // the flag weakens: it needs to be allowed, otherwise it may be required
		policy func(*attest.Policy)
	}{
		{"guest-policy.smt", 0x0a, 0, true, func(p *attest.Policy) { p.Guest.AllowSMT = true }},
		{"guest-policy.migration-agent", 0x0a, 2, true, func(p *attest.Policy) { p.Guest.AllowMigrationAgent = true }},
		{"guest-policy.debug", 0x0a, 3, true, func(p *attest.Policy) { p.Guest.AllowDebug = true }},
		{"guest-policy.cxl", 0x0a, 5, true, func(p *attest.Policy) { p.Guest.AllowCXL = true }},
		{"guest-policy.single-socket", 0x0a, 4, false, func(p *attest.Policy) { p.Guest.RequireSingleSocket = true }},
		{"guest-policy.aes-256-xts", 0x0a, 6, false, func(p *attest.Policy) { p.Guest.RequireAES256XTS = true }},
		{"guest-policy.rapl-disabled", 0x0a, 7, false, func(p *attest.Policy) { p.Guest.RequireRAPLDisabled = true }},
		{"guest-policy.cipher-hiding", 0x0b, 0, false, func(p *attest.Policy) { p.Guest.RequireCipherHiding = true }},
		{"guest-policy.page-swap-disable", 0x0b, 1, false, func(p *attest.Policy) { p.Guest.RequirePageSwapDisable = true }},
		{"guest-policy.abi", 0x08, 2, false, func(p *attest.Policy) { p.Guest.ABIMinor = 4 }},
		{"guest-policy.abi", 0x09, 0, false, func(p *attest.Policy) { p.Guest.ABIMajor, p.Guest.ABIMinor = 1, 0 }},
		{"platform.tsme", 0x40, 1, false, func(p *attest.Policy) { p.Platform.RequireTSME = true }},
		{"platform.ecc", 0x40, 2, false, func(p *attest.Policy) { p.Platform.RequireECC = true }},
		{"platform.rapl-disabled", 0x40, 3, false, func(p *attest.Policy) { p.Platform.RequireRAPLDisabled = true }},
		{"platform.cipher-hiding", 0x40, 4, false, func(p *attest.Policy) { p.Platform.RequireCipherHiding = true }},
		{"platform.alias-check", 0x40, 5, false, func(p *attest.Policy) { p.Platform.RequireAliasCheck = true }},
	} {
		for _, set := range []bool{false, true} {
			for _, said := range []bool{false, true} {
				r := full(t)
				r.policy.Guest = attest.GuestPolicy{}
				copy(r.report[0x08:], []byte{0, 0, 2, 0})
				r.report[0x40] = 0
				if set {
					r.report[c.at] |= 1 << c.bit
				}
				if said {
					c.policy(r.policy)
				}
				refused := c.weak && set && !said || !c.weak && !set && said
				var want []string
				if refused {
					want = []string{c.name}
				}
				wantFailures(t, r.appraise(t), want...)
			}
		}
	}
	r := full(t) // SMT of the host is the other way round: required to be off
	r.report[0x40], r.policy.Platform.RequireSMTDisabled = 1, true
	wantFailures(t, r.appraise(t), "platform.smt-disabled")
}
