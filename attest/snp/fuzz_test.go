package snp_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/google/go-sev-guest/abi"

	"keybroker/attest"
	"keybroker/attest/snp"
)

// Whatever is sent as evidence, nothing panics, and no verdict passes or calls the report genuine unless its signed octets are
// a sample's own: nobody but AMD's processors can make others.
func FuzzEvidence(f *testing.F) {
	samples := allSamples(f)
	v := verifier(f)
	guids := map[string]string{attest.VCEK: abi.VcekGUID, attest.VLEK: abi.VlekGUID}
	var vlekIssuers []byte
	for _, s := range samples {
		f.Add(s.report)
		f.Add(append(bytes.Clone(s.report), tableOf(item(guids[s.kind], s.key))...))
		if s.issuers != "" {
			vlekIssuers = vector(f, s.issuers)
			f.Add(append(bytes.Clone(s.report), tableOf(item(guids[s.kind], s.key), item(abi.AskGUID, vlekIssuers))...))
		}
	}
	turin := turin(f).request(f) // by a test chain: so the code for Turin is reached
	f.Add(append(turin.Evidence.Octets, tableOf(item(abi.VcekGUID, turin.Endorsements.Certificates[0]))...))
	given := map[string]attest.Endorsements{}
	for _, s := range samples {
		given[s.name] = s.endorsements(f)
	}
	f.Fuzz(func(t *testing.T, octets []byte) {
		for _, s := range samples {
			// With what the evidence brings along, and with the certificates that fit: the signature decides.
			for _, e := range []attest.Endorsements{{}, given[s.name]} {
				verdict := v.Appraise(snp.Request{
					Evidence: attest.Evidence{Kind: attest.KindSNP, Octets: octets}, Endorsements: e,
					ReportData: s.report[0x50:0x90], Policy: s.policy(), At: s.at,
				})
				own := false
				for _, known := range samples {
					own = own || len(octets) >= signed && bytes.Equal(octets[:signed], known.report[:signed])
				}
				if !own && (verdict.Pass() || verdict.All(attest.Genuine())) {
					t.Errorf("passes: %x", octets[:min(len(octets), signed)])
				}
				for _, c := range verdict.Failures() {
					if c.Name == "internal" {
						t.Error("panics")
					}
				}
			}
		}
	})
}

// Whatever is given as a certificate or a revocation list, nothing is an endorsement but what AMD signed.
func FuzzEndorsement(f *testing.F) {
	v := verifier(f)
	var known [][]byte
	for _, s := range allSamples(f) {
		known = append(known, s.endorsements(f).Certificates...)
	}
	chain, err := snp.ParseFile(vector(f, "turin.ask-ark-asvk.pem"))
	if err != nil {
		f.Fatal(err)
	}
	known = append(append(known, chain.Certificates...), vector(f, "turin.vcek.der"))
	for _, der := range known {
		f.Add(der)
	}
	list, err := authority(f, snp.Milan).CRL(spring, spring, 2, 3)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(list)
	f.Fuzz(func(t *testing.T, octets []byte) {
		e, err := v.Endorsement(octets, known)
		own := slices.ContainsFunc(known, func(der []byte) bool { return bytes.Equal(der, octets) })
		if own != (err == nil) || own != (e != nil) {
			t.Errorf("%x: %+v, %v", octets, e, err)
		}
	})
}
