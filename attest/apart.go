package attest

import (
	"bytes"
	"fmt"
	"slices"
)

// Apart reports whether no report can satisfy both policies, whenever it is made. If one could, why says of each key that may
// tell guests apart why it does not. To be asked of policies without Problems.
//
// Only what a report says of the guest or its processor once counts, and what the guest cannot choose: HOST_DATA, MEASUREMENT, the digests
// and ids of the ID block, the chip and its product line. VMPLs and signers do not, for a guest asks for reports of several;
// nor does what is a least or a flag (TCBs, GUEST_SVN, the guest's policy, the platform), for a better guest satisfies both. That a
// value is no longer accepted does not count either: it was, and clocks are set.
func Apart(p, q *Policy) (apart bool, why []string) {
	for _, l := range []struct {
		key  string
		p, q ReferenceValues
	}{
		{"host_data", p.HostData, q.HostData}, {"measurement", p.Measurements, q.Measurements}, {"id_key", p.IDKeys, q.IDKeys},
		{"author_key", p.AuthorKeys, q.AuthorKeys}, {"image_id", p.ImageIDs, q.ImageIDs}, {"family_id", p.FamilyIDs, q.FamilyIDs},
	} {
		switch common := l.p.common(l.q); {
		case l.p == nil && l.q == nil:
			why = append(why, l.key+" is in neither")
		case l.p == nil || l.q == nil:
			why = append(why, l.key+" is in one alone")
		case common == nil:
			return true, nil
		default:
			why = append(why, fmt.Sprintf("%s %.8x... is in both", l.key, common))
		}
	}
	line := commonProcessor(p, q)
	if line == "" {
		return true, nil
	}
	return false, append(why, "a "+line+" may be the processor of both")
}

// common returns a value that is in both lists, or nil.
func (l ReferenceValues) common(m ReferenceValues) []byte {
	for _, v := range l {
		if slices.ContainsFunc(m, func(w ReferenceValue) bool { return len(v.Value) > 0 && bytes.Equal(v.Value, w.Value) }) {
			return v.Value
		}
	}
	return nil
}

// commonProcessor returns a product line of which some chip satisfies both policies, or "".
func commonProcessor(p, q *Policy) string {
	for _, a := range p.Products {
		for _, b := range q.Products {
			denied := slices.Contains(p.DenyProducts, a.Line) || slices.Contains(q.DenyProducts, a.Line)
			if a.Line == b.Line && !denied && commonChip(p, q, p.Chips, a.Chips, q.Chips, b.Chips) {
				return a.Line
			}
		}
	}
	return ""
}

// commonChip reports whether some chip is in each of the lists that are not nil, and denied by neither policy.
func commonChip(p, q *Policy, lists ...ReferenceValues) bool {
	lists = slices.DeleteFunc(lists, func(l ReferenceValues) bool { return l == nil })
	if len(lists) == 0 {
		return true // of so many chips one is left, whichever are denied
	}
	return slices.ContainsFunc(lists[0], func(v ReferenceValue) bool {
		one := ReferenceValues{v}
		for _, l := range lists[1:] {
			if one.common(l) == nil {
				return false
			}
		}
		return one.common(p.DenyChips) == nil && one.common(q.DenyChips) == nil
	})
}
