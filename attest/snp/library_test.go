package snp_test

import (
	"testing"

	"github.com/google/go-sev-guest/abi"
	spb "github.com/google/go-sev-guest/proto/sevsnp"
	"github.com/google/go-sev-guest/verify"
	"github.com/google/go-sev-guest/verify/trust"

	"keybroker/attest"
)

// go-sev-guest itself says the same of the samples, where it can tell: of Zen4c it only says that it does not know it.
func TestLibraryAgrees(t *testing.T) {
	v := verifier(t)
	for _, s := range allSamples(t) {
		report, err := abi.ReportToProto(s.report)
		if err != nil {
			t.Fatal(err)
		}
		a := &spb.Attestation{Report: report, CertificateChain: &spb.CertificateChain{Extras: map[string][]byte{}}}
		roots := trust.AMDRootCertsProduct(s.line)
		bundle := map[string][]byte{"Milan": trust.AskArkMilanVcekBytes, "Genoa": trust.AskArkGenoaVcekBytes}[s.line]
		if s.kind == attest.VLEK {
			a.CertificateChain.VlekCert, bundle = s.key, trust.AskArkMilanVlekBytes
		} else {
			a.CertificateChain.VcekCert = s.key
		}
		if err := roots.FromKDSCertBytes(bundle); err != nil {
			t.Fatal(err)
		}
		err = verify.SnpAttestation(a, &verify.Options{
			DisableCertFetching: true, Now: s.at, TrustedRoots: map[string][]*trust.AMDRootCerts{s.line: {roots}},
		})
		ours := v.Appraise(s.request(t)).All(attest.Genuine())
		if known := s.name != "zen4c-v5"; !ours || (err == nil) != known {
			t.Errorf("%s: we say %v, the library says %v", s.name, ours, err)
		}
	}
}
