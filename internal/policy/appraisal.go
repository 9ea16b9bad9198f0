package policy

import (
	"fmt"
	"strings"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
)

// An Appraisal is what reports must say so that VMs get their keys: one [[snp]] table, for people.
type Appraisal struct {
	Rule string      // the table
	VMs  []string    // who names it, by name or UUID
	Rows [][2]string // a key of the table, and what it accepts
}

// Appraisals returns all appraisal policies in the order of the files, as they are at this time.
func (p *Policy) Appraisals(at time.Time) []Appraisal {
	var out []Appraisal
	for _, g := range p.snps {
		a := Appraisal{Rule: g.Rule, VMs: g.vmNames()}
		for _, s := range g.describe(at) {
			a.Rows = append(a.Rows, [2]string{s.key, s.value})
		}
		out = append(out, a)
	}
	return out
}

// settings returns what the table says, whenever it is asked, and without who names it.
func (g *snpTable) settings() []setting {
	alone := *g
	alone.vms = nil
	return alone.describe(time.Time{})
}

// describe returns what the table accepts, a key's value in each line; at the zero time nothing has ended.
func (g *snpTable) describe(at time.Time) []setting {
	p := g.policy
	out := []setting{{"signer", strings.Join(p.Signers, ", ")}}
	if p.CSPs != nil {
		out = append(out, setting{"csp", quoteStrings(p.CSPs)})
	}
	for _, product := range p.Products {
		out = append(out, setting{"product " + product.Line, describeProduct(product)})
	}
	if p.DenyProducts != nil {
		out = append(out, setting{"deny_product", strings.Join(p.DenyProducts, ", ")})
	}
	out = append(out, setting{"vmpl", joinInts(p.VMPLs)})
	for _, l := range namedLists(p) {
		for _, v := range l.values {
			out = append(out, setting{l.key + " " + quote(v.Name), describeValue(v, at)})
		}
	}
	out = append(out, g.describeHostData()...)
	for _, l := range []valueList{{"image_id", p.ImageIDs}, {"family_id", p.FamilyIDs}, {"chip_id", p.Chips}, {"deny_chip_id", p.DenyChips}} {
		if l.values != nil {
			out = append(out, setting{l.key, joinValues(l.values)})
		}
	}
	return append(out, describeRest(p)...)
}

// A valueList is a list of reference values with its key.
type valueList struct {
	key    string
	values attest.ReferenceValues
}

// namedLists are the lists that say what runs in a guest.
func namedLists(p *attest.Policy) []valueList {
	return []valueList{{"measurement", p.Measurements}, {"id_key", p.IDKeys}, {"author_key", p.AuthorKeys}}
}

// describeHostData says which HOST_DATA guests are to be launched with.
func (g *snpTable) describeHostData() []setting {
	switch {
	case g.anyData:
		return []setting{{"host_data", "anything"}}
	case g.policy.HostData != nil:
		return []setting{{"host_data", joinValues(g.policy.HostData)}}
	}
	out := []setting{{"host_data", "each VM's own"}}
	for _, v := range g.vms {
		out = append(out, setting{"host_data of " + nameOr(v.Name, v.UUID), fmt.Sprintf("%x", attest.HostData(v.UUID))})
	}
	return out
}

// describeRest describes what is neither a list nor a product.
func describeRest(p *attest.Policy) []setting {
	var out []setting
	if p.MinGuestSVN > 0 {
		out = append(out, setting{"guest_svn", fmt.Sprintf("at least %d", p.MinGuestSVN)})
	}
	if p.AllowMaskedChip {
		out = append(out, setting{"masked_chip_id", "a report may hide its chip"})
	}
	crl := p.CRL
	if p.MaxCRLAge > 0 {
		crl += fmt.Sprintf(", at most %s old", p.MaxCRLAge)
	}
	out = append(out, setting{"crl", crl})
	if p.MinValidity > 0 {
		out = append(out, setting{"min_validity", fmt.Sprintf("another %s", p.MinValidity)})
	}
	guest, platform := p.Guest, p.Platform // to point into
	words := describeFlags(guestFlags(&guest))
	if p.Guest.ABIMajor|p.Guest.ABIMinor != 0 {
		words = append([]string{fmt.Sprintf("abi at least %d.%d", p.Guest.ABIMajor, p.Guest.ABIMinor)}, words...)
	}
	return append(out, setting{"guest_policy", nameOr(strings.Join(words, ", "), "nothing that weakens allowed, nothing required")},
		setting{"platform", nameOr(strings.Join(describeFlags(platformFlags(&platform)), ", "), "nothing required")})
}

// describeFlags names the flags that are set.
func describeFlags(flags []flag) (out []string) {
	for _, f := range flags {
		if *f.is {
			out = append(out, f.key)
		}
	}
	return out
}

func describeProduct(product attest.Product) string {
	text := "at least " + snp.FormatTCB(product.Line, *product.Reported)
	if *product.Committed != *product.Reported || *product.Launch != *product.Reported {
		text = fmt.Sprintf("at least reported %s; committed %s; launch %s", snp.FormatTCB(product.Line, *product.Reported),
			snp.FormatTCB(product.Line, *product.Committed), snp.FormatTCB(product.Line, *product.Launch))
	}
	if product.Chips != nil {
		text += "; only chip_id " + joinValues(product.Chips)
	}
	return text
}

func describeValue(v attest.ReferenceValue, at time.Time) string {
	text := fmt.Sprintf("%x", v.Value)
	if !v.Until.IsZero() {
		text += " until " + v.Until.UTC().Format(time.RFC3339)
		if !at.Before(v.Until) {
			text += ", so no longer"
		}
	}
	return text
}

// joinValues lists values that have no names, in the order of the file.
func joinValues(l attest.ReferenceValues) string {
	var out []string
	for _, v := range l {
		out = append(out, fmt.Sprintf("%x", v.Value))
	}
	return strings.Join(out, ", ")
}
