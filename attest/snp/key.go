package snp

import (
	"bytes"
	"errors"
	"fmt"

	"keybroker/attest"
)

// A Key says which key signs reports: that of one chip, or of one provider, at one TCB.
type Key struct {
	Kind string     // attest.VCEK or attest.VLEK
	Line string     // Milan, Genoa or Turin
	Chip []byte     // of a VCEK: the hardware id as its certificate has it, HardwareIDSize octets; nil if a report hides it
	CSP  string     // of a VLEK: the provider; "" if a report is all that is known
	TCB  attest.TCB // for which the key was derived
}

// Equal reports whether two keys are the same.
func (k Key) Equal(o Key) bool {
	return k.Kind == o.Kind && k.Line == o.Line && bytes.Equal(k.Chip, o.Chip) && k.CSP == o.CSP && k.TCB == o.TCB
}

// TCBValues returns the parts of a line's TCB in the order of TCBParts; nil if there is no such line.
func TCBValues(line string, tcb attest.TCB) []uint8 {
	l := lineByName(line)
	if l == nil {
		return nil
	}
	var out []uint8
	for _, p := range l.layout {
		out = append(out, *p.in(&tcb))
	}
	return out
}

// TCBOf is the reverse of TCBValues. It is an error if there is no such line, or another number of parts.
func TCBOf(line string, values []uint8) (attest.TCB, error) {
	var tcb attest.TCB
	l := lineByName(line)
	if l == nil || len(values) != len(l.layout) {
		return tcb, fmt.Errorf("expected one value for each of %v, got %d", TCBParts(line), len(values))
	}
	for i, p := range l.layout {
		*p.in(&tcb) = values[i]
	}
	return tcb, nil
}

// FormatTCB writes a line's TCB for people: "bootloader 3, tee 0, snp 8, microcode 115".
func FormatTCB(line string, tcb attest.TCB) string {
	if l := lineByName(line); l != nil {
		return l.layout.String(tcb)
	}
	return ""
}

// Lines returns the names of the product lines.
func Lines() []string {
	var names []string
	for _, l := range lines {
		names = append(names, l.name)
	}
	return names
}

// HardwareIDSize returns how many octets a hardware id of a line has; 0 if there is no such line.
func HardwareIDSize(line string) int {
	if l := lineByName(line); l != nil {
		return l.hwid
	}
	return 0
}

// KeysOf returns the keys that may have signed a report, by what it says of itself, which may be a lie: one of each line that it
// can be of, which is one alone since version 3. Without an error there is at least one.
func KeysOf(raw []byte) ([]Key, error) {
	if len(raw) != ReportSize || !isVersion(versionOf(raw)) {
		return nil, fmt.Errorf("reading report: expected %d octets of version 2, 3 or 5", ReportSize)
	}
	r, err := parseReport(raw)
	if err != nil {
		return nil, err
	}
	kind := r.signer.SigningKey.String()
	if kind != attest.VCEK && kind != attest.VLEK {
		return nil, fmt.Errorf("reading report: expected one that a VCEK or a VLEK signed, got signing key %.20q", kind)
	}
	var out []Key
	for _, l := range lines {
		if r.Version >= withCPUID && r.line != l {
			continue
		}
		if k, ok := l.keyOf(r, kind); ok {
			out = append(out, k)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("reading report: expected a processor, chip id and TCB of " + lineNames())
	}
	return out, nil
}

// keyOf reads the key that signed a report as this line's reports have it, if it can be one of this line.
func (l *line) keyOf(r *report, kind string) (Key, bool) {
	tcb, ok := l.layout.parse(r.ReportedTcb)
	k := Key{Kind: kind, Line: l.name, TCB: tcb}
	if kind == attest.VCEK && !r.masked() {
		k.Chip = bytes.Clone(r.ChipId[:l.hwid])
		ok = ok && isZero(r.ChipId[l.hwid:])
	}
	return k, ok
}
