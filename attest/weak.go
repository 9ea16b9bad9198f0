package attest

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// milan is the product line of which it is reported that the seed of its signing keys was extracted.
const milan = "Milan"

// Warnings returns what an administrator should know of a policy that is complete: where it is weak, and what of it is at
// this time of no use any more.
func (p *Policy) Warnings(at time.Time) []string {
	var out []string
	add := func(weak bool, rule, text string) {
		if weak {
			out = append(out, rule+": "+text)
		}
	}
	add(p.Guest.AllowDebug, p.RuleOf("guest_policy.allow_debug"), "the host can read the memory of such a guest; no production policy allows it")
	add(p.Guest.AllowMigrationAgent, p.RuleOf("guest_policy.allow_migration_agent"), "a migration agent can hand on the memory of such a guest")
	add(p.CRL == CRLWhenGiven, p.RuleOf("crl"), "without a revocation list nothing is known to be revoked")
	add(p.Measurements == nil, p.RuleOf("id_key"), "whoever has one of these keys decides what the guest runs")
	unsigned := p.IDKeys == nil && p.AuthorKeys == nil && (p.ImageIDs != nil || p.FamilyIDs != nil || p.MinGuestSVN > 0)
	add(unsigned, p.RuleOf("image_id"), "IMAGE_ID, FAMILY_ID and GUEST_SVN are in the ID block, which without id_key or author_key anybody may sign")
	add(p.AllowMaskedChip && slices.Contains(p.Signers, VLEK), p.RuleOf("masked_chip_id"), "under a VLEK such a report does not say which chip made it")
	for _, product := range p.Products {
		out = append(out, p.productWarnings(product)...)
	}
	for _, l := range []struct {
		key    string
		values ReferenceValues
	}{{"measurement", p.Measurements}, {"id_key", p.IDKeys}, {"author_key", p.AuthorKeys}} {
		out = append(out, p.ended(l.key, l.values, at)...)
	}
	return out
}

// productWarnings says where an accepted product line is weak.
func (p *Policy) productWarnings(product Product) (out []string) {
	if slices.Contains(p.DenyProducts, product.Line) {
		return []string{product.Rule + ": " + p.RuleOf("deny_product") + " refuses this line, so the entry allows nothing"}
	}
	if product.Line == milan && product.Chips == nil && p.Chips == nil {
		out = append(out, product.Rule+": the seed of Milan's signing keys is reported extracted, so a report of any Milan may be forged; "+
			"allow only chips that you know (chip_id), or remove the line")
	}
	var none []string
	for _, t := range []struct {
		name string
		tcb  *TCB
	}{{"reported", product.Reported}, {"committed", product.Committed}, {"launch", product.Launch}} {
		if t.tcb != nil && *t.tcb == (TCB{}) {
			none = append(none, t.name)
		}
	}
	if none != nil {
		out = append(out, fmt.Sprintf("%s: any TCB is enough (%s), also one with known flaws", product.Rule, strings.Join(none, ", ")))
	}
	return out
}

// ended tells of values that are no longer accepted. When none is left, every report is refused.
func (p *Policy) ended(key string, l ReferenceValues, at time.Time) (out []string) {
	for _, v := range l {
		if !v.accepted(at) {
			out = append(out, fmt.Sprintf("%s: is no longer accepted, since %s; remove it", v.Rule, v.Until.UTC().Format(time.RFC3339)))
		}
	}
	if len(l) > 0 && len(out) == len(l) {
		out = append(out, p.RuleOf(key)+": none of its values is accepted any more, so every report is refused")
	}
	return out
}
