package snp

import (
	"fmt"
	"slices"
	"strings"

	"keybroker/attest"
)

// The product lines, as AMD's key service calls them.
const (
	Milan = "Milan" // Zen 3
	Genoa = "Genoa" // Zen 4 and Zen 4c: also Bergamo and Siena
	Turin = "Turin" // Zen 5 and Zen 5c
)

// A line is a product line: what its processors' reports and certificates look like.
type line struct {
	name   string
	models []models
	layout layout
	hwid   int // octets of the hardware id in certificates; what is left of CHIP_ID is zero
}

// models is a range of processors, as CPUID names them.
type models struct {
	family      uint8
	first, last uint8
	core        string // what people call them; may be empty
}

// lines are the product lines that are known; see "Determining the Product Name" in AMD's 57230, which is wider than
// go-sev-guest's own table.
var lines = []*line{
	{Milan, []models{{0x19, 0x00, 0x0f, ""}}, layoutMilan, 64},
	{Genoa, []models{{0x19, 0x10, 0x1f, ""}, {0x19, 0xa0, 0xaf, "Zen4c"}}, layoutMilan, 64},
	{Turin, []models{{0x1a, 0x00, 0x0f, ""}, {0x1a, 0x10, 0x11, "Zen5c"}}, layoutTurin, 8},
}

// lineNames returns the names of the lines, for messages.
func lineNames() string {
	var names []string
	for _, l := range lines {
		names = append(names, l.name)
	}
	return strings.Join(names, ", ")
}

// lineByName returns nil if there is no such line.
func lineByName(name string) *line {
	for _, l := range lines {
		if l.name == name {
			return l
		}
	}
	return nil
}

// lineByCPUID returns nil if the processor is of no known line.
func lineByCPUID(family, model uint8) (*line, models) {
	for _, l := range lines {
		for _, m := range l.models {
			if m.family == family && m.first <= model && model <= m.last {
				return l, m
			}
		}
	}
	return nil, models{}
}

// lineByProductName takes PRODUCT_NAME of a certificate: a line, and in some VCEKs a stepping behind it, which does not always
// tell the truth ("Milan-B0").
func lineByProductName(name string) *line {
	name, _, _ = strings.Cut(name, "-")
	return lineByName(name)
}

// A part is one component of a TCB_VERSION: the octet where it stands, counted from the lowest.
type part struct {
	name  string
	octet int
	in    func(*attest.TCB) *uint8
}

// A layout is how a line of processors packs a TCB into 8 octets (SNP ABI, section 2.2, table TCB_VERSION). All other octets are
// reserved and zero.
type layout []part

var (
	layoutMilan = layout{
		{"bootloader", 0, bootloader}, {"tee", 1, tee}, {"snp", 6, snpFirmware}, {"microcode", 7, microcode},
	}
	layoutTurin = layout{
		{"fmc", 0, fmc}, {"bootloader", 1, bootloader}, {"tee", 2, tee}, {"snp", 3, snpFirmware}, {"microcode", 7, microcode},
	}
)

func fmc(t *attest.TCB) *uint8         { return &t.FMC }
func bootloader(t *attest.TCB) *uint8  { return &t.Bootloader }
func tee(t *attest.TCB) *uint8         { return &t.TEE }
func snpFirmware(t *attest.TCB) *uint8 { return &t.SNP }
func microcode(t *attest.TCB) *uint8   { return &t.Microcode }

// parse unpacks a TCB_VERSION. It is not well formed if a reserved octet is not zero.
func (l layout) parse(raw uint64) (t attest.TCB, wellFormed bool) {
	for _, p := range l {
		*p.in(&t) = uint8(raw >> (8 * p.octet))
		raw &^= 0xff << (8 * p.octet)
	}
	return t, raw == 0
}

// has reports whether the layout has a part of this name.
func (l layout) has(name string) bool {
	return slices.ContainsFunc(l, func(p part) bool { return p.name == name })
}

// String returns all parts of a TCB: "bootloader 3, tee 0, snp 8, microcode 115".
func (l layout) String(t attest.TCB) string {
	var out []string
	for _, p := range l {
		out = append(out, fmt.Sprintf("%s %d", p.name, *p.in(&t)))
	}
	return strings.Join(out, ", ")
}

// TCBParts returns the names of the parts of a line's TCB, in the order of its octets; nil if there is no such line.
func TCBParts(line string) []string {
	l := lineByName(line)
	if l == nil {
		return nil
	}
	var names []string
	for _, p := range l.layout {
		names = append(names, p.name)
	}
	return names
}

// LineOf returns the name of a processor's line, "" if it is of none that is known. Family and model are as in reports: whole.
func LineOf(family, model uint8) string {
	if l, _ := lineByCPUID(family, model); l != nil {
		return l.name
	}
	return ""
}
