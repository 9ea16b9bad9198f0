package snp

import (
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"math/big"
	"strings"
	"testing"

	"keybroker/attest"
)

// A panic becomes a refusal, also when all that was decided before it holds.
func TestGuard(t *testing.T) {
	a := &appraisal{req: &Request{}, out: &attest.Verdict{}}
	for _, p := range attest.Parts() {
		a.add(p, "all is well", true, "-", "-", "-")
	}
	if !a.out.Pass() {
		t.Fatal("this verdict should pass")
	}
	a.guard(func() { panic("a mistake") })
	if a.out.Pass() || a.out.Failures()[0].Name != "internal" {
		t.Errorf("%+v", a.out)
	}
	v, err := New(Config{Roots: AMDRoots()})
	if err != nil {
		t.Fatal(err)
	}
	v.roots[0].ARK = nil // nobody can do this from outside
	if v.Appraise(Request{}).Pass() {
		t.Error("passes")
	}
}

// The memory of good chains is bounded, and does not forget what it has room for.
func TestGoodChainsAreBounded(t *testing.T) {
	var g goodChains
	id := func(n int) (out [sha256.Size]byte) {
		binary.BigEndian.PutUint64(out[:], uint64(n))
		return out
	}
	for n := range maxGood + 100 {
		g.add(id(n))
		if !g.has(id(n)) {
			t.Fatalf("chain %d is not remembered", n)
		}
	}
	if len(g.ids) != maxGood {
		t.Errorf("%d chains", len(g.ids))
	}
	n := len(g.ids)
	g.add(id(maxGood + 99))
	if len(g.ids) > n {
		t.Error("the same chain twice")
	}
}

// Nobody makes us verify a signature with a key that is larger than any of AMD's, or of another kind.
func TestUsableIssuer(t *testing.T) {
	root := AMDRoots()[0]
	large := *root.Intermediates[0]
	large.PublicKey = &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), maxRSA), E: 65537}
	if !usableIssuer(root.ARK) || usableIssuer(&large) || usableIssuer(&x509.Certificate{}) {
		t.Error("a key is usable that is not, or the other way round")
	}
	v, err := New(Config{Roots: AMDRoots()})
	if err != nil {
		t.Fatal(err)
	}
	if err := v.verify(chain{root.Intermediates[0], &large, root.ARK}); err == nil || !strings.Contains(err.Error(), "at most 4096 bits") {
		t.Errorf("%v", err)
	}
	root.ARK = &large
	if root.check() == nil {
		t.Error("a root with such a key is taken")
	}
}
