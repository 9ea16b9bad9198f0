package attest_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"keybroker/attest"
)

var now = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

// values makes reference values of words.
func values(words ...string) attest.ReferenceValues {
	out := attest.ReferenceValues{}
	for _, w := range words {
		out = append(out, attest.ReferenceValue{Name: w, Value: []byte(w), Rule: "r " + w})
	}
	return out
}

func TestRuleOf(t *testing.T) {
	p := attest.Policy{Rule: "policy.toml:3 [[snp]] web", File: "policy.toml", Lines: map[string]int{"vmpl": 4}}
	for key, want := range map[string]string{"vmpl": "policy.toml:4 vmpl", "crl": "policy.toml:3 [[snp]] web crl"} {
		if got := p.RuleOf(key); got != want {
			t.Error(got)
		}
	}
	if got := (&attest.Policy{}).RuleOf("crl"); got != "crl" {
		t.Error(got)
	}
}

// strong is a policy that nothing is to be said about.
func strong() *attest.Policy {
	tcb := &attest.TCB{SNP: 1}
	return &attest.Policy{
		Rule: "p", Signers: []string{attest.VCEK}, VMPLs: []uint32{0}, CRL: attest.CRLRequired, MaxCRLAge: time.Hour, MinGuestSVN: 1,
		Measurements: values("m"), AuthorKeys: values("a"), HostData: values("h"),
		Products: []attest.Product{{Line: "Genoa", Reported: tcb, Committed: tcb, Launch: tcb, Rule: "product"}},
	}
}

// Each weakness is told, with its rule, and nothing else.
func TestWarnings(t *testing.T) {
	if got := strong().Warnings(now); len(got)+len(strong().Problems()) != 0 {
		t.Errorf("%q", got)
	}
	chips := values("chip")
	for name, c := range map[string]struct {
		change func(*attest.Policy)
		want   []string
	}{
		"debug":             {func(p *attest.Policy) { p.Guest.AllowDebug = true }, []string{"p guest_policy.allow_debug: the host can read"}},
		"migration agent":   {func(p *attest.Policy) { p.Guest.AllowMigrationAgent = true }, []string{"p guest_policy.allow_migration_agent: a migration"}},
		"no CRL":            {func(p *attest.Policy) { p.CRL = attest.CRLWhenGiven }, []string{"p crl: without"}},
		"no measurement":    {func(p *attest.Policy) { p.Measurements = nil }, []string{"p id_key: whoever"}},
		"unsigned block":    {func(p *attest.Policy) { p.AuthorKeys = nil }, []string{"p image_id: IMAGE_ID"}},
		"masked under VLEK": {func(p *attest.Policy) { p.AllowMaskedChip, p.Signers = true, []string{attest.VLEK} }, []string{"p masked_chip_id: under"}},
		"masked under VCEK": {func(p *attest.Policy) { p.AllowMaskedChip = true }, nil},
		"any TCB": {func(p *attest.Policy) { p.Products[0].Reported, p.Products[0].Launch = &attest.TCB{}, &attest.TCB{} },
			[]string{"product: any TCB is enough (reported, launch)"}},
		"Milan":             {func(p *attest.Policy) { p.Products[0].Line = "Milan" }, []string{"product: the seed of Milan's"}},
		"chips of Milan":    {func(p *attest.Policy) { p.Products[0].Line, p.Products[0].Chips = "Milan", chips }, nil},
		"chips":             {func(p *attest.Policy) { p.Products[0].Line, p.Chips = "Milan", chips }, nil},
		"denied line":       {func(p *attest.Policy) { p.DenyProducts = []string{"Genoa"} }, []string{"product: p deny_product refuses this line"}},
		"ends later":        {func(p *attest.Policy) { p.Measurements[0].Until = now.Add(1) }, nil},
		"an old one":        {func(p *attest.Policy) { p.Measurements = values("old", "m"); p.Measurements[0].Until = now }, []string{"r old: is no longer accepted, since 2026-06-01T00:00:00Z"}},
		"all ended":         {func(p *attest.Policy) { p.Measurements[0].Until = now }, []string{"r m: is no longer", "p measurement: none of its values"}},
		"author keys ended": {func(p *attest.Policy) { p.AuthorKeys[0].Until = now }, []string{"r a: is no longer", "p author_key: none of its values"}},
		"ID keys ended": {func(p *attest.Policy) { p.IDKeys = values("i"); p.IDKeys[0].Until = now },
			[]string{"r i: is no longer", "p id_key: none of its values"}},
	} {
		p := strong()
		c.change(p)
		got := p.Warnings(now)
		if !slices.EqualFunc(got, c.want, strings.HasPrefix) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// What tells guests apart, and what does not although it looks like it.
func TestApart(t *testing.T) {
	set := func(p, q *attest.ReferenceValues, a, b string) {
		*p, *q = values(strings.Fields(a)...), values(strings.Fields(b)...)
	}
	for name, c := range map[string]struct {
		change func(p, q *attest.Policy)
		apart  bool
	}{
		"equal":                    {func(p, q *attest.Policy) {}, false},
		"host_data":                {func(p, q *attest.Policy) { set(&p.HostData, &q.HostData, "a", "b c") }, true},
		"host_data in common":      {func(p, q *attest.Policy) { set(&p.HostData, &q.HostData, "a b", "c b") }, false},
		"host_data in one":         {func(p, q *attest.Policy) { q.HostData = nil }, false},
		"measurement":              {func(p, q *attest.Policy) { set(&p.Measurements, &q.Measurements, "a", "b") }, true},
		"measurement in common":    {func(p, q *attest.Policy) { set(&p.Measurements, &q.Measurements, "a b", "b") }, false},
		"a measurement that ended": {func(p, q *attest.Policy) { p.Measurements[0].Until = now.AddDate(-1, 0, 0) }, false},
		"id_key":                   {func(p, q *attest.Policy) { set(&p.IDKeys, &q.IDKeys, "a", "b") }, true},
		"id_key in one":            {func(p, q *attest.Policy) { p.IDKeys = values("a") }, false},
		"author_key":               {func(p, q *attest.Policy) { set(&p.AuthorKeys, &q.AuthorKeys, "a", "b") }, true},
		"image_id":                 {func(p, q *attest.Policy) { set(&p.ImageIDs, &q.ImageIDs, "a", "b") }, true},
		"family_id":                {func(p, q *attest.Policy) { set(&p.FamilyIDs, &q.FamilyIDs, "a", "b") }, true},
		"product":                  {func(p, q *attest.Policy) { q.Products[0].Line = "Turin" }, true},
		"a product in common": {func(p, q *attest.Policy) {
			q.Products = append([]attest.Product{{Line: "Turin"}}, q.Products...)
		}, false},
		"denied product":       {func(p, q *attest.Policy) { q.DenyProducts = []string{"Genoa"} }, true},
		"other denied product": {func(p, q *attest.Policy) { q.DenyProducts = []string{"Milan"} }, false},
		"chips":                {func(p, q *attest.Policy) { set(&p.Chips, &q.Chips, "a", "b") }, true},
		"chips in common":      {func(p, q *attest.Policy) { set(&p.Chips, &q.Chips, "a b", "b") }, false},
		"chips of the line":    {func(p, q *attest.Policy) { set(&p.Products[0].Chips, &q.Chips, "a", "b") }, true},
		"chip that is denied":  {func(p, q *attest.Policy) { set(&p.Chips, &q.DenyChips, "a", "a") }, true},
		"another that is":      {func(p, q *attest.Policy) { set(&p.Chips, &q.DenyChips, "a b", "a") }, false},
		"denied, of all":       {func(p, q *attest.Policy) { q.DenyChips = values("a") }, false},
		"empty values":         {func(p, q *attest.Policy) { p.HostData, q.HostData = values(""), values("") }, true}, // no report has one
		"VMPL":                 {func(p, q *attest.Policy) { q.VMPLs = []uint32{3} }, false},
		"signer":               {func(p, q *attest.Policy) { q.Signers, q.CSPs = []string{attest.VLEK}, []string{"c"} }, false},
		"TCB, SVN and flags": {func(p, q *attest.Policy) {
			q.Products[0].Reported = &attest.TCB{SNP: 9}
			q.MinGuestSVN = 7
			q.Guest.RequireSingleSocket = true
			p.Guest.AllowSMT = true
		}, false},
		"a measurement of each": {func(p, q *attest.Policy) {
			p.Measurements, p.IDKeys, q.IDKeys, q.Measurements = nil, values("i"), nil, values("m")
		}, false},
	} {
		p, q := strong(), strong()
		p.Products, q.Products = slices.Clone(p.Products), slices.Clone(q.Products)
		c.change(p, q)
		for _, pair := range [][2]*attest.Policy{{p, q}, {q, p}} {
			if apart, why := attest.Apart(pair[0], pair[1]); apart != c.apart || (why == nil) != apart {
				t.Errorf("%s: apart %v, %q", name, apart, why)
			}
		}
	}
	p, q := strong(), strong()
	q.Measurements = nil
	_, why := attest.Apart(p, q)
	want := []string{"host_data 68... is in both", "measurement is in one alone", "id_key is in neither", "author_key 61... is in both", "image_id is in neither",
		"family_id is in neither", "a Genoa may be the processor of both"}
	if !slices.Equal(why, want) {
		t.Errorf("%q", why)
	}
}
