package policy

import (
	"fmt"
	"strings"
)

// An entry is what Diff compares of a [[service]], [[vm]] or [[snp]].
type entry struct {
	id    string // the same in both policies for the same entry
	title string
	lines []setting
}

// Diff returns what changed from one policy to another, a line for each entry that was added, removed or changed, for
// people. Where an entry stands, and comments, do not count. Nil is the policy that allows nothing.
func Diff(old, new *Policy) []string {
	before, after := old.entries(), new.entries()
	byID := map[string]entry{}
	for _, e := range before {
		byID[e.id] = e
	}
	var out []string
	for _, e := range after {
		was, there := byID[e.id]
		delete(byID, e.id)
		if !there {
			out = append(out, "added "+e.title+": "+inline(e.lines))
		} else if changes := changed(was.lines, e.lines); changes != "" {
			out = append(out, "changed "+e.title+": "+changes)
		}
	}
	for _, e := range before {
		if _, left := byID[e.id]; left {
			out = append(out, "removed "+e.title)
		}
	}
	return out
}

// entries lists all entries. Services may have several entries of one name: the n-th of each is compared to the n-th.
func (p *Policy) entries() []entry {
	if p == nil {
		return nil
	}
	var out []entry
	seen := map[string]int{}
	for _, s := range p.services {
		seen[s.Name]++
		out = append(out, entry{fmt.Sprintf("service %s %d", s.Name, seen[s.Name]), "[[service]] " + s.Name, s.settings()})
	}
	for _, v := range p.vms {
		out = append(out, entry{"vm " + v.UUID, "[[vm]] " + strings.TrimSpace(v.Name+" "+v.UUID), v.settings()})
	}
	for _, g := range p.snps {
		out = append(out, entry{"snp " + g.Name, "[[snp]] " + g.Name, g.settings()})
	}
	return out
}

// changed returns "key: before -> after" for each setting that differs.
func changed(before, after []setting) string {
	old := map[string]string{}
	for _, l := range before {
		old[l.key] = l.value
	}
	var out []string
	for _, l := range after {
		if was, there := old[l.key]; !there {
			out = append(out, fmt.Sprintf("%s: (default) -> %s", l.key, l.value))
		} else if was != l.value {
			out = append(out, fmt.Sprintf("%s: %s -> %s", l.key, was, l.value))
		}
		delete(old, l.key)
	}
	for _, l := range before {
		if was, left := old[l.key]; left {
			out = append(out, fmt.Sprintf("%s: %s -> (default)", l.key, was))
		}
	}
	return strings.Join(out, ", ")
}
