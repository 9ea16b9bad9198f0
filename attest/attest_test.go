package attest_test

import (
	"slices"
	"testing"
	"time"

	"keybroker/attest"
)

// complete is a verdict with a claim that holds in each part.
func complete() *attest.Verdict {
	v := &attest.Verdict{}
	for _, p := range attest.Parts() {
		v.Add(attest.Claim{Part: p, Name: "claim", Result: attest.Holds})
	}
	return v
}

// There is no pass without every part, and none with anything but claims that hold.
func TestPassNeedsEveryPart(t *testing.T) {
	if (&attest.Verdict{}).Pass() || !complete().Pass() {
		t.Error("the zero verdict passes, or a complete one does not")
	}
	for _, left := range attest.Parts() {
		v := &attest.Verdict{}
		for _, p := range attest.Parts() {
			if p != left {
				v.Add(attest.Claim{Part: p, Name: "claim", Result: attest.Holds})
			}
		}
		if v.Pass() || v.Of(left) != attest.Unchecked {
			t.Errorf("passes without %s", left)
		}
	}
	for _, p := range append(attest.Parts(), "", "another") {
		for _, result := range []attest.Result{attest.Fails, attest.Unchecked, "", "other"} {
			v := complete()
			v.Add(attest.Claim{Part: p, Result: result})
			if v.Pass() {
				t.Errorf("passes with a claim of %q that is %q", p, result)
			}
		}
	}
	if complete().All(nil) {
		t.Error("of no parts all hold")
	}
}

func TestVerdictOrder(t *testing.T) {
	v := &attest.Verdict{}
	for _, p := range []attest.Part{attest.Appraisal, attest.Form, attest.Signature, attest.Form} {
		v.Add(attest.Claim{Part: p, Result: attest.Fails})
	}
	var got []attest.Part
	for _, c := range v.Failures() {
		got = append(got, c.Part)
	}
	if want := []attest.Part{attest.Form, attest.Form, attest.Signature, attest.Appraisal}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestFind(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	list := attest.ReferenceValues{
		{Name: "old", Value: []byte("a"), Until: now}, {Name: "new", Value: []byte("a")}, {Name: "none"}, {Name: "ended", Value: []byte("b"), Until: now},
	}
	for got, want := range map[string]string{"a": "new", "b": "ended", "": "", "c": ""} {
		v, ok := list.Find([]byte(got), now)
		name := ""
		if v != nil {
			name = v.Name
		}
		if name != want || ok != (want == "new") {
			t.Errorf("%q: %q, %v", got, name, ok)
		}
	}
}
