package snp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"regexp"

	"github.com/google/go-sev-guest/kds"

	"keybroker/attest"
)

// The subjects of the certificates for keys that sign reports (AMD's 57230, section 3.1).
const (
	vcekName = "SEV-VCEK"
	vlekName = "SEV-VLEK"
)

var (
	oidAMD  = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}
	oidSPLs = append(oidAMD[:len(oidAMD):len(oidAMD)], 3) // one extension for each part of the TCB
	oidFMC  = append(oidSPLs[:len(oidSPLs):len(oidSPLs)], 9)
)

// splParts are the extensions for parts of a TCB, by the names that layouts give them. Those named "" are reserved and must be
// zero.
var splParts = []struct {
	oid  asn1.ObjectIdentifier
	name string
}{
	{oidFMC, "fmc"}, {kds.OidBlSpl, "bootloader"}, {kds.OidTeeSpl, "tee"}, {kds.OidSnpSpl, "snp"}, {kds.OidUcodeSpl, "microcode"},
	{kds.OidSpl4, ""}, {kds.OidSpl5, ""}, {kds.OidSpl6, ""}, {kds.OidSpl7, ""},
}

// A signingKey is a certificate for a key that signs reports, with what AMD's extensions say of it. The extensions are read by
// our own hand: go-sev-guest knows neither FMC nor hardware ids of 8 octets.
type signingKey struct {
	cert *x509.Certificate
	kind string // attest.VCEK or attest.VLEK
	line *line
	tcb  attest.TCB
	hwid []byte // of a VCEK: as many octets as the line has
	csp  string // of a VLEK: the provider that it was made for
}

// issuerName is the subject of the certificate that must have issued this one: the ASK's, or of a VLEK the ASVK's.
func (k *signingKey) issuerName() string {
	if k.kind == attest.VLEK {
		return "SEV-VLEK-" + k.line.name
	}
	return "SEV-" + k.line.name
}

// kindOf returns which kind of key a certificate is for, "" if for none that signs reports.
func kindOf(c *x509.Certificate) string {
	switch c.Subject.CommonName {
	case vcekName:
		return attest.VCEK
	case vlekName:
		return attest.VLEK
	}
	return ""
}

// parseSigningKey reads a certificate for a key that signs reports. It does not say who issued it.
func parseSigningKey(c *x509.Certificate) (*signingKey, error) {
	k := &signingKey{cert: c, kind: kindOf(c)}
	if k.kind == "" {
		return nil, fmt.Errorf("expected the subject %s or %s, got %.40q", vcekName, vlekName, c.Subject.CommonName)
	}
	if pub, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P384() {
		return nil, fmt.Errorf("expected an ECDSA key on P-384, got %s", c.PublicKeyAlgorithm)
	}
	var product string
	if err := stringExtension(c, kds.OidProductName1, &product); err != nil {
		return nil, fmt.Errorf("product name: %w", err)
	}
	if k.line = lineByProductName(product); k.line == nil {
		return nil, fmt.Errorf("expected a product of %s, got %.40q", lineNames(), product)
	}
	if err := k.parseTCB(); err != nil {
		return nil, err
	}
	return k, k.parseOwner()
}

// parseTCB reads the TCB that the key was derived for. Each part that the product line has must be there, and no other.
func (k *signingKey) parseTCB() error {
	seen := 0
	for _, e := range k.cert.Extensions {
		if e.Id[:min(len(e.Id), len(oidSPLs))].Equal(oidSPLs) {
			seen++
		}
	}
	for _, spl := range splParts {
		raw := extension(k.cert, spl.oid)
		wanted := k.line.layout.has(spl.name)
		if raw == nil && !wanted {
			continue
		}
		seen--
		n, err := parseSPL(raw)
		if err != nil {
			return fmt.Errorf("TCB, extension %v: %w", spl.oid, err)
		}
		if !wanted && (n != 0 || spl.name != "") {
			return fmt.Errorf("TCB, extension %v: expected none in a certificate for %s, got %d", spl.oid, k.line.name, n)
		}
		for _, p := range k.line.layout {
			if p.name == spl.name {
				*p.in(&k.tcb) = n
			}
		}
	}
	if seen != 0 {
		return errors.New("TCB: expected only parts that are known, got another one")
	}
	return nil
}

// parseSPL reads a number from 0 to 255.
func parseSPL(raw []byte) (uint8, error) {
	if raw == nil {
		return 0, errors.New("expected it to be there")
	}
	var n int
	if rest, err := asn1.Unmarshal(raw, &n); err != nil || len(rest) > 0 || n < 0 || n > 255 {
		return 0, errors.New("expected a number from 0 to 255")
	}
	return uint8(n), nil
}

// parseOwner reads whose key it is: the chip's by its hardware id, or the provider's.
func (k *signingKey) parseOwner() error {
	hwid, csp := extension(k.cert, kds.OidHwid), extension(k.cert, kds.OidCspID)
	if k.kind == attest.VLEK {
		if hwid != nil {
			return errors.New("expected no hardware id in a VLEK's certificate")
		}
		if err := stringExtension(k.cert, kds.OidCspID, &k.csp); err != nil || k.csp == "" {
			return errors.New("expected the provider's CSP_ID in a VLEK's certificate")
		}
		return nil
	}
	if csp != nil {
		return errors.New("expected no CSP_ID in a VCEK's certificate")
	}
	var octets []byte
	if len(hwid) == k.line.hwid { // as AMD's key service has it: bare, without a tag
		k.hwid = hwid
		return nil
	}
	if rest, err := asn1.Unmarshal(hwid, &octets); err != nil || len(rest) > 0 || len(octets) != k.line.hwid {
		return fmt.Errorf("expected a hardware id of %d octets in a VCEK's certificate for %s", k.line.hwid, k.line.name)
	}
	k.hwid = octets
	return nil
}

// chipID returns the hardware id as reports have it, in 64 octets; nil of a VLEK.
func (k *signingKey) chipID() []byte {
	if k.kind != attest.VCEK {
		return nil
	}
	return append(bytes.Clone(k.hwid), make([]byte, 64-len(k.hwid))...)
}

// owner describes whose key it is, for messages.
func (k *signingKey) owner() string {
	if k.kind == attest.VLEK {
		return "provider " + plain(k.csp)
	}
	return "chip " + hexOf(k.hwid)
}

// extension returns the value of an extension, nil if there is none. A certificate has each extension once: the parser of
// crypto/x509 sees to that.
func extension(c *x509.Certificate, oid asn1.ObjectIdentifier) []byte {
	for _, e := range c.Extensions {
		if e.Id.Equal(oid) {
			return e.Value
		}
	}
	return nil
}

// stringExtension reads an extension that is an IA5String of up to 128 octets.
func stringExtension(c *x509.Certificate, oid asn1.ObjectIdentifier, dst *string) error {
	raw := extension(c, oid)
	if raw == nil {
		return errors.New("expected it to be there")
	}
	rest, err := asn1.UnmarshalWithParams(raw, dst, "ia5")
	if err != nil || len(rest) > 0 || len(*dst) > 128 {
		return errors.New("expected an IA5String of at most 128 octets")
	}
	return nil
}

// subject returns how messages name a certificate.
func subject(c *x509.Certificate) string { return plain(c.Subject.CommonName) }

// plainText is text that messages can show as it is.
var plainText = regexp.MustCompile(`^[A-Za-z0-9=.-]{1,60}$`)

// plain quotes and shortens what a peer wrote, unless there is nothing odd about it.
func plain(s string) string {
	if plainText.MatchString(s) {
		return s
	}
	return fmt.Sprintf("%.60q", s)
}
