// Package snp is the verifier of AMD SEV-SNP attestation reports: versions 2, 3 and 5, signed by a VCEK or a VLEK, of the lines
// Milan, Genoa and Turin.
//
// One call checks everything and lists everything: see Verifier.Appraise. It needs no network. Section numbers are those of
// AMD's publication 56860 ("SNP ABI"), unless another is named.
//
// Reports are read, and their signatures taken apart, by github.com/google/go-sev-guest. Which products there are, how their TCBs are laid
// out, what their certificates say, tables of certificates, chains, revocation and the policy are our own: the library does not
// know Zen4c and Turin, takes nil for "not checked", looks for no more than its first error, and can be made to panic.
package snp

import (
	"errors"
	"fmt"
	"time"

	"keybroker/attest"
)

// Config is what a Verifier needs.
type Config struct {
	Roots []Root // trusted; AMDRoots() in production. None is an error
}

// A Verifier appraises reports. It may be used by many goroutines at the same time.
type Verifier struct {
	roots []Root
	good  goodChains
}

// New makes a Verifier.
func New(c Config) (*Verifier, error) {
	if len(c.Roots) == 0 {
		return nil, errors.New("making verifier: expected roots to trust, got none")
	}
	for _, r := range c.Roots {
		if err := r.check(); err != nil {
			return nil, fmt.Errorf("making verifier: %w", err)
		}
	}
	return &Verifier{roots: append([]Root(nil), c.Roots...)}, nil
}

// A Request is what is appraised, and against what.
type Request struct {
	Evidence     attest.Evidence
	Endorsements attest.Endorsements // besides those that the evidence has with it
	ReportData   []byte              // what REPORT_DATA must be, 64 octets; nil: the binding stays unchecked, so the verdict does not pass
	Policy       *attest.Policy      // nil: the policy stays unchecked, so the verdict does not pass
	At           time.Time           // when certificates must be valid; zero: they are not
}

// Appraise checks the whole of a report: that it can be read, its signature, the certificate's chain to a root, validity,
// revocation, that it was made for this session, and the policy. It looks at everything that it can look at, so the verdict
// names all failures at once. It never panics, and takes about half a millisecond, or twice that when it sees the certificate
// for the first time.
func (v *Verifier) Appraise(r Request) *attest.Verdict {
	a := &appraisal{v: v, req: &r, out: &attest.Verdict{}}
	a.guard(a.run)
	return a.out
}

// AppraiseCertificates checks a key's certificate alone, without a report: chain, validity, revocation. Its verdict never
// passes, as nothing is said about a guest.
func (v *Verifier) AppraiseCertificates(e attest.Endorsements, at time.Time) *attest.Verdict {
	a := &appraisal{v: v, req: &Request{Endorsements: e, At: at}, out: &attest.Verdict{}}
	a.guard(a.runCertificates)
	return a.out
}

// guard runs f and turns a panic into a refusal. None is known: it is here because what f looks at was made by others.
func (a *appraisal) guard(f func()) {
	defer func() {
		if r := recover(); r != nil {
			a.add(attest.Form, "internal", false, "evidence that can be appraised", "a mistake of this program; please report it", "default")
		}
	}()
	f()
}
