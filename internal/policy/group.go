package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"keybroker/attest"
	"keybroker/derive"
	"keybroker/internal/tomlfile"
)

// A snpTable is one [[snp]] table: an appraisal policy for the reports of all VMs that name it.
type snpTable struct {
	Rule string // "policy.toml:30 [[snp]] web": names the table everywhere
	Name string

	policy  *attest.Policy // with HOST_DATA only if the table has it
	anyData bool           // any_host_data: HOST_DATA tells nothing apart
	vms     []*VM          // who names it
}

// snp adds a [[snp]] table. VMs name it from any file, so whether they do is seen when all are read.
func (b *builder) snp(file string, t *tomlfile.Table) {
	g := &snpTable{}
	if t.String("name", &g.Name) {
		checkText(t, "name", g.Name, "a name for this appraisal policy")
	} else if !t.Has("name") {
		t.Errorf("name", "expected a name, which VMs give as snp = \"NAME\", got none")
	}
	g.Rule = ruleName(file, t, "snp", g.Name)
	r := newSNPReader(file, t, g.Rule)
	r.group = true
	r.read()
	g.policy, g.anyData = r.p, r.anyData
	if other := b.groups[g.Name]; other != nil {
		t.Errorf("name", "expected each name once, got it again; the other is %s", other.Rule)
		return
	}
	b.groups[g.Name] = g
	b.p.snps = append(b.p.snps, g)
}

// of returns the appraisal policy of one VM. Unless the table says otherwise HOST_DATA is the VM's own.
func (g *snpTable) of(v *VM) *attest.Policy {
	p := *g.policy
	if p.HostData == nil && !g.anyData {
		p.HostData = attest.ReferenceValues{{Name: nameOr(v.Name, v.UUID), Value: attest.HostData(v.UUID), Rule: v.Rule}}
	}
	return &p
}

// checkAppraisal holds that an entry of tier snp names an appraisal policy, and that no entry says what its tier has no use for: a
// condition that nobody looks at would be taken for one that holds.
func checkAppraisal(t *tomlfile.Table, v *VM) {
	t.String("snp", &v.SNPName)
	t.Bool("shared", &v.Shared)
	for _, k := range []struct{ key, tier, why string }{
		{"snp", derive.TierVM, "reports are for tier \"snp\""},
		{"shared", derive.TierVM, "reports are for tier \"snp\""},
		{"hosts", derive.TierSNP, "no host proves its name there; chip_id in [[snp]] says which processors may run the guest"},
		{"after_gap", derive.TierSNP, "a report says itself which boot it is of"},
	} {
		if t.Has(k.key) && k.tier == v.Tier {
			t.Errorf(k.key, "expected no %s in tier %q, which has no use for it: %s", k.key, v.Tier, k.why)
		}
	}
	switch {
	case v.Tier != derive.TierSNP:
	case !t.Has("snp"):
		t.Errorf("snp", "expected snp = \"NAME\", the name of a [[snp]] table, got none: without an appraisal policy no report is accepted")
	case t.Is("snp", ""):
		t.Errorf("snp", "expected the name of a [[snp]] table, got an empty one")
	}
}

// finish does what needs all files: it finds the appraisal policies that VMs name, and when nothing else is wrong holds that
// no report fits two VMs.
func (b *builder) finish() error {
	for _, step := range []func(){b.findAppraisals, b.tellApart} {
		step()
		if err := b.err(); err != nil {
			return err
		}
	}
	return nil
}

// err returns what is wrong in the files so far.
func (b *builder) err() error {
	var errs []error
	for _, t := range b.roots {
		errs = append(errs, t.Err())
	}
	return errors.Join(errs...)
}

// findAppraisals gives each VM of tier snp its appraisal policy.
func (b *builder) findAppraisals() {
	for _, v := range b.p.vms {
		if v.Tier != derive.TierSNP || v.SNPName == "" {
			continue
		}
		g := b.groups[v.SNPName]
		if g == nil {
			b.tables[v].Errorf("snp", "expected the name of a [[snp]] table, got %.60q, which none has", v.SNPName)
			continue
		}
		g.vms = append(g.vms, v)
		v.SNP = g.of(v)
	}
}

// tellApart holds that no report satisfies two entries, for then the guest of one could have the keys of the other; unless
// both say that it may. Entries that refuse whatever comes do not count.
func (b *builder) tellApart() {
	var before, anyData []*VM    // entries so far, and those of them that take any HOST_DATA
	byData := map[string][]*VM{} // those that take this HOST_DATA
	for _, v := range b.p.vms {
		if v.Tier != derive.TierSNP || v.Deny {
			continue
		}
		candidates := before
		if v.SNP.HostData != nil {
			candidates = anyData
			for _, d := range v.SNP.HostData {
				candidates = append(slices.Clip(candidates), byData[string(d.Value)]...)
			}
		}
		b.tellFrom(v, candidates)
		before = append(before, v)
		if v.SNP.HostData == nil {
			anyData = append(anyData, v)
		}
		for _, d := range v.SNP.HostData {
			byData[string(d.Value)] = append(byData[string(d.Value)], v)
		}
	}
}

// tellFrom reports the first of these entries that one report could satisfy together with v.
func (b *builder) tellFrom(v *VM, others []*VM) {
	for _, other := range others {
		if v.Shared && other.Shared {
			continue
		}
		apart, why := attest.Apart(v.SNP, other.SNP)
		if apart {
			continue
		}
		hint := ""
		if v.Shared || other.Shared {
			hint = " (one of them says so)"
		}
		b.tables[v].Errorf("snp", "expected reports that fit this entry or %s, got entries that one report could satisfy both, so that either guest had "+
			"the other's keys: %s; give each what the other does not accept (HOST_DATA is each VM's own unless host_data or any_host_data "+
			"changes that; or [[snp]] tables with other values there), or say shared = true in both%s", other.Rule, strings.Join(why, ", "), hint)
		return
	}
}

// vmNames returns the names of the VMs that name this table, or their UUIDs, in the order of the files.
func (g *snpTable) vmNames() []string {
	var out []string
	for _, v := range g.vms {
		out = append(out, nameOr(v.Name, v.UUID))
	}
	return out
}

// warnings says why nobody has any use of a table.
func (g *snpTable) warnings() []string {
	if len(g.vms) == 0 {
		return []string{fmt.Sprintf("no VM names it; give a [[vm]] of tier %q the line snp = %q, or remove it", derive.TierSNP, g.Name)}
	}
	return nil
}
