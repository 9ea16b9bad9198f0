package snp_test

import (
	"crypto/x509"
	"sync"
	"testing"

	"github.com/google/go-sev-guest/abi"

	"keybroker/attest/snp"
)

// A verifier may be used by many at once, and does not change what it is given.
func TestConcurrentAppraisals(t *testing.T) {
	v := verifier(t)
	var wg sync.WaitGroup
	for _, s := range allSamples(t) {
		r := s.request(t)
		for range 4 {
			wg.Go(func() {
				if verdict := v.Appraise(r); verdict.Pass() == (s.name == "milan-v2-debug") {
					t.Errorf("%s: failing %q", s.name, failing(verdict))
				}
			})
		}
	}
	wg.Wait()
}

// BenchmarkAppraise is what a verdict costs once the certificate is known.
func BenchmarkAppraise(b *testing.B) {
	v := verifier(b)
	r := sampleNamed(b, "zen4c-v5").request(b)
	for b.Loop() {
		if !v.Appraise(r).Pass() {
			b.Fatal("refused")
		}
	}
}

// BenchmarkAppraiseRefused is what a flood of reports with bad signatures costs, each.
func BenchmarkAppraiseRefused(b *testing.B) {
	v := verifier(b)
	r := sampleNamed(b, "zen4c-v5").request(b)
	r.Evidence.Octets = with(r.Evidence.Octets, 0x90, 1)
	for b.Loop() {
		if v.Appraise(r).Pass() {
			b.Fatal("passes")
		}
	}
}

// BenchmarkAppraiseFirst is what it costs when the certificate is seen for the first time.
func BenchmarkAppraiseFirst(b *testing.B) {
	r := sampleNamed(b, "zen4c-v5").request(b)
	roots := snp.AMDRoots()
	for b.Loop() {
		if !verifier(b, roots...).Appraise(r).Pass() {
			b.Fatal("refused")
		}
	}
}

// BenchmarkSignatureAlone is the part of it that cannot be saved: one ECDSA P-384 verification.
func BenchmarkSignatureAlone(b *testing.B) {
	s := sampleNamed(b, "zen4c-v5")
	key := mustParse(b, s.key)
	der, err := abi.ReportToSignatureDER(s.report)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := key.CheckSignature(x509.ECDSAWithSHA384, s.report[:signed], der); err != nil {
			b.Fatal(err)
		}
	}
}
