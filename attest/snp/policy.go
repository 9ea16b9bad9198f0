package snp

import (
	"fmt"
	"slices"
	"strings"

	"keybroker/attest"
)

// policy decides whether the policy accepts what the report says. Every key of the policy is looked at.
func (a *appraisal) policy() {
	p := a.req.Policy
	if p == nil {
		a.describe()
		return
	}
	a.complete(p)
	a.signer(p)
	a.line(p)
	a.minTCBs(p)
	a.chips(p)
	a.vmpl(p)
	a.identity(p)
	a.guestFlags(p)
	a.platformFlags(p)
	a.remaining(p)
}

// describe tells, without a policy, what one would decide on.
func (a *appraisal) describe() {
	r := a.report
	for _, c := range [][2]string{
		{"signer", r.signer.SigningKey.String()}, {"product", r.product()}, {"chip-id", orUnknown(r.chip)}, {"vmpl", fmt.Sprint(r.Vmpl)},
		{"measurement", hexOf(r.Measurement)}, {"id-key", hexOf(r.IdKeyDigest)}, {"author-key", hexOf(r.AuthorKeyDigest)},
		{"host-data", hexOf(r.HostData)}, {"image-id", hexOf(r.ImageId)}, {"family-id", hexOf(r.FamilyId)}, {"guest-svn", fmt.Sprint(r.GuestSvn)},
		{"guest-policy", fmt.Sprintf("%#x", r.Policy)}, {"platform", fmt.Sprintf("%#x", r.PlatformInfo)},
	} {
		a.unchecked(attest.Appraisal, c[0], noPolicy, c[1])
	}
	for _, name := range []string{reportedTCB, committedTCB, launchTCB, currentTCB} {
		if r.line != nil {
			a.unchecked(attest.Appraisal, name, noPolicy, r.line.layout.String(r.tcbs[name]))
		}
	}
}

// noPolicy is what is expected of a claim when there is no policy.
const noPolicy = "no policy given"

// accept records a claim of the policy.
func (a *appraisal) accept(name string, ok bool, expected, got, rule string) {
	a.add(attest.Appraisal, name, ok, expected, got, rule)
}

// complete refuses under a policy that leaves out what matters: empty never means all.
func (a *appraisal) complete(p *attest.Policy) {
	for _, problem := range p.Problems() {
		a.accept("policy."+problem.Key, false, problem.Expected, problem.Got, p.RuleOf(problem.Key))
	}
}

// signer decides on the kind of key, and on a VLEK's provider.
func (a *appraisal) signer(p *attest.Policy) {
	kind := a.report.signer.SigningKey.String()
	a.accept("signer", slices.Contains(p.Signers, kind), oneOf(p.Signers), kind, p.RuleOf("signer"))
	if a.key != nil && a.key.kind == attest.VLEK {
		a.accept("csp", slices.Contains(p.CSPs, a.key.csp), oneOf(p.CSPs), plain(a.key.csp), p.RuleOf("csp"))
	}
}

// oneOf lists what a policy accepts, for messages.
func oneOf(words []string) string {
	if len(words) == 0 {
		return "nothing: the list is empty"
	}
	return "one of " + strings.Join(words, ", ")
}

// productOf returns the policy's entry for the report's line, nil if there is none.
func (a *appraisal) productOf(p *attest.Policy) *attest.Product {
	for i := range p.Products {
		if a.report.line != nil && p.Products[i].Line == a.report.line.name {
			return &p.Products[i]
		}
	}
	return nil
}

// line decides on the product line.
func (a *appraisal) line(p *attest.Policy) {
	var names []string
	for _, product := range p.Products {
		names = append(names, product.Line)
	}
	entry, rule := a.productOf(p), p.RuleOf("product")
	if entry != nil {
		rule = entry.Rule
	}
	a.accept("product", entry != nil, oneOf(names), a.report.product(), rule)
	if p.DenyProducts != nil && a.report.line != nil {
		ok := !slices.Contains(p.DenyProducts, a.report.line.name)
		a.accept("deny-product", ok, "none of "+strings.Join(p.DenyProducts, ", "), a.report.line.name, p.RuleOf("deny_product"))
	}
}

// minTCBs holds every part of three TCBs against the least that the policy wants.
func (a *appraisal) minTCBs(p *attest.Policy) {
	entry := a.productOf(p)
	if entry == nil {
		a.unchecked(attest.Appraisal, reportedTCB, "the least TCB of the product", "the policy has no such product")
		return
	}
	for _, t := range []struct {
		name string
		min  *attest.TCB
	}{{reportedTCB, entry.Reported}, {committedTCB, entry.Committed}, {launchTCB, entry.Launch}} {
		if t.min == nil {
			continue // complete has said so
		}
		got := a.report.tcbs[t.name]
		for _, part := range a.report.line.layout {
			want, have := *part.in(t.min), *part.in(&got)
			a.accept(t.name+"."+part.name, have >= want, fmt.Sprintf("at least %d", want), fmt.Sprint(have), entry.Rule)
		}
	}
}

// chips decides on the chip. Which one it is, a report that hides it says only by its VCEK.
func (a *appraisal) chips(p *attest.Policy) {
	if a.report.masked() {
		a.accept("masked-chip-id", p.AllowMaskedChip, "a report that says which chip made it", "CHIP_ID is all zero", p.RuleOf("masked_chip_id"))
	}
	a.values("chip-id", "chip_id", p, p.Chips, a.report.chip)
	if entry := a.productOf(p); entry != nil {
		a.values("product.chip-id", "chip_id", p, entry.Chips, a.report.chip)
	}
	if p.DenyChips == nil {
		return
	}
	denied, rule := a.denied(p)
	a.accept("deny-chip-id", !denied && a.report.chip != nil, "none of "+names(p.DenyChips), orUnknown(a.report.chip), rule)
}

// denied looks for the chip among those that are refused. An entry that has ended refuses on: only removing it allows.
func (a *appraisal) denied(p *attest.Policy) (bool, string) {
	if v, _ := p.DenyChips.Find(a.report.chip, a.req.At); v != nil {
		return true, v.Rule
	}
	return false, p.RuleOf("deny_chip_id")
}

func orUnknown(b []byte) string {
	if b == nil {
		return "unknown"
	}
	return hexOf(b)
}

// values decides on a value that must be in a list. A nil list has nothing to say.
func (a *appraisal) values(name, key string, p *attest.Policy, list attest.ReferenceValues, got []byte) {
	if list == nil {
		return
	}
	v, ok := list.Find(got, a.req.At)
	rule, text := p.RuleOf(key), orUnknown(got)
	if len(list) == 1 {
		rule = list[0].Rule // what decides is where the only value stands, which of a VM's HOST_DATA is the VM's entry
	}
	if v != nil {
		rule = v.Rule
		if !ok {
			text += ", which was accepted until " + stamp(v.Until)
		}
	}
	a.accept(name, ok, names(list), text, rule)
}

// names lists reference values, for messages.
func names(list attest.ReferenceValues) string {
	var out []string
	for _, v := range list {
		text := hexOf(v.Value)
		if v.Name != "" {
			text = fmt.Sprintf("%q %s", v.Name, text)
		}
		out = append(out, text)
	}
	return oneOf(out)
}

// vmpl decides on the privilege level that asked for the report. A report that the host asked for has none of 0 to 3.
func (a *appraisal) vmpl(p *attest.Policy) {
	var levels []string
	for _, v := range p.VMPLs {
		levels = append(levels, fmt.Sprint(v))
	}
	ok := a.report.Vmpl <= 3 && slices.Contains(p.VMPLs, a.report.Vmpl)
	a.accept("vmpl", ok, oneOf(levels), fmt.Sprint(a.report.Vmpl), p.RuleOf("vmpl"))
}

// identity decides on what runs in the guest, and on which guest it is.
func (a *appraisal) identity(p *attest.Policy) {
	r := a.report
	a.values("measurement", "measurement", p, p.Measurements, r.Measurement)
	a.values("id-key", "id_key", p, p.IDKeys, nonZero(r.IdKeyDigest))
	a.values("author-key", "author_key", p, p.AuthorKeys, a.authorKey())
	a.values("host-data", "host_data", p, p.HostData, r.HostData)
	a.values("image-id", "image_id", p, p.ImageIDs, r.ImageId)
	a.values("family-id", "family_id", p, p.FamilyIDs, r.FamilyId)
	a.accept("guest-svn", r.GuestSvn >= p.MinGuestSVN, fmt.Sprintf("at least %d", p.MinGuestSVN), fmt.Sprint(r.GuestSvn), p.RuleOf("guest_svn"))
}

// authorKey returns the digest of the key that signed the ID key, if AUTHOR_KEY_EN says that one did.
func (a *appraisal) authorKey() []byte {
	if !a.report.signer.AuthorKeyEn {
		return nil
	}
	return nonZero(a.report.AuthorKeyDigest)
}

// nonZero returns nil for a digest that is not there.
func nonZero(digest []byte) []byte {
	if isZero(digest) {
		return nil
	}
	return digest
}

// guestFlags decides on the policy that the guest was launched under (SNP ABI, section 4.3).
func (a *appraisal) guestFlags(p *attest.Policy) {
	got, want := a.report.guest, p.Guest
	a.abi(p)
	a.allow(p, "debug", got.Debug, want.AllowDebug)
	a.allow(p, "migration-agent", got.MigrateMA, want.AllowMigrationAgent)
	a.allow(p, "smt", got.SMT, want.AllowSMT)
	a.allow(p, "cxl", got.CXLAllowed, want.AllowCXL)
	const at = "guest-policy."
	a.require(p, at, "single-socket", got.SingleSocket, want.RequireSingleSocket)
	a.require(p, at, "aes-256-xts", got.MemAES256XTS, want.RequireAES256XTS)
	a.require(p, at, "rapl-disabled", got.RAPLDis, want.RequireRAPLDisabled)
	a.require(p, at, "cipher-hiding", got.CipherTextHidingDRAM, want.RequireCipherHiding)
	a.require(p, at, "page-swap-disable", got.PageSwapDisable, want.RequirePageSwapDisable)
}

// abi holds that the guest asks for at least this ABI of the firmware.
func (a *appraisal) abi(p *attest.Policy) {
	got, want := a.report.guest, p.Guest
	ok := version(got.ABIMajor, got.ABIMinor) >= version(want.ABIMajor, want.ABIMinor)
	a.accept("guest-policy.abi", ok, fmt.Sprintf("at least %d.%d", want.ABIMajor, want.ABIMinor),
		fmt.Sprintf("%d.%d", got.ABIMajor, got.ABIMinor), p.RuleOf("guest_policy.abi"))
}

func version(major, minor uint8) int { return int(major)<<8 | int(minor) }

// allow decides on a flag that weakens the guest.
func (a *appraisal) allow(p *attest.Policy, name string, set, allowed bool) {
	expected := "off"
	if allowed {
		expected = "on or off"
	}
	a.accept("guest-policy."+name, !set || allowed, expected, onOff(set), p.RuleOf("guest_policy.allow_"+snake(name)))
}

// require decides on a flag that strengthens guest or host.
func (a *appraisal) require(p *attest.Policy, at, name string, set, required bool) {
	expected := "on or off"
	if required {
		expected = "on"
	}
	a.accept(at+name, set || !required, expected, onOff(set), p.RuleOf(snake(at)+"require_"+snake(name)))
}

// snake turns a claim's name into the key of a policy's file.
func snake(name string) string { return strings.ReplaceAll(name, "-", "_") }

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// platformFlags decides on what the report says of its host (PLATFORM_INFO).
func (a *appraisal) platformFlags(p *attest.Policy) {
	got, want := a.report.host, p.Platform
	const at = "platform."
	a.require(p, at, "smt-disabled", !got.SMTEnabled, want.RequireSMTDisabled)
	a.require(p, at, "tsme", got.TSMEEnabled, want.RequireTSME)
	a.require(p, at, "ecc", got.ECCEnabled, want.RequireECC)
	a.require(p, at, "rapl-disabled", got.RAPLDisabled, want.RequireRAPLDisabled)
	a.require(p, at, "cipher-hiding", got.CiphertextHidingDRAMEnabled, want.RequireCipherHiding)
	a.require(p, at, "alias-check", got.AliasCheckComplete, want.RequireAliasCheck)
}

// remaining holds that the chain's certificates stay valid for as long as the policy wants.
func (a *appraisal) remaining(p *attest.Policy) {
	if p.MinValidity <= 0 || a.chain == nil {
		return
	}
	for _, c := range a.chain {
		if left := c.NotAfter.Sub(a.req.At); left < p.MinValidity {
			a.accept("min-validity", false, fmt.Sprintf("valid for another %s", p.MinValidity), fmt.Sprintf("%s for %s", subject(c), left), p.RuleOf("min_validity"))
			return
		}
	}
	a.accept("min-validity", true, fmt.Sprintf("valid for another %s", p.MinValidity), "valid for longer", p.RuleOf("min_validity"))
}
