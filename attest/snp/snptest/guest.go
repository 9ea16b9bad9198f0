package snptest

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"fmt"

	"github.com/go-json-experiment/json"
	"github.com/google/go-sev-guest/abi"

	"keybroker/attest"
	"keybroker/attest/snp"
)

// A Guest is a guest that the authority's firmware makes reports for: of a Genoa processor, version 3, signed by its VCEK. Its
// fields may be changed before a report is made.
type Guest struct {
	Measurement [48]byte
	HostData    [32]byte
	ImageID     [16]byte
	ReportID    [32]byte // of this launch; random
	ChipID      [64]byte
	Policy      uint64     // SNP ABI, section 4.3; 0x30000: SMT is allowed, nothing else
	VMPL        uint32     // of reports that name none
	CPU         [3]byte    // family, model and stepping, as CPUID has them
	TCB         attest.TCB // Certify follows a change

	authority *Authority
	key       *Key
}

// NewGuest launches a guest of a subject. The authority must be of Genoa.
func (a *Authority) NewGuest(subject string) (*Guest, error) {
	if a.Line != snp.Genoa {
		return nil, fmt.Errorf("making a guest: expected an authority of %s, got %s", snp.Genoa, a.Line)
	}
	g := &Guest{authority: a, Policy: 0x30000, CPU: [3]byte{0x19, 0x11, 1}, TCB: attest.TCB{Bootloader: 10, SNP: 27, Microcode: 27}}
	copy(g.HostData[:], attest.HostData(subject))
	for _, random := range [][]byte{g.Measurement[:], g.ReportID[:], g.ChipID[:]} {
		rand.Read(random)
	}
	return g, g.Certify()
}

// Certify gives the processor the key, and its certificate, that belong to its TCB and its chip id as they are now.
func (g *Guest) Certify() (err error) {
	g.key, err = g.authority.Issue(Template{Kind: attest.VCEK, TCB: g.TCB, HWID: g.ChipID[:]})
	return err
}

// carried is a guest with what its reports need of the authority.
type carried struct {
	Guest               *Guest
	Key, VCEK, ASK, ARK []byte // DER
}

// Encode returns the guest, with the key that signs its reports, for ParseGuest on another machine.
func (g *Guest) Encode() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(g.key.key)
	if err != nil {
		return nil, err
	}
	return json.Marshal(carried{g, key, g.key.DER, g.authority.ASK.Raw, g.authority.ARK.Raw})
}

// ParseGuest reads what Encode returned. The guest makes reports, and cannot be certified anew.
func ParseGuest(b []byte) (*Guest, error) {
	var c carried
	if err := json.Unmarshal(b, &c, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("reading a guest: %w", err)
	}
	key, err := x509.ParsePKCS8PrivateKey(c.Key)
	signer, ok := key.(*ecdsa.PrivateKey)
	if err != nil || !ok || c.Guest == nil {
		return nil, fmt.Errorf("reading a guest: expected it and an ECDSA key: %v", err)
	}
	a := &Authority{Line: snp.Genoa}
	if a.ASK, err = x509.ParseCertificate(c.ASK); err == nil {
		a.ARK, err = x509.ParseCertificate(c.ARK)
	}
	c.Guest.authority, c.Guest.key = a, &Key{DER: c.VCEK, key: signer}
	return c.Guest, err
}

// Report makes a report with this REPORT_DATA (SNP ABI, section 7.3).
func (g *Guest) Report(data [snp.ReportDataSize]byte) ([]byte, error) {
	r := make([]byte, snp.ReportSize)
	number := binary.LittleEndian
	number.PutUint32(r[0x00:], 3)
	number.PutUint64(r[0x08:], g.Policy)
	copy(r[0x20:], g.ImageID[:])
	number.PutUint32(r[0x30:], g.VMPL)
	number.PutUint32(r[0x34:], abi.SignEcdsaP384Sha384)
	copy(r[0x50:], data[:])
	copy(r[0x90:], g.Measurement[:])
	copy(r[0xc0:], g.HostData[:])
	copy(r[0x140:], g.ReportID[:])
	for i := range 32 {
		r[0x160+i] = 0xff // REPORT_ID_MA: no migration agent
	}
	for _, at := range []int{0x38, 0x180, 0x1e0, 0x1f0} { // current, reported, committed, at launch
		copy(r[at:], []byte{g.TCB.Bootloader, g.TCB.TEE, 0, 0, 0, 0, g.TCB.SNP, g.TCB.Microcode})
	}
	copy(r[0x188:], g.CPU[:])
	copy(r[0x1a0:], g.ChipID[:])
	return g.key.Sign(r)
}

// Table returns the certificates that the host hands to the guest: VCEK, ASK, ARK.
func (g *Guest) Table() []byte {
	var t abi.CertTable
	for guid, der := range map[string][]byte{abi.VcekGUID: g.key.DER, abi.AskGUID: g.authority.ASK.Raw, abi.ArkGUID: g.authority.ARK.Raw} {
		e := abi.CertTableEntry{RawCert: der}
		if err := e.GUID.UnmarshalText([]byte(guid)); err != nil {
			panic(err)
		}
		t.Entries = append(t.Entries, e)
	}
	return t.Marshal()
}

// Accepting returns a policy that accepts this guest's reports as they are now, and nothing that differs.
func (g *Guest) Accepting() *attest.Policy {
	one := func(value []byte) attest.ReferenceValues { return attest.ReferenceValues{{Name: "test", Value: value}} }
	tcb := g.TCB
	return &attest.Policy{
		Rule: "test", Signers: []string{attest.VCEK}, VMPLs: []uint32{g.VMPL}, CRL: attest.CRLWhenGiven,
		Products:     []attest.Product{{Line: snp.Genoa, Reported: &tcb, Committed: &tcb, Launch: &tcb}},
		Measurements: one(append([]byte(nil), g.Measurement[:]...)), HostData: one(append([]byte(nil), g.HostData[:]...)),
		Guest: attest.GuestPolicy{AllowSMT: true},
	}
}
