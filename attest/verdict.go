package attest

import "slices"

// A Part is one question of an appraisal. A verdict passes only if each of them was asked and answered with yes.
type Part string

// The parts, in the order in which they are told: what comes first explains best why evidence is refused.
const (
	Form       Part = "form"       // the evidence can be read, and is of a kind, version and product that is known
	Signature  Part = "signature"  // it is signed, and the certificate is for this chip and this TCB
	Chain      Part = "chain"      // that certificate leads to a root that the verifier trusts
	Validity   Part = "validity"   // the certificates are valid at the time of the appraisal
	Revocation Part = "revocation" // none of them is revoked, as far as the policy wants that known
	Binding    Part = "binding"    // the evidence was made for this session
	Appraisal  Part = "policy"     // the policy accepts what it says
)

// Parts returns all parts, in order.
func Parts() []Part {
	return []Part{Form, Signature, Chain, Validity, Revocation, Binding, Appraisal}
}

// Genuine are the parts that need neither a session nor a policy: they say that the hardware made the evidence.
func Genuine() []Part { return []Part{Form, Signature, Chain, Validity, Revocation} }

// A Result is what became of a claim, or of a part. The zero value does not hold.
type Result string

// The results. Only Holds is good enough for a pass.
const (
	Holds     Result = "holds"
	Fails     Result = "fails"
	Unchecked Result = "unchecked" // nothing was given to check it with, or something before it failed
)

// A Claim is one thing that evidence says, or that is said about it, and what was decided about it.
type Claim struct {
	Part     Part   `json:"part"`
	Name     string `json:"claim"` // stable, lower case: "measurement", "reported-tcb.snp"
	Result   Result `json:"result"`
	Expected string `json:"expected"`
	Got      string `json:"got"`  // text that the peer chose is quoted
	Rule     string `json:"rule"` // what decided: a line of the policy, or a section of a specification
}

// A Verdict is the attestation result: every claim that was looked at, those that fail and those that hold alike. The zero
// value refuses. It is used by one goroutine until it is complete.
type Verdict struct {
	claims []Claim

	// Instance names the running guest that made the evidence; of an SNP report its REPORT_ID, 32 octets. It means something
	// only if the verdict passes.
	Instance []byte
}

// Add records a claim.
func (v *Verdict) Add(c Claim) { v.claims = append(v.claims, c) }

// Claims returns all claims in the order in which the verdict tells them: by part, and within it as they were decided.
func (v *Verdict) Claims() []Claim {
	var out []Claim
	for _, p := range Parts() {
		for _, c := range v.claims {
			if c.Part == p {
				out = append(out, c)
			}
		}
	}
	return out
}

// Failures returns the claims that fail, in the order of Claims.
func (v *Verdict) Failures() []Claim {
	return slices.DeleteFunc(v.Claims(), func(c Claim) bool { return c.Result == Holds || c.Result == Unchecked })
}

// Of returns the result of one part: Fails if any claim of it fails, Holds if there are claims and all hold, otherwise
// Unchecked.
func (v *Verdict) Of(p Part) Result {
	seen, unchecked := false, false
	for _, c := range v.claims {
		if c.Part != p {
			continue
		}
		seen = true
		switch c.Result {
		case Holds:
		case Unchecked:
			unchecked = true
		default:
			return Fails
		}
	}
	if !seen || unchecked {
		return Unchecked
	}
	return Holds
}

// All reports whether all these parts hold. Of no parts it is false.
func (v *Verdict) All(parts []Part) bool {
	return len(parts) > 0 && !slices.ContainsFunc(parts, func(p Part) bool { return v.Of(p) != Holds })
}

// Pass reports whether every part holds: there is no way to it around any of them. Claims of no known part are no help, and
// fail.
func (v *Verdict) Pass() bool { return v.All(Parts()) && len(v.Claims()) == len(v.claims) }
