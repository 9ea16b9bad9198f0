package snp

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"time"

	"keybroker/attest"
)

// revocation looks for what the root has revoked. AMD's lists speak of intermediates: single keys are left behind by a higher
// TCB, and all have the serial number 0.
func (a *appraisal) revocation() {
	if a.chain == nil {
		a.unchecked(attest.Revocation, "revoked", "nothing revoked", "no chain to look at")
		return
	}
	newest := a.newestCRL()
	a.freshness(newest)
	a.revoked()
}

// newestCRL returns the list of the chain's root that was issued last, nil if there is none. One that cannot be trusted fails.
func (a *appraisal) newestCRL() *x509.RevocationList {
	var newest *x509.RevocationList
	for _, l := range a.crls {
		if !a.concerns(l) {
			continue
		}
		if err := checkCRL(l, a.chain[2]); err != nil {
			a.add(attest.Revocation, "crl-signature", false, "revocation lists signed by "+subject(a.chain[2]), err.Error(), ruleRFC5280)
		}
		if newest == nil || l.ThisUpdate.After(newest.ThisUpdate) {
			newest = l
		}
	}
	return newest
}

// concerns reports whether a list was issued in the name of the chain's root.
func (a *appraisal) concerns(l *x509.RevocationList) bool {
	return bytes.Equal(l.RawIssuer, a.chain[2].RawSubject)
}

var (
	oidAuthorityKey = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidCRLNumber    = asn1.ObjectIdentifier{2, 5, 29, 20}
)

// checkCRL verifies a list's signature. One with critical extensions that we do not know may mean something else than it says.
func checkCRL(l *x509.RevocationList, root *x509.Certificate) error {
	for _, e := range l.Extensions {
		if e.Critical && !e.Id.Equal(oidAuthorityKey) && !e.Id.Equal(oidCRLNumber) {
			return fmt.Errorf("a list with the critical extension %v", e.Id)
		}
	}
	if err := l.CheckSignatureFrom(root); err != nil {
		return fmt.Errorf("a list that it did not sign")
	}
	return nil
}

// freshness holds that there is a list which is recent enough, if the policy requires one.
func (a *appraisal) freshness(newest *x509.RevocationList) {
	got := "none given"
	if newest != nil {
		got = fmt.Sprintf("issued %s, next %s", stamp(newest.ThisUpdate), stamp(newest.NextUpdate))
	}
	if p := a.req.Policy; p == nil || p.CRL == attest.CRLWhenGiven {
		a.add(attest.Revocation, "crl", true, "none required; each that is given is heeded", got, "default")
		return
	}
	p := a.req.Policy
	expected := fmt.Sprintf("a revocation list of %s that is in force, and at most %s old", subject(a.chain[2]), p.MaxCRLAge)
	a.add(attest.Revocation, "crl", newest != nil && a.inForce(newest, p.MaxCRLAge), expected, got, p.RuleOf("crl"))
}

// inForce reports whether a list is neither of the future nor too old. A list that never ends has no next.
func (a *appraisal) inForce(l *x509.RevocationList, maxAge time.Duration) bool {
	at := a.req.At
	ended := !l.NextUpdate.IsZero() && !at.Before(l.NextUpdate)
	return !at.Before(l.ThisUpdate) && !ended && at.Sub(l.ThisUpdate) <= maxAge
}

// revoked looks into every list, of any age: what was revoked once stays so.
func (a *appraisal) revoked() {
	got := "nothing"
	for _, l := range a.crls {
		if !a.concerns(l) {
			continue
		}
		for _, e := range l.RevokedCertificateEntries {
			for _, c := range a.chain[1:] {
				if e.SerialNumber.Cmp(c.SerialNumber) == 0 {
					got = fmt.Sprintf("%s, on %s", subject(c), stamp(e.RevocationTime))
				}
			}
		}
	}
	a.add(attest.Revocation, "revoked", got == "nothing", "nothing", got, ruleRFC5280)
}
