package snp

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"keybroker/attest"
)

// The kinds of endorsements besides attest.VCEK and attest.VLEK.
const (
	ASK  = "ASK"  // issues VCEKs' certificates
	ASVK = "ASVK" // issues VLEKs' certificates
	ARK  = "ARK"  // the root of a line
	CRL  = "CRL"  // the root's revocation list
)

// An Endorsement is a certificate or revocation list whose signatures lead to a trusted root. That it is valid, and not revoked,
// is another matter: an appraisal decides about that. It does not change.
type Endorsement struct {
	Kind   string    // attest.VCEK, attest.VLEK, ASK, ASVK, ARK or CRL
	Line   string    // Milan, Genoa or Turin
	Key    Key       // of a VCEK or a VLEK
	Serial []byte    // of a certificate; of a CRL its number, if it has one
	From   time.Time // when it begins to be valid; when a CRL was issued
	Until  time.Time // when it ends; when the next CRL is due, zero if there is no such time
	DER    []byte

	crl *x509.RevocationList
}

// Endorsement verifies one certificate or revocation list in DER up to a root that the Verifier trusts. A certificate's issuer
// is among the root's intermediates, or among those given here.
func (v *Verifier) Endorsement(der []byte, issuers [][]byte) (*Endorsement, error) {
	if len(der) <= maxCRL {
		if l, err := x509.ParseRevocationList(der); err == nil && len(l.Raw) == len(der) { // the parser lets more follow
			return v.endorsedCRL(l)
		}
	}
	c, err := parseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("expected a certificate or a revocation list: %w", err)
	}
	if kindOf(c) == "" {
		return v.endorsedCA(c)
	}
	k, err := parseSigningKey(c)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", subject(c), err)
	}
	if len(issuers) > maxCertificates {
		return nil, fmt.Errorf("expected at most %d certificates, got %d", maxCertificates, len(issuers))
	}
	var given []*x509.Certificate
	for _, der := range issuers {
		if issuer, err := parseCertificate(der); err == nil {
			given = append(given, issuer)
		}
	}
	if _, err := v.findChain(k, given); errors.Is(err, errNoIssuer) {
		return nil, &MissingIssuerError{Line: k.line.name, Kind: k.kind}
	} else if err != nil {
		return nil, err
	}
	e := endorsement(k.kind, k.line.name, c)
	e.Key = Key{Kind: k.kind, Line: k.line.name, Chip: k.hwid, CSP: k.csp, TCB: k.tcb}
	return e, nil
}

// A MissingIssuerError says that a key's certificate cannot be verified because its issuer's is not there.
type MissingIssuerError struct {
	Line string // the product line
	Kind string // of the key: attest.VCEK or attest.VLEK
}

// Error names the certificate that is missing.
func (e *MissingIssuerError) Error() string {
	return fmt.Sprintf("a %s of %s: expected its issuer's certificate (%s), got none", e.Kind, e.Line, IssuerOf(e.Kind))
}

// endorsement is what all certificates have in common.
func endorsement(kind, line string, c *x509.Certificate) *Endorsement {
	return &Endorsement{Kind: kind, Line: line, Serial: c.SerialNumber.Bytes(), From: c.NotBefore, Until: c.NotAfter, DER: c.Raw}
}

// endorsedCA takes a root that is trusted, or what one of them signed.
func (v *Verifier) endorsedCA(c *x509.Certificate) (*Endorsement, error) {
	known := false
	for _, root := range v.roots {
		kind := ""
		switch c.Subject.CommonName {
		case arkName(root.Line):
			kind = ARK
		case "SEV-" + root.Line:
			kind = ASK
		case "SEV-VLEK-" + root.Line:
			kind = ASVK
		}
		known = known || kind != ""
		switch {
		case kind == "":
		case kind == ARK && c.Equal(root.ARK), kind != ARK && c.IsCA && usableIssuer(c) && c.CheckSignatureFrom(root.ARK) == nil:
			return endorsement(kind, root.Line, c), nil
		}
	}
	if known {
		return nil, fmt.Errorf("expected a certificate %s by a root that is trusted, got one by %s", subject(c), plain(c.Issuer.CommonName))
	}
	return nil, fmt.Errorf("expected the certificate of a VCEK, VLEK, ASK, ASVK or ARK of %s, got %s", lineNames(), subject(c))
}

func (v *Verifier) endorsedCRL(l *x509.RevocationList) (*Endorsement, error) {
	for _, root := range v.roots {
		if !bytes.Equal(l.RawIssuer, root.ARK.RawSubject) || checkCRL(l, root.ARK) != nil {
			continue
		}
		e := &Endorsement{Kind: CRL, Line: root.Line, From: l.ThisUpdate, Until: l.NextUpdate, DER: l.Raw, crl: l}
		if l.Number != nil {
			e.Serial = l.Number.Bytes()
		}
		return e, nil
	}
	return nil, fmt.Errorf("expected a revocation list that a trusted root signed, got one in the name of %s", plain(l.Issuer.CommonName))
}

// Replaces reports whether nothing is lost when e stands in the place of old: it is of the same kind for the same key or line,
// does not end earlier, and as a revocation list it is not older and revokes all that old revokes.
func (e *Endorsement) Replaces(old *Endorsement) bool {
	switch {
	case e.Kind != old.Kind || e.Line != old.Line || !e.Key.Equal(old.Key):
		return false
	case e.Kind == CRL:
		return !e.From.Before(old.From) && !slices.ContainsFunc(old.crl.RevokedCertificateEntries, e.misses)
	case e.Key.Kind == "" && !bytes.Equal(e.Serial, old.Serial):
		return false
	}
	return !e.Until.Before(old.Until)
}

// misses reports whether a revocation list does not revoke what another one does.
func (e *Endorsement) misses(r x509.RevocationListEntry) bool {
	return !slices.ContainsFunc(e.crl.RevokedCertificateEntries, func(mine x509.RevocationListEntry) bool {
		return mine.SerialNumber.Cmp(r.SerialNumber) == 0
	})
}

// KeyOf returns the key that a certificate is for, without a look at who signed it. It is an error if it is none of a VCEK or
// VLEK.
func KeyOf(der []byte) (Key, error) {
	c, err := parseCertificate(der)
	if err != nil {
		return Key{}, err
	}
	k, err := parseSigningKey(c)
	if err != nil {
		return Key{}, err
	}
	return Key{Kind: k.kind, Line: k.line.name, Chip: k.hwid, CSP: k.csp, TCB: k.tcb}, nil
}

// Endorses reports whether an endorsement is of use for a report by one of these keys (see KeysOf): the certificate of such a key,
// of an issuer of such keys, the line's root or its revocation list.
func (e *Endorsement) Endorses(keys []Key) bool {
	return slices.ContainsFunc(keys, func(k Key) bool {
		switch {
		case e.Line != k.Line:
			return false
		case e.Kind == CRL || e.Kind == ARK:
			return true
		case e.Kind == ASK || e.Kind == ASVK:
			return e.Kind == IssuerOf(k.Kind)
		case k.Kind == attest.VLEK:
			k.CSP = e.Key.CSP
		}
		return e.Key.Equal(k)
	})
}

// IssuerOf returns which kind of certificate issues those of a kind of key: of a VLEK the ASVK, else the ASK.
func IssuerOf(kind string) string {
	if kind == attest.VLEK {
		return ASVK
	}
	return ASK
}
