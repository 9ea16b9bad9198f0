package snp_test

import (
	"strings"
	"testing"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
)

// A revocation list is checked when there is one, and required when the policy says so.
func TestRevocation(t *testing.T) {
	day := 24 * time.Hour
	type list struct {
		line    string // empty: the report's
		age     time.Duration
		left    time.Duration
		serials []int64
	}
	fresh := list{age: day, left: 30 * day}
	for name, c := range map[string]struct {
		require time.Duration // the greatest age; zero: no list is required
		lists   []list
		fails   string
	}{
		"none":                         {0, nil, ""},
		"none, required":               {30 * day, nil, "crl"},
		"fresh":                        {0, []list{fresh}, ""},
		"fresh, required":              {30 * day, []list{fresh}, ""},
		"old, required":                {30 * day, []list{{age: 31 * day, left: day}}, "crl"},
		"old and fresh":                {30 * day, []list{{age: 31 * day, left: day}, fresh}, ""},
		"ended":                        {0, []list{{age: 9 * day, left: -day}}, ""},
		"ended, required":              {30 * day, []list{{age: 9 * day, left: -day}}, "crl"},
		"of tomorrow":                  {30 * day, []list{{age: -day, left: 30 * day}}, "crl"},
		"another line's":               {0, []list{{line: snp.Milan, age: day, left: day, serials: []int64{1, 2, 3}}}, ""},
		"another line's, required":     {30 * day, []list{{line: snp.Milan, age: day, left: day}}, "crl"},
		"ASK revoked":                  {0, []list{{age: day, left: day, serials: []int64{9, 2}}}, "revoked"},
		"ARK revoked":                  {0, []list{{age: day, left: day, serials: []int64{1}}}, "revoked"},
		"ASVK revoked":                 {0, []list{{age: day, left: day, serials: []int64{3}}}, ""},
		"ASK revoked in an ended list": {0, []list{{age: 99 * day, left: -day, serials: []int64{2}}}, "revoked"},
		"ASK revoked, then not":        {30 * day, []list{{age: 99 * day, left: -day, serials: []int64{2}}, fresh}, "revoked"},
	} {
		t.Run(name, func(t *testing.T) {
			r := resign(t, sampleNamed(t, "zen4c-v5"))
			if c.require > 0 {
				r.policy.CRL, r.policy.MaxCRLAge = attest.CRLRequired, c.require
			}
			request := r.request(t)
			for _, l := range c.lists {
				issuer := r.authority
				if l.line != "" {
					issuer = authority(t, l.line)
				}
				der, err := issuer.CRL(spring.Add(-l.age), spring.Add(l.left), l.serials...)
				if err != nil {
					t.Fatal(err)
				}
				request.Endorsements.CRLs = append(request.Endorsements.CRLs, der)
			}
			wantFailures(t, verifier(t, r.authority.Root()).Appraise(request), strings.Fields(c.fails)...)
		})
	}
}

// A list in the root's name that it did not sign, one that is none, and more than anybody has.
func TestBadRevocationLists(t *testing.T) {
	r := resign(t, sampleNamed(t, "zen4c-v5"))
	other, err := snptest.New(snp.Genoa)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := other.CRL(spring.Add(-time.Hour), spring.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for fails, lists := range map[string][][]byte{
		"crl-signature": {forged}, "crls": {[]byte("none")}, "crls ": make([][]byte, 17),
	} {
		request := r.request(t)
		request.Endorsements.CRLs = lists
		wantFailures(t, verifier(t, r.authority.Root()).Appraise(request), strings.Fields(fails)...)
	}
}
