// Package attest is a verdict on evidence: what an attester says of itself, appraised under a policy, claim by claim.
//
// The words are those of RFC 9334. The package has the words alone, and no cryptography: evidence of each kind is appraised
// by a package below this one, and only in one call that checks signature, chain, revocation, binding and policy together.
package attest

// KindSNP is evidence that is an AMD SEV-SNP attestation report.
const KindSNP = "snp-report"

// Evidence is what an attester sends. Nothing of it is trusted.
type Evidence struct {
	Kind   string // KindSNP
	Octets []byte // KindSNP: the report, 1184 octets, and behind it, if the attester has one, its table of certificates
}

// Endorsements are what others say of the attester's hardware. They carry their own proof, so whoever brings them need not be
// trusted.
type Endorsements struct {
	Certificates [][]byte // X.509, DER
	CRLs         [][]byte // X.509, DER
}
