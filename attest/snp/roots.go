package snp

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-sev-guest/verify/trust"
)

// A Root is where a product line's certificates lead to.
type Root struct {
	Line          string              // Milan, Genoa or Turin
	ARK           *x509.Certificate   // trusted; it signs the intermediates and the revocation lists
	Intermediates []*x509.Certificate // ASK, ASVK: known beforehand, and trusted only as far as the ARK signed them
}

// AMDRoots returns AMD's roots for all lines that are known, each with its ASK. The ASVKs are not among them: a VLEK comes with
// its own.
func AMDRoots() []Root {
	return []Root{
		mustRoot(Milan, trust.AskArkMilanVcekBytes), mustRoot(Genoa, trust.AskArkGenoaVcekBytes), mustRoot(Turin, trust.AskArkTurinVcekBytes),
	}
}

func mustRoot(line string, chain []byte) Root {
	r, err := ParseRoot(line, chain)
	if err != nil {
		panic("snp: " + err.Error()) // the octets are compiled in
	}
	return r
}

// ParseRoot reads a root in PEM with its intermediates, in any order, as AMD's key service has it under cert_chain.
func ParseRoot(line string, chain []byte) (Root, error) {
	r := Root{Line: line}
	for block, rest := pem.Decode(chain); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return Root{}, fmt.Errorf("reading the root of %s: %w", line, err)
		}
		if c.Subject.CommonName == arkName(line) {
			r.ARK = c
		} else {
			r.Intermediates = append(r.Intermediates, c)
		}
	}
	return r, r.check()
}

// arkName is the subject of a line's root.
func arkName(line string) string { return "ARK-" + line }

// maxRSA is the greatest size of an issuer's key, bits. AMD's are as large; a larger one would cost too much to use.
const maxRSA = 4096

// usableIssuer reports whether it is safe to verify a signature with this certificate's key.
func usableIssuer(c *x509.Certificate) bool {
	pub, ok := c.PublicKey.(*rsa.PublicKey)
	return ok && pub.N.BitLen() <= maxRSA
}

// check refuses a root that could verify nothing.
func (r Root) check() error {
	switch {
	case lineByName(r.Line) == nil:
		return fmt.Errorf("expected the root of %s, got one of %.40q", lineNames(), r.Line)
	case r.ARK == nil:
		return fmt.Errorf("expected the root certificate %s, got none", arkName(r.Line))
	case !r.ARK.IsCA || !usableIssuer(r.ARK):
		return fmt.Errorf("expected the root certificate %s to be a CA with an RSA key of at most %d bits", arkName(r.Line), maxRSA)
	case slices.Contains(r.Intermediates, nil):
		return errors.New("expected intermediate certificates, got nil")
	}
	return nil
}
