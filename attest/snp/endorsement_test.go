package snp_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
)

// A report says which key signed it, and its certificate says the same. Version 2 leaves the line open.
func TestKeysOf(t *testing.T) {
	for _, s := range append(allSamples(t), turinSample(t)) {
		keys, err := snp.KeysOf(s.report)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		own, err := snp.KeyOf(s.key)
		if err != nil {
			t.Fatal(err)
		}
		if s.kind == attest.VLEK {
			own.CSP = "" // a report does not say
		}
		if !slices.ContainsFunc(keys, own.Equal) || len(keys) > 2 || s.report[0] > 2 && len(keys) != 1 {
			t.Errorf("%s: %+v, its certificate is for %+v", s.name, keys, own)
		}
		values := snp.TCBValues(own.Line, own.TCB)
		if tcb, err := snp.TCBOf(own.Line, values); err != nil || tcb != own.TCB || len(values) != len(snp.TCBParts(own.Line)) {
			t.Errorf("%s: %v is %v, %v", s.name, values, tcb, err)
		}
	}
	masked := bytes.Clone(sampleNamed(t, "zen4c-v5").report)
	clear(masked[0x1a0:0x1e0])
	if keys, err := snp.KeysOf(masked); err != nil || len(keys) != 1 || keys[0].Chip != nil || keys[0].Path() != "" {
		t.Errorf("with a hidden chip: %+v, %v", keys, err)
	}
	for n := range snp.ReportSize {
		if keys, err := snp.KeysOf(masked[:n]); err == nil || keys != nil {
			t.Fatalf("%d octets are a report", n)
		}
	}
	if _, err := snp.TCBOf(snp.Turin, make([]uint8, 4)); err == nil {
		t.Error("a TCB of Turin without FMC")
	}
}

// turinSample is a report of Turin, by a test chain.
func turinSample(t *testing.T) sample {
	r := turin(t)
	return sample{name: "turin", line: snp.Turin, kind: attest.VCEK, report: r.report, key: r.request(t).Endorsements.Certificates[0]}
}

// endorses reports whether an endorsement is of use for a report.
func endorses(t *testing.T, e *snp.Endorsement, report []byte) bool {
	t.Helper()
	keys, err := snp.KeysOf(report)
	if err != nil {
		t.Fatal(err)
	}
	return e.Endorses(keys)
}

// Real certificates are endorsements: they say for what, and a report needs those of its own key alone.
func TestEndorsements(t *testing.T) {
	v := verifier(t)
	for _, s := range allSamples(t) {
		issuers := s.endorsements(t).Certificates
		e, err := v.Endorsement(s.key, issuers)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if e.Kind != s.kind || e.Line != s.line || !bytes.Equal(e.DER, s.key) || !endorses(t, e, s.report) {
			t.Errorf("%s: %+v", s.name, e)
		}
		for _, other := range allSamples(t) {
			if other.name != s.name && !bytes.Equal(other.key, s.key) && endorses(t, e, other.report) {
				t.Errorf("%s endorses %s", s.name, other.name)
			}
		}
	}
	if e, err := v.Endorsement(vector(t, "turin.vcek.der"), nil); err != nil || len(e.Key.Chip) != 8 || e.Key.TCB.FMC == 0 && e.Key.TCB.Microcode == 0 {
		t.Errorf("turin: %+v, %v", e, err)
	}
	for _, line := range []string{"milan", "genoa", "turin"} {
		given, err := snp.ParseFile(vector(t, line+".ask-ark-asvk.pem"))
		if err != nil {
			t.Fatal(err)
		}
		var kinds []string
		for _, der := range given.Certificates {
			e, err := v.Endorsement(der, nil)
			if err != nil {
				t.Fatal(err)
			}
			kinds = append(kinds, e.Kind)
		}
		if slices.Sort(kinds); !slices.Equal(kinds, []string{"ARK", "ASK", "ASVK"}) {
			t.Errorf("%s: %q", line, kinds)
		}
	}
	vlek := sampleNamed(t, "milan-v3-vlek")
	if _, err := v.Endorsement(vlek.key, nil); !errors.As(err, new(*snp.MissingIssuerError)) {
		t.Errorf("a VLEK without its ASVK: %v", err)
	}
}

// What no trusted root signed is none, whatever it calls itself; nor is one with an octet changed, or one more.
func TestWrongEndorsements(t *testing.T) {
	v, forger := verifier(t), authority(t, snp.Milan)
	forged, err := forger.Issue(snptest.Template{Kind: attest.VCEK, HWID: make([]byte, 64)})
	if err != nil {
		t.Fatal(err)
	}
	list, err := forger.CRL(spring, spring.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for what, der := range map[string][]byte{
		"VCEK": forged.DER, "ASK": forger.ASK.Raw, "ASVK": forger.ASVK.Raw, "ARK": forger.ARK.Raw, "list": list, "nothing": nil, "text": []byte("none"),
	} {
		if e, err := v.Endorsement(der, [][]byte{forger.ASK.Raw, forger.ARK.Raw}); err == nil || e != nil {
			t.Errorf("a forged %s is taken: %+v", what, e)
		}
	}
	trusting := verifier(t, forger.Root())
	if e, err := trusting.Endorsement(list, nil); err != nil || e.Kind != snp.CRL || e.Line != snp.Milan || !e.From.Equal(spring) {
		t.Errorf("%+v, %v", e, err)
	}
	for what, der := range map[string][]byte{"VCEK": forged.DER, "ASK": forger.ASK.Raw, "list": list} {
		if _, err := trusting.Endorsement(append(bytes.Clone(der), 0), nil); err == nil {
			t.Errorf("a %s with an octet more is taken", what)
		}
		for i := range der {
			changed := bytes.Clone(der)
			changed[i] ^= 1
			if _, err := trusting.Endorsement(changed, nil); err == nil {
				t.Fatalf("a %s with octet %d changed is taken", what, i)
			}
		}
	}
}

// Nothing that lasts longer, or revokes more, is replaced.
func TestReplaces(t *testing.T) {
	a := authority(t, snp.Genoa)
	v := verifier(t, a.Root())
	endorsement := func(der []byte, err error) *snp.Endorsement {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		e, err := v.Endorsement(der, nil)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	key := func(chip byte, until int) *snp.Endorsement {
		k, err := a.Issue(snptest.Template{Kind: attest.VCEK, HWID: bytes.Repeat([]byte{chip}, 64), From: spring, Until: spring.AddDate(until, 0, 0)})
		return endorsement(k.DER, err)
	}
	list := func(day int, serials ...int64) *snp.Endorsement {
		return endorsement(a.CRL(spring.AddDate(0, 0, day), spring.AddDate(1, 0, day), serials...))
	}
	for _, c := range []struct {
		what     string
		new, old *snp.Endorsement
		want     bool
	}{
		{"a longer one", key(1, 7), key(1, 6), true},
		{"a shorter one", key(1, 6), key(1, 7), false},
		{"another chip's", key(2, 7), key(1, 6), false},
		{"a newer list", list(2), list(1), true},
		{"an older list", list(1), list(2), false},
		{"a list with more", list(2, 5, 6), list(1, 6), true},
		{"a newer list with less", list(2, 5), list(1, 6), false},
		{"a list for a key", list(2), key(1, 1), false},
		{"one root for another's issuer", endorsement(a.ASK.Raw, nil), endorsement(a.ASVK.Raw, nil), false},
	} {
		if got := c.new.Replaces(c.old); got != c.want {
			t.Errorf("%s: %t", c.what, got)
		}
	}
}
