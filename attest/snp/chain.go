package snp

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// A chain is a key's certificate, its issuer and the root.
type chain [3]*x509.Certificate

// findChain looks for a chain from a key to a root of its line, among intermediates that are known or given. Validity is not
// looked at. The error says what is missing or wrong.
func (v *Verifier) findChain(k *signingKey, given []*x509.Certificate) (*chain, error) {
	named := false
	var last error
	for _, root := range v.roots {
		if root.Line != k.line.name {
			continue
		}
		for _, issuer := range candidates(k.issuerName(), root.Intermediates, given) {
			named = true
			c := chain{k.cert, issuer, root.ARK}
			if last = v.verify(c); last == nil {
				return &c, nil
			}
		}
	}
	if !named {
		return nil, errNoIssuer
	}
	return nil, last
}

// errNoIssuer says that nobody has the certificate that issued a key's.
var errNoIssuer = errors.New("none")

// candidates returns the certificates with this subject, each once.
func candidates(name string, lists ...[]*x509.Certificate) []*x509.Certificate {
	var out []*x509.Certificate
	for _, c := range slices.Concat(lists...) {
		if c.Subject.CommonName == name && !slices.ContainsFunc(out, c.Equal) {
			out = append(out, c)
		}
	}
	return out
}

// verify checks a chain's two signatures, and everything that RFC 5280 asks of a path but its validity. What was found good is
// remembered: the two RSA signatures cost as much as the report's own.
func (v *Verifier) verify(c chain) error {
	id := c.id()
	if v.good.has(id) {
		return nil
	}
	at, err := c.commonTime()
	if err != nil {
		return err
	}
	if !usableIssuer(c[1]) {
		return fmt.Errorf("expected an RSA key of at most %d bits in %s", maxRSA, subject(c[1]))
	}
	if err := c[1].CheckSignatureFrom(c[2]); err != nil { // first: only then is its key worth anything
		return fmt.Errorf("%s is not signed by the root %s", subject(c[1]), subject(c[2]))
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(c[2])
	intermediates.AddCert(c[1])
	options := x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	if _, err := c[0].Verify(options); err != nil {
		return fmt.Errorf("%s is not signed by %s: %w", subject(c[0]), subject(c[1]), err)
	}
	v.good.add(id)
	return nil
}

// id stands for a chain's octets.
func (c chain) id() [sha256.Size]byte {
	h := sha256.New()
	for _, cert := range c {
		sum := sha256.Sum256(cert.Raw)
		h.Write(sum[:])
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// commonTime returns a moment at which all certificates of the chain are valid.
func (c chain) commonTime() (time.Time, error) {
	at, end := c[0].NotBefore, c[0].NotAfter
	for _, cert := range c[1:] {
		if cert.NotBefore.After(at) {
			at = cert.NotBefore
		}
		if cert.NotAfter.Before(end) {
			end = cert.NotAfter
		}
	}
	if at.After(end) {
		return at, errors.New("its certificates are at no time valid together")
	}
	return at, nil
}

// isGiven reports whether a certificate is among those given, octet for octet.
func isGiven(c *x509.Certificate, given []*x509.Certificate) bool {
	return slices.ContainsFunc(given, func(g *x509.Certificate) bool { return bytes.Equal(g.Raw, c.Raw) })
}

// maxGood is how many chains are remembered: those of as many chips and TCBs.
const maxGood = 4096

// goodChains are chains that were found good. It may be used by many goroutines.
type goodChains struct {
	mu  sync.Mutex
	ids map[[sha256.Size]byte]struct{}
}

func (g *goodChains) has(id [sha256.Size]byte) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, ok := g.ids[id]
	return ok
}

// add remembers a chain, in place of any other one if there is no room.
func (g *goodChains) add(id [sha256.Size]byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ids == nil {
		g.ids = map[[sha256.Size]byte]struct{}{}
	}
	for old := range g.ids {
		if len(g.ids) < maxGood {
			break
		}
		delete(g.ids, old)
	}
	g.ids[id] = struct{}{}
}
