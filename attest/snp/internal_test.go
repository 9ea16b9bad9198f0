package snp

import (
	"crypto/sha256"
	"encoding/binary"
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
