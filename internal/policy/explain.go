package policy

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"keybroker/derive"
)

// A Condition is one thing that an entry asks, and how the claims met it.
type Condition struct {
	Name     string // "uid", "unit", "via", "tier", "name", "hosts", "deny", "keys"
	Expected string // what the entry says
	Got      string // what the kernel or hypervisor says
	Holds    bool
	Code     string // of the refusal if it does not hold
}

// A Trial is one entry that was tried.
type Trial struct {
	Rule       string
	Allow      bool
	Conditions []Condition // all of them, also those that hold
}

// String returns one line: the rule, and for each condition that failed what was expected and what came.
func (t Trial) String() string {
	if t.Allow {
		return t.Rule + ": allows"
	}
	var failed []string
	for _, c := range t.failed() {
		failed = append(failed, fmt.Sprintf("%s: expected %s, got %s", c.Name, c.Expected, c.Got))
	}
	return t.Rule + ": refuses; " + strings.Join(failed, "; ")
}

// ExplainService returns every entry whose name matches, in the order of the files, with what each makes of the caller.
func (p *Policy) ExplainService(name string, c Claims) []Trial {
	var trials []Trial
	for _, s := range p.matchingInOrder(name) {
		trials = append(trials, newTrial(s.Rule, s.conditions(c)))
	}
	return trials
}

// ExplainVM returns what the entry with this UUID makes of a VM; nothing if there is none.
func (p *Policy) ExplainVM(c VMClaims) []Trial {
	v := p.byUUID[c.UUID]
	if v == nil {
		return nil
	}
	return []Trial{newTrial(v.Rule, v.conditions(c))}
}

func newTrial(rule string, conds []Condition) Trial {
	t := Trial{Rule: rule, Conditions: conds}
	t.Allow = len(t.failed()) == 0
	return t
}

func (t Trial) failed() (out []Condition) {
	for _, c := range t.Conditions {
		if !c.Holds {
			out = append(out, c)
		}
	}
	return out
}

// conditions lists what the entry asks of a caller. All hold exactly if allows is true.
func (s *Service) conditions(c Claims) []Condition {
	if s.useless() {
		return []Condition{{Name: "uid, unit, via", Expected: "an entry that somebody can meet",
			Got: "an entry without uid, or with an empty list", Code: CodeDenies}}
	}
	out := []Condition{{
		Name: "uid", Expected: "one of " + joinInts(s.UIDs), Got: fmt.Sprint(c.UID),
		Holds: slices.Contains(s.UIDs, c.UID), Code: CodeUID,
	}}
	if s.Units != nil {
		out = append(out, Condition{
			Name: "unit", Expected: "one of " + quoteStrings(s.Units), Got: c.unit(),
			Holds: s.unitHolds(c), Code: CodeUnit,
		})
	}
	return append(out, Condition{
		Name: "via", Expected: "one of " + quoteStrings(s.Via), Got: quote(c.Via),
		Holds: slices.Contains(s.Via, c.Via), Code: CodeDoor,
	})
}

func (v *VM) conditions(c VMClaims) []Condition {
	out := []Condition{
		{Name: "deny", Expected: "an entry without deny", Got: "deny = true", Holds: !v.Deny, Code: CodeDenies},
		{Name: "keys", Expected: "an entry with keys", Got: "keys = []", Holds: len(v.Keys) > 0, Code: CodeDenies},
		{Name: "tier", Expected: quote(v.Tier), Got: quote(c.Tier), Holds: v.Tier == c.Tier, Code: CodeTier},
	}
	if v.Name != "" && v.Tier != derive.TierSNP { // there nothing proves a name
		out = append(out, Condition{Name: "name", Expected: quote(v.Name), Got: quote(c.Name), Holds: v.Name == c.Name, Code: CodeVMName})
	}
	if v.Hosts != nil {
		out = append(out, Condition{
			Name: "hosts", Expected: "one of " + quoteStrings(v.Hosts), Got: quote(c.Host),
			Holds: slices.Contains(v.Hosts, c.Host), Code: CodeHost,
		})
	}
	return out
}

// askExplain stands before the name of who is refused: the advice that ends a refusal's reason.
const askExplain = "ask the administrator of this host to run `keybroker explain "

// WithoutAdvice is the reason of a refusal for who runs that command already.
func (d Decision) WithoutAdvice() string {
	reason, _, _ := strings.Cut(d.Reason, "; "+askExplain)
	return reason
}

// words are for conditions whose names in the file do not read well.
var words = map[string]string{"via": "transport", "name": "domain name", "hosts": "host"}

// refusal makes the decision that follows from a condition that does not hold. The peer learns its own claim and not what
// the policy expects.
func (c Condition) refusal(rule, next string) Decision {
	reason := fmt.Sprintf("%s does not allow this %s, which is %s; %s", rule, nameOr(words[c.Name], c.Name), c.Got, next)
	if c.Code == CodeDenies {
		reason = fmt.Sprintf("%s allows nobody; %s", rule, next)
	}
	return Decision{Rule: rule, Code: c.Code, Reason: reason, Expected: clip(c.Name + ": " + c.Expected)}
}

// clip bounds what goes to the log for one refusal: an entry may list thousands of uids.
func clip(s string) string {
	const most = 300
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}

// refuseService says why no entry allows a caller, by the entry that came nearest: the one with the fewest conditions that
// failed, and the first of these.
func (p *Policy) refuseService(name string, c Claims) Decision {
	if err := derive.CheckKeyName(name); err != nil {
		return Decision{Code: CodeBadName, Reason: err.Error(), Expected: "a service's name"}
	}
	trials := p.ExplainService(name, c)
	if len(trials) == 0 {
		return Decision{
			Code:     CodeNoPolicy,
			Reason:   fmt.Sprintf("no [[service]] entry for %q; add one to policy.toml", name),
			Expected: "a [[service]] entry for this name",
		}
	}
	nearest := slices.MinFunc(trials, func(a, b Trial) int { return cmp.Compare(a.severity(), b.severity()) })
	failed := nearest.failed()
	if len(failed) == 0 { // a unit came to be after the entry was tried
		return Decision{Rule: nearest.Rule, Code: CodeUnit, Reason: "the caller's unit has just changed; ask again"}
	}
	return failed[0].refusal(nearest.Rule, askExplain+name+"`")
}

// severity orders refusals: an entry that allows nobody is the farthest from allowing.
func (t Trial) severity() int {
	failed := t.failed()
	if len(failed) == 1 && failed[0].Code == CodeDenies {
		return math.MaxInt
	}
	return len(failed)
}

func (c Claims) unit() string {
	if c.Unit == "" {
		return strings.TrimSuffix("unknown: "+c.NoUnit, ": ")
	}
	return quote(c.Unit)
}

func joinInts(ns []uint32) string {
	var out []string
	for _, n := range ns {
		out = append(out, fmt.Sprint(n))
	}
	return strings.Join(out, ", ")
}
