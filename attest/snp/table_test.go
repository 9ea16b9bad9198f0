package snp_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-sev-guest/abi"

	"keybroker/attest"
	"keybroker/attest/snp"
)

// tableOf makes a table of certificates as a hypervisor does, by go-sev-guest's own hand.
func tableOf(entries ...abi.CertTableEntry) []byte {
	return (&abi.CertTable{Entries: entries}).Marshal()
}

func item(guid string, blob []byte) abi.CertTableEntry {
	e := abi.CertTableEntry{RawCert: blob}
	if err := e.GUID.UnmarshalText([]byte(guid)); err != nil {
		panic(err)
	}
	return e
}

// The certificates behind a report are used: also padded to a page, also in PEM, also the ASVK, which has the ASK's place.
func TestExtendedReport(t *testing.T) {
	v := verifier(t)
	for _, s := range allSamples(t) {
		guid := abi.VcekGUID
		if s.kind == attest.VLEK {
			guid = abi.VlekGUID
		}
		entries := []abi.CertTableEntry{item(guid, s.key), item("ecae0c0f-9502-43b1-afa2-0ae2e0d565b6", []byte("unknown")), item(abi.ArkGUID, nil)}
		if s.issuers != "" {
			entries = append(entries, item(abi.AskGUID, vector(t, s.issuers)))
		}
		inPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.key})
		for form, table := range map[string][]byte{
			"DER": tableOf(entries...), "PEM": tableOf(append([]abi.CertTableEntry{item(guid, inPEM)}, entries[1:]...)...),
			"padded DER": tableOf(append([]abi.CertTableEntry{item(guid, append(bytes.Clone(s.key), make([]byte, 500)...))}, entries[1:]...)...),
			"page":       append(tableOf(entries...), make([]byte, 4096)...),
		} {
			r := s.request(t)
			r.Endorsements = attest.Endorsements{}
			r.Evidence.Octets = append(bytes.Clone(s.report), table...)
			if verdict := v.Appraise(r); !verdict.All(attest.Genuine()) {
				t.Errorf("%s, %s: failing %q", s.name, form, failing(verdict))
			}
		}
	}
}

// Offsets and lengths of every kind, the greatest too, are refused or are within the table.
func TestTableLengths(t *testing.T) {
	s := sampleNamed(t, "zen4c-v5")
	good := tableOf(item(abi.VcekGUID, s.key), item(abi.ArkGUID, []byte{0x30, 0}))
	r := s.request(t)
	v := verifier(t)
	numbers := []uint32{1, 23, 24, 71, 72, uint32(len(good)) - 1, uint32(len(good)) + 1, 1 << 16, 1<<31 - 1, 1 << 31, 1<<31 + 72, 1<<32 - 72, 1<<32 - 1}
	for entry := range 2 {
		for field := range 2 {
			for _, n := range numbers {
				table := bytes.Clone(good)
				binary.LittleEndian.PutUint32(table[entry*24+16+field*4:], n)
				if n == 1<<31 && field == 1 { // 2^31 + 2^31 is 0 in 32 bits
					binary.LittleEndian.PutUint32(table[entry*24+16:], n)
				}
				if _, err := snp.ParseTable(table); err == nil {
					t.Errorf("entry %d, field %d, %d: no error", entry, field, n)
				}
				r.Evidence.Octets = append(bytes.Clone(s.report), table...)
				if v.Appraise(r).Pass() {
					t.Errorf("entry %d, field %d, %d: passes", entry, field, n)
				}
			}
		}
	}
	for n := 1; n < len(good); n++ {
		if _, err := snp.ParseTable(good[:n]); err == nil {
			t.Errorf("cut to %d octets: no error", n)
		}
	}
	many := slices.Repeat([]abi.CertTableEntry{item(abi.ArkGUID, nil)}, 33)
	if _, err := snp.ParseTable(tableOf(many...)); err == nil || !strings.Contains(err.Error(), "32 entries") {
		t.Errorf("33 entries: %v", err)
	}
}

// Certificates come in files of three forms.
func TestParseFile(t *testing.T) {
	der := vector(t, "zen4c-v5.vcek.der")
	crl, err := authority(t, snp.Genoa).CRL(spring, spring.AddDate(0, 1, 0))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data              []byte
		certificates, crl int
	}{
		"DER": {der, 1, 0}, "PEM": {vector(t, "genoa.ask-ark-asvk.pem"), 3, 0}, "table": {tableOf(item(abi.VcekGUID, der)), 1, 0},
		"CRL": {crl, 0, 1}, "CRL in PEM": {pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: crl}), 0, 1},
		"empty": {nil, 0, 0}, "empty table": {make([]byte, 4096), 0, 0}, "table of others": {tableOf(item("ecae0c0f-9502-43b1-afa2-0ae2e0d565b6", []byte("x"))), 0, 0},
		"table with CRL": {tableOf(item("92f81bc3-5811-4d3d-97ff-d19f88dc67ea", crl)), 0, 1},
	} {
		e, err := snp.ParseFile(c.data)
		if err != nil || len(e.Certificates) != c.certificates || len(e.CRLs) != c.crl {
			t.Errorf("%s: %d certificates, %d lists, %v", name, len(e.Certificates), len(e.CRLs), err)
		}
	}
	for name, data := range map[string][]byte{
		"text": []byte("hello"), "a report": vector(t, "zen4c-v5.report.bin"),
		"a key": []byte("-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n"), "half": der[:500],
		"empty PEM": []byte("-----BEGIN CERTIFICATE-----\n"),
	} {
		if e, err := snp.ParseFile(data); err == nil || len(e.Certificates) > 0 {
			t.Errorf("%s: %d certificates, no error", name, len(e.Certificates))
		}
	}
}

// More certificates than anybody has, and what is none, are refused.
func TestBadCertificates(t *testing.T) {
	s := sampleNamed(t, "zen4c-v5")
	for name, more := range map[string][][]byte{
		"none": {[]byte("none")}, "cut": {s.key[:300]}, "long": {append(bytes.Clone(s.key), make([]byte, 20000)...)}, "many": slices.Repeat([][]byte{s.key}, 64),
	} {
		r := s.request(t)
		r.Endorsements.Certificates = append(r.Endorsements.Certificates, more...)
		verdict := verifier(t).Appraise(r)
		if verdict.Pass() || failing(verdict)[0] != "certificates" {
			t.Errorf("%s: pass %v, failing %q", name, verdict.Pass(), failing(verdict))
		}
	}
}

// What is put into a table is found in it, and the library reads the same.
func FuzzTable(f *testing.F) {
	key, err := hex.DecodeString("3003020101")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(tableOf(item(abi.VcekGUID, key)))
	f.Add(tableOf(item(abi.VcekGUID, vector(f, "zen4c-v5.vcek.der")), item(abi.AskGUID, vector(f, "genoa.ask-ark-asvk.pem"))))
	f.Add(make([]byte, 24))
	f.Fuzz(func(t *testing.T, table []byte) {
		e, err := snp.ParseTable(table)
		if err != nil {
			if len(e.Certificates)+len(e.CRLs) > 0 {
				t.Error("an error with certificates")
			}
			return
		}
		for _, c := range e.Certificates {
			if len(c) > len(table) {
				t.Errorf("a certificate of %d octets in a table of %d", len(c), len(table))
			}
		}
	})
}
