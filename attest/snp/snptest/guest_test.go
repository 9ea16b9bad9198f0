package snptest_test

import (
	"bytes"
	"testing"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
)

// A guest that was carried to another machine makes reports there that its policy accepts, as does one that was changed and certified
// anew; without that it does not.
func TestCarriedGuest(t *testing.T) {
	a, err := snptest.New(snp.Genoa)
	if err != nil {
		t.Fatal(err)
	}
	g, err := a.NewGuest("11111111-2222-4333-8444-555555555555")
	if err != nil {
		t.Fatal(err)
	}
	v, err := snp.New(snp.Config{Roots: []snp.Root{a.Root()}})
	if err != nil {
		t.Fatal(err)
	}
	passes := func() bool {
		t.Helper()
		b, err := g.Encode()
		if err != nil {
			t.Fatal(err)
		}
		carried, err := snptest.ParseGuest(b)
		if err != nil {
			t.Fatal(err)
		}
		data := [snp.ReportDataSize]byte{1}
		report, err := carried.Report(data)
		if err != nil {
			t.Fatal(err)
		}
		verdict := v.Appraise(snp.Request{
			Evidence: attest.Evidence{Kind: attest.KindSNP, Octets: append(report, carried.Table()...)}, ReportData: data[:], Policy: g.Accepting(), At: time.Now(),
		})
		if verdict.Pass() && !bytes.Equal(verdict.Instance, g.ReportID[:]) {
			t.Errorf("the report is of %x, expected %x", verdict.Instance, g.ReportID)
		}
		return verdict.Pass()
	}
	if !passes() {
		t.Error("a guest as it was launched does not pass")
	}
	g.TCB.SNP++
	if passes() {
		t.Error("a TCB that is not the certificate's passes")
	}
	if err := g.Certify(); err != nil || !passes() {
		t.Errorf("%v; with a certificate for its TCB it does not pass", err)
	}
	if _, err := snptest.ParseGuest([]byte(`{"Guest":null,"Key":""}`)); err == nil {
		t.Error("nothing is a guest")
	}
}
