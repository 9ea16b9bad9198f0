package snp

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-sev-guest/abi"

	"keybroker/attest"
)

// Rules that are not the policy's.
const (
	ruleReport  = "SNP ABI, section 7.3"
	ruleTCB     = "SNP ABI, section 2.2"
	ruleGHCB    = "GHCB specification, SNP Extended Guest Request"
	ruleKDS     = "AMD 57230, section 3.1"
	ruleRFC5280 = "RFC 5280"
)

// NoneGiven is what a claim got about a certificate that is missing.
const NoneGiven = "none given"

// An appraisal is one call of Appraise under way.
type appraisal struct {
	v   *Verifier
	req *Request
	out *attest.Verdict

	report *report             // nil: it could not be read
	certs  []*x509.Certificate // all that were given
	crls   []*x509.RevocationList
	key    *signingKey // nil: there is no usable certificate for the key that signed
	chain  *chain      // nil: the key leads to no root
}

// add records a claim that holds or fails.
func (a *appraisal) add(part attest.Part, name string, ok bool, expected, got, rule string) {
	result := attest.Fails
	if ok {
		result = attest.Holds
	}
	a.out.Add(attest.Claim{Part: part, Name: name, Result: result, Expected: expected, Got: got, Rule: rule})
}

// unchecked records a claim that nothing can be said about.
func (a *appraisal) unchecked(part attest.Part, name, expected, why string) {
	a.out.Add(attest.Claim{Part: part, Name: name, Result: attest.Unchecked, Expected: expected, Got: why})
}

// run is the whole appraisal. Of a report that cannot be read nothing else is looked at.
func (a *appraisal) run() {
	if a.readEvidence(); a.report == nil {
		return
	}
	a.readCRLs()
	a.findKey()
	a.product()
	a.tcbForm()
	a.belongs()
	a.signature()
	a.findIssuers()
	a.validity()
	a.revocation()
	a.binding()
	a.policy()
}

// runCertificates is the part of it that needs no report.
func (a *appraisal) runCertificates() {
	a.readCertificates(a.req.Endorsements.Certificates)
	a.readCRLs()
	a.findKey()
	if a.key != nil {
		a.add(attest.Chain, "certificate-tcb", true, "the TCB that the key is for", a.key.line.layout.String(a.key.tcb), ruleKDS)
	}
	a.findIssuers()
	a.validity()
	a.revocation()
}

// readEvidence takes the report and the certificates behind it apart.
func (a *appraisal) readEvidence() {
	ev := a.req.Evidence
	a.add(attest.Form, "kind", ev.Kind == attest.KindSNP, attest.KindSNP, plain(ev.Kind), "default")
	raw, table := split(ev.Octets)
	size := fmt.Sprintf("%d octets", len(ev.Octets))
	fits := len(raw) == ReportSize && len(ev.Octets) <= MaxExtended
	a.add(attest.Form, "report-size", fits, fmt.Sprintf("%d octets, and a table of certificates up to %d", ReportSize, MaxExtended), size, ruleReport)
	if !fits {
		return
	}
	if a.readReport(raw); a.report == nil {
		return
	}
	given, err := ParseTable(table)
	a.add(attest.Form, "certificate-table", err == nil, "a table of certificates, or nothing, behind the report", said(err, "well formed"), ruleGHCB)
	a.readCertificates(append(given.Certificates, a.req.Endorsements.Certificates...))
	a.req.Endorsements.CRLs = append(given.CRLs, a.req.Endorsements.CRLs...)
}

// said returns an error's text, or what to say when there is none.
func said(err error, good string) string {
	if err != nil {
		return err.Error()
	}
	return good
}

// readReport parses the report, if it is of a version that is known.
func (a *appraisal) readReport(raw []byte) {
	version := versionOf(raw)
	known := isVersion(version)
	a.add(attest.Form, "report-version", known, "2, 3 or 5", fmt.Sprint(version), ruleReport)
	if !known {
		return
	}
	r, err := parseReport(raw)
	a.add(attest.Form, "report", err == nil, "no reserved bits, only flags that are known", said(err, "well formed"), ruleReport)
	if err != nil {
		return
	}
	a.report = r
	a.out.Instance = bytes.Clone(r.ReportId)
	signer := r.signer.SigningKey
	a.add(attest.Form, "signing-key", signer == abi.VcekReportSigner || signer == abi.VlekReportSigner, "VCEK or VLEK", signer.String(), ruleReport)
	a.add(attest.Form, "signature-algorithm", r.SignatureAlgo == abi.SignEcdsaP384Sha384, "1, ECDSA P-384 with SHA-384", fmt.Sprint(r.SignatureAlgo), ruleReport)
}

// readCertificates parses all certificates that were given.
func (a *appraisal) readCertificates(given [][]byte) {
	if len(given) > maxCertificates {
		a.add(attest.Form, "certificates", false, fmt.Sprintf("at most %d certificates", maxCertificates), fmt.Sprint(len(given)), "default")
		return
	}
	for i, der := range given {
		c, err := parseCertificate(der)
		if err != nil {
			a.add(attest.Form, "certificates", false, "X.509 certificates", fmt.Sprintf("number %d: %v", i+1, err), ruleRFC5280)
			continue
		}
		if !isGiven(c, a.certs) {
			a.certs = append(a.certs, c)
		}
	}
}

func parseCertificate(der []byte) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("expected at most %d octets, got %d", maxCertificate, len(der))
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, errors.New("not a certificate in DER")
	}
	return c, nil
}

// readCRLs parses all revocation lists that were given.
func (a *appraisal) readCRLs() {
	given := a.req.Endorsements.CRLs
	if len(given) > maxCRLs {
		a.add(attest.Form, "crls", false, fmt.Sprintf("at most %d revocation lists", maxCRLs), fmt.Sprint(len(given)), "default")
		return
	}
	for i, der := range given {
		l, err := x509.ParseRevocationList(der)
		if err != nil || len(der) > maxCRL {
			a.add(attest.Form, "crls", false, "X.509 revocation lists", fmt.Sprintf("number %d is none", i+1), ruleRFC5280)
			continue
		}
		a.crls = append(a.crls, l)
	}
}

// wantedKind is the kind of key that signed the report; without one, either. "" if the report is signed by neither.
func (a *appraisal) wantedKind(kind string) bool {
	if a.report == nil {
		return kind != ""
	}
	return kind != "" && a.report.signer.SigningKey.String() == kind
}

// findKey picks the certificate of the key that signed the report: of those of its kind the one that fits best, so that more
// certificates than needed do no harm.
func (a *appraisal) findKey() {
	best, name := -1, a.keyName()
	var problem error
	for _, c := range a.certs {
		if !a.wantedKind(kindOf(c)) {
			continue
		}
		k, err := parseSigningKey(c)
		if err != nil {
			problem = fmt.Errorf("%s: %w", subject(c), err)
		} else if fit := a.fit(k); fit > best {
			best, a.key = fit, k
		}
	}
	got := NoneGiven
	switch {
	case a.key != nil:
		got = fmt.Sprintf("%s of %s, %s", a.key.kind, a.key.line.name, a.key.owner())
	case problem != nil:
		got = problem.Error()
	}
	a.add(attest.Chain, "certificate", a.key != nil, "the certificate of the "+name+" that signed", got, ruleKDS)
}

// keyName is what messages call the key that signed the report.
func (a *appraisal) keyName() string {
	if a.report == nil {
		return "VCEK or VLEK"
	}
	return a.report.signer.SigningKey.String()
}

// fit says how well a certificate fits the report: the chip counts more than the TCB.
func (a *appraisal) fit(k *signingKey) int {
	if a.report == nil {
		return 0
	}
	fit := 0
	if bytes.Equal(k.chipID(), a.report.ChipId) {
		fit += 2
	}
	if tcb, ok := k.line.layout.parse(a.report.ReportedTcb); ok && tcb == k.tcb {
		fit++
	}
	return fit
}

// product says of which line the processor is: since version 3 by the report, before by the certificate.
func (a *appraisal) product() {
	r := a.report
	if r.Version < withCPUID {
		if a.key == nil {
			a.unchecked(attest.Form, "product", lineNames(), "no certificate, and version 2 does not say")
			return
		}
		r.line = a.key.line
	}
	a.add(attest.Form, "product", r.line != nil, lineNames(), r.product(), ruleReport)
	if r.line != nil {
		r.setLine(r.line)
	}
}

// tcbForm holds that the TCBs are what the line's layout makes of them.
func (a *appraisal) tcbForm() {
	if a.report.line == nil {
		return
	}
	got := a.report.line.layout.String(a.report.tcbs[reportedTCB])
	if bad := a.report.malTCBs; len(bad) > 0 {
		got = fmt.Sprint(bad)
	}
	a.add(attest.Form, "tcb", len(a.report.malTCBs) == 0, "zero in the reserved octets of each TCB of "+a.report.line.name, got, ruleTCB)
}

// belongs holds that the certificate is for this chip and for the TCB that the report states.
func (a *appraisal) belongs() {
	r, k := a.report, a.key
	if k == nil || r.line == nil {
		a.unchecked(attest.Signature, "certificate-tcb", "a certificate for the report's TCB", "no certificate, or no known product")
		return
	}
	a.add(attest.Signature, "certificate-product", k.line == r.line, r.line.name, k.line.name, ruleKDS)
	tcb := r.tcbs[reportedTCB]
	a.add(attest.Signature, "certificate-tcb", k.tcb == tcb, r.line.layout.String(tcb), k.line.layout.String(k.tcb), ruleReport+", REPORTED_TCB")
	if r.masked() {
		r.chip = k.chipID() // nil of a VLEK
	}
	if k.kind == attest.VCEK {
		a.chipID()
	}
}

// chipID holds that a VCEK is that of the report's chip. A report that hides the chip leaves it to the policy.
func (a *appraisal) chipID() {
	expected, got := hexOf(a.report.ChipId), hexOf(a.key.chipID())
	if a.report.masked() {
		expected = "any: the report hides its chip"
	}
	ok := a.report.masked() || expected == got
	a.add(attest.Signature, "certificate-chip-id", ok, expected, got, ruleReport+", CHIP_ID")
}

// signature verifies the report's signature over its octets 0 to 0x29f.
func (a *appraisal) signature() {
	const expected = "a signature by that key over octets 0 to 0x29f"
	if a.key == nil {
		a.unchecked(attest.Signature, "signature", expected, "no certificate")
		return
	}
	der, err := abi.ReportToSignatureDER(a.report.raw)
	if err == nil {
		err = a.key.cert.CheckSignature(x509.ECDSAWithSHA384, abi.SignedComponent(a.report.raw), der)
	}
	got := "good"
	if err != nil {
		got = "not by this key, or over other octets"
	}
	a.add(attest.Signature, "signature", err == nil, expected, got, ruleReport)
}

// findIssuers looks for the chain to a root.
func (a *appraisal) findIssuers() {
	if a.key == nil {
		a.unchecked(attest.Chain, "chain", "a chain to a trusted root", "no certificate to begin with")
		return
	}
	issuer, role := a.key.issuerName(), IssuerOf(a.key.kind)
	c, err := a.v.findChain(a.key, a.certs)
	if errors.Is(err, errNoIssuer) {
		a.add(attest.Chain, "issuer", false, fmt.Sprintf("the certificate %s (%s)", issuer, role), NoneGiven, ruleKDS)
		a.unchecked(attest.Chain, "chain", "a chain to a trusted root", "the certificate "+issuer+" is missing")
		return
	}
	expected := fmt.Sprintf("%s signed by %s, signed by the trusted root %s", subject(a.key.cert), issuer, arkName(a.key.line.name))
	a.add(attest.Chain, "chain", err == nil, expected, said(err, "good"), ruleRFC5280)
	a.chain = c
}

// validity holds that each certificate of the chain is valid now.
func (a *appraisal) validity() {
	if a.key == nil {
		a.unchecked(attest.Validity, "certificate-validity", "valid certificates", "no certificate")
		return
	}
	a.validAt("certificate-validity", a.key.cert)
	if a.chain != nil {
		a.validAt("issuer-validity", a.chain[1])
		a.validAt("root-validity", a.chain[2])
	}
}

func (a *appraisal) validAt(name string, c *x509.Certificate) {
	at := a.req.At
	ok := !at.IsZero() && !at.Before(c.NotBefore) && !at.After(c.NotAfter)
	got := fmt.Sprintf("%s is valid from %s to %s", subject(c), stamp(c.NotBefore), stamp(c.NotAfter))
	a.add(attest.Validity, name, ok, "valid at "+stamp(at), got, ruleRFC5280)
}

// stamp writes a time as messages have it.
func stamp(t time.Time) string {
	if t.IsZero() {
		return "no time"
	}
	return t.UTC().Format(time.RFC3339)
}

// binding holds that the report was made for this session.
func (a *appraisal) binding() {
	want := a.req.ReportData
	if want == nil {
		a.unchecked(attest.Binding, "report-data", "none given to compare with", hexOf(a.report.ReportData))
		return
	}
	ok := len(want) == ReportDataSize && bytes.Equal(want, a.report.ReportData)
	a.add(attest.Binding, "report-data", ok, hexOf(want), hexOf(a.report.ReportData), "the session")
}
