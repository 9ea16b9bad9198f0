// Package snptest is an authority of AMD's shape, with keys of its own: it makes certificates and signs reports for tests, on
// machines without the hardware. No program that ships links it.
package snptest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
)

// An Authority is what AMD is for a product line: a root and its two intermediates.
type Authority struct {
	Line           string
	ARK, ASK, ASVK *x509.Certificate
	ark, ask, asvk *rsa.PrivateKey
}

// bits is the size of the authority's keys: smaller than AMD's, which take seconds to make.
const bits = 2048

// New makes an authority for a line, "Milan", "Genoa" or "Turin", with fresh keys. It is valid from 2020 to 2045.
func New(line string) (*Authority, error) {
	a := &Authority{Line: line}
	for _, key := range []**rsa.PrivateKey{&a.ark, &a.ask, &a.asvk} {
		var err error
		if *key, err = rsa.GenerateKey(rand.Reader, bits); err != nil {
			return nil, fmt.Errorf("making an authority: %w", err)
		}
	}
	var err error
	if a.ARK, err = a.ca("ARK-"+line, 1, a.ark); err != nil {
		return nil, err
	}
	if a.ASK, err = a.ca("SEV-"+line, 2, a.ask); err != nil {
		return nil, err
	}
	a.ASVK, err = a.ca("SEV-VLEK-"+line, 3, a.asvk)
	return a, err
}

// Root returns the root with both intermediates.
func (a *Authority) Root() snp.Root {
	return snp.Root{Line: a.Line, ARK: a.ARK, Intermediates: []*x509.Certificate{a.ASK, a.ASVK}}
}

// name is how AMD writes names.
func name(common string) pkix.Name {
	return pkix.Name{
		OrganizationalUnit: []string{"Engineering"}, Country: []string{"US"}, Locality: []string{"Santa Clara"}, Province: []string{"CA"},
		Organization: []string{"Advanced Micro Devices"}, CommonName: common,
	}
}

// ca makes a certificate that signs others; the root's own when there is none yet.
func (a *Authority) ca(common string, serial int64, key *rsa.PrivateKey) (*x509.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: name(common), NotBefore: year(2020), NotAfter: year(2045),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SignatureAlgorithm: x509.SHA384WithRSAPSS,
	}
	parent := a.ARK
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), a.ark)
	if err != nil {
		return nil, fmt.Errorf("making %s: %w", common, err)
	}
	return x509.ParseCertificate(der)
}

func year(y int) time.Time { return time.Date(y, 1, 1, 0, 0, 0, 0, time.UTC) }

// A Key is a key that signs reports, with its certificate.
type Key struct {
	DER []byte
	key *ecdsa.PrivateKey
}

// A Template says what a key's certificate shall say.
type Template struct {
	Kind    string // attest.VCEK or attest.VLEK
	Product string // "Milan-B0"; empty: the authority's line
	TCB     attest.TCB
	HWID    []byte // of a VCEK
	CSP     string // of a VLEK
	From    time.Time
	Until   time.Time               // zero: From and Until are 2021 and 2041
	Leave   []asn1.ObjectIdentifier // extensions to leave out
	More    []pkix.Extension        // further extensions
}

// oid returns an identifier below AMD's.
func oid(rest ...int) asn1.ObjectIdentifier {
	return append(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, rest...)
}

// extensions are those that AMD's key service writes into such a certificate (AMD's 57230, section 3.1).
func (a *Authority) extensions(t Template) []pkix.Extension {
	product := t.Product
	if product == "" {
		product = a.Line
	}
	spl := func(n int, value uint8) pkix.Extension { return Extension(oid(3, n), int(value)) }
	version, reserved := 0, []int{4, 5, 6, 7}
	out := []pkix.Extension{{Id: oid(2), Value: ia5(product)}}
	if a.Line == snp.Turin {
		version, reserved = 1, []int{5, 6, 7}
		out = append(out, spl(9, t.TCB.FMC))
	}
	out = append(out, Extension(oid(1), version), spl(1, t.TCB.Bootloader), spl(2, t.TCB.TEE), spl(3, t.TCB.SNP), spl(8, t.TCB.Microcode))
	for _, n := range reserved {
		out = append(out, spl(n, 0))
	}
	if t.HWID != nil {
		out = append(out, pkix.Extension{Id: oid(4), Value: t.HWID})
	}
	if t.CSP != "" {
		out = append(out, pkix.Extension{Id: oid(5), Value: ia5(t.CSP)})
	}
	out = slices.DeleteFunc(out, func(e pkix.Extension) bool { return slices.ContainsFunc(t.Leave, e.Id.Equal) })
	return append(out, t.More...)
}

// Extension is one of AMD's that holds a number.
func Extension(id asn1.ObjectIdentifier, n int) pkix.Extension {
	value, err := asn1.Marshal(n)
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: id, Value: value}
}

func ia5(s string) []byte {
	out, err := asn1.MarshalWithParams(s, "ia5")
	if err != nil {
		panic(err)
	}
	return out
}

// Issue makes a key and its certificate, signed by the ASK, or by the ASVK if it is a VLEK.
func (a *Authority) Issue(t Template) (*Key, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if t.Until.IsZero() {
		t.From, t.Until = year(2021), year(2041)
	}
	issuer, signer := a.ASK, a.ask
	if t.Kind == attest.VLEK {
		issuer, signer = a.ASVK, a.asvk
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(0), Subject: name("SEV-" + t.Kind), NotBefore: t.From, NotAfter: t.Until,
		SignatureAlgorithm: x509.SHA384WithRSAPSS, ExtraExtensions: a.extensions(t),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("issuing a %s: %w", t.Kind, err)
	}
	return &Key{DER: der, key: key}, nil
}

// Where a report's signature is, and how long each of its two numbers is (SNP ABI, section 7.3).
const (
	signatureAt = 0x2a0
	numberSize  = 72
)

// Sign returns a copy of a report with a signature by this key.
func (k *Key) Sign(report []byte) ([]byte, error) {
	digest := sha512.Sum384(report[:signatureAt])
	r, s, err := ecdsa.Sign(rand.Reader, k.key, digest[:])
	if err != nil {
		return nil, err
	}
	out := slices.Clone(report)
	clear(out[signatureAt:])
	for i, n := range []*big.Int{r, s} {
		number := n.FillBytes(make([]byte, numberSize))
		slices.Reverse(number)
		copy(out[signatureAt+i*numberSize:], number)
	}
	return out, nil
}

// CRL returns a revocation list in DER that the root signed, with these serial numbers: 2 is the ASK's, 3 the ASVK's.
func (a *Authority) CRL(issued, next time.Time, serials ...int64) ([]byte, error) {
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: issued, NextUpdate: next, SignatureAlgorithm: x509.SHA384WithRSAPSS}
	for _, n := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: big.NewInt(n), RevocationTime: issued,
		})
	}
	return x509.CreateRevocationList(rand.Reader, list, a.ARK, a.ark)
}
